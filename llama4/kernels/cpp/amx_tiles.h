// The instructions of AMX by number of tile, for GCC and clang alike: GCC's intrinsics take numbers only as they are
// written, and do not say that a load reads memory.

#pragma once

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {
namespace tiles {

// Asks the system for the state that tiles take in each thread of this process. -> nullptr, or what is wrong
inline const char* request() {
#ifdef __linux__
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (!syscall(SYS_arch_prctl, request_permission, tile_data)) return nullptr;
#endif
  return "the system does not let this process use the tiles of AMX";
}

inline void configure(const void* bytes) { asm volatile("ldtilecfg (%0)" ::"r"(bytes) : "memory"); }
inline void release() { asm volatile("tilerelease" ::: "memory"); }

template <int t>
void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
// Rows lie so many bytes apart.
template <int t>
void load(const void* from, long row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row), "i"(t) : "memory");
}
template <int t>
void store(void* to, long row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row), "i"(t) : "memory");
}

// c += a b: of pairs of bfloat16; of fours of bytes, signed in a and unsigned in b.
template <int c, int a, int b>
void add_pairs() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
void add_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

}  // namespace tiles
}  // namespace
