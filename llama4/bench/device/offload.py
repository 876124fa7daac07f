"""Experts on the host, copies of a quarter of them on the card."""

from __future__ import annotations

from functools import partial

import torch

from llama4.bench.device import timing, workload
from llama4.bench.device.record import Figures, Record
from llama4.config import TextConfig
from llama4.engine.offload import ExpertCache, OffloadedExperts, offload_experts

STEPS = 8


def run(record: Record) -> None:
    for scheme in (None, "int4"):
        record.case(f"{scheme or 'bfloat16'}, 4 layers", partial(_decode, record, scheme))
        timing.release(record.device)


def _decode(record: Record, scheme: str | None) -> Figures:
    """A prompt, then steps of one token, whose experts are drawn by the router of random weights."""
    text: TextConfig = workload.text_config("scout", layers=4, dry=record.dry)
    host = torch.device("cpu")
    model, _ = workload.build(
        workload.config(text), record.device, scheme, place=lambda name: host if ".experts." in name else record.device
    )
    stored = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    offload_experts(model, record.device, stored // 4)
    hot: ExpertCache = next(m.hot for m in model.modules() if isinstance(m, OffloadedExperts))
    cache = model.new_cache()
    prompt = 40 if record.dry else 512
    reading = timing.once(
        lambda: workload.read(model, workload.ids(text, 1, prompt, record.device), cache), record.device
    )
    first_B1, *ids_SB1 = workload.ids(text, 1 + STEPS, 1, record.device)[..., None]
    model(first_B1, cache=cache, last_only=True)  # compiles kernels
    before = hot.misses

    def steps() -> None:
        for ids_B1 in ids_SB1:
            model(ids_B1, cache=cache, last_only=True)

    spent = timing.once(steps, record.device)
    copies = hot.misses - before
    return {
        "prompt_ms": reading * 1e3,
        "step_ms": spent / STEPS * 1e3,
        "copies_per_step": copies / STEPS,
        "copied_gb_s": copies * hot_bytes(hot) / spent / 1e9,
        "experts_gib": stored / 2**30,
    }


def hot_bytes(hot: ExpertCache) -> int:
    """Of one expert."""
    return sum(slots[0].nbytes for slots in hot.slots.values())
