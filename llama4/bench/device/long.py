"""A long prompt on all of Scout in int4, with an fp8 cache in the layers that see everything."""

from __future__ import annotations

from functools import partial

import torch

from llama4.bench.device import timing, workload
from llama4.bench.device.record import NO_TIME, Figures, Record, Skip
from llama4.bench.device.scout import Subject
from llama4.engine.prefill import piece_size
from llama4.engine.runner import ModelRunner

MARKS = (16384, 32768, 65536, 131072)
DRY_MARKS = (64, 160)
STEPS = 8


class Reading:
    """One prompt, of which more is read from case to case."""

    def __init__(self, subject: Subject, tokens: int) -> None:
        self.subject, self.record = subject, subject.record
        self.model, _ = subject.get()
        self.ids_BT = workload.ids(subject.text, 1, tokens, self.record.device)
        self.cache = self.model.new_cache(1, "fp8")
        self.piece = piece_size(self.model)
        self.read = 0

    def go_on(self, end: int) -> Figures:
        """Read up to a token, in pieces, as long as there is time; then decode a few from there."""
        begin, spent = self.read, 0.0
        while self.read < end and self.record.seconds_left > 3 + 2 * spent / max(1, self.read - begin) * self.piece:
            piece_BT = self.ids_BT[:, self.read : min(end, self.read + self.piece)]
            run = partial(self.model, piece_BT, cache=self.cache, last_only=True)
            spent += timing.once(run, self.record.device)
            self.read += piece_BT.shape[1]
        if self.read == begin:
            raise Skip(NO_TIME)
        other, runner = self.cache.fork(), ModelRunner(self.model)
        ids = self.ids_BT[0, :1].tolist()
        runner.run(ids, other)

        def steps() -> None:
            for _ in range(STEPS):
                runner.run(ids, other)

        step = timing.once(steps, self.record.device) / STEPS
        return {
            "tokens": self.read,
            "prompt_tokens_per_s": (self.read - begin) / spent,
            "step_ms": step * 1e3,
            "cache_gib": self.cache.num_bytes / 2**30,
        }


def run(record: Record) -> None:
    marks = DRY_MARKS if record.dry else MARKS
    subject = Subject(record, workload.text_config("scout", dry=record.dry), "int4")
    made: list[Reading] = []

    def begin() -> Figures:
        made.append(Reading(subject, marks[-1]))
        return {"weights_gib": sum(p.nbytes for p in made[0].model.parameters()) / 2**30}

    def go_on(mark: int) -> Figures:
        if not made:
            raise Skip("the prompt has not been begun in this process")
        return made[0].go_on(mark)

    torch.manual_seed(0)
    record.case("built", begin)
    for mark in marks:
        record.case(f"read to {mark}", partial(go_on, mark), least_seconds=4.0)
