"""Random models of Llama 3.2 Vision, made with transformers, and what both sides compute with them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama import modeling_mllama
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from tests import small_model

FIRST = small_model.RANKS
VOCABULARY = FIRST + 256
IMAGE = VOCABULARY
SIDE, TILES = 28, 4
ARRANGEMENTS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(**text: Any) -> MllamaConfig:
    tower: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 2}
    tower |= {"intermediate_size": 48, "vision_output_dim": 96, "image_size": SIDE, "patch_size": 14}
    vision = MllamaVisionConfig(**tower, intermediate_layers_indices=[0, 2])
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    ids = {"bos_token_id": FIRST, "eos_token_id": [FIRST + 1, FIRST + 9], "pad_token_id": FIRST + 4}
    rope = {**ROPE, "rope_theta": 500000.0, "original_max_position_embeddings": 16}
    decoder = MllamaTextConfig(**{**sizes, **ids, "cross_attention_layers": [1, 3], "rope_parameters": rope} | text)
    return MllamaConfig(vision_config=vision, text_config=decoder, image_token_index=IMAGE)


def fresh(**text: Any) -> MllamaForConditionalGeneration:
    """Gates are open, and every embedding of a grid is another, of empty tiles too."""
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(config(**text)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.1)
        elif name.endswith(("gate", "gate_attn", "gate_ffn")):
            torch.nn.init.constant_(parameter, 0.7)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.12)
    model.lm_head.weight.data[FIRST:] = 0  # greedy replies run to their limit
    return model


@functools.cache
def reference() -> MllamaForConditionalGeneration:
    return fresh()


def write(directory: Path) -> Path:
    """A checkpoint as transformers writes it, with a tokenizer.model and the image processor's file."""
    reference().save_pretrained(directory)
    small_model.write_tokenizer(directory / "tokenizer.model")
    (directory / "preprocessor_config.json").write_text(
        '{"image_processor_type": "MllamaImageProcessor", "size": {"height": 28, "width": 28}, "max_image_tiles": 4, '
        '"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}'
    )
    return directory


def pictures(grids: Sequence[tuple[int, int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random pictures of these grids, as our model takes them."""
    pixels = torch.zeros(len(grids), TILES, 3, SIDE, SIDE)
    generator = torch.Generator().manual_seed(seed)
    for picture, (rows, cols) in zip(pixels, grids, strict=True):
        picture[: rows * cols] = torch.randn(rows * cols, 3, SIDE, SIDE, generator=generator)
    return pixels, torch.tensor(list(grids)).reshape(-1, 2)


def theirs(ids: Tensor, pixels: Tensor, grids: Tensor, model: Any = None, as_meta: bool = True) -> Tensor:
    """Logits by transformers, in one prefill; pictures are those of all rows in order, masks are its processor's.

    Args:
        as_meta: whether rows before the first picture are as in Meta's code.
    """
    with silent_rows() if as_meta else contextlib.nullcontext():
        return _theirs(ids, pixels, grids, model or reference())


def _theirs(ids: Tensor, pixels: Tensor, grids: Tensor, model: Any) -> Tensor:
    counts = (ids == IMAGE).sum(1).tolist()
    most = max(counts)
    if most == 0:
        logits: Tensor = model(ids).logits
        return logits
    padded = torch.zeros(len(ids), most, TILES, 3, SIDE, SIDE)
    grid_ids = torch.zeros(len(ids), most, dtype=torch.long)
    tiles = torch.zeros(len(ids), most, TILES, dtype=torch.long)
    tiles[:, :, 0] = 1
    given = iter(zip(pixels, grids.tolist(), strict=True))
    numbers: list[list[int]] = [[] for _ in counts]
    for row, count in enumerate(counts):
        for i in range(count):
            padded[row, i], grid = next(given)
            grid_ids[row, i] = 1 + ARRANGEMENTS.index(grid)
            tiles[row, i, : grid[0] * grid[1]] = 1
            numbers[row].append(grid[0] * grid[1])
    seen = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(row, IMAGE) for row in ids.tolist()], numbers, TILES, ids.shape[1]
    )
    logits = model(
        ids,
        pixel_values=padded,
        aspect_ratio_ids=grid_ids,
        aspect_ratio_mask=tiles,
        cross_attention_mask=torch.from_numpy(seen),
    ).logits
    return logits


@contextlib.contextmanager
def silent_rows() -> Iterator[None]:
    """Meta's one line that transformers lacks: what attention gives to a row that sees nothing is nothing, too."""
    layer: Any = modeling_mllama.MllamaCrossAttentionDecoderLayer
    forward = layer.forward

    def meta(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.get("full_text_row_masked_out_mask")

        def silence(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            return (output[0] if rows is None else output[0] * rows[:, 0], output[1])

        hook = self.cross_attn.register_forward_hook(silence)
        try:
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            hook.remove()

    layer.forward = meta
    try:
        yield
    finally:
        layer.forward = forward
