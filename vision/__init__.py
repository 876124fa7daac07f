"""From pixels to image features: loading, tiling, the vision tower, and the projection into the decoder."""

from llama4.vision.config import VisionConfig
from llama4.vision.encoder import VisionModel
from llama4.vision.images import ImageError, load_image
from llama4.vision.projector import Projector
from llama4.vision.tiling import tile_image

__all__ = ["ImageError", "Projector", "VisionConfig", "VisionModel", "load_image", "tile_image"]
