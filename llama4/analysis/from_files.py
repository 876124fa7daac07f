"""A quantized model that is larger than the memory of a CPU: its routed experts stay in their files, and memory keeps
pages of some. What is read from the disk.

A token's experts are anyone's guess, so the share of them that is in memory is the share that has room there. A prompt
needs nearly all experts of a layer, layer after layer: what the last layers read has taken the place of the first ones'
when the next piece comes, so each piece reads all that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama4.analysis import costs
from llama4.analysis.planner import Placement, fits, memory, usable
from llama4.engine.prefill import PREFILL_TOKENS


@dataclass(frozen=True)
class FromFiles:
    """Bytes.

    Attributes:
        experts: of all routed experts.
        room: of memory for their pages, beside all else.
        token: read from the disk to decode one.
        prompt: read from the disk for the whole prompt.
    """

    experts: float
    room: float
    token: float
    prompt: float


def from_files(placement: Placement, context: int) -> FromFiles | None:
    """What is read where a quantized model does not fit; None if it does, or if all else does not fit, either."""
    text = placement.config.text
    sizes = costs.parameter_bytes(text, placement.plan, placement.dtype)
    experts = {name: size for name, size in sizes.items() if costs.is_of_experts(name) and name in placement.plan}
    if fits(placement, context) or placement.devices > 1 or not experts:
        return None
    total = float(sum(experts.values()))
    # Embeddings and vision tower are mapped as well, and seldom read.
    seldom = sum(size for name, size in sizes.items() if costs.share_per_token(text, name) < 0.01)
    seldom += costs.vision_bytes(placement.config, placement.dtype)
    room = usable(placement) - (memory(placement, context).total - total - seldom)
    if room <= 0:
        return None
    room = min(room, total)
    piece = min(context, PREFILL_TOKENS)
    share = {name: costs.share_per_token(text, name) for name in experts}
    token = sum(size * share[name] for name, size in experts.items()) * (1 - room / total)
    needed = sum(size * min(1.0, piece * share[name]) for name, size in experts.items())
    return FromFiles(total, room, token, needed * -(-context // piece))
