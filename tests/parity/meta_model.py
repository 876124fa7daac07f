"""Meta's own model code (llama-models), run on one process and a CPU: its parallel layers become plain ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class _Linear(nn.Linear):
    def __init__(self, inner: int, outer: int, bias: bool = True, **_: Any) -> None:
        super().__init__(inner, outer, bias=bias)


class _Embedding(nn.Embedding):
    def __init__(self, rows: int, width: int, **_: Any) -> None:
        super().__init__(rows, width)


@contextmanager
def _one_process() -> Iterator[None]:
    """Stand-ins for fairscale's parallel layers, and for `Tensor.cuda`, which Meta's constructors call."""
    contents: dict[str, dict[str, Any]] = {
        "fairscale": {},
        "fairscale.nn": {},
        "fairscale.nn.model_parallel": {},
        "fairscale.nn.model_parallel.initialize": {"get_model_parallel_world_size": lambda: 1},
        "fairscale.nn.model_parallel.layers": {
            "ColumnParallelLinear": _Linear,
            "RowParallelLinear": _Linear,
            "VocabParallelEmbedding": _Embedding,
        },
        "fairscale.nn.model_parallel.mappings": {"reduce_from_model_parallel_region": lambda x: x},
    }
    modules = {}
    for name, content in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(modules[parent], leaf, modules[name])
    before, cuda = {name: sys.modules.get(name) for name in modules}, Tensor.cuda
    sys.modules.update(modules)
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore
    try:
        yield
    finally:
        Tensor.cuda = cuda  # type: ignore[method-assign]
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class MetaModel:
    """Meta's Transformer with the weights of a one-rank checkpoint, in float32."""

    def __init__(self, directory: Path, params: dict[str, Any]) -> None:
        with _one_process():
            from llama_models.llama4.args import ModelArgs
            from llama_models.llama4.datatypes import MaskedEmbedding, TransformerInput
            from llama_models.llama4.model import Transformer

            self._input, self._masked = TransformerInput, MaskedEmbedding
            args = ModelArgs(**params, max_batch_size=1, max_seq_len=512)
            self.model = Transformer(args).float()
        weights = torch.load(directory / "consolidated.00.pth", weights_only=False)  # written by the test
        loaded = self.model.load_state_dict(weights, strict=False)
        assert not loaded.missing_keys, loaded.missing_keys

    def __call__(self, ids: Tensor, start: int = 0, tiles: Tensor | None = None, patch: int = -1) -> Tensor:
        """Logits [1, T, V] of tokens that begin at position `start`; earlier ones are in the model's cache."""
        image = None
        if tiles is not None:
            mask = (ids == patch)[..., None]
            like = torch.zeros(*ids.shape, 1)
            image = self._masked(self.model.vision_embeddings([[tiles]], mask, like), mask)
        out: Tensor = self.model(self._input(ids, tokens_position=start, image_embedding=image)).logits
        return out
