"""Triton kernels without a GPU: run in Triton's interpreter, and compiled for GPUs that are not there.

The interpreter must be chosen before triton is imported. So a file of tests skips those that need a device, and one of
its tests runs the file again in a process of its own, where they are not skipped (`run_again`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama4.bench.device.kernels import Target
from llama4.kernels.triton import common, launch_products

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_the_interpreter = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is running, or not needed")
needs_the_compiler = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


def _replace_the_language_once() -> None:
    """The interpreter puts its functions in the place of those of `triton.language` at each launch, and at each call of
    a function in a kernel, and looks through the whole language for them: longer than most kernels here compute."""
    pytest.importorskip("triton")
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang"):  # another version's, which is slow
        return
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)


if INTERPRETED:
    _replace_the_language_once()


def on_a_device(test: Callable[..., None]) -> Callable[..., None]:
    absent = not INTERPRETED and not torch.cuda.is_available()
    skip = pytest.mark.skipif(absent, reason="no GPU; test_in_the_interpreter runs it on the CPU")
    return pytest.mark.cuda(skip(test))


def run_again(file: str) -> None:
    """All tests of a file, in the interpreter."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", file]
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class _OneOfSeveral(Target):
    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by it


def compile_only(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """From here on kernels are compiled for a GPU of that compute capability, such as 90, and not launched. -> a list,
    to which each of them is added."""
    import triton
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(common.GPUS, torch.device("meta"), common.Gpu(capability, multiprocessors=132))
    monkeypatch.setattr(triton.runtime.driver, "_active", _OneOfSeveral(capability))
    monkeypatch.setattr(
        JITFunction, "run", lambda *args, **kwargs: compiled.append(run(*args, **kwargs | {"warmup": True}))
    )
    return compiled


@pytest.fixture
def launches_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of 8 multiprocessors, but of large blocks, which cost it what small ones do."""
    if not INTERPRETED:
        return
    gemv_blocks = launch_products._gemv_blocks

    def large_blocks(kind: str, rows: int, outputs: Sequence[int], inputs: int) -> dict[str, int]:
        least = min(o for o in outputs if o)
        return gemv_blocks(kind, rows, outputs, inputs) | {"BLOCK_O": min(32, 1 << (least.bit_length() - 1))}

    monkeypatch.setattr(launch_products, "_gemv_blocks", large_blocks)
    monkeypatch.setitem(common.GPUS, torch.device("cpu"), common.Gpu(capability=0, multiprocessors=8))


@pytest.fixture
def e4m3_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It rounds ties up on the way to e4m3, and rounds twice where a GPU multiplies and adds at once."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.create_fp_to_fp

    def multiply_and_add(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    def new_convert(self: Any, x: Any, dtype: Any, rounding: Any) -> Any:
        if dtype.scalar != tl.float8e4nv:
            return convert(self, x, dtype, rounding)
        rounded = torch.from_numpy(x.data).clamp(-448, 448).to(torch.float8_e4m3fn)
        return TensorHandle(rounded.view(torch.uint8).numpy(), dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", multiply_and_add)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", new_convert)


@pytest.fixture
def bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps bfloat16 as bits and takes them for integers where it computes."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    names = "si_to_fp", "fsub", "dot", "fp_trunc", "fp_to_fp"
    to_float, subtract, dot, truncate, convert = (getattr(InterpreterBuilder, f"create_{name}") for name in names)

    def wide(a: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return a
        return TensorHandle((a.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrow(a: Any) -> Any:
        bits = a.data.view(np.uint32)
        assert not (bits & 0xFFFF).any(), "values are exact in bfloat16"
        return TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)

    def new_subtract(self: Any, a: Any, b: Any) -> Any:
        difference = subtract(self, wide(a), wide(b))
        return narrow(difference) if a.dtype.scalar == tl.bfloat16 else difference

    def new_to_float(self: Any, a: Any, dtype: Any) -> Any:
        return narrow(to_float(self, a, tl.float32)) if dtype.scalar == tl.bfloat16 else to_float(self, a, dtype)

    def new_truncate(self: Any, a: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16:
            return truncate(self, a, dtype)
        bits = a.data.astype(np.float32).view(np.uint32)  # it cuts off what it should round
        return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), dtype.scalar)

    def new_convert(self: Any, a: Any, dtype: Any, rounding: Any) -> Any:
        is_halved = (a.dtype.scalar, dtype.scalar) == (tl.float16, tl.bfloat16)  # from Triton 3.9 on not by float32
        return new_truncate(self, a, dtype) if is_halved else convert(self, a, dtype, rounding)

    constant = InterpreterBuilder.get_fp32
    monkeypatch.setattr(
        InterpreterBuilder, "get_bf16", lambda self, value: narrow(constant(self, value)), raising=False
    )
    monkeypatch.setattr(InterpreterBuilder, "create_si_to_fp", new_to_float)
    monkeypatch.setattr(InterpreterBuilder, "create_fsub", new_subtract)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", new_truncate)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", new_convert)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest))
