"""The shape of a model, in frozen dataclasses with Hugging Face's field names: nothing here allocates anything."""

from llama4.config.generation import GENERATION_FILE, GenerationConfig
from llama4.config.hf_json import CONFIG_FILE
from llama4.config.image_json import IMAGE_CONFIG_FILES
from llama4.config.model import Llama4Config
from llama4.config.presets import PRESETS, behemoth, guard4, maverick, scout, tiny
from llama4.config.rope import RopeScaling
from llama4.config.text import CACHE_BLOCK, TextConfig

__all__ = [
    "CACHE_BLOCK",
    "CONFIG_FILE",
    "GENERATION_FILE",
    "IMAGE_CONFIG_FILES",
    "PRESETS",
    "GenerationConfig",
    "Llama4Config",
    "RopeScaling",
    "TextConfig",
    "behemoth",
    "guard4",
    "maverick",
    "scout",
    "tiny",
]
