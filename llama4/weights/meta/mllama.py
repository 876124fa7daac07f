"""Meta's layout of Llama 3.2 Vision: `params.json`, and what its tensors are in the shapes of the model.

params.json says nothing of the tower but the size and number of tiles: the rest stands in Meta's code,
models/llama3/multimodal/model.py of llama-models.

Shapes: n most tiles of a picture, P patches of a tile and its class token, W width of the tower.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4.config import Llama4Config
from llama4.config.typed import read_value, section
from llama4.errors import ConfigError, Llama4Error
from llama4.families.mllama import EXTRA_EMBEDDINGS
from llama4.families.mllama_presets import CLIP_MEAN, CLIP_STD, layer_kinds
from llama4.reading import read_json
from llama4.vision.tiled_config import TiledVisionConfig
from llama4.weights.computed import Computed, ComputedSource
from llama4.weights.meta import llama
from llama4.weights.meta.names import LEARNABLE, OF_GRIDS, OF_TEXT, UNFOLDED
from llama4.weights.meta.params import PARAMS_FILE
from llama4.weights.meta.source import MetaSource
from llama4.weights.source import Source

_CROSS = "vision_num_cross_attention_layers"
_FIELDS = ("vision_chunk_size", "vision_max_num_chunks", _CROSS)

TOWER = TiledVisionConfig(image_mean=CLIP_MEAN, image_std=CLIP_STD)
"""What Meta's code has for every model."""


def is_mllama(params: Mapping[str, Any]) -> bool:
    """Whether the content of a `params.json` is of Llama 3.2 Vision."""
    return _CROSS in (section(params, "model", PARAMS_FILE) or params)


def read_params(directory: Path) -> Llama4Config:
    """Raises:
    ConfigError: a `params.json` that is damaged or of another model.
    """
    path = directory / PARAMS_FILE
    try:
        return config_from_params(read_json(path))
    except (Llama4Error, ArithmeticError) as error:
        raise ConfigError(f"{path} is damaged, or not of a Llama model: {error}") from error


def config_from_params(params: Mapping[str, Any]) -> Llama4Config:
    """Build from the content of `params.json`."""
    params = section(params, "model", PARAMS_FILE) or params
    side, tiles, cross = (read_value(int, params.get(name), name, PARAMS_FILE) for name in _FIELDS)
    text = llama.config_from_params({name: value for name, value in params.items() if name not in _FIELDS}).text
    if not 1 <= cross <= text.num_hidden_layers:
        raise ConfigError(f"{_CROSS} is {cross}, which must be from 1 to n_layers, {text.num_hidden_layers}")
    # One stands before every k-th layer of the others, counted from the last.
    step = math.ceil(text.num_hidden_layers / cross)
    before = sorted(range(text.num_hidden_layers - 1, -1, -step)[:cross])
    count = text.num_hidden_layers + len(before)
    decoder = dataclasses.replace(
        text,
        num_hidden_layers=count,
        extra_embeddings=EXTRA_EMBEDDINGS,
        **layer_kinds(count, {layer + i for i, layer in enumerate(before)}),
    )
    vision = dataclasses.replace(TOWER, image_size=side, max_tiles=tiles)
    return Llama4Config(decoder, vision, -1, -1, image_token_index=text.vocab_size, family="mllama")


def in_model_shapes(files: MetaSource, config: Llama4Config) -> Source:
    """The tensors of the ranks as the model has them: the embeddings of text and of `<|image|>` as one, what tells
    grids of tiles apart as a row for each grid, the patches' matrix as a convolution's."""
    vision = config.vision
    assert isinstance(vision, TiledVisionConfig)
    present = set(files.names())
    tensors: dict[str, str | Computed] = {name: name for name in present if "/" not in name}
    width, side = vision.hidden_size, vision.patch_size

    def compute(name: str, parts: Mapping[str, str], compute: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        if present >= set(parts.values()):
            spec = files.spec(next(iter(parts.values())))
            tensors[name] = Computed(parts, shapes[name], spec.dtype, compute)

    embeddings = OF_TEXT.rpartition("/")[0]
    conv = UNFOLDED.rpartition("/")[0]
    shapes = {
        embeddings: (config.text.num_embeddings, config.text.hidden_size),
        conv: (width, vision.num_channels, side, side),
    }
    compute(embeddings, {"text": OF_TEXT, "images": LEARNABLE}, lambda p: torch.cat((p["text"], p["images"])))
    compute(conv, {"rows": UNFOLDED}, lambda p: p["rows"])
    for part in OF_GRIDS:
        name = part.rpartition("/")[0]
        patches = vision.keys_per_tile if "tile_embedding" in name else 1
        shapes[name] = (len(vision.grids) + 1, vision.max_tiles * patches * width)
        compute(name, {"grids": part}, lambda p: _rows(p["grids"], vision))
    return ComputedSource(files, tensors, {})


def _rows(grids_nnPW: Tensor, vision: TiledVisionConfig) -> Tensor:
    """[n, n, P, W], by the row and column of a tile -> a row for each grid of tiles, zeros for tiles that it does not
    have; row 0 is of no picture."""
    table = grids_nnPW.new_zeros(len(vision.grids) + 1, vision.max_tiles, *grids_nnPW.shape[2:])
    for i, (rows, cols) in enumerate(vision.grids, 1):
        table[i, : rows * cols] = grids_nnPW[:rows, :cols].flatten(0, 1)
    return table
