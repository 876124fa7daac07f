"""Settings of preprocessor_config.json and processor_config.json against transformers' processors on the same files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_models.llama4.preprocess import VariableSizeImageTransform
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from llama4.config import Llama4Config
from llama4.errors import ConfigError
from llama4.families import family_of
from llama4.inputs import Processor
from llama4.vision.tiling import tile_image
from tests import small_model

SIDE = small_model.config().to_dict()["vision_config"]["image_size"]
SIZES = [(28, 28), (91, 60), (11, 200), (300, 31), (5, 5), (200, 180)]
LANCZOS = torch.__version__ >= "2.12"


def picture(width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(width * height).randbytes(3 * width * height))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = small_model.write(tmp_path_factory.mktemp("model"))
    (directory / "preprocessor_config.json").unlink()
    tokenizer = family_of(small_model.config()).load_tokenizer(directory, small_model.config())
    assert tokenizer is not None
    tokenizer.save(directory)
    return directory


def write(directory: Path, image: dict[str, Any] | None = None, **processor: Any) -> Path:
    """Only these two files beside config.json."""
    size = {"height": SIDE, "width": SIDE}
    named = {"image_processor_type": "Llama4ImageProcessor", "processor_class": "Llama4Processor"}
    for name, content in (("preprocessor_config", image), ("processor_config", processor)):
        path = directory / f"{name}.json"
        path.unlink(missing_ok=True)
        if content:
            path.write_text(
                json.dumps(named | {"size": size, "max_patches": 4} | content if content is image else content)
            )
    return directory


def processor_of(directory: Path) -> Processor:
    config = Llama4Config.from_directory(directory)
    tokenizer = family_of(config).load_tokenizer(directory, config)
    assert tokenizer is not None
    return Processor.from_config(tokenizer, config)


SETTINGS: list[dict[str, Any]] = [
    {"resize_to_max_canvas": True},
    {"resize_to_max_canvas": True, "max_patches": 16},
    {"max_patches": 9},
    {"resample": 0, "do_normalize": False},
    {"resample": 2, "do_normalize": False, "resize_to_max_canvas": True},
    {"resample": 3, "do_normalize": False},
    {"resample": "bicubic", "resize_to_max_canvas": True},
    pytest.param({"resample": 1, "do_normalize": False}, marks=pytest.mark.skipif(not LANCZOS, reason="old torch")),  # type: ignore[list-item]
    {"do_normalize": False, "rescale_factor": 1 / 127.5},
    {"do_normalize": None},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 128, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1]},
    {"image_mean": 0.25, "image_std": 0.5},
    {"size": [SIDE, SIDE], "do_convert_rgb": False, "do_center_crop": True, "crop_size": {"height": 9, "width": 9}},
    {"size": SIDE, "do_pad": True, "default_to_square": True, "data_format": "channels_last", "device": "cpu"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_pixels_and_grids_as_transformers(settings: dict[str, Any], model: Path) -> None:
    directory = write(model, settings)
    ours, theirs = processor_of(directory), AutoImageProcessor.from_pretrained(directory)
    for size in SIZES:
        image = picture(*size)
        tiles, wanted = ours.tile(image), theirs(image, return_tensors="pt")
        assert [tiles.rows, tiles.cols] == wanted["aspect_ratios"].tolist()[0], size
        pixels = wanted["pixel_values"].reshape(tiles.pixel_values.shape)
        if pixels.dtype == torch.bfloat16:  # transformers rounds after each of three steps
            std = torch.tensor(settings.get("image_std", 0.5)).min()
            torch.testing.assert_close(tiles.pixel_values, pixels.float(), rtol=2**-7, atol=float(2**-7 / std))
        else:
            torch.testing.assert_close(tiles.pixel_values, pixels.float(), rtol=1e-6, atol=1e-6)


def test_the_most_tiles_that_a_picture_fills(model: Path) -> None:
    tiles = [
        len(processor_of(write(model, {"resize_to_max_canvas": on})).tile(picture(28, 28)).pixel_values)
        for on in (False, True)
    ]
    assert tiles == [1, 5]


@pytest.mark.parametrize("size", [(28, 28), (10, 200), (27, 9), (105, 9), (61, 47), (400, 300)])
def test_the_largest_canvas_as_meta(size: tuple[int, int]) -> None:
    """In exact arithmetic, as Meta's; transformers has float32 there, and one pixel less in some sizes, as (27, 9)."""
    image = picture(*size)
    metas, grid = VariableSizeImageTransform(SIDE)(image, max_num_chunks=16, resize_to_max_canvas=True)
    ours = tile_image(image, SIDE, 16, resize_to_max_canvas=True)
    assert (ours.rows, ours.cols) == grid
    levels = (ours.pixel_values[: len(metas)] - metas).abs() / 2 * 255
    assert levels.max().round() <= 2  # PIL rounds after each of its two passes


