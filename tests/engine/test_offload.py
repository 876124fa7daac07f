"""Experts that stay on the host: what is computed, what is copied, and a model larger than memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from llama4.api import Llama4
from llama4.engine.offload import ExpertCache, OffloadedExperts, Staging, offload_experts
from llama4.model.experts import GroupedExperts
from llama4.model.multimodal import Llama4Model
from llama4.quantization.modules import SeparateExperts
from tests import small_model
from tests.parity.references import ReferenceModel, reference_config, write_large

CPU = torch.device("cpu")
IDS = torch.randint(0, 490, (2, 50), generator=torch.Generator().manual_seed(0))
ONE = 3 * 48 * 32 * 4
"""Bytes of an expert of the small model in float32."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("offload") / "model")


def loaded(directory: Path | str, **options: Any) -> Llama4:
    return Llama4.from_pretrained(directory, progress=False, **options)


def hot(model: nn.Module) -> ExpertCache:
    (found,) = {module.hot for module in model.modules() if isinstance(module, OffloadedExperts)}
    return found


@torch.no_grad()
def outputs(model: Llama4Model, device: torch.device = CPU) -> torch.Tensor:
    """Logits of a prompt, and of three tokens after it."""
    ids, cache = IDS.to(device), model.new_cache(2)
    logits = [model(ids, cache=cache), *(model(ids[:, i : i + 1], cache=cache) for i in range(3))]
    return torch.cat([x.float().cpu() for x in logits], dim=1)


