"""Launches of kernels that were compiled already, without what Triton works out anew in each.

In each launch Triton looks at every argument, writes the kernel's options to a string, calls hooks that are not there:
with a short prompt a host needs longer for that than a GPU for what the kernel computes. Here the arguments' kinds are
looked up, and the compiled kernel is called with the arguments. docs/gpu.md has times.

A kernel is compiled for dtypes, for addresses and integers that are multiples of 16, for integers that fit 32 bits, for
ones, and for each constant (`specialize_arg` in Triton's python/src/specialize.cc). What is looked up is at least that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

VERSIONS = ("3.6.", "3.8.", "3.9.")
"""Of Triton, whose way from a launch to the driver was read. Another may have changed it."""
OPTIONS = {"enable_fp_fusion": True}
"""Of compiling: a product and its sum are one instruction, for which Triton wants to be asked from 3.10 on."""
MAX_KEPT = 1 << 14
"""Kinds of launches. The length of a prompt makes few: whether it is 1 or a multiple of 16, and the kernels' blocks."""

enabled = True
"""Whether anything is launched from here; not after a launch went wrong when it was tried (support.py)."""

_kept: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""What a kernel was compiled to for arguments of a kind, and the constants behind these. It is unloaded when nobody has
it any more, and has its kernel, so that the kernel's `id` is no other's."""


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, arguments: Sequence[Any], sizes: dict[str, Any]) -> bool:
    """Launch a kernel; -> False if it was not, and is to be launched as Triton does."""
    if not enabled or not like.is_cuda:
        return False
    if (triton := _triton()) is None or not isinstance(kernel, triton.JITFunction):
        return False
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    if kernel.pre_run_hooks or any(getattr(hook, "calls", hook) for hook in hooks):
        return False  # a profiler wants to know of launches
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    if like.get_device() != device:
        return False
    kind: list[Any] = [id(kernel), device]
    for argument in arguments:
        if isinstance(argument, Tensor):
            kind += argument.dtype, argument.data_ptr() % 16
        elif type(argument) is int:
            kind += int, argument == 1, argument % 16 == 0, argument >> 31
        elif argument is None or isinstance(argument, (int, float)):
            kind += type(argument), argument  # 1.0 and True are equal
        else:  # a tensor's descriptor, whose tensor is aligned
            kind += argument.base.dtype, *argument.block_shape, argument.padding
    kind += sizes.items()
    key = tuple(kind)
    found = _kept.get(key)
    if found is None:
        _compile(key, kernel, grid, arguments, sizes)
        return True
    compiled, constants = found
    compiled.run(
        *(*grid, 1, 1)[:3],
        *(driver.get_current_stream(device), compiled.function, compiled.packed_metadata, None, None, None),
        *arguments,
        *constants,
    )
    return True


@cache
def _triton() -> Any:
    """The package, if it is of a version that is known."""
    import triton

    return triton if triton.__version__.startswith(VERSIONS) else None


def _compile(
    key: tuple[Any, ...], kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], sizes: dict[str, Any]
) -> None:
    """Launch a kernel as Triton does, and keep what it was compiled to."""
    compiled = kernel[grid](*arguments, **sizes, **OPTIONS)
    names = kernel.arg_names[len(arguments) :]
    assert not any(parameter.is_constexpr for parameter in kernel.params[: len(arguments)]), "constants go by name"
    if compiled is not None and all(name in sizes for name in names):
        if len(_kept) >= MAX_KEPT:
            _kept.clear()
        _kept[key] = compiled, tuple(sizes[name] for name in names)
