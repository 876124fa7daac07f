// Lists of formats. A format that stands in a list is registered: the library exports it, and every kernel reads it.

#pragma once

#include <array>
#include <cstdint>

namespace {

// What Python is told of a format.
struct FormatEntry {
  const char* name;
  int64_t number;
  int64_t multiple;  // of which the length of a row must be one
};

// Formats have the numbers `first`, `first` + 1, and so on.
template <long first, class... F>
struct FormatList {
  static constexpr std::array<FormatEntry, sizeof...(F)> entries() {
    long number = first;
    return {FormatEntry{F::name, number++, F::multiple}...};
  }
  // Calls run(F()) for the format with a number.
  template <class Run>
  static void visit(long number, const Run& run) {
    long i = first;
    (void)((number == i++ && (run(F()), true)) || ...);
  }
};

}  // namespace
