"""From pixels to image features: loading, tiling, the vision tower, and the projection into the decoder."""

from vision.config import VisionConfig
from vision.encoder import VisionModel
from vision.images import ImageError, load_image
from vision.projector import Projector
from vision.tiling import tile_image

__all__ = ["ImageError", "Projector", "VisionConfig", "VisionModel", "load_image", "tile_image"]
