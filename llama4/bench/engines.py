"""Who is measured: this library, and others on the same weights and the same tokens, each at its best setting.

Shapes: B rows, T tokens of a prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import io
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from llama4.api import Llama4
from llama4.bench.machine import peak_bytes
from llama4.engine.generate import advance, prefill, step
from llama4.engine.sampling import Sampler
from llama4.inputs import Inputs
from llama4.kernels import build
from llama4.model.moe import Router


@dataclass(frozen=True)
class Setting:
    """A contestant: an engine, and how it runs the model in `directory`."""

    engine: str
    directory: str
    dtype: str
    threads: int
    quantization: str | None = None
    device: str = "cpu"
    memory_map: bool = True


@dataclass(frozen=True)
class Task:
    """What is timed: reading prompts ("prefill"), one step after them ("decode"), or a picture and a question up to the
    first token ("picture")."""

    kind: str
    rows: int = 1
    prompt: int = 128
    new: int = 0

    def __str__(self) -> str:
        names = {"prefill": f"prefill, {self.prompt} tokens", "decode": f"decode, batch {self.rows}"}
        return names.get(self.kind, "first token with a picture")


class Engine(Protocol):
    """One way to run a model."""

    def start(self, ids_BT: Tensor) -> tuple[Tensor, Any]:
        """Read prompts -> logits of their last tokens [B, V], and what is remembered of them."""

    def step(self, ids_B: Tensor, memory: Any) -> Tensor:
        """One more token in every row -> logits of the next, [B, V]."""

    def choose(self, logits_BV: Tensor) -> list[int]:
        """The likeliest token of each row."""

    def advance(self, ids: list[int], memory: Any) -> list[int]:
        """One more token in every row -> the likeliest of those that may be next."""

    def look(self, picture: Image.Image, question: str) -> tuple[Tensor, tuple[int, int]]:
        """A question about a picture -> logits of the reply's first token, and how many tokens and tiles were read."""


class Ours:
    """This library, by the functions that `Llama4.chat` calls."""

    def __init__(self, setting: Setting) -> None:
        self.llm = Llama4.from_pretrained(
            setting.directory,
            dtype=setting.dtype,
            device=setting.device,
            quantization=setting.quantization,
            memory_map=setting.memory_map,
            progress=False,
        )
        self._sampler = Sampler(temperature=0)
        self._generator = random.Random()

    def start(self, ids_BT: Tensor) -> tuple[Tensor, Any]:
        cache = self.llm.model.new_cache(len(ids_BT))
        inputs = Inputs(ids_BT, torch.ones_like(ids_BT), None)
        return prefill(self.llm.model, inputs, cache), cache

    def step(self, ids_B: Tensor, memory: Any) -> Tensor:
        return step(self.llm.model, ids_B, memory)

    def choose(self, logits_BV: Tensor) -> list[int]:
        ids: list[int] = self._sampler(logits_BV, [self._generator] * len(logits_BV))[0].tolist()
        return ids

    def advance(self, ids: list[int], memory: Any) -> list[int]:
        return advance(self.llm.model, ids, memory, self._sampler, [self._generator] * len(ids))[0]

    def look(self, picture: Image.Image, question: str) -> tuple[Tensor, tuple[int, int]]:
        inputs = self.llm.processor([message(picture, question)])
        assert inputs.pixel_values is not None
        read = inputs.input_ids.shape[1], len(inputs.pixel_values)
        return prefill(self.llm.model, inputs, self.llm.model.new_cache()), read

    def experts_met(self, ids_BT: Tensor, new_BN: Tensor) -> float:
        """Different experts that a step's rows are sent to, on average over layers and steps; 0 without experts."""
        met: list[int] = []

        def count(router: Router, inputs: object, output: tuple[Tensor, Tensor]) -> None:
            met.append(output[1].unique().numel())

        _, cache = self.start(ids_BT)
        routers = [module for module in self.llm.model.modules() if isinstance(module, Router)]
        hooks = [router.register_forward_hook(count) for router in routers]
        for ids_B in new_BN.unbind(1):
            self.step(ids_B, cache)
        for hook in hooks:
            hook.remove()
        return sum(met) / max(len(met), 1)


def message(picture: Image.Image, question: str) -> dict[str, Any]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return {"role": "user", "content": content}


def _ours() -> Callable[[Setting], Engine]:
    build.library()  # compiled once, which is no part of loading
    return Ours


def _transformers() -> Callable[[Setting], Engine]:
    from llama4.bench.baselines import Transformers

    return Transformers


ENGINES: dict[str, Callable[[], Callable[[Setting], Engine]]] = {"llama4": _ours, "transformers": _transformers}
"""Name -> what imports it and gives its class."""
PEERS = tuple(name for name in ENGINES if name != "llama4")


def version(engine: str) -> str:
    """Name and version, as a report says them."""
    try:
        return f"{engine} {importlib.metadata.version(engine)}"
    except importlib.metadata.PackageNotFoundError:
        return engine


class Contestant:
    """An engine in its process, loaded, and what is asked of it."""

    def __init__(self, setting: Setting, vocabulary: int) -> None:
        torch.set_num_threads(setting.threads)
        make = ENGINES[setting.engine]()
        begin = time.perf_counter()
        self.engine = make(setting)
        self.load_seconds = time.perf_counter() - begin
        self.vocabulary = vocabulary
        self._picture = photo_bytes(1024, 768)

    def load(self) -> tuple[float, float]:
        """Seconds until the model is there, and from then on until the first token after a short prompt."""
        return self.load_seconds, self.seconds(Task("prefill"))

    def seconds(self, task: Task) -> float:
        """Of the task, with the choice of the likeliest token; of "decode", one step on average."""
        if task.kind == "picture":
            return self._look()[0]
        ids_BT, new_BN = self._tokens(task)
        begin = time.perf_counter()
        logits_BV, memory = self.engine.start(ids_BT)
        self.engine.choose(logits_BV)
        if task.kind == "prefill":
            return time.perf_counter() - begin
        new = new_BN.T.tolist()
        begin = time.perf_counter()
        for ids in new:
            self.engine.advance(ids, memory)
        return (time.perf_counter() - begin) / task.new

    def experts_met(self, task: Task) -> float:
        """Of this library: see `Ours.experts_met`."""
        assert isinstance(self.engine, Ours)
        return self.engine.experts_met(*self._tokens(task))

    def picture_size(self) -> tuple[int, int]:
        """Tokens and tiles that the task "picture" reads."""
        return self._look()[1]

    def peak_bytes(self) -> int:
        """The most memory that this process has held, on the device too."""
        return peak_bytes() + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)

    def _look(self) -> tuple[float, tuple[int, int]]:
        """From the bytes of a JPEG."""
        begin = time.perf_counter()
        picture = Image.open(io.BytesIO(self._picture)).convert("RGB")
        logits_BV, read = self.engine.look(picture, "What is in the picture?")
        self.engine.choose(logits_BV)
        return time.perf_counter() - begin, read

    def _tokens(self, task: Task) -> tuple[Tensor, Tensor]:
        """The same for every engine: random ids, prompts [B, T] and what is said after them, [B, N]."""
        shape = task.rows, task.prompt + task.new
        ids = torch.randint(0, self.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        return ids[:, : task.prompt], ids[:, task.prompt :]


def photo_bytes(width: int, height: int) -> bytes:
    """A JPEG like a photograph's in size: soft shapes with grain."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 9, 12, generator=generator) * 255
    soft = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    grain = torch.randn(1, 1, height, width, generator=generator) * 6
    pixels = (soft + grain).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()
