"""What preparing a picture takes: at most 4 bytes a pixel above the decoded picture, and 100 MB."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, features

from llama4.errors import ImageError
from llama4.vision import images, tiling
from llama4.vision.images import load_image
from llama4.vision.limits import ImageLimits

EACH = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:4])  # AVIF's decoder takes half a megabyte for each core
from PIL import Image
from llama4.vision.images import load_image
from llama4.vision.limits import ImageLimits
from llama4.vision.tiling import tile_image

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

tile_image(load_image(Image.new("RGBA", (700, 500))))  # what is imported and allocated once
limits = ImageLimits(max_decoding=10**10) if sys.argv[1] == "decode" else ImageLimits()
for path in sys.argv[2:]:  # each in a process of its own, whose peak begins at what it has now
    if os.fork() == 0:
        before = peak()
        image = load_image(path, limits)
        pixels = image.width * image.height
        if sys.argv[1] == "prepare":
            tile_image(image)
        print(pixels, peak() - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def taken(what: str, paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Of each picture the pixels, and the bytes that it takes to "prepare" it or to "decode" it."""
    command = [sys.executable, "-c", EACH, what, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    return [(int(pixels), int(used)) for pixels, used in lines]


def png(width: int, height: int, colour: int, channels: int) -> bytes:
    """A few bytes that hold a picture of any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    line = b"\0" + b"\x80" * (width * channels)
    lines = max(1, min(height, 2**20 // len(line)))
    data = b"".join(packer.compress(line * min(lines, height - done)) for done in range(0, height, lines))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data + packer.flush()) + chunk(b"IEND", b"")


PICTURES = [(1, 1_000_000, 0, 1), (1_000_000, 3, 2, 3), (4000, 5000, 6, 4), (30, 600_000, 4, 2)]
"""Width, height, PNG's kind of colour and its channels: one wide, three high, RGBA, narrow and grey with alpha."""


@needs_proc
def test_memory(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(len(PICTURES))]
    for path, picture in zip(paths, PICTURES, strict=True):
        path.write_bytes(png(*picture))
    for (width, height, _, _), (pixels, used) in zip(PICTURES, taken("prepare", paths), strict=True):
        assert pixels == width * height
        decoded = 4 * pixels + 8 * height  # as PIL has it: 4 bytes a pixel, and an address for each row
        assert used < decoded + 4 * pixels + 100e6, (width, height)


FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "WebP": ("RGB", "WEBP", {"lossless": True, "quality": 0, "method": 0}),
    "WebP with alpha": ("RGBA", "WEBP", {"method": 0}),
    "JPEG 2000": ("RGBA", "JPEG2000", {}),
    "AVIF": ("RGBA", "AVIF", {"speed": 10, "quality": 30}),
    "JPEG in scans": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "CMYK in scans": ("CMYK", "JPEG", {"progressive": True}),
    "GIF": ("P", "GIF", {}),
    "TIFF": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "PPM": ("RGB", "PPM", {}),
    "BMP": ("RGB", "BMP", {}),
    "TGA": ("RGB", "TGA", {"compression": "tga_rle"}),
    "grey PNG of 16 bits": ("I;16", "PNG", {"compress_level": 1}),
}
MEBIPIXELS = 5


