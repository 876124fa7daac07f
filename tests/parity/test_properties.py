"""Random models, random inputs: float32 equal to transformers, float64 equal to the plain reference.

A failing case prints itself; `check(Case(...))` runs it again. More of them than the suite draws:
`LLAMA4_EXAMPLES=1000 pytest tests/parity/test_properties.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from llama4.config import Llama4Config
from llama4.model.experts import BACKENDS, backends_for
from llama4.model.multimodal import Llama4Model
from tests.drawn import drawn
from tests.parity import specification
from tests.parity.references import ReferenceConfig, reference_model, relative_error
from tests.parity.ways import KERNELS, TORCH, computed_by

EXAMPLES = int(os.environ.get("LLAMA4_EXAMPLES", "0"))
FLOAT32, FLOAT64 = 1e-5, 1e-10
"""Sums in another order, relative to the largest logit: float32 has 24 bits, float64 53."""
CLEAR = 1e-4
"""A router whose choice hangs on less than this may choose otherwise in float32; such a case says nothing."""
VOCABULARY, PATCH = 64, 63


@pytest.fixture(autouse=True)
def way() -> None:
    """Every case is computed in both ways, one after the other."""


@dataclass(frozen=True)
class Case:
    """A model and a batch for it. A row has a length and a number of tiles; `cuts` cut the first row into pieces."""

    hidden_size: int = 16
    heads: int = 2
    key_value_heads: int = 1
    head_dim: int = 8
    layers: int = 2
    experts: int = 4
    top_k: int = 1
    interleave: int = 1
    no_rope: tuple[int, ...] = (1, 0)
    chunk: int | None = 8
    qk_norm: bool = True
    scaling: str = "default"
    factor: float = 1.0
    high_freq_factor: float = 1.0
    temperature: bool = True
    floor_scale: int = 4
    tied: bool = False
    attention_bias: bool = False
    vision_heads: int = 1
    vision_head_dim: int = 8
    vision_layers: int = 1
    grid: int = 2
    patch: int = 2
    backend: str = "loop"
    rows: tuple[tuple[int, int], ...] = ((9, 1),)
    cuts: tuple[int, ...] = ()
    pad_left: bool = False
    seed: int = 0

    def config(self, chunk: int | None) -> ReferenceConfig:
        rope: dict[str, Any] = {"rope_type": self.scaling, "rope_theta": 10000.0}
        if self.scaling != "default":
            rope["factor"] = self.factor
        if self.scaling == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": self.high_freq_factor}
            rope["original_max_position_embeddings"] = 64
        text = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_size": 12,
            "intermediate_size_mlp": 20,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "interleave_moe_layer_step": self.interleave,
            "no_rope_layers": list(self.no_rope),
            "attention_chunk_size": chunk,
            "use_qk_norm": self.qk_norm,
            "rope_parameters": rope,
            "attn_temperature_tuning": self.temperature,
            "floor_scale": self.floor_scale,
            "attn_scale": 0.3,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
            "bos_token_id": 60,
            "eos_token_id": 61,
            "pad_token_id": 62,
        }
        width = self.vision_heads * self.vision_head_dim
        vision = {
            "hidden_size": width,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "intermediate_size": 4 * width,
            "image_size": self.grid * self.patch,
            "patch_size": self.patch,
            "vision_output_dim": 12,
            "projector_input_dim": 12,
            "projector_output_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
        return ReferenceConfig(
            text_config=text, vision_config=vision, image_token_index=PATCH, tie_word_embeddings=self.tied
        )

    def batch(self) -> list[tuple[list[int], Tensor]]:
        """Ids and tiles of each row; the `<|patch|>` tokens of its tiles stand at its end, tile behind tile."""
        generator = torch.Generator().manual_seed(self.seed)
        per_tile, side, batch = (self.grid // 2) ** 2, self.grid * self.patch, []
        for length, tiles in self.rows:
            ids = torch.randint(0, 60, (length,), generator=generator).tolist()
            ids = ids[: length // 2] + [PATCH] * (tiles * per_tile) + ids[length // 2 :]
            batch.append((ids, torch.randn(tiles, 3, side, side, generator=generator)))
        return batch


@st.composite
def cases(draw: st.DrawFn) -> Case:
    key_value_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers = draw(st.integers(1, 4))
    experts = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 64]))
    chunk = draw(st.sampled_from([None, 1, 2, 5, 8, 16]))
    near = [1, 40] if chunk is None else [1, chunk, chunk + 1, 2 * chunk - 1, 3 * chunk + 2]
    interval = draw(st.sampled_from([0, 1, 2, 3, 4]))
    rows = draw(st.lists(st.tuples(st.sampled_from(near), st.integers(0, 3)), min_size=1, max_size=4))
    return Case(
        hidden_size=draw(st.sampled_from([8, 12, 16, 24])),
        heads=key_value_heads * group,
        key_value_heads=key_value_heads,
        head_dim=draw(st.sampled_from([2, 4, 6, 16])),
        layers=layers,
        experts=experts,
        top_k=draw(st.integers(1, min(3, experts))),
        interleave=draw(st.integers(1, min(4, layers))),
        no_rope=tuple(int((i + 1) % interval != 0) for i in range(layers))
        if interval
        else tuple(draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))),
        chunk=chunk,
        qk_norm=draw(st.booleans()),
        scaling=draw(st.sampled_from(["default", "llama3", "linear"])),
        factor=draw(st.sampled_from([2.0, 8.0, 16.0])),
        high_freq_factor=draw(st.sampled_from([1.0, 4.0])),
        temperature=draw(st.booleans()),
        floor_scale=draw(st.sampled_from([2, 8])),
        tied=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        vision_heads=draw(st.integers(1, 3)),
        vision_head_dim=draw(st.sampled_from([4, 8])),
        vision_layers=draw(st.integers(1, 2)),
        grid=draw(st.sampled_from([2, 4])),
        patch=draw(st.sampled_from([1, 2, 3])),
        backend=draw(st.sampled_from(backends_for(torch.device("cpu"), torch.float32))),
        rows=tuple(rows),
        cuts=tuple(draw(st.lists(st.integers(1, 30), max_size=4))),
        pad_left=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def ours_of(case: Case, weights: dict[str, Tensor]) -> Llama4Model:
    content = case.config(4096).to_dict()
    content["text_config"]["attention_chunk_size"] = case.chunk
    model = Llama4Model(Llama4Config.from_dict(content), BACKENDS[case.backend])
    model.load_state_dict(weights, strict=True)
    return model.eval()


def batched(model: Llama4Model, batch: list[tuple[list[int], Tensor]], pad_left: bool) -> list[Tensor]:
    """Logits of each row, computed in one padded batch."""
    longest = max(len(ids) for ids, _ in batch)
    padded, mask = torch.full((len(batch), longest), 62), torch.zeros(len(batch), longest)
    for row, (ids, _) in enumerate(batch):
        place = slice(longest - len(ids), None) if pad_left else slice(len(ids))
        padded[row, place], mask[row, place] = torch.tensor(ids), 1
    tiles = torch.cat([tiles for _, tiles in batch])
    logits = model(padded, attention_mask=mask, pixel_values=tiles if len(tiles) else None)
    return [logits[row, mask[row] == 1] for row in range(len(batch))]


def in_pieces(model: Llama4Model, ids: list[int], tiles: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """The same row with a cache, cut at `cuts`, the rest one token at a time."""
    features = model.encode_images(tiles) if len(tiles) else None
    borders = sorted({cut for cut in cuts if cut < len(ids)} | {0, len(ids)})
    if not cuts:
        borders = list(range(len(ids) + 1))
    cache, logits, used = model.new_cache(), [], 0
    for start, end in pairwise(borders):
        count = ids[start:end].count(PATCH)
        mine = features[used : used + count] if features is not None and count else None
        used += count
        logits.append(model(torch.tensor([ids[start:end]]), image_features=mine, cache=cache))
    return torch.cat(logits, dim=1)[0]


@torch.inference_mode()
def check(case: Case) -> bool:
    """False if a router's choice was too close to compare."""
    theirs = reference_model(case.config(4096 if case.chunk is None else case.chunk), seed=case.seed)
    weights, batch = theirs.state_dict(), case.batch()
    ours = ours_of(case, weights)
    truths = [specification.run(weights, ours.config, ids, tiles if len(tiles) else None) for ids, tiles in batch]
    if min(truth.margin for truth in truths) < CLEAR:
        return False
    references = [
        theirs(torch.tensor([ids]), pixel_values=tiles if len(tiles) else None, use_cache=False).logits[0]
        for ids, tiles in batch
    ]
    for reference, truth in zip(references, truths, strict=True):
        assert relative_error(reference.double(), truth.logits) < FLOAT32, "the two references differ"
    for way in (TORCH, KERNELS):
        with computed_by(way):
            single, pieces = batched(ours, batch, case.pad_left), in_pieces(ours, *batch[0], case.cuts)
        for reference, logits in zip(references, single, strict=True):
            assert relative_error(logits, reference) < FLOAT32, way
        assert relative_error(pieces.double(), truths[0].logits) < FLOAT32, way
    if case.backend == "loop":  # torch's grouped product has no float64
        double = ours.double()
        for truth, logits in zip(truths, batched(double, batch, case.pad_left), strict=True):
            assert relative_error(logits, truth.logits) < FLOAT64
        assert relative_error(in_pieces(double, *batch[0], case.cuts), truths[0].logits) < FLOAT64
    return True


@drawn(EXAMPLES or 40, same=not EXAMPLES)
@given(cases())
def test_random_models(case: Case) -> None:
    assume(check(case))


MAVERICK = Case(layers=4, interleave=2, no_rope=(1, 1, 1, 0), qk_norm=False, experts=8, rows=((19, 2), (8, 0)))


@pytest.mark.parametrize(
    "case",
    [
        Case(rows=((16, 0), (17, 3), (1, 0)), cuts=(8, 9), scaling="llama3", factor=16.0),
        MAVERICK,
        replace(MAVERICK, backend="grouped", top_k=3, pad_left=True),
        Case(chunk=None, no_rope=(1, 1), temperature=False, rows=((33, 1),)),
        Case(chunk=1, rows=((5, 0),)),
        Case(scaling="llama3", factor=8.0, high_freq_factor=4.0, head_dim=16, chunk=None, rows=((40, 0),)),
    ],
)
def test_chosen_models(case: Case) -> None:
    assert check(case), "choose another seed"
