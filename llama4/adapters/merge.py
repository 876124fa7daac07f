"""Adapters into the weights of their model, for good.

Shapes: O outputs, I inputs, E experts.
"""

from __future__ import annotations

import torch
from torch import nn

from llama4.adapters.config import target_of
from llama4.adapters.lora import Adapter, EmbeddingLora, Lora
from llama4.errors import Llama4Error
from llama4.model.multimodal import Llama4Model
from llama4.ops.precision import upcast
from llama4.progress import PIECE, Bar, track
from llama4.quantization.modules import SeparateExperts, SplitExperts
from llama4.quantization.weight import QuantizedWeight


def merge_adapter(adapter: Adapter, model: Llama4Model, *, progress: bool = False) -> None:
    """W := W + scale * B A, added in float32 and rounded once to the dtype of W. A packed matrix is dequantized, added
    to, and quantized again as it was: its values are the nearest to the sum, not to the matrix without it. Parameters
    are replaced and not written to: what another thread computes with at this moment stays.

    Raises:
        Llama4Error: as `check_can_merge`; nothing is changed then.
    """
    assert not adapter.is_attached, "take it off first"
    check_can_merge(adapter, model)
    sizes = {name: _size(_home(model, name), name) for name, _ in adapter.items()}
    with torch.no_grad(), Bar("merging", sum(sizes.values()), "bytes", shown=progress) as bar:
        for name, lora in adapter.items():
            with bar.step(sizes[name]):
                _merge(_home(model, name), name.rpartition(".")[2], lora)


def check_can_merge(adapter: Adapter, model: Llama4Model) -> None:
    """Raises:
    Llama4Error: the adapter does not fit, or a matrix is in a format that is only read, or is two: that of embeddings
        and of the head.
    """
    adapter.check(model)
    for name, _ in adapter.items():
        _check_is_written(name, _home(model, name))
        if model.config.text.tie_word_embeddings and target_of(name) == "embeddings":
            raise Llama4Error(f"{name} is also the head, which the adapter does not change; use it without merging")


def _home(model: Llama4Model, name: str) -> nn.Module:
    """The module of a matrix: a Linear, an embedding or a packed weight, or that which has it as a parameter."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(name.rpartition(".")[0])


def _size(home: nn.Module, name: str) -> int:
    """Bytes of a matrix."""
    if isinstance(home, QuantizedWeight):
        return sum(home.part(part).nbytes for part in home.format.parts)
    leaf = name.rpartition(".")[2]
    return home.get_parameter(leaf if leaf in home._parameters else "weight").nbytes


def _check_is_written(name: str, home: nn.Module) -> None:
    kinds = [home.format] if isinstance(home, QuantizedWeight) else []
    if isinstance(home, (SplitExperts, SeparateExperts)):
        raise Llama4Error(f"{name} is in a format that is read and not written; merge into the unquantized model")
    for format in kinds:
        if not format.is_written:
            raise Llama4Error(f"{name} is {format}, which is read and not written; merge into the unquantized model")


def _merge(home: nn.Module, leaf: str, lora: Lora) -> None:
    if isinstance(home, QuantizedWeight):
        _merge_packed(home, lora)
    elif lora.a.ndim == 2:
        weight = home.weight
        assert isinstance(weight, nn.Parameter)
        delta_OI = lora.delta()
        delta = delta_OI.mT if isinstance(lora, EmbeddingLora) else delta_OI
        merged = torch.empty_like(weight)  # what it was may be part of a file
        rows = max(1, PIECE // delta[0].nbytes)
        for to, of, added in track(tuple(zip(merged.split(rows), weight.split(rows), delta.split(rows), strict=True))):
            to.copy_(upcast(of) + added)
        home.weight = nn.Parameter(merged, weight.requires_grad)
    else:
        weight_EIO = home.get_parameter(leaf)
        merged_EIO = torch.empty_like(weight_EIO)
        for i, weight_IO in enumerate(track(weight_EIO.unbind())):
            merged_EIO[i] = upcast(weight_IO) + lora.delta(i).mT
        home.register_parameter(leaf, nn.Parameter(merged_EIO, weight_EIO.requires_grad))


def _merge_packed(weight: QuantizedWeight, lora: Lora) -> None:
    is_narrow = "weight_scale" in weight.specs and weight.checkpoint_dtype("weight_scale") == torch.bfloat16
    matrices = []
    for expert in track(range(weight.shape[0])) if len(weight.shape) == 3 else [None]:
        weight_OI = weight.format.rows_of(weight, expert, torch.float32)(slice(0, weight.shape[-2]))
        sum_OI = weight_OI + weight.format.sort(lora.delta(expert)).to(weight_OI.device)
        matrices.append(weight.format.quantize(sum_OI.bfloat16() if is_narrow else sum_OI))
    device = weight.part(weight.format.parts[0]).device
    weight.set_parts(
        {
            part: torch.stack([matrix[part] for matrix in matrices]).view(*weight.shape[:-1], -1)
            for part in weight.format.parts
        },
        device,
    )