@pytest.mark.parametrize("room", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("experts", ["loop", "grouped"])
def test_the_same_comes_out(directory: Path, experts: str, room: int | None) -> None:
    truth = outputs(loaded(directory, experts=experts).model)
    model = loaded(directory, experts=experts).model
    offload_experts(model, CPU, None if room is None else room * ONE)
    assert hot(model).room == {None: 8, 100: 32}.get(room, room)
    assert (outputs(model) - truth).abs().max() <= 1e-5 * truth.abs().max()
    if room == 100:
        assert hot(model).misses <= 32, "each is copied once"


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8", "fp8_mixed"])
def test_packed_experts(tmp_path: Path, scheme: str) -> None:
    model = ReferenceModel(reference_config(head_dim=32)).bfloat16()
    model.save_pretrained(tmp_path / "model")
    truth = outputs(loaded(tmp_path / "model", quantization=scheme, dtype="float32").model)
    ours = loaded(tmp_path / "model", quantization=scheme, dtype="float32").model
    offload_experts(ours, CPU, 150_000)
    assert (outputs(ours) - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_those_used_last_stay() -> None:
    experts = GroupedExperts(small_model.config().text)
    nn.init.normal_(experts.gate_up_proj), nn.init.normal_(experts.down_proj)
    room = ExpertCache(experts, CPU, 3)
    for chosen, misses in [([0, 1], 2), ([1, 2], 3), ([1], 3), ([5], 4), ([1, 2, 5], 4), ([0], 5), ([5], 5), ([1], 6)]:
        slots = room.bring(experts, chosen)
        assert room.misses == misses
        for slot, expert in zip(slots, chosen, strict=True):
            assert torch.equal(room.slots["gate_up_proj"][slot], experts.gate_up_proj[expert])
            assert torch.equal(room.slots["down_proj"][slot], experts.down_proj[expert])
    assert room.hits == 1 + 1 + 3 + 1


def test_a_copy_that_is_interrupted_loses_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = GroupedExperts(small_model.config().text)
    nn.init.normal_(experts.gate_up_proj), nn.init.normal_(experts.down_proj)
    room = ExpertCache(experts, CPU, 3)
    room.bring(experts, [0, 1, 2])
    monkeypatch.setattr(room, "_copy", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        room.bring(experts, [3])
    monkeypatch.undo()
    for chosen in ([1, 2], [3], [1, 2, 3], [0, 4, 5]):
        for slot, expert in zip(room.bring(experts, chosen), chosen, strict=True):
            assert torch.equal(room.slots["gate_up_proj"][slot], experts.gate_up_proj[expert])


def test_it_is_saved_as_it_was(directory: Path, tmp_path: Path) -> None:
    llm = loaded(directory)
    names = list(llm.model.state_dict())
    offload_experts(llm.model, CPU)
    assert list(llm.model.state_dict()) == names
    llm.save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(loaded(tmp_path / "saved").model), outputs(loaded(directory).model))


def test_what_cannot_be(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"4\.5 KiB hold no expert: one takes 18\.0 KiB; give more"):
        offload_experts(loaded(directory).model, CPU, ONE // 4)
    model = loaded(directory).model
    model.get_submodule("language_model.model.layers.1.feed_forward").experts = SeparateExperts(8, 48, 32)
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.experts has tensors for each expert, not of all"):
        offload_experts(model, CPU)
    with pytest.raises(ValueError, match=r"experts_memory='8GiB' is for copies .* name experts_device, too"):
        loaded(directory, experts_memory="8GiB")
    with pytest.raises(ValueError, match=r"'much' is not a size"):
        loaded(directory, experts_device="cpu", experts_memory="much")
    for forgotten in (8, "8"):
        with pytest.raises(ValueError, match="write 8GiB"):
            loaded(directory, experts_device="cpu", experts_memory=forgotten)
    with pytest.raises(ValueError, match=r"device='moon' cannot be used"):
        loaded(directory, experts_device="moon")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scheme", [None, "int4", "fp8"])
def test_on_a_gpu(scheme: str | None) -> None:
    truth = loaded("tiny", dtype="bfloat16", device="cuda", quantization=scheme).model
    ours = loaded("tiny", dtype="bfloat16", device="cuda", quantization=scheme, experts_device="cpu").model
    assert all(slot.is_cuda for slot in hot(ours).slots.values())
    assert all(p.is_cuda != (".experts." in name) for name, p in ours.named_parameters())
    expected = outputs(truth, torch.device("cuda"))
    assert (outputs(ours, torch.device("cuda")) - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are used again and again, and what a source held counts, not what it holds later."""
    monkeypatch.setattr(Staging, "BYTES", 1 << 16)
    staging = Staging()
    sources = [torch.randn(n, 3) for n in (1, 1000, 65_536, 300_001)] * 5
    targets = [torch.zeros(source.shape, device="cuda") for source in sources]
    truth = [source.clone() for source in sources]
    for source, target in zip(sources, targets, strict=True):
        staging.copy(source, target)
    for source in sources:
        source.zero_()
    assert all(target.cpu().equal(expected) for target, expected in zip(targets, truth, strict=True))


# ---- a model larger than the memory that a process may take


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group whose processes may hold so many bytes, pages of files included; version 1 or 2 of Linux's."""
    mounts = (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")
    for mount, file in mounts:
        group = mount / f"llama4-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / file).exists():
                (group / file).write_text(str(limit))
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("needs the right to limit a process's memory (control groups)")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.4 GB, almost all of it experts; not in the page cache."""
    config = reference_config(hidden_size=512, intermediate_size=1024, num_local_experts=32, num_hidden_layers=14)
    directory = write_large(config, tmp_path_factory.mktemp("large") / "model")
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return directory


GENERATE = """
import json, os, sys
from pathlib import Path
if len(sys.argv) > 2:
    (Path(sys.argv[2]) / "cgroup.procs").write_text(str(os.getpid()))
import torch
from llama4 import Llama4
torch.set_num_threads(1)
model = Llama4.from_pretrained(sys.argv[1], progress=False).model
ids = torch.randint(0, 490, (1, 600), generator=torch.Generator().manual_seed(1))
used = set()
for number, layer in enumerate(model.language_model.model.layers):
    layer.feed_forward.experts.register_forward_pre_hook(
        lambda module, given, number=number: used.update((number, i) for i in given[1].nonzero().flatten().tolist())
    )
cache, said = model.new_cache(1), []
with torch.no_grad():
    for _ in range(6):
        ids = model(ids, cache=cache)[:, -1:].argmax(-1)
        said.append(ids.item())
print(json.dumps([said, len(used)]))
"""


def test_a_model_larger_than_memory(large: Path) -> None:
    """Half of its size: what no token needs now makes room for what one needs."""
    limit = 690_000_000  # of which torch takes 300
    assert sum(path.stat().st_size for path in large.glob("*.safetensors")) > 2 * limit
    with memory_group(limit) as group:
        results = [
            subprocess.run([sys.executable, "-c", GENERATE, large, *more], capture_output=True, text=True, check=False)
            for more in ([group], [])
        ]
    for result in results:
        assert result.returncode == 0, result.stderr
    (limited, used), (truth, _) = (json.loads(result.stdout) for result in results)
    assert used > 0.9 * 14 * 32, "nearly the whole of the file was read"
    assert limited == truth
