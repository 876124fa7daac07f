"""The machine: what it is, and the rates that shares are shares of."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4.bench.device import timing
from llama4.bench.device.record import Figures, Record, Skip

ROOT = Path(__file__).parents[3]


def about() -> dict[str, Any]:
    """What is known without touching the device."""
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "megablocks", "kernels")}
    compiler = c_compiler()
    card = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.max.sm", "--format=csv,noheader")
    return {
        "card": card or "no nvidia-smi",
        "C compiler for Triton": compiler or "none: neither CC, nor cc, gcc or clang on the PATH",
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **{name: version or "not installed" for name, version in versions.items()},
    }


def c_compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def triton_missing(device: torch.device) -> str | None:
    """Why Triton's kernels cannot be compiled; None if they can, or if they are interpreted."""
    if _version("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda" and c_compiler() is None:
        return "Triton needs a C compiler, and there is none"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(done.stdout.strip().splitlines()) if done.returncode == 0 else ""


def probe(record: Record) -> None:
    """Whether a process can compute on the device at all."""

    def add() -> Figures:
        assert torch.ones(8, device=record.device).sum().item() == 8
        return {}

    record.case("a sum", add)


def run(record: Record) -> None:
    record.case("device", partial(_device, record.device))
    copied = record.case("copy on the device", partial(_copy, record))
    record.case("read", partial(_read, record))
    record.case("GEMM bfloat16", partial(_gemm, record, "bf16"))
    record.case("GEMM fp8, a scale per row", partial(_gemm, record, "fp8"))
    record.case("GEMM float32", partial(_gemm, record, "fp32"))
    record.case("launch", partial(_launch, record))
    record.case("host to device", partial(_transfer, record, False))
    record.case("host to device, pinned", partial(_transfer, record, True))
    if copied is not None:
        record.case("copy on the device, again", lambda: {"again_gb_s": _copy(record)["copy_gb_s"]})


def _device(device: torch.device) -> Figures:
    if device.type != "cuda":
        raise Skip("not a GPU")
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": found.total_memory / 2**30,
        "cuda": str(torch.version.cuda),
        "free_gib": torch.cuda.mem_get_info(device)[0] / 2**30,
    }


def _copy(record: Record) -> dict[str, float]:
    """Bytes read and bytes written, of random data."""
    count = 1 << (20 if record.dry else 31)
    source = torch.empty(count, dtype=torch.int8, device=record.device).random_(-127, 128)
    target = torch.empty_like(source)
    spent = record.time(lambda: target.copy_(source))
    return {"copy_gb_s": 2 * count / spent / 1e9}


def _read(record: Record) -> Figures:
    """A sum in float32: what decoding does with weights is reading."""
    numbers = torch.randn(1 << (18 if record.dry else 29), device=record.device)
    spent = record.time(numbers.sum)
    return {"read_gb_s": numbers.nbytes / spent / 1e9}


def _gemm(record: Record, kind: str) -> Figures:
    size, device = 256 if record.dry else 8192, record.device
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out: dict[str, float] = {}
    for rows in (size,) if record.dry else (size, 2048):
        spent = record.time(_product(kind, a[:rows], b, device))
        out[f"{kind}_tflops" if rows == size else f"{kind}_{rows}_rows_tflops"] = 2 * rows * size * size / spent / 1e12
    return out


def _product(kind: str, a: Tensor, b: Tensor, device: torch.device) -> Callable[[], object]:
    if kind == "fp8":
        if device.type != "cuda":
            raise Skip("a CPU multiplies e4m3 a hundred times slower")
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        scale_a, scale_b = torch.ones(len(a), 1, device=device), torch.ones(1, len(b), device=device)
        return lambda: torch._scaled_mm(a8, b8.mT, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)
    if kind == "fp32":
        a, b = a.float(), b.float()
    return lambda: torch.nn.functional.linear(a, b)


def _launch(record: Record) -> Figures:
    """What one small operation costs: launched from Python, and in a CUDA graph."""
    count = 20 if record.dry else 500
    x = torch.zeros(32, device=record.device)

    def many() -> None:
        for _ in range(count):
            x.add_(1)

    eager = record.time(many)
    replay = timing.graph(many, record.device)
    in_graph = record.time(replay)
    return {"launch_eager_us": eager / count * 1e6, "launch_graph_us": in_graph / count * 1e6}


def _transfer(record: Record, pinned: bool) -> Figures:
    if record.device.type != "cuda":
        raise Skip("not a GPU")
    source = torch.empty(1 << 29, dtype=torch.int8).random_(-127, 128)
    source = source.pin_memory() if pinned else source
    target = torch.empty_like(source, device=record.device)
    spent = record.time(lambda: target.copy_(source, non_blocking=pinned), most=5)
    return {f"host_{'pinned' if pinned else 'pageable'}_gb_s": len(source) / spent / 1e9}
