"""Tensors that are computed when they are read, and weights that are larger than memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llama4.api import Llama4
from llama4.errors import CheckpointError
from llama4.weights import memory
from llama4.weights.computed import Computed, ComputedSource
from llama4.weights.safetensors import open_safetensors
from tests import small_model


def test_computed_when_read(tmp_path: Path) -> None:
    values, kept = torch.tensor([[-3, 2], [1, 0]], dtype=torch.int8), torch.arange(3.0)
    save_file({"a.values": values, "a.scale": torch.tensor([2.0]), "b": kept}, tmp_path / "model.safetensors")
    parts = {"values": "a.values", "scale": "a.scale"}
    weight = Computed(parts, (2, 2), torch.bfloat16, lambda parts: parts["values"] * parts["scale"])
    source = ComputedSource(open_safetensors(tmp_path), {"b": "b", "a.weight": weight}, {})
    assert set(source.names()) == {"a.weight", "b"}
    assert source.spec("a.weight") == ((2, 2), torch.bfloat16)
    assert torch.equal(source.read("a.weight"), torch.tensor([[-6, 4], [2, 0]], dtype=torch.bfloat16))
    assert not source.is_mapped("a.weight")
    assert str(source.origin("a.weight")) == "a.values in model.safetensors"
    assert torch.equal(source.read("b"), kept)
    assert source.is_mapped("b")


def test_weights_that_are_larger_than_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays in the file does not count: of a checkpoint in its own dtype, all but the head."""
    directory = small_model.write(tmp_path / "model")
    model = Llama4.from_pretrained(directory, dtype="float64").model
    size = 8 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(memory, "total", lambda device: size // 2)
    Llama4.from_pretrained(directory, dtype="float32")
    refusal = r"MiB of weights do not fit into the .* of memory of cpu; "
    with pytest.raises(
        CheckpointError, match=refusal + r"quantize them .*\(quantization='int4'\), or take a checkpoint"
    ):
        Llama4.from_pretrained(directory, dtype="float64")
    monkeypatch.setattr(memory, "total", lambda device: size)
    Llama4.from_pretrained(directory, dtype="float64")
    monkeypatch.setattr(memory, "total", lambda device: 1000)
    with pytest.raises(CheckpointError, match=r"KiB" + refusal[3:] + r"take a checkpoint"):
        Llama4.from_pretrained(directory, quantization="int8")
