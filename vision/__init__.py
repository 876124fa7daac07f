"""From pixels to image features: loading, tiling, the vision tower, and the projection into the decoder.

The folder stands at the top of the repository and is installed as `llama4.vision`. Names are imported when they are
first used, so that reading a configuration does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama4.errors import ImageError
    from llama4.vision.config import VisionConfig
    from llama4.vision.encoder import VisionModel
    from llama4.vision.images import load_image
    from llama4.vision.projector import Projector
    from llama4.vision.tiling import tile_image

_HOME = {
    "ImageError": "llama4.errors",
    "Projector": "llama4.vision.projector",
    "VisionConfig": "llama4.vision.config",
    "VisionModel": "llama4.vision.encoder",
    "load_image": "llama4.vision.images",
    "tile_image": "llama4.vision.tiling",
}

__all__ = ["ImageError", "Projector", "VisionConfig", "VisionModel", "load_image", "tile_image"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
