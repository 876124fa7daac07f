"""Prompts -> a filled cache and the logits of their last tokens, in pieces of bounded size.

Shapes: B rows, T columns of the prompts, V vocabulary, D hidden size, n tiles, Q tokens per tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama4.cache.sequence import SequenceCache
from llama4.engine.fused_cpu import only_our_threads
from llama4.errors import Llama4Error
from llama4.inputs import Inputs
from llama4.model.device import free_memory
from llama4.model.multimodal import Llama4Model
from llama4.progress import Bar

PREFILL_TOKENS = 2048
"""Most tokens of all rows together that go through the model at once: bounds the memory a long prompt takes."""
VISION_TILES = 16
"""Tiles that go through the vision tower at once."""


@torch.inference_mode()
def prefill(model: Llama4Model, inputs: Inputs, cache: SequenceCache, progress: bool = False) -> Tensor:
    """Compute the prompts into the cache in pieces of bounded size; -> logits of their last tokens, [B, V].

    Prompts are padded on the left. Tokens that the cache holds, the same number of each prompt, are skipped. Images are
    encoded once, and their features cut with the tokens.
    """
    ids_BT, mask_BT = inputs.input_ids, inputs.attention_mask.bool()
    assert bool(mask_BT[:, -1].all()), "prompts are padded on the left"
    cache.announce(mask_BT.sum(1).tolist())
    (past,) = set(cache.lengths)
    is_patch_BT = (ids_BT == model.config.image_token_index) & mask_BT
    if past == int(mask_BT.sum()) and (remembered := cache.logits_after(past)) is not None:
        return remembered
    mask_BT = mask_BT & (mask_BT.cumsum(1) > past)
    images = ImageFeatures(model, inputs, is_patch_BT, is_patch_BT & mask_BT, progress)
    batch_size, columns = ids_BT.shape
    size = max(piece_size(model) // batch_size, 1)
    first = int(mask_BT.any(0).int().argmax())
    starts = range(first, columns, size)
    logits_B1V = torch.empty(0)
    with Bar("reading", int(mask_BT.sum()), "tokens", shown=progress) as bar:
        for start in starts:
            piece = slice(start, start + size)
            mask = mask_BT[:, piece]
            with bar.step(int(mask.sum())), only_our_threads(model, cache):
                logits_B1V = model(
                    ids_BT[:, piece],
                    **images.of(piece),
                    cache=cache,
                    attention_mask=mask,
                    last_only=True,
                )
    if batch_size == 1:
        cache.remember_logits(logits_B1V[:, -1])
    return logits_B1V[:, -1]


class ImageFeatures:
    """Image features for the pieces of a prompt, [n * Q, D] in all; tiles whose tokens are all cached are not encoded.

    A tile is a whole picture where layers of cross-attention see it: it is one token, Q = 1.

    Args:
        inputs: the prompts.
        is_patch_BT: where the prompts have `<|patch|>`; is_new_BT: those among them that the cache does not hold.

    Raises:
        Llama4Error: the prompts have more or fewer patches than the tiles give.
    """

    def __init__(
        self,
        model: Llama4Model,
        inputs: Inputs,
        is_patch_BT: Tensor,
        is_new_BT: Tensor,
        progress: bool = False,
    ) -> None:
        self.is_new_BT = is_new_BT
        self.features_ND, self.grids = None, None
        pixel_values, grids = inputs.pixel_values, inputs.image_grids
        if pixel_values is None:
            return
        vision, count = model.config.vision, int(is_patch_BT.sum())
        per_tile = vision.tokens_per_tile if vision is not None else 0
        given = len(pixel_values) * per_tile
        if count != given:
            raise Llama4Error(
                f"the prompt holds {count} {model.image_name} tokens, but its images give {given} features; let the "
                "processor of this model prepare both"
            )
        places_BT = (is_patch_BT.flatten().cumsum(0) - 1).view_as(is_patch_BT)
        tiles, inverse = torch.unique(places_BT[is_new_BT] // max(per_tile, 1), return_inverse=True)
        places_BT[is_new_BT] = inverse * per_tile + places_BT[is_new_BT] % max(per_tile, 1)
        self.places_BT = places_BT
        if len(tiles):
            self.grids = grids[tiles] if grids is not None else None
            self.features_ND = encode_tiles(model, pixel_values[tiles], self.grids, progress)

    def of(self, columns: slice) -> dict[str, Tensor | None]:
        """Those of some columns of the prompts, and their grids, as arguments of the model; {} if the prompts have
        none."""
        if self.features_ND is None:
            return {}
        places = self.places_BT[:, columns][self.is_new_BT[:, columns]]
        features = self.features_ND[places.to(self.features_ND.device)]
        return {"image_features": features, "image_grids": self.grids[places] if self.grids is not None else None}


def encode_tiles(
    model: Llama4Model, pixel_values: Tensor, image_grids: Tensor | None = None, progress: bool = False
) -> Tensor:
    """Tiles [n, 3, A, A] -> image tokens [n * Q, D], a few tiles at a time."""
    features = []
    with Bar("looking at pictures", len(pixel_values), "tiles", shown=progress) as bar:
        for begin in range(0, len(pixel_values), VISION_TILES):
            some = slice(begin, begin + VISION_TILES)
            with bar.step(len(pixel_values[some])):
                grids = image_grids[some] if image_grids is not None else None
                features.append(model.encode_images(pixel_values[some], grids))
    return torch.cat(features)


def piece_size(model: Llama4Model) -> int:
    """Tokens that go through the model at once: 2,048, or fewer where their activations would take more than a quarter
    of the memory that is free."""
    text = model.config.text
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    widest = max(text.intermediate_size_mlp, 3 * text.intermediate_size, heads * text.head_dim)
    per_token = 4 * (4 * text.hidden_size + 3 * widest)  # the residual and what is added to it; what is between
    return max(64, min(PREFILL_TOKENS, free_memory(model.device) // 4 // per_token))
