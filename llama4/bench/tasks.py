"""What is timed, and the engine that does it in a process of its own.

Shapes: B rows, T prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from llama4.bench.engine import EngineConfig
from llama4.bench.engines import ENGINES, Llama4Engine
from llama4.bench.process_memory import peak_bytes


@dataclass(frozen=True)
class Task:
    """Prompts ("prefill"), a step after them ("decode"), or a picture and a question up to the first token
    ("picture")."""

    kind: str
    rows: int = 1
    prompt: int = 128
    new: int = 0

    def __str__(self) -> str:
        names = {"prefill": f"prefill, {self.prompt} tokens", "decode": f"decode, batch {self.rows}"}
        return names.get(self.kind, "first token with a picture")

    @property
    def tokens(self) -> int:
        """That one sample counts; 0 for what is not counted in tokens."""
        return {"prefill": self.prompt, "decode": self.rows}.get(self.kind, 0)


class TimedEngine:
    """An engine, loaded, and the time and memory it takes."""

    def __init__(self, config: EngineConfig, vocabulary: int) -> None:
        torch.set_num_threads(config.threads)
        make = ENGINES[config.engine]()
        begin = time.perf_counter()
        self.engine = make(config)
        self.load_seconds = time.perf_counter() - begin
        self.vocabulary = vocabulary
        self._picture = photo_bytes(1024, 768)

    def load(self) -> tuple[float, float]:
        """Seconds of loading the model, and from then on until the first token after a short prompt."""
        return self.load_seconds, self.seconds(Task("prefill"))

    def seconds(self, task: Task) -> float:
        """Of the task, the choice of the most likely token included; of "decode", one step on average."""
        if task.kind == "picture":
            return self._prefill_image()[0]
        ids_BT, new_BN = self._tokens(task)
        begin = time.perf_counter()
        logits_BV, cache = self.engine.prefill(ids_BT)
        self.engine.greedy(logits_BV)
        if task.kind == "prefill":
            return time.perf_counter() - begin
        new = new_BN.T.tolist()
        begin = time.perf_counter()
        for ids in new:
            self.engine.decode_greedy(ids, cache)
        return (time.perf_counter() - begin) / task.new

    def distinct_experts(self, task: Task) -> float:
        """Of this library: see `Llama4Engine.distinct_experts`."""
        assert isinstance(self.engine, Llama4Engine)
        return self.engine.distinct_experts(*self._tokens(task))

    def picture_size(self) -> tuple[int, int]:
        """Tokens and tiles that the task "picture" reads."""
        return self._prefill_image()[1]

    def peak_bytes(self) -> int:
        """Peak memory of this process, the device's included."""
        return peak_bytes() + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)

    def _prefill_image(self) -> tuple[float, tuple[int, int]]:
        """From the bytes of a JPEG."""
        begin = time.perf_counter()
        picture = Image.open(io.BytesIO(self._picture)).convert("RGB")
        logits_BV, size = self.engine.prefill_image(picture, "What is in the picture?")
        self.engine.greedy(logits_BV)
        return time.perf_counter() - begin, size

    def _tokens(self, task: Task) -> tuple[Tensor, Tensor]:
        """Random ids, the same for every engine: prompts [B, T] and what follows them, [B, N]."""
        shape = task.rows, task.prompt + task.new
        ids = torch.randint(0, self.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        return ids[:, : task.prompt], ids[:, task.prompt :]


def photo_bytes(width: int, height: int) -> bytes:
    """A JPEG of a photograph's size in bytes: soft shapes with grain."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 9, 12, generator=generator) * 255
    soft = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    grain = torch.randn(1, 1, height, width, generator=generator) * 6
    pixels = (soft + grain).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()
