"""Reading an image from a path, a URL, bytes or PIL -> an upright RGB image."""

from __future__ import annotations

import base64
import binascii
import errno
import io
import math
import stat
import urllib.parse
import urllib.request
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import BmpImagePlugin, Image, ImageOps, PngImagePlugin

from llama4.errors import ImageError
from llama4.vision.download import download
from llama4.vision.limits import LIMITS, ImageLimits

MIN_IMAGE_BYTES = 32
"""Of an image file with a pixel: a GIF's is 35, a PNG's 67."""

BAND_PIXELS = 2**21
"""Of the band of an image that is converted to RGB at a time."""

ALLOWED = 4
"""Bytes a pixel beside the decoded picture that preparing one may take, and `max_decoding` beyond that."""

DECODERS = {
    **{"WEBP": 8.1, "AVIF": 17.0, "JPEG2000": 25.0, "TIFF of more than 32 bits": 8.3},
    **{"JPEG of several scans, RGB": 6.2, "JPEG of several scans, CMYK": 8.0},
}
"""Bytes a pixel that some formats' decoders take beside the decoded picture and the file, as measured; of AVIF with 16
bits a sample (13 with 8), of TIFF in a single strip. Others take less than what is allowed."""

BITS_PER_SAMPLE = 258
"""Tag of a TIFF."""

MIN_SIDE = 32
"""As which a shorter side of a picture counts there: decoders work by blocks."""

# Only formats that PIL decodes itself: no PostScript, which it would hand to an interpreter.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")

ImageSource = str | Path | bytes | bytearray | memoryview | np.ndarray[Any, Any] | Image.Image


def load_image(source: ImageSource, limits: ImageLimits = LIMITS) -> Image.Image:
    """Read an image as RGB, upright.

    The orientation in its EXIF data is applied. Transparency is composited on white. Greyscale, palette, CMYK and
    16-bit images are converted (16 bits are scaled down to 8). Of an animation the first frame is taken.

    Args:
        source: a path, an http(s) or file URL, the bytes of an image file or these in base64, alone or in a `data:`
            URL, a PIL image, or an array [H, W, 3] of uint8 (also [H, W], grey, and [H, W, 4], with transparency).
        limits: what reading it may cost, and where it may come from.

    Raises:
        ImageError: there is no such file, it is not an image or only part of one, it has no pixels, it is beyond the
            limits, or a download failed.
    """
    if isinstance(source, Image.Image):
        name = f"the given {source.mode} image"
        _check_pixels(source, name, limits)
        image = _upright_rgb(source, name)
        return image.copy() if image is source else image
    if isinstance(source, np.ndarray):
        return load_image(_from_array(source), limits)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), f"the image of {memoryview(source).nbytes} bytes", limits)
    if isinstance(source, str):
        if not source:
            raise ImageError("the name of an image is empty; give its path")
        _check_length(source, limits)
        scheme = source[:8].lower()
        if scheme.startswith(("http://", "https://")):
            return _decode(io.BytesIO(download(source, limits)), source, limits)
        if scheme.startswith("data:"):
            return _decode(io.BytesIO(_decode_data_url(source)), f"the image in {_short(source)}", limits)
        if scheme.startswith("file://"):
            return load_image(_local_path(source), limits)
        if "://" in source[:12]:
            raise ImageError(f"{_short(source)} is no URL this library reads; use http, https, data, file or a path")
    if not isinstance(source, (str, Path)):
        raise ImageError(
            f"an image cannot be a {type(source).__name__}; give a path, a URL, bytes, a base64 data URL, a PIL image "
            "or an array [H, W, 3] of uint8 (of a tensor [3, H, W]: tensor.permute(1, 2, 0).numpy())"
        )
    if not limits.files:
        if isinstance(source, str) and (data := decode_base64(source)):
            return _decode(io.BytesIO(data), "the image in base64", limits)
        raise ImageError(f"{_short(str(source))} is not read: pictures may not come from files here; send the data")
    try:
        path = Path(source).expanduser()
        if stat.S_ISFIFO(mode := path.stat().st_mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode):
            raise ImageError(f"{path} is no regular file; give that of an image")  # reading it may never end
        with path.open("rb") as file:
            return _decode(file, str(path), limits)
    except ImageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or error
        reason = f"cannot open the image file {_short(str(source))}: {said}"
        if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == errno.ENAMETOOLONG:
            reason = f"no such image file: {_short(str(source))}; check the path"
        elif isinstance(error, IsADirectoryError):
            reason = f"{_short(str(source))} is a directory; give the file of an image"
        if isinstance(source, str) and (data := decode_base64(source)):
            try:
                return _decode(io.BytesIO(data), "in base64 it", limits)
            except ImageError as other:
                reason += f"; {other}"
        raise ImageError(reason) from error


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.dtype != np.uint8:
        remedy = "scale it to 0 to 255 and round" if array.dtype.kind == "f" else "convert it"
        raise ImageError(f"an image that is an array must hold uint8, this one {array.dtype}; {remedy}")
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(
            f"an image that is an array must have the shape [H, W, 3], this one {list(array.shape)}; of channels that "
            "come first, array.transpose(1, 2, 0)"
        )
    if 0 in array.shape:
        raise ImageError(f"the given array of shape {list(array.shape)} has no pixels; give one of at least 1 x 1")
    return Image.fromarray(np.ascontiguousarray(array))


