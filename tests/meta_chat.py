"""Meta's `ChatFormat`, on its genuine tokenizer and with Scout's image sizes."""

from __future__ import annotations

from functools import cache

import llama_models.llama4.tokenizer as meta
from llama_models.llama4.args import Size, VisionArgs
from PIL import ImageFile

truncated = ImageFile.LOAD_TRUNCATED_IMAGES
from llama_models.llama4.chat_format import ChatFormat, TransformedImage  # noqa: E402

ImageFile.LOAD_TRUNCATED_IMAGES = truncated  # Meta's module switches it on for the whole process

__all__ = ["ChatFormat", "TransformedImage", "chat_format"]


@cache
def chat_format() -> ChatFormat:
    vision = VisionArgs(
        image_size=Size(height=336, width=336),
        patch_size=Size(height=14, width=14),
        dim=1408,
        n_layers=34,
        n_heads=16,
        mlp_ratio=4.0,
        output_dim=4096,
        pixel_shuffle_ratio=0.5,
    )
    return ChatFormat(meta.Tokenizer.get_instance(), vision)
