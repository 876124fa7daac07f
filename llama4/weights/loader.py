"""Checkpoint -> model: strict, one tensor at a time, each read once."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch
from torch import nn
from tqdm import tqdm

from llama4.errors import CheckpointError
from llama4.weights.rules import NameTable, table_for
from llama4.weights.source import Source


def load(
    model: nn.Module,
    source: Source,
    *,
    table: NameTable | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> None:
    """Fill a model that was built on the meta device.

    Where dtype and device already fit, a parameter IS the file's memory map (private: changing it never touches the
    file), so loading is nearly free and bytes are read when first used. Otherwise tensors are converted one by one;
    two copies of the model are never in memory.

    Args:
        model: its `named_parameters()` say what is wanted.
        source: the checkpoint.
        table: how its keys map to parameters; by default found from the keys.
        dtype: of the parameters; None keeps the checkpoint's.
        device: where they go.
        progress: show a bar, if stderr is a terminal.

    Raises:
        CheckpointError: keys that are missing, unexpected or of another shape, all of them listed; nothing is loaded
            then.
    """
    table = table or table_for(source.keys())
    owners: dict[str, list[str]] = {}  # first name of a parameter -> all its names (tied embeddings have two)
    by_identity: dict[int, str] = {}
    wanted = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in wanted.items():
        owners.setdefault(by_identity.setdefault(id(parameter), name), []).append(name)
    keys = match(source, {name: tuple(wanted[name].shape) for name in owners}, table, aliases=set(wanted) - set(owners))
    for name, key in tqdm(keys.items(), "loading", unit="tensor", disable=None if progress else True, leave=False):
        tensor = source.tensor(key).to(device=device, dtype=dtype)
        filled = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        for alias in owners[name]:
            module, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(module), leaf, filled)
    assert not any(p.is_meta for p in model.parameters()), "a parameter was left without values"


def match(
    source: Source,
    shapes: dict[str, tuple[int, ...]],
    table: NameTable,
    aliases: AbstractSet[str] = frozenset(),
) -> dict[str, str]:
    """Parameter -> key, for every parameter of `shapes`; keys for `aliases` of a tied parameter may be there and are
    not used.

    Raises:
        CheckpointError: the two sides do not correspond one to one.
    """
    found: dict[str, str] = {}
    unexpected = []
    for key in sorted(source.keys()):
        name = table.to_model(key)
        if name in shapes:
            found[name] = key
        elif name not in aliases:
            unexpected.append(key)
    missing = [table.to_file(name) or name for name in shapes if name not in found]
    mismatched = [
        (key, source.shape(key), shapes[name]) for name, key in found.items() if source.shape(key) != shapes[name]
    ]
    if missing or unexpected or mismatched:
        raise CheckpointError(
            f"the checkpoint does not fit its configuration: {len(missing)} keys missing, {len(unexpected)} "
            f"unexpected, {len(mismatched)} of another shape; check that config.json and the weights are of one model",
            missing,
            unexpected,
            mismatched,
        )
    return {name: found[name] for name in shapes}