def _local_path(url: str) -> Path:
    """The path in a file URL."""
    parts = urllib.parse.urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost"):
        raise ImageError(f"{_short(url)} is a file of another machine; write file:///path for one of this machine")
    return Path(urllib.request.url2pathname(parts.path))


def _check_length(text: str, limits: ImageLimits) -> None:
    """Of what may be base64, before it is copied: it has 4 letters for 3 bytes, and room for line breaks.

    Raises:
        ImageError: it holds more bytes than a file may have.
    """
    letters = len(text) // 3 if "%" in text else len(text)  # `%2B` is one
    if letters > 2 * limits.max_bytes + 1000:
        raise ImageError(
            f"{_short(text)} is larger than {limits.max_bytes >> 20} MiB; make it smaller, or raise max_bytes of "
            "ImageLimits"
        )


def decode_base64(text: str) -> bytes | None:
    """The bytes that a text is in base64; None if it is not, or too short to be an image."""
    try:
        letters = "".join(text.split()).rstrip("=")
        data = base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if len(data) >= MIN_IMAGE_BYTES else None


def _decode(file: IO[bytes], name: str, limits: ImageLimits) -> Image.Image:
    Image.init()
    size = file.seek(0, io.SEEK_END)
    if not size:
        raise ImageError(f"{name} is empty; it holds no image")
    if size > limits.max_bytes:
        raise ImageError(
            f"{name} is larger than {limits.max_bytes >> 20} MiB; make it smaller, or raise max_bytes of ImageLimits"
        )
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower, or meant
            _check_icon(file, name, limits)
            image = Image.open(file, formats=[format for format in FORMATS if format in Image.OPEN])
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} is too large ({error}); make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS and max_pixels of "
            "ImageLimits if you trust it"
        ) from None
    except Exception as error:  # PIL's parsers raise whatever a malformed header leads them to
        raise ImageError(
            f"{name} is not an image that can be read; give a JPEG, PNG, WebP, GIF, BMP or TIFF file, whole"
        ) from error
    with image:
        _check_pixels(image, name, limits)
        kind = str(image.format)
        if kind in ("JPEG", "MPO") and _has_several_scans(file, image, name, limits):
            kind = f"JPEG of several scans, {image.mode}"
        if kind == "TIFF" and sum(image.tag_v2.get(BITS_PER_SAMPLE, ())) > 32:  # type: ignore[attr-defined]
            kind = "TIFF of more than 32 bits"
        _check_decoder(image, kind, size, name, limits)
        return _upright_rgb(_of_webp(image, name) if image.format == "WEBP" else image, name)


def _check_icon(file: IO[bytes], name: str, limits: ImageLimits) -> None:
    """PIL decodes an icon when it is opened, so what is in one is looked at before."""
    head = file.read(6)
    entries = file.read(16 * int.from_bytes(head[4:], "little")) if head[:4] == b"\0\0\1\0" else b""
    for place in {int.from_bytes(entries[end - 4 : end], "little") for end in range(16, len(entries) + 1, 16)}:
        file.seek(place)
        kind = PngImagePlugin.PngImageFile if file.read(4) == b"\x89PNG" else BmpImagePlugin.DibImageFile
        file.seek(place)
        _check_pixels(kind(file), name, limits)
    file.seek(0)


