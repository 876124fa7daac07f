"""How pictures are prepared: preprocessor_config.json and processor_config.json <-> fields of `VisionConfig`.

As in transformers, `image_processor` in the latter counts before the former, and a field that is absent means what
`Llama4ImageProcessor` has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama4.config.fields import FieldTable
from llama4.config.typed import read_value
from llama4.errors import ConfigError
from llama4.vision.config import RESAMPLE, VisionConfig

IMAGE_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
IMAGE_CONFIG_FILES = (IMAGE_FILE, PROCESSOR_FILE)
IMAGE_FIELDS = ("max_tiles", "resize_to_max_canvas", "resample", "rescale_factor", "image_mean", "image_std")
"""Fields of `VisionConfig` that are not in config.json but in the image processor's files."""

IMAGE = FieldTable(
    IMAGE_FILE,
    used=(
        *("size", "max_patches", "resize_to_max_canvas", "resample"),
        *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    ),
    without_effect={
        "do_convert_rgb": "every picture becomes RGB",
        **dict.fromkeys(("do_center_crop", "crop_size", "do_pad", "pad_size"), "the image processor does neither"),
        **dict.fromkeys(("default_to_square", "image_seq_length"), "the image processor does not read it"),
        **dict.fromkeys(("data_format", "input_data_format", "return_tensors"), "of input and output"),
        **dict.fromkeys(("device", "disable_grouping"), "of speed"),
        **dict.fromkeys(("auto_map", "feature_extractor_type"), "names of classes; no code is run"),
    },
    fixed={
        "do_resize": (True,),
        "image_processor_type": ("Llama4ImageProcessor", "Llama4ImageProcessorFast"),
        "processor_class": ("Llama4Processor",),
    },
)

PROCESSOR = FieldTable(
    PROCESSOR_FILE,
    used=("image_processor", "patch_size", "pixel_shuffle_ratio", "chat_template"),
    without_effect={
        "tokenizer": "tokenizer_config.json counts",
        **dict.fromkeys(
            ("fake_image_token", "start_of_image_token", "end_of_image_token"), "Llama 4's names are written"
        ),
        **dict.fromkeys(
            ("patch_token", "tile_x_separator_token", "tile_y_separator_token"), "Llama 4's names are written"
        ),
        "auto_map": "names of classes; no code is run",
    },
    fixed={"processor_class": ("Llama4Processor",), "image_token": ("<|image|>",)},
)


def read_image_files(
    processor: Mapping[str, Any], preprocessor: Mapping[str, Any], vision: VisionConfig
) -> dict[str, Any]:
    """The fields of `vision` that the contents of processor_config.json and preprocessor_config.json give.

    Raises:
        ConfigError: one asks for what cannot be computed.
    """
    PROCESSOR.check(processor)
    for name in ("patch_size", "pixel_shuffle_ratio"):
        if processor.get(name, getattr(vision, name)) != getattr(vision, name):
            raise ConfigError(
                f"{PROCESSOR_FILE} has {name} = {processor[name]!r}, but vision_config in config.json has "
                f"{getattr(vision, name)!r}; make them agree"
            )
    if "image_processor" in processor:
        return read_image_config(processor["image_processor"], vision, f"{PROCESSOR_FILE} (image_processor)")
    return read_image_config(preprocessor, vision)


def read_image_config(
    content: Mapping[str, Any],
    vision: VisionConfig,
    place: str = IMAGE_FILE,
    table: FieldTable = IMAGE,
    max_tiles: str = "max_patches",
) -> dict[str, Any]:
    """Args:
        place: the file, and the object in it, for errors.
        table: its fields.
        max_tiles: the field that says how many tiles a picture may have.

    Raises:
        ConfigError: a value that cannot be.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(f"{place} must be a JSON object, not {content!r:.80}")
    dataclasses.replace(table, place=place).check(content)
    fields: dict[str, Any] = {}
    side = _square(content["size"]) if content.get("size") is not None else vision.image_size
    if side != vision.image_size:
        raise ConfigError(
            f"{place} has size = {content['size']!r}, but the model's tiles are squares of {vision.image_size} pixels "
            f'(image_size in config.json); write {{"height": {vision.image_size}, "width": {vision.image_size}}}'
        )
    if content.get(max_tiles) is not None:
        fields["max_tiles"] = _whole(content[max_tiles], max_tiles, place)
    if content.get("resize_to_max_canvas"):
        fields["resize_to_max_canvas"] = True
    if content.get("resample") is not None:
        fields["resample"] = _resample(content["resample"], place)
    rescales, normalises = (bool(content.get(name, True)) for name in ("do_rescale", "do_normalize"))
    if normalises and not rescales:
        raise ConfigError(
            f"{place} has do_normalize without do_rescale, which transformers does not compute either; set do_rescale "
            "to true, and rescale_factor to what the model was trained with"
        )
    if not rescales:
        fields["rescale_factor"] = 1.0
    elif content.get("rescale_factor") is not None:
        fields["rescale_factor"] = _number(content["rescale_factor"], "rescale_factor", place)
    for name, without in (("image_mean", 0.0), ("image_std", 1.0)):
        if not normalises:
            fields[name] = (without,) * 3
        elif content.get(name) is not None:
            fields[name] = _channels(content[name], name, place)
    return fields


def write_image_config(vision: VisionConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json, for transformers' Llama4ImageProcessor."""
    return {
        "image_processor_type": "Llama4ImageProcessorFast",
        "processor_class": "Llama4Processor",
        "size": {"height": vision.image_size, "width": vision.image_size},
        "max_patches": vision.max_tiles,
        "resize_to_max_canvas": vision.resize_to_max_canvas,
        "resample": RESAMPLE[vision.resample],
        "do_rescale": True,
        "rescale_factor": vision.rescale_factor,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def write_processor_config(vision: VisionConfig) -> dict[str, Any]:
    """The content of processor_config.json, for transformers' Llama4Processor."""
    return {
        "processor_class": "Llama4Processor",
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        "image_token": "<|image|>",
        "fake_image_token": "<|image|>",
    }


def _square(size: Any) -> int | None:
    """The side that a `size` means; None if it means no square."""
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")]
    sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else [size]
    return sides[0] if type(sides[0]) is int and sides[0] == sides[-1] else None


def _resample(value: Any, place: str) -> str:
    known = {code: name for name, code in RESAMPLE.items()} | {name: name for name in RESAMPLE}
    name = known.get(value.lower() if isinstance(value, str) else value) if isinstance(value, (str, int)) else None
    if name is None:
        names = ", ".join(f"{code} ({name})" for name, code in RESAMPLE.items())
        raise ConfigError(f"{place} has resample = {value!r:.80}; filters that can be computed are {names}")
    return name


def _whole(value: Any, name: str, place: str) -> int:
    number: int = read_value(int, value, name, place)
    if number < 1:
        raise ConfigError(f"{place} has {name} = {number}; it must be at least 1")
    return number


def _number(value: Any, name: str, place: str) -> float:
    number: float = read_value(float, value, name, place)
    if number <= 0:
        raise ConfigError(f"{place} has {name} = {number}; it must be above 0")
    return number


def _channels(value: Any, name: str, place: str) -> tuple[float, float, float]:
    """One number per channel, or one for all."""
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    if len(values) != 3:
        raise ConfigError(f"{place} has {name} = {value!r:.80}; it must be a number for each of 3 channels, or for all")
    if name == "image_std" and 0 in values:
        raise ConfigError(f"{place} has {name} = {value!r:.80}; what pixels are divided by cannot be 0")
    red, green, blue = (read_value(float, each, name, place) for each in values)
    return red, green, blue
