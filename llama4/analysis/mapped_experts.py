"""A quantized model that is larger than the memory of a CPU: its routed experts stay in their files, and memory keeps
pages of some. What is read from the disk.

A token's experts are anyone's guess, so the share of them that is in memory is the share that has room there. A prompt
needs nearly all experts of a layer, layer after layer: what the last layers read has taken the place of the first ones'
when the next piece comes, so each piece reads all that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama4.analysis import costs
from llama4.analysis.planner import Deployment, fits, memory, usable
from llama4.units import bytes_text, time_text


@dataclass(frozen=True)
class MappedExperts:
    """Bytes.

    Attributes:
        experts: of all routed experts.
        room: of memory for their pages, beside all else.
        own: of memory for all else.
        token: read from the disk to decode one.
        prompt: read from the disk for the whole prompt.
    """

    experts: float
    room: float
    own: float
    token: float
    prompt: float


def mapped_experts(deployment: Deployment, context: int) -> MappedExperts | None:
    """What is read where a quantized model does not fit; None if it does, or if all else does not fit, either."""
    text = deployment.config.text
    sizes = costs.parameter_bytes(text, deployment.plan, deployment.dtype)
    experts = {name: size for name, size in sizes.items() if costs.is_of_experts(name) and name in deployment.plan}
    if fits(deployment, context) or deployment.devices > 1 or not experts:
        return None
    total = float(sum(experts.values()))
    # Embeddings and vision tower are mapped as well, and seldom read.
    seldom = sum(
        size
        for name, size in sizes.items()
        if not costs.is_of_experts(name) and costs.share_per_token(text, name) < 0.01
    )
    seldom += costs.vision_bytes(deployment.config, deployment.dtype)
    own = memory(deployment, context).total - total - seldom
    room = usable(deployment) - own
    if room <= 0:
        return None
    room = min(room, total)
    piece = min(context, deployment.prefill_tokens)
    share = {name: costs.share_per_token(text, name) for name in experts}
    token = sum(size * share[name] for name, size in experts.items()) * (1 - room / total)
    needed = sum(size * min(1.0, piece * share[name]) for name, size in experts.items())
    return MappedExperts(total, room, own, token, needed * -(-context // piece))


def describe(mapped: MappedExperts, facts: dict[str, Any], disk_rate: float) -> dict[str, Any]:
    """What is added to the figures of `llama4 plan`. A token waits for the disk; while experts of a prompt compute, the
    next are read.

    Args:
        facts: the figures without the disk.
        disk_rate: bytes a second.
    """
    token, prompt = (size / disk_rate for size in (mapped.token, mapped.prompt))
    return {
        "experts_bytes": int(mapped.experts),
        "experts_room": int(mapped.room),
        "own_bytes": int(mapped.own),
        "bytes_per_token": int(mapped.token),
        "bytes_for_prompt": int(mapped.prompt),
        "disk_rate": disk_rate,
        "seconds_per_token": facts["seconds_per_token"] + token,
        "seconds_for_prompt": max(facts["seconds_for_prompt"], prompt),
    }


def table(facts: dict[str, Any]) -> str:
    """That as lines of text."""
    size = {name: bytes_text(value) for name, value in facts.items() if "seconds" not in name}
    return (
        f"  experts in files  {size['experts_room']} of {size['experts_bytes']} have room in memory, the rest is read "
        f"at {facts['disk_rate'] / 1e9:.2f} GB/s\n"
        f"  time per token    {time_text(facts['seconds_per_token'])}, of which {size['bytes_per_token']} are read\n"
        f"  the whole prompt  {time_text(facts['seconds_for_prompt'])}, for which {size['bytes_for_prompt']} are read"
    )
