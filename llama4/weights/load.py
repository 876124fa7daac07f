"""Checkpoint -> model: strict, one tensor at a time, each read once."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from llama4.analysis.costs import HEAD
from llama4.errors import CheckpointError
from llama4.ops.linear import Linear
from llama4.quantization.weight import PackedWeight
from llama4.weights import memory
from llama4.weights.quantizing import QuantizingSource
from llama4.weights.source import SafetensorsSource, Source


def load(
    model: nn.Module,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    experts_device: torch.device | str | None = None,
    memory_map: bool = True,
    progress: bool = False,
) -> None:
    """Fill a model that was built on the meta device.

    Where dtype and device already fit, a parameter IS the file's memory map (private: changing it never touches the
    file), so loading is nearly free and bytes are read when first used. Otherwise tensors are copied one by one, into
    large pages, and two copies of the model are never in memory. So are those that a quantised model has in another
    order than a checkpoint, and what it uses for every token though it is not quantised. And so is the head of any
    model: every token reads all of it, and first in a file, as it often is, it lies in the smallest pages.

    Args:
        model: its `named_parameters()` say what is wanted.
        source: the checkpoint.
        dtype: of the parameters; None keeps the checkpoint's.
        device: where they go.
        experts_device: where routed experts go, if elsewhere.
        memory_map: false copies even what fits, which takes time now and may save some with every token.
        progress: show a bar, if stderr is a terminal.

    Raises:
        CheckpointError: keys that are missing, unexpected or of another shape, all of them listed; nothing is loaded
            then.
    """
    owners = _owners(model)
    keys = match(model, source)
    computes_on = torch.device(device).type
    is_quantised = any(isinstance(module, PackedWeight) for module in model.modules())
    for name, key in tqdm(keys.items(), "loading", unit="tensor", disable=None if progress else True, leave=False):
        path, _, part = name.rpartition(".")
        module = model.get_submodule(path)
        packed = module if isinstance(module, PackedWeight) and part != "bias" else None
        target = torch.device(experts_device if experts_device is not None and ".experts." in name else device)
        raw = source.tensor(key)
        new_dtype = raw.dtype if packed is not None or dtype is None else dtype
        values = packed.for_cpu(part, raw) if packed is not None and target.type == computes_on == "cpu" else raw
        is_map = isinstance(source, SafetensorsSource | QuantizingSource) and source.is_map(key)
        is_new = isinstance(source, QuantizingSource) and not is_map
        is_read_always = name == HEAD or (is_quantised and isinstance(module, Linear))
        fits = new_dtype == raw.dtype and values is raw
        if target.type != "cpu" or (memory_map and fits and not is_new and not is_read_always):
            tensor = raw.to(target, new_dtype)
        else:
            tensor = memory.keep(values, new_dtype).view(raw.shape)
            if is_map:
                memory.release(raw)
        if packed is not None:  # as kernels read it: nothing between two rows, e4m3 as bytes
            tensor = tensor.contiguous().view(torch.uint8 if tensor.dtype == torch.float8_e4m3fn else tensor.dtype)
        filled = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() and packed is None)
        for alias in owners[name]:
            path, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(path), leaf, filled)
    assert not any(p.is_meta for p in model.parameters()), "a parameter was left without values"


def _owners(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter -> all its names (tied embeddings have two)."""
    owners: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return owners


def match(model: nn.Module, source: Source) -> dict[str, str]:
    """Parameter -> key, for every parameter of the model; further names of a tied one may be there and are not used.

    Raises:
        CheckpointError: the two sides do not correspond one to one.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    aliases = {alias for name, others in _owners(model).items() for alias in others if alias != name}
    names, unexpected = source.names, list[str]()
    found: dict[str, str] = {}
    for key in sorted(source.keys()):
        name = names.to_model(key)
        if name in shapes:
            found[name] = key
        elif name not in aliases:
            unexpected.append(key)
    missing = [names.to_file(name) or name for name in shapes if name not in found]
    mismatched = [
        (names.to_file(name) or key, source.shape(key), shapes[name])
        for name, key in found.items()
        if source.shape(key) != shapes[name]
    ]
    if missing or unexpected or mismatched:
        raise CheckpointError(
            f"the checkpoint does not fit its configuration: {len(missing)} keys missing, {len(unexpected)} "
            f"unexpected, {len(mismatched)} of another shape; check that configuration and weights are of one model",
            missing,
            unexpected,
            mismatched,
        )
    return {name: found[name] for name in shapes}
