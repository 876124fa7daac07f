"""Routed experts that stay on the host: the device computes with copies of those that tokens chose.

Of a mixture of experts most weights are routed experts, and a token needs few of them. `offload_experts` leaves them on
the host, in the checkpoint's memory map or in memory, and gives the device a cache for some. The least recently used
are replaced (Eliseev and Mazur 2023, "Fast inference of mixture-of-experts language models with offloading").

Shapes: R routed rows sorted by expert, D hidden size, E experts of a layer, S experts that there is room for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llama4.errors import ArgumentError, Llama4Error
from llama4.model.multimodal import Llama4Model
from llama4.ops.experts import concat_experts
from llama4.quantization.modules import SeparateExperts
from llama4.quantization.weight import QuantizedWeight
from llama4.units import bytes_text


class Staging:
    """Copies to a GPU from memory of the host that is not pinned, such as a file's map: the host fills one pinned
    buffer with all of its cores while the GPU reads the other. The driver's own way has one core copy.

    Attributes:
        buffers: [2, bytes].
        read: for each buffer, when the GPU has read it.
    """

    BYTES = 32 << 20

    def __init__(self) -> None:
        self.buffers = torch.empty(2, self.BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.read = torch.cuda.Event(), torch.cuda.Event()
        self._next = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Both contiguous, of one shape and dtype. The source may change when this returns; kernels that are launched
        later find the target filled."""
        parts = zip(*(x.view(-1).view(torch.uint8).split(self.BYTES) for x in (source, target)), strict=True)
        for here, there in parts:
            buffer, read = self.buffers[self._next, : len(here)], self.read[self._next]
            read.synchronize()
            buffer.copy_(here)
            there.copy_(buffer, non_blocking=True)
            read.record(torch.cuda.current_stream(there.device))
            self._next = 1 - self._next


class ExpertCache:
    """Slots on a device for S experts of any layers whose experts are alike; the least recently used is replaced.

    Attributes:
        slots: the copies, by the names of the experts' parameters.
        hits: how often a chosen expert was in a slot already.
        misses: how often one was copied.
    """

    def __init__(self, experts: nn.Module, device: torch.device, room: int) -> None:
        self.slots = {n: p.new_empty(room, *p.shape[1:], device=device) for n, p in experts.named_parameters()}
        self.room = room
        self._staging = Staging() if device.type == "cuda" else None
        self._slot_of: OrderedDict[tuple[nn.Module, int], int] = OrderedDict()
        self.hits = self.misses = 0

    def bring(self, experts: nn.Module, chosen: Sequence[int]) -> list[int]:
        """Copy the chosen experts that are not in a slot; -> the slot of each."""
        assert len(chosen) <= self.room
        keys = [(experts, expert) for expert in chosen]
        missing = [key for key in keys if key not in self._slot_of]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        for key in keys:
            if key in self._slot_of:
                self._slot_of.move_to_end(key)
        free = [*set(range(self.room)).difference(self._slot_of.values())] if missing else []
        for key in missing:
            slot = free.pop() if free else self._slot_of.popitem(last=False)[1]
            for name, parameter in experts.named_parameters():
                self._copy(parameter[key[1]].detach(), self.slots[name][slot])
            self._slot_of[key] = slot
        return [self._slot_of[key] for key in keys]

    def _copy(self, expert: Tensor, slot: Tensor) -> None:
        if self._staging is not None and expert.is_cpu and expert.is_contiguous():
            self._staging.copy(expert, slot)
        else:
            slot.copy_(expert)


class OffloadedExperts(nn.Module):
    """A layer's experts, with their parameters under their own names, computed in the slots of a cache."""

    def __init__(self, experts: nn.Module, hot: ExpertCache) -> None:
        super().__init__()
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in experts.named_children():
            self.add_module(name, child)
        self.hot = hot
        self._experts = (experts,)  # not a child: its parameters would have a second name

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """See `Experts.forward`. The host waits for the device once, to know which experts were chosen."""
        experts, counts = self._experts[0], num_tokens_per_expert_E.tolist()
        rows = x_RD.split(counts)
        chosen = [expert for expert, count in enumerate(counts) if count]
        out: dict[int, Tensor] = {}
        for start in range(0, len(chosen), self.hot.room):
            some = chosen[start : start + self.hot.room]
            places = dict(sorted(zip(self.hot.bring(experts, some), some, strict=True)))
            counts_S = torch.zeros(self.hot.room, dtype=torch.int64)
            counts_S[[*places]] = torch.tensor([counts[expert] for expert in places.values()])
            x_nD = torch.cat([rows[expert] for expert in places.values()])
            y_nD = functional_call(experts, self.hot.slots, (x_nD, counts_S.to(x_RD.device)))
            out |= zip(places.values(), y_nD.split([counts[expert] for expert in places.values()]), strict=True)
        return concat_experts([out[expert] for expert in chosen], x_RD)


def check_offload(device: str | torch.device | None, memory: int | str | None) -> None:
    """What can be known to be wrong of `experts_device` and `experts_memory` before anything is fetched.

    Raises:
        ArgumentError: memory for copies, and no device that they are copies of.
    """
    if memory is not None and device is None:
        raise ArgumentError(
            f"experts_memory={memory!r} is for copies of experts that stay on another device; name experts_device, too"
        )


def offload_experts(model: Llama4Model, device: torch.device, memory: int | None = None) -> None:
    """Leave a model's routed experts where they are, and compute them on a device.

    Args:
        model: all but its routed experts is on the device.
        device: the device that computes.
        memory: bytes on it for copies of experts; by default room for twice as many as one token uses, and for all of
            one layer.

    Raises:
        Llama4Error: there is not even room for one expert; or each has tensors of its own, as NF4 checkpoints do.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            if isinstance(module, SeparateExperts):
                raise Llama4Error(f"{path} has tensors for each expert, not of all: they cannot stay on another device")
            kind = (type(module), *((name, part.shape, part.dtype) for name, part in module.named_parameters()))
            alike.setdefault(kind, []).append(path)
    sizes = {kind: _bytes(model.get_submodule(paths[0])) * len(paths) for kind, paths in alike.items()}
    for kind, paths in alike.items():
        experts = model.get_submodule(paths[0])
        count = next(experts.parameters()).shape[0]
        each = _bytes(experts) // count
        room = max(count, 2 * len(paths) * model.config.text.num_experts_per_tok)
        if memory is not None:
            share = memory * sizes[kind] // sum(sizes.values())
            room = share // each
            if room < 1:
                raise ArgumentError(f"{bytes_text(share)} hold no expert: one takes {bytes_text(each)}; give more")
        hot = ExpertCache(experts, device, min(room, count * len(paths)))
        for path in paths:
            for module in model.get_submodule(path).modules():
                if isinstance(module, QuantizedWeight) and device.type != "cpu":
                    module.change_layout(device)
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, OffloadedExperts(model.get_submodule(path), hot))


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
