"""Everything a user may hand over as an image, and everything that is none."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from llama4.errors import ImageError
from llama4.vision import images
from llama4.vision.images import load_image
from llama4.vision.limits import LIMITS


def scene() -> Image.Image:
    image = Image.new("RGB", (40, 24), (10, 200, 30))
    ImageDraw.Draw(image).rectangle((2, 3, 12, 9), fill=(250, 0, 90))
    return image


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.mode == right.mode == "RGB" and left.size == right.size and left.tobytes() == right.tobytes()


def test_every_kind_of_source(tmp_path: Path) -> None:
    data = encoded(scene())
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    bare, wrapped = base64.b64encode(data).decode(), base64.encodebytes(data).decode()
    unpadded = base64.b64encode(data + bytes(1 + -len(data) % 3)).decode().removesuffix("==")
    assert len(unpadded) % 4
    for source in (path, str(path), data, bytearray(data), memoryview(data), url, bare, wrapped, unpadded, scene()):
        assert same(load_image(source), scene())


def test_a_given_image_is_not_changed() -> None:
    image = scene().convert("RGBA")
    before = image.tobytes()
    load_image(image)
    assert image.mode == "RGBA"
    assert image.tobytes() == before
    rgb = scene()
    assert load_image(rgb) is not rgb


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(io.BytesIO(encoded(scene(), exif=exif)))
    assert same(load_image(encoded(scene(), exif=exif)), ImageOps.exif_transpose(image))
    if orientation == 6:  # turned by 90 degrees: the rectangle at the top left of the file belongs at the top right
        assert load_image(encoded(scene(), exif=exif)).getpixel((24 - 5, 5)) == (250, 0, 90)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_ignored() -> None:
    data = encoded(scene(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffgarbage")
    assert same(load_image(data), scene())


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    key = Image.new("RGB", (4, 4), (1, 2, 3))
    assert load_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(half)).getpixel((0, 0)) == (255, 127, 127)
    assert load_image(Image.new("LA", (4, 4), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("PA", (4, 4), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("RGBa", (4, 4), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(palette)).getpixel((0, 0)) == (0, 0, 255)
    assert load_image(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(key, transparency=(1, 2, 3))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_convert_as_in_pil(mode: str) -> None:
    image = scene().convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (40, 24), (120, 130, 140))
    assert same(load_image(image), image.convert("RGB"))


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = load_image(encoded(image, "JPEG")).getpixel((8, 8))  # type: ignore[misc]
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("value", [0, 1, 128, 129, 300, 32768, 65535])
def test_16_bits_are_scaled_not_clipped(mode: str, value: int) -> None:
    expected = round(value / 257)
    image = Image.new(mode, (3, 3), value)
    assert load_image(image).getpixel((1, 1)) == (expected,) * 3
    if mode != "I;16B":
        format = "PNG" if mode == "I;16" else "TIFF"
        assert load_image(encoded(image, format)).getpixel((1, 1)) == (expected,) * 3


def test_pixels_of_unknown_range_are_refused() -> None:
    image = Image.new("I", (2, 2), 70000)
    image.putpixel((0, 0), 0)
    with pytest.raises(ImageError, match="0 to 70000; save it with 8 or 16 bits"):
        load_image(image)
    with pytest.raises(ImageError, match="floating-point"):
        load_image(Image.new("F", (2, 2), 0.5))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    assert same(load_image(data), frames[0])


def test_no_such_file_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no such image file: .*nowhere\.png"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a directory; give the file of an image"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="the name of an image is empty"):
        load_image("")
    with pytest.raises(ImageError, match=r"cannot open|no such"):
        load_image("x" * 5000)
    with pytest.raises(ImageError, match="cannot open"):
        load_image("a\0b")
    with pytest.raises(ImageError, match="no URL"):
        load_image("ftp://host/a.png")


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"notes\.png is not an image"):
        load_image(tmp_path / "notes.png")
    with pytest.raises(ImageError, match=r"empty\.png is empty"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match="image of 0 bytes is empty"):
        load_image(b"")
    with pytest.raises(ImageError, match="cannot be a int"):
        load_image(5)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="not an image"):  # PostScript would run in an interpreter
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


def test_arrays() -> None:
    picture = picture_of_noise()
    array = np.asarray(picture)
    assert load_image(array).tobytes() == picture.tobytes()
    assert load_image(array[::-1, ::2]).size == (32, 64)
    grey = picture.convert("L")
    assert load_image(np.asarray(grey)).tobytes() == grey.convert("RGB").tobytes()
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    assert load_image(np.asarray(clear)).getcolors() == [(64 * 64, (255, 255, 255))]
    for wrong, message in (
        (array / 255, r"must hold uint8, this one float64; scale it"),
        (array.astype(int), r"must hold uint8, this one int64; convert it"),
        (array.transpose(2, 0, 1), r"shape \[H, W, 3\], this one \[3, 64, 64\]; .*transpose\(1, 2, 0\)"),
        (array[None], r"this one \[1, 64, 64, 3\]"),
        (array[:0], "has no pixels"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(wrong)
    with pytest.raises(ImageError, match=r"cannot be a Tensor; .*permute"):
        load_image(torch.zeros(3, 4, 4, dtype=torch.uint8))  # type: ignore[arg-type]


def test_file_urls(tmp_path: Path) -> None:
    path, picture = tmp_path / "größe 1%.png", picture_of_noise()
    picture.save(path)
    for url in (path.as_uri(), path.as_uri().replace("file://", "FILE://localhost")):
        assert load_image(url).tobytes() == picture.tobytes()
    with pytest.raises(ImageError, match=r"no such image file: .*none\.png"):
        load_image((tmp_path / "none.png").as_uri())
    with pytest.raises(ImageError, match="another machine"):
        load_image("file://host/a.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files(format: str) -> None:
    data = encoded(picture_of_noise(), format)
    for keep in (len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(ImageError, match=r"truncated or damaged|not an image"):
            load_image(data[:keep])
    assert load_image(data).size == (64, 64)


def picture_of_noise() -> Image.Image:
    return Image.effect_noise((64, 64), 90).convert("RGB")


def test_no_pixels() -> None:
    with pytest.raises(ImageError, match=r"no pixels \(0 x 5\)"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_decompression_bomb(side: int) -> None:
    """A PNG of a few hundred bytes that claims 100 or 900 million pixels; PIL refuses the other by itself."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match=r"too large.*max_pixels of ImageLimits"):
        load_image(data)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png,abc", "no base64 data URL"),
        ("data:image/png;base64", "no base64 data URL"),
        ("data:image/png;base64,@@@", "not base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
    ],
)
def test_broken_data_urls(url: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(url)


def test_base64_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file comes first, whatever its name."""
    small = Image.new("RGB", (1, 1), (255, 0, 0))
    for format in ("GIF", "BMP", "PNG", "JPEG", "WEBP"):
        assert load_image(base64.b64encode(encoded(small, format)).decode()).size == (1, 1)
    monkeypatch.chdir(tmp_path)
    name = base64.b64encode(encoded(small, "GIF")).decode().replace("/", "A")
    (tmp_path / name).write_bytes(encoded(scene()))
    assert same(load_image(name), scene())
    with pytest.raises(ImageError, match=r"no such image file: iVBOR.*; in base64 it is truncated or damaged"):
        load_image(base64.b64encode(encoded(scene())[:-20]).decode())
    with pytest.raises(ImageError, match=r"no such image file: aGVs.*; in base64 it is not an image that can"):
        load_image("aGVsbG8h" * 10_000)
    with pytest.raises(ImageError, match=r"no such image file: photo123; check the path$"):
        load_image("photo123")
    with pytest.raises(ImageError, match=r"no such image file: @@@.*check the path$"):
        load_image("@" * 5000)


def test_long_data_urls_are_not_printed() -> None:
    with pytest.raises(ImageError) as caught:
        load_image("data:image/png;base64," + "aGVsbG8h" * 10_000)
    assert len(str(caught.value)) < 400


def progressive(scans: int) -> bytes:
    """A JPEG whose scan number 2, of a few bytes, comes so many times."""
    data = encoded(scene(), "JPEG", progressive=True)
    begins = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    return data[: begins[1]] + data[begins[1] : begins[2]] * scans + data[begins[2] :]


def test_scans_of_a_jpeg_are_counted() -> None:
    assert same(load_image(progressive(1)), load_image(encoded(scene(), "JPEG", progressive=True)))
    with pytest.raises(ImageError, match=r"a JPEG of 2,00\d scans, more than 100"):
        load_image(progressive(2000))
    limits = dataclasses.replace(LIMITS, max_scans=3000)
    assert load_image(progressive(2000), limits).size == scene().size
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 30_000) + b"\xff\xda" * 15_000  # not scans of this image
    data = encoded(scene(), "JPEG")
    assert load_image(data[:2] + thumbnail + data[2:]).size == scene().size


def test_files_that_are_none(tmp_path: Path) -> None:
    """Reading them would not end."""
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(ImageError, match="no regular file"):
            load_image(path)


def test_bytes_are_limited(tmp_path: Path) -> None:
    data = encoded(scene(), "BMP") + b"\0" * 2**21
    (tmp_path / "a.bmp").write_bytes(data)
    limits = dataclasses.replace(LIMITS, max_bytes=2**21)
    for source in (data, tmp_path / "a.bmp"):
        assert load_image(source).size
        with pytest.raises(ImageError, match=r"larger than 2 MiB.*max_bytes"):
            load_image(source, limits)


@pytest.mark.parametrize("begin", ["data:image/png;base64,", "", "data:", "data:image/png;base64,%2B"])
@pytest.mark.parametrize("files", [True, False])
def test_a_text_that_is_too_long_is_not_copied(begin: str, files: bool) -> None:
    """A data URL of a small picture is read; one of 8 MiB is refused before it takes another 1."""
    limits = dataclasses.replace(LIMITS, max_bytes=2**20, files=files)
    small = "data:image/png;base64," + base64.b64encode(encoded(scene(), "PNG")).decode()
    assert load_image(small, limits).size == load_image(small.replace("+", "%2B"), limits).size == scene().size
    text = begin + "A" * 2**23
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"larger than 1 MiB.*max_bytes"):
            load_image(text, limits)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "YCbCr", "HSV"])
def test_bands_convert_as_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    elif mode == "P":
        image = image.convert("RGB").quantize(17)
        image.info["transparency"] = 3
    else:
        image = (image if mode in ("RGBA", "LA") else image.convert("RGB")).convert(mode)
    whole = load_image(image)
    monkeypatch.setattr(images, "BAND_PIXELS", 100)
    assert same(load_image(image), whole)
