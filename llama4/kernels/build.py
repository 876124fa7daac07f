"""The compiled kernels for a CPU: found in the user's cache, or built of the sources in `cpp/` when first wanted.

The compiler is found, and told what machine it builds for, by torch's inductor. Without a compiler, or with
`LLAMA4_CPU_KERNELS=off`, everything runs through torch, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from llama4.files import replaced_file
from llama4.kernels import abi
from llama4.progress import Bar

logger = logging.getLogger(__name__)

SWITCH = "LLAMA4_CPU_KERNELS"
"""Environment variable; "off" keeps to torch."""

DIRECTORY = Path(__file__).parent / "cpp"
SOURCES = (
    "threads.h",
    "format_list.h",
    "simd.h",
    "formats.h",
    "gemv.h",
    "gemv_int4.h",
    "gemv_in_out.h",
    "gemm.h",
    "gemm_unpacked.h",
    "matrix.h",
    "elementwise.h",
    "greedy_token.h",
    "kv_cache.h",
    "attention.h",
    "flash_attention.h",
    "quantize.h",
    "decoder.h",
    "check.h",
    "api.cpp",
)
"""Files of `DIRECTORY`, each behind those that it includes."""

FLAGS = ("-ffp-contract=fast", "-ftree-loop-vectorize", "-Wno-psabi")
"""Beside those for optimisation. No vector is an argument of what the library exports, which -Wpsabi is about."""

_lock = threading.Lock()
_loaded: tuple[abi.Library | None] | None = None


def library() -> abi.Library | None:
    """The compiled kernels; None where they are switched off or cannot be built, which is logged once."""
    global _loaded
    if not _loaded:
        with _lock:
            _loaded = _loaded or (_load(),)
    return _loaded[0]


def loaded() -> abi.Library:
    """The same where it is known that there are kernels."""
    found = library()
    assert found is not None
    return found


def function(name: str, dtype: torch.dtype) -> Callable[..., bytes | None]:
    """The kernel of that name, one of `abi.SIGNATURES`, for rows of a dtype; its result is for `abi.check`."""
    return loaded().functions[name, dtype]


def _load() -> abi.Library | None:
    if os.environ.get(SWITCH, "").lower() == "off" or sys.byteorder != "little":
        return None
    text = source()
    path = _cache_directory() / f"cpu-{_fingerprint(text)}.so"
    try:
        return abi.bind(ctypes.CDLL(str(path if path.exists() else _build(text, path))))
    except abi.AbiError as error:
        logger.error("the CPU kernels are not used: %s", error)
        return None
    except Exception as error:  # whatever goes wrong, torch is there
        logger.warning(
            "the CPU kernels cannot be built (%s); decoding is slower without them. They need a C++ compiler "
            "such as g++; %s=off silences this",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            SWITCH,
        )
        return None


def source() -> str:
    """All files as one, without their includes of each other."""
    return "".join(map(_text, SOURCES))


def _text(name: str) -> str:
    lines = (DIRECTORY / name).read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(('#include "', "#pragma once")))


def _build(text: str, path: Path) -> Path:
    from torch._inductor.codecache import CppCodeCache  # takes a second to import

    chatty = logging.getLogger("torch.utils.cpp_extension")  # which misses a GPU here
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        with Bar("compiling the CPU kernels, once", done="the CPU kernels are compiled"):
            built = CppCodeCache.load(text, extra_flags=FLAGS)
    finally:
        chatty.setLevel(level)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(built._name, "rb") as library, replaced_file(path) as file:
        shutil.copyfileobj(library, file)
    return path


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama4"


@cache
def _fingerprint(text: str) -> str:
    """Of all that the compiled file depends on; a home directory may be shared by different machines."""
    machine = [platform.machine(), platform.system(), torch.__version__, *FLAGS]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        machine += sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
    return hashlib.sha256("\n".join([text, *machine]).encode()).hexdigest()[:16]
