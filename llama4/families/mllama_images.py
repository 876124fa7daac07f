"""How Llama 3.2 Vision's pictures are prepared: what stands in preprocessor_config.json and processor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama4.config import image_json
from llama4.config.fields import FieldTable
from llama4.config.image_json import IMAGE_FILE, PROCESSOR_FILE, read_image_config, write_image_config
from llama4.reading import read_json
from llama4.vision.config import VisionConfig

_MAX_TILES = "max_image_tiles"

IMAGE = replace(
    image_json.IMAGE,
    used=(
        *("size", _MAX_TILES, "resample"),
        *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    ),
    without_effect={name: why for name, why in image_json.IMAGE.without_effect.items() if name != "do_pad"},
    fixed={
        **dict.fromkeys(("do_resize", "do_pad"), (True,)),
        "image_processor_type": ("MllamaImageProcessor", "MllamaImageProcessorFast", "MllamaImageProcessorPil"),
        "processor_class": ("MllamaProcessor",),
    },
)
PROCESSOR = FieldTable(
    PROCESSOR_FILE,
    used=("image_processor", "chat_template"),
    without_effect={"tokenizer": "tokenizer_config.json counts", "auto_map": "names of classes; no code is run"},
    fixed={"processor_class": ("MllamaProcessor",)},
)


def read(directory: Path, vision: VisionConfig) -> dict[str, Any]:
    """The fields of `vision` that the files of a directory give.

    Raises:
        ConfigError: one asks for what cannot be computed.
    """
    paths = (directory / name for name in (PROCESSOR_FILE, IMAGE_FILE))
    processor, image = (read_json(path) if path.is_file() else {} for path in paths)
    PROCESSOR.check(processor)
    if "image_processor" in processor:
        return read_image_config(
            processor["image_processor"], vision, f"{PROCESSOR_FILE} (image_processor)", IMAGE, _MAX_TILES
        )
    return read_image_config(image, vision, IMAGE_FILE, IMAGE, _MAX_TILES)


def write(vision: VisionConfig) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The contents of preprocessor_config.json and processor_config.json."""
    content = write_image_config(vision)
    del content["resize_to_max_canvas"]
    content |= {_MAX_TILES: content.pop("max_patches"), "do_pad": True}
    content |= {"image_processor_type": "MllamaImageProcessor", "processor_class": "MllamaProcessor"}
    return content, {"processor_class": "MllamaProcessor"}
