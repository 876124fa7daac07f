"""The engines by name: this library, and the baselines it is compared with.

Shapes: B rows, T prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llama4.api import Llama4
from llama4.bench.engine import Engine, EngineConfig, image_message
from llama4.engine.prefill import prefill
from llama4.engine.sampling import RowState, Sampler
from llama4.inputs import Inputs
from llama4.kernels import loader
from llama4.model.moe import Router


class Llama4Engine:
    """This library, through the functions that `Llama4.chat` calls."""

    def __init__(self, config: EngineConfig) -> None:
        self.llm = Llama4.from_pretrained(
            config.directory,
            dtype=config.dtype,
            device=config.device,
            quantization=config.quantization,
            memory_map=config.memory_map,
            progress=False,
        )
        self._sampler = Sampler(temperature=0)

    def prefill(self, ids_BT: Tensor) -> tuple[Tensor, Any]:
        cache = self.llm.model.new_cache(len(ids_BT))
        inputs = Inputs(ids_BT, torch.ones_like(ids_BT), None)
        return prefill(self.llm.model, inputs, cache), cache

    def decode(self, ids_B: Tensor, cache: Any) -> Tensor:
        return self.llm.runner.step(ids_B, cache)

    def greedy(self, logits_BV: Tensor) -> list[int]:
        ids: list[int] = self._sampler(logits_BV, [RowState()] * len(logits_BV))[0].tolist()
        return ids

    def decode_greedy(self, ids: list[int], cache: Any) -> list[int]:
        return self.llm.runner.run(ids, cache).greedy_token()[0]

    def prefill_image(self, picture: Image.Image, question: str) -> tuple[Tensor, tuple[int, int]]:
        inputs = self.llm.processor([image_message(picture, question)])
        assert inputs.pixel_values is not None
        size = inputs.input_ids.shape[1], len(inputs.pixel_values)
        return prefill(self.llm.model, inputs, self.llm.model.new_cache()), size

    def distinct_experts(self, ids_BT: Tensor, new_BN: Tensor) -> float:
        """Different experts that a decoding step's rows are routed to, on average over layers and steps; 0 without
        experts."""
        counts: list[int] = []

        def count(router: Router, inputs: object, output: tuple[Tensor, Tensor]) -> None:
            counts.append(output[1].unique().numel())

        _, cache = self.prefill(ids_BT)
        routers = [module for module in self.llm.model.modules() if isinstance(module, Router)]
        hooks = [router.register_forward_hook(count) for router in routers]
        for ids_B in new_BN.unbind(1):
            self.decode(ids_B, cache)
        for hook in hooks:
            hook.remove()
        return sum(counts) / max(len(counts), 1)


def _llama4() -> Callable[[EngineConfig], Engine]:
    loader.library()  # loaded before anything is timed
    return Llama4Engine


def _transformers() -> Callable[[EngineConfig], Engine]:
    from llama4.bench.baselines import TransformersEngine

    return TransformersEngine


ENGINES: dict[str, Callable[[], Callable[[EngineConfig], Engine]]] = {"llama4": _llama4, "transformers": _transformers}
"""Name -> a function that imports the engine and returns its class."""
BASELINES = tuple(name for name in ENGINES if name != "llama4")


def version(engine: str) -> str:
    """Name and version, as a report says them."""
    try:
        return f"{engine} {importlib.metadata.version(engine)}"
    except importlib.metadata.PackageNotFoundError:
        return engine
