"""Checkpoint -> model: strict, one tensor at a time, each read once."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from llama4.errors import CheckpointError
from llama4.quantization.packed import PackedWeight
from llama4.weights import pages
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
    large pages, and two copies of the model are never in memory.

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
    for name, key in tqdm(keys.items(), "loading", unit="tensor", disable=None if progress else True, leave=False):
        path, _, part = name.rpartition(".")
        is_packed = isinstance(model.get_submodule(path), PackedWeight) and part != "bias"
        target = torch.device(experts_device if experts_device is not None and ".experts." in name else device)
        raw = source.tensor(key)
        new_dtype = raw.dtype if is_packed or dtype is None else dtype
        if target.type != "cpu" or (memory_map and new_dtype == raw.dtype):
            tensor = raw.to(target, new_dtype)
        else:
            tensor = pages.keep(raw, new_dtype)
            if isinstance(source, SafetensorsSource):
                pages.let_go(raw)
        if is_packed:  # as kernels read it: one row after the other, e4m3 as bytes
            tensor = tensor.contiguous().view(torch.uint8 if tensor.dtype == torch.float8_e4m3fn else tensor.dtype)
        filled = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() and not is_packed)
        for alias in owners[name]:
            module, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(module), leaf, filled)
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
