"""Memory in large pages, and the ways of loading that use it."""

from __future__ import annotations

import gc
import mmap
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama4.api import Llama4
from llama4.weights import memory, safetensors
from tests.parity.references import reference_config, reference_model

IS_LINUX = sys.platform.startswith("linux")


def test_tensors_do_not_overlap() -> None:
    shapes = [((3, 5), torch.float32), ((0, 4), torch.int8), ((7,), torch.bfloat16), ((1 << 20, 3), torch.uint8)] * 30
    tensors = [memory.empty(shape, dtype).fill_(i) for i, (shape, dtype) in enumerate(shapes)]
    for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert bool((tensor == i).all())


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for")
def test_what_lies_there_is_not_copied_again() -> None:
    kept = memory.in_large_pages(torch.ones(3, 5))
    assert memory.in_large_pages(kept) is kept
    assert memory.in_large_pages(kept, torch.float64).dtype == torch.float64
    assert memory.in_large_pages(kept.mT).data_ptr() != kept.data_ptr()


def test_a_tensor_outlives_its_region() -> None:
    kept = memory.in_large_pages(torch.arange(1000.0).view(10, 100).mT, torch.float64)
    for _ in range(3):
        memory.empty((memory.REGION,), torch.uint8).fill_(255)
    gc.collect()
    assert kept.is_contiguous()
    assert torch.equal(kept, torch.arange(1000.0, dtype=torch.float64).view(10, 100).mT)


@pytest.mark.skipif(not IS_LINUX, reason="what a process holds is read from /proc")
def test_regions_go_back_to_the_system() -> None:
    def held() -> int:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    tensor = memory.empty((6 * memory.REGION,), torch.uint8).fill_(1)
    before = held()
    del tensor
    memory.empty((memory.REGION,), torch.uint8)  # in a region of its own, and the large one has no other tensor
    gc.collect()
    assert before - held() > 5 * memory.REGION


@pytest.mark.skipif(not IS_LINUX, reason="elsewhere nothing is released")
@pytest.mark.parametrize("offset", [0, 1, 4095])
def test_what_is_released_is_still_there(tmp_path: Path, offset: int) -> None:
    data = bytes(range(256)) * 1000
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    tensor = torch.frombuffer(mapped, dtype=torch.uint8, offset=offset)
    assert bytes(tensor.tolist()) == data[offset:]
    memory.release(tensor)
    assert bytes(tensor.tolist()) == data[offset:]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    reference_model(reference_config(), 3).bfloat16().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("quantization", "dtype"), [(None, "bfloat16"), (None, "float32"), ("int8", "bfloat16"), ("fp8", "float32")]
)
def test_copied_or_mapped_is_the_same(directory: Path, quantization: str | None, dtype: str) -> None:
    models = [
        Llama4.from_pretrained(
            directory, quantization=quantization, dtype=dtype, memory_map=memory_map, progress=False
        ).model
        for memory_map in (True, False)
    ]
    for (name, one), (other_name, other) in zip(*(model.named_parameters() for model in models), strict=True):
        assert name == other_name
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.skipif(not IS_LINUX, reason="what is mapped is read from /proc")
def test_no_map_is_left(directory: Path) -> None:
    llm = Llama4.from_pretrained(directory, memory_map=False, progress=False)
    gc.collect()
    assert str(directory) not in Path("/proc/self/maps").read_text()
    mapped = Llama4.from_pretrained(directory, dtype="bfloat16", progress=False)
    assert str(directory) in Path("/proc/self/maps").read_text()
    assert llm.model.config.text == mapped.model.config.text


def test_each_file_is_mapped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where tensors are read ahead: those that come from the next file are not."""
    model = reference_model(reference_config(), 3).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    mapped = []

    class Map(safetensors._Map):
        def __init__(self, path: Path) -> None:
            mapped.append(path.name)
            super().__init__(path)

    monkeypatch.setattr(safetensors, "_Map", Map)
    Llama4.from_pretrained(tmp_path, dtype="float32", progress=False)
    assert len(mapped) > 1
    assert sorted(mapped) == sorted(path.name for path in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_what_is_copied_though_it_could_be_mapped(directory: Path, scheme: str | None) -> None:
    """The head, and all that a quantized model multiplies with; of embeddings a token reads one row."""
    llm = Llama4.from_pretrained(directory, quantization=scheme, dtype="bfloat16", progress=False)
    held = {name: memory._regions.contains(p) for name, p in llm.model.named_parameters()}
    assert held["language_model.lm_head.weight"]
    assert held["language_model.model.layers.0.self_attn.q_proj.weight"] == (scheme is not None)
    assert not held["language_model.model.embed_tokens.weight"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
@pytest.mark.parametrize("settings", [{}, {"MALLOC_ARENA_MAX": "8"}])
def test_freed_memory_is_used_again(settings: dict[str, str]) -> None:
    """Pages of tensors that come and go are taken from the system once; settings of the user's own are left alone."""
    script = """
import ctypes, resource, torch
from llama4.weights import memory
if hasattr(libc := ctypes.CDLL(None), "prctl"):
    libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: large pages come and go as the system has room for them

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(60 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults()
memory.reuse_freed()
for _ in range(4):  # until holes of the right size are there
    faults()
print(fresh, faults())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, env=environment | settings, capture_output=True, text=True, check=True)
    fresh, later = map(int, done.stdout.split())
    assert fresh >= 4 * (60 << 20) // (2 << 20), "even where all pages are large ones"
    assert later >= fresh / 2 if settings else later < fresh / 10
