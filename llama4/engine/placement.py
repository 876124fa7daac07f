"""Where a model computes and its weights stay, and the way there from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llama4.config import Llama4Config
from llama4.engine.fused_cpu import make_batch_invariant
from llama4.engine.offload import offload_experts
from llama4.families import family_of
from llama4.model.device import resolve_device, resolve_dtype
from llama4.model.experts import resolve_experts
from llama4.model.multimodal import Llama4Model
from llama4.quantization.modules import choose_activations, swap_modules
from llama4.units import parse_bytes
from llama4.weights import memory
from llama4.weights.load import load
from llama4.weights.source import Source


@dataclass(frozen=True)
class Placement:
    """Where a model computes and its weights stay.

    Attributes:
        device: which computes.
        dtype: what it computes in.
        experts_device: where the weights of routed experts stay.
        experts_memory: bytes of `device` for copies of experts that stay elsewhere; None: see `offload_experts`.
        memory_map: whether weights on a CPU may stay in their files.
    """

    device: torch.device
    dtype: torch.dtype
    experts_device: torch.device
    experts_memory: int | None = None
    memory_map: bool = True

    @classmethod
    def resolve(
        cls,
        config: Llama4Config,
        device: str | torch.device,
        dtype: str | torch.dtype,
        *,
        experts_device: str | torch.device | None,
        experts_memory: int | str | None,
        memory_map: bool,
    ) -> Placement:
        """What a caller of `Llama4.from_pretrained` means.

        Raises:
            ArgumentError: a device, dtype or size that there is not.
            ConfigError: the checkpoint's dtype is none that models are computed in.
        """
        chosen = resolve_device(device)
        return cls(
            chosen,
            resolve_dtype(dtype, config, chosen),
            resolve_device(experts_device) if experts_device is not None else chosen,
            parse_bytes(str(experts_memory)) if experts_memory is not None else None,
            memory_map,
        )

    @property
    def room(self) -> int | None:
        """Bytes of memory beyond which routed experts stay in their files; None if they never do."""
        stay = self.memory_map and self.device.type == self.experts_device.type == "cpu"
        return memory.for_weights(self.device) if stay else None


def build_and_load(
    config: Llama4Config,
    source: Source,
    placement: Placement,
    *,
    experts: str = "auto",
    activations: str = "auto",
    batch_invariant: bool = False,
    progress: bool = False,
) -> Llama4Model:
    """A checkpoint's model, with its weights in place.

    Args:
        experts, activations, batch_invariant: see `Llama4.from_pretrained`.
        progress: show a bar, where somebody sees it.

    Raises:
        ArgumentError: a choice that this model, or this machine, does not have.
        CheckpointError: see `load`.
    """
    device, dtype = placement.device, placement.dtype
    with torch.device("meta"):
        built = replace(config, dtype=str(dtype).removeprefix("torch."))
        model = family_of(config).build(built, resolve_experts(experts, device, dtype))
    swap_modules(model, source.plan)
    choose_activations(model, activations, device, dtype)
    if batch_invariant:
        make_batch_invariant(model, device, dtype)
    load(
        model,
        source,
        dtype=dtype,
        device=device,
        experts_device=placement.experts_device,
        memory_map=placement.memory_map,
        progress=progress,
    )
    if placement.experts_device != device:
        offload_experts(model, device, placement.experts_memory)
    return model.eval()