def _check_pixels(image: Image.Image, name: str, limits: ImageLimits) -> None:
    if max(image.size) > limits.max_side:
        raise ImageError(
            f"{name} is too long ({image.width} x {image.height}, more than {limits.max_side:,} pixels on a side); cut "
            "it, or raise max_side of ImageLimits if you trust it"
        )
    if image.width * image.height > limits.max_pixels:
        raise ImageError(
            f"{name} is too large ({image.width} x {image.height}, more than {limits.max_pixels:,} pixels); make it "
            "smaller, or raise max_pixels of ImageLimits if you trust it"
        )


def _check_decoder(image: Image.Image, kind: str, size: int, name: str, limits: ImageLimits) -> None:
    taken = (DECODERS.get(kind, ALLOWED) - ALLOWED) * math.prod(max(side, MIN_SIDE) for side in image.size) + size
    if kind in DECODERS and taken > limits.max_decoding:
        raise ImageError(
            f"{name} is too large for {kind} ({image.width} x {image.height}): decoding it takes "
            f"{taken / 1e6:.0f} MB beside what other formats do, more than {limits.max_decoding / 1e6:.0f}; make it "
            "smaller, save it as PNG, or raise max_decoding of ImageLimits if you trust it"
        )


def _of_webp(image: Image.Image, name: str) -> Image.Image:
    """Without two of the copies that PIL makes, for which its decoder is let go before the picture is made."""
    try:
        data = image._get_next()[0]  # type: ignore[attr-defined]
        raw_mode, image._decoder = image.rawmode, None  # type: ignore[attr-defined]
    except AttributeError:  # PIL of another version
        return image
    except Exception as error:  # as for other decoders
        raise ImageError(f"{name} is truncated or damaged ({error}); fetch it again") from error
    decoded = Image.frombytes(image.mode, image.size, data, "raw", raw_mode)
    decoded.info = image.info
    return decoded


def _has_several_scans(file: IO[bytes], image: Image.Image, name: str, limits: ImageLimits) -> bool:
    """A JPEG may pass over its pixels any number of times, each for a few bytes of file. Whether its decoder is ready
    for several, for which it keeps the whole picture's coefficients: of one that is progressive, or whose first scan
    has not all components."""
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    at = scans = 0
    is_partial = "progressive" in image.info
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # of the data, or without content
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            break
        if marker == 0xDA:
            scans += 1
            is_partial |= data[at + 4 : at + 5] < bytes([len(image.getbands())])
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if scans > limits.max_scans:
        raise ImageError(
            f"{name} is a JPEG of {scans:,} scans, more than {limits.max_scans}; save it again, or raise max_scans of "
            "ImageLimits if you trust it"
        )
    return is_partial or scans > 1


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """The image itself if it is so already."""
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels ({image.width} x {image.height}); give one of at least 1 x 1")
    try:
        image.load()
        return _to_rgb(_upright(image), name)
    except ImageError:
        raise
    except Exception as error:  # PIL's decoders raise whatever malformed data leads them to
        raise ImageError(f"{name} is truncated or damaged ({error}); fetch it again") from error


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a broken EXIF block, common in photographs, counts as none."""
    try:
        is_upright = image.getexif().get(0x0112, 1) == 1  # a transposition copies
        return image if is_upright else ImageOps.exif_transpose(image)
    except Exception:  # as for the decoders
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """In bands of rows, so that what is converted on the way takes no memory of the image's size."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point pixels, whose range is unknown; save it with 8 bits per channel")
    rgb = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(image.height, top + rows))
        band = image if rows >= image.height else image.crop(box)
        band.info = image.info
        rgb.paste(_band_to_rgb(band, name), box)
    return rgb


def _band_to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;"):
        return _to_8_bits(image, name).convert("RGB")
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey, 0 to 65535, to 8-bit grey, rounded to the nearest."""
    wide = image.convert("I")
    lowest, highest = wide.getextrema()
    if lowest < 0 or highest > 0xFFFF:  # type: ignore[operator]  # one channel: two numbers
        raise ImageError(f"{name} holds pixels from {lowest} to {highest}; save it with 8 or 16 bits per channel")
    return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _decode_data_url(url: str) -> bytes:
    at = url.find(",", 0, 1000)
    if at < 0 or not url[:at].lower().endswith(";base64"):
        raise ImageError(f"{_short(url)} is no base64 data URL; write data:image/png;base64,...")
    payload = url[at + 1 :]
    if "%" in payload:
        payload = urllib.parse.unquote(payload)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data in {_short(url)} is not base64 ({error}); encode it again") from None


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:77]}...{text[-40:]}"