@needs_proc
def test_decoders(tmp_path: Path) -> None:
    """Bytes a pixel do not exceed what is said of a format, or what is allowed: a picture at its limit takes no more
    than 100 MB beyond it."""
    noise = Image.effect_noise((2048, 512 * MEBIPIXELS), 50)
    wanted: dict[Path, float] = {}
    for mode, name, options in FORMS.values():
        if features.check({"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}.get(name, "zlib")):
            path = tmp_path / f"{len(wanted)}.{name}"
            image = Image.merge(mode, [noise] * len(mode)) if mode in ("RGB", "RGBA", "CMYK") else noise.convert(mode)
            image.save(path, name, **options)
            kind = f"JPEG of several scans, {mode}" if options.get("progressive") else name
            own = images.DECODERS.get(kind, images.ALLOWED)  # and, if it is named there, the file
            wanted[path] = 4 + own + (kind in images.DECODERS) * path.stat().st_size / image.width / image.height
    used = {path: used / pixels for path, (pixels, used) in zip(wanted, taken("decode", [*wanted]), strict=True)}
    print({path.name: round(value, 1) for path, value in used.items()})
    band = 30e6 / (1 << 20) / MEBIPIXELS  # what is converted at a time
    assert not {path.name: value for path, value in used.items() if value > wanted[path] + band}


def test_a_decoder_that_would_take_too_much() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "WEBP")
    with pytest.raises(ImageError, match=r"too large for WEBP \(64 x 64\).*save it as PNG, or raise max_decoding"):
        load_image(file.getvalue(), ImageLimits(max_decoding=10_000))
    assert load_image(file.getvalue(), ImageLimits(max_decoding=30_000)).size == (64, 64)


def test_a_long_picture_of_blocks_and_a_tiff_of_many_bits() -> None:
    thin, wide = io.BytesIO(), io.BytesIO()
    if features.check("jpg_2000"):
        Image.new("L", (1000, 1)).save(thin, "JPEG2000")
        with pytest.raises(ImageError, match=r"too large for JPEG2000 \(1000 x 1\)"):
            load_image(thin.getvalue(), ImageLimits(max_decoding=100_000))
    Image.new("CMYK", (64, 64)).save(wide, "TIFF")
    load_image(wide.getvalue(), ImageLimits(max_decoding=1))
    of_16_bits = wide.getvalue().replace(b"\x08\0\x08\0\x08\0\x08\0", b"\x10\0\x10\0\x10\0\x10\0")
    with pytest.raises(ImageError, match="too large for TIFF of more than 32 bits"):
        load_image(of_16_bits, ImageLimits(max_decoding=1))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_webp_is_as_pil_decodes_it(mode: str) -> None:
    file = io.BytesIO()
    image = Image.merge(mode, [Image.effect_noise((60, 40), 50) for _ in mode])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, "WEBP", save_all=True, append_images=[image.rotate(90)], exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file))
    white = Image.new("RGB", upright.size, (255, 255, 255))
    white.paste(upright, mask=upright.getchannel("A") if mode == "RGBA" else None)
    assert load_image(file.getvalue()).tobytes() == white.tobytes()


def test_a_file_of_74_bytes() -> None:
    """Claims 1 x 89,478,485 pixels, for which resizing took 90 GB."""
    with pytest.raises(ImageError, match=r"more than 1,000,000 pixels on a side.*max_side"):
        load_image(png(1, 89_478_485, 0, 1)[:74])


@pytest.mark.filterwarnings("ignore:Image was not the expected size")  # PIL's, of a size that the file makes up
def test_an_icon_is_not_opened_before_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL decodes it when it opens it, whatever size it says it has."""
    inner = png(3000, 1000, 0, 1)
    icon = b"\0\0\1\0\1\0" + struct.pack("<8xII", len(inner), 22) + inner
    assert load_image(icon).size == (3000, 1000)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *_: pytest.fail("it is decoded"))
    with pytest.raises(ImageError, match=r"too large \(3000 x 1000.*max_pixels"):
        load_image(icon, ImageLimits(max_pixels=1_000_000))


@pytest.mark.parametrize("change", ["one scan", "no interleaving"])
def test_a_jpeg_whose_decoder_keeps_coefficients(change: str) -> None:
    """As of several scans, though there is but one."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=change == "one scan")
    data = file.getvalue()
    at = data.index(b"\xff\xda")
    cut = data[: data.index(b"\xff\xda", at + 2)] if change == "one scan" else data
    if change == "no interleaving":  # as if the first scan were of the first component alone
        cut = data[:at] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + data[at + 14 :]
    with pytest.raises(ImageError, match=r"too large for JPEG of several scans, RGB.*max_decoding"):
        load_image(cut, ImageLimits(max_decoding=1000))


def test_columns_first_is_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, 3, 900, 50), dtype=torch.uint8, generator=generator)
    exact = F.interpolate(noise.double(), (336, 336), mode="bilinear", align_corners=False, antialias=True)[0]
    rows_first = tiling._resize(noise, 336, 336, "bilinear")
    monkeypatch.setattr(tiling, "MAX_WIDENED_PIXELS", 0)
    columns_first = tiling._resize(noise, 336, 336, "bilinear")
    assert not torch.equal(rows_first, columns_first)
    for resized in (rows_first, columns_first):
        assert (resized.double() - exact).abs().max() < 1.1


def test_bands_hold_every_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO(png(61, 47, 2, 3))
    image = Image.open(file)
    image.putpixel((60, 46), (1, 2, 3))
    whole = tiling._pixels(image)
    monkeypatch.setattr(tiling, "BAND_PIXELS", 200)
    assert torch.equal(tiling._pixels(image), whole)
    assert whole[0, :, 46, 60].tolist() == [1, 2, 3]