@pytest.mark.parametrize("nested", [False, True])
def test_which_file_counts_and_the_prompt_of_a_picture(nested: bool, model: Path) -> None:
    """image_processor in processor_config.json beats preprocessor_config.json; other names there do not count."""
    inner = {"image_processor_type": "Llama4ImageProcessor", "size": {"height": SIDE, "width": SIDE}, "max_patches": 9}
    inner |= {"resize_to_max_canvas": True}
    processor: dict[str, Any] = {"image_processor": inner} if nested else {"max_patches": 2}
    tokens = {"start_of_image_token": "<a>", "patch_token": "<b>", "tile_x_separator_token": "<c>"}
    directory = write(model, {"max_patches": 3}, patch_size=14, pixel_shuffle_ratio=0.5, **processor, **tokens)
    ours, theirs = processor_of(directory), AutoProcessor.from_pretrained(directory)
    image = picture(90, 60)
    wanted = theirs(text="<|image|>", images=[image], return_tensors="pt", add_special_tokens=False)
    tiles = ours.tile(image)
    assert len(tiles.pixel_values) == len(wanted["pixel_values"]) == (7 if nested else 3)
    ids = ours([{"role": "user", "content": [{"type": "image", "image": image}]}]).input_ids[0].tolist()
    expected = wanted["input_ids"][0].tolist()
    assert any(ids[i : i + len(expected)] == expected for i in range(len(ids)))


@pytest.mark.parametrize(
    ("image", "processor", "message"),
    [
        ({"size": {"height": 28, "width": 56}}, {}, r"preprocessor_config\.json has size = .*squares of 28 pixels"),
        ({"size": {"shortest_edge": 28}}, {}, "squares of 28 pixels"),
        ({"size": {"height": 56, "width": 56}}, {}, "squares of 28 pixels"),
        ({"do_resize": False}, {}, "has do_resize = False"),
        ({"do_rescale": False}, {}, "do_normalize without do_rescale"),
        ({"resample": 4}, {}, r"resample = 4; filters that can be computed are 0 \(nearest-exact\)"),
        ({"max_patches": 0}, {}, "max_patches = 0"),
        ({"max_patches": 10**9}, {}, "max_patches = 1000000000, .*at most 1,024"),
        ({"image_mean": [0.5, "a", 0.5]}, {}, "image_mean = 'a', .*a number"),
        ({"image_mean": [0.5, 0.5]}, {}, "image_mean = .*3 channels"),
        ({"image_std": "x"}, {}, "image_std"),
        ({"image_std": 0}, {}, "image_std"),
        ({"rescale_factor": 0}, {}, "rescale_factor = 0"),
        ({"image_processor_type": "CLIPImageProcessor"}, {}, "computes 'Llama4ImageProcessor' or"),
        ({}, {"image_processor": {"do_resize": False}}, r"processor_config\.json \(image_processor\) has do_resize"),
        ({}, {"image_processor": 3}, "must be a JSON object"),
        ({}, {"patch_size": 28}, r"patch_size = 28, but vision_config in config\.json has 14"),
        ({}, {"pixel_shuffle_ratio": 1.0}, "pixel_shuffle_ratio"),
        ({}, {"image_token": "<img>"}, "image_token = '<img>'"),
        ({}, {"processor_class": "LlavaProcessor"}, "processor_class"),
    ],
)
def test_what_cannot_be_computed_is_named(
    image: dict[str, Any], processor: dict[str, Any], message: str, model: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        Llama4Config.from_directory(write(model, image, **processor))


def test_settings_are_written_as_they_are_read(model: Path) -> None:
    settings = {"resize_to_max_canvas": True, "resample": 3, "rescale_factor": 0.01, "image_mean": [0.1, 0.2, 0.3]}
    config = Llama4Config.from_directory(write(model, settings))
    assert config.preprocessor_dict().items() >= settings.items()
