"""Reading an image from a path, a URL, bytes or PIL -> an upright RGB image."""

from __future__ import annotations

import base64
import binascii
import errno
import http.client
import io
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps

from llama4.errors import ImageError

MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_SECONDS = 30.0
MIN_IMAGE_BYTES = 32
"""Of an image file with a pixel: a GIF's is 35, a PNG's 67."""

# Only formats that PIL decodes itself: no PostScript, which it would hand to an interpreter.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")

ImageSource = str | Path | bytes | bytearray | memoryview | Image.Image


def load_image(source: ImageSource) -> Image.Image:
    """Read an image as RGB, upright.

    The orientation in its EXIF data is applied. Transparency is composited on white. Greyscale, palette, CMYK and
    16-bit images are converted (16 bits are scaled down to 8). Of an animation the first frame is taken.

    Args:
        source: a path, an http(s) URL, the bytes of an image file or these in base64, alone or in a `data:` URL, or a
            PIL image.

    Raises:
        ImageError: there is no such file, it is not an image or only part of one, it has no pixels or more than
            `PIL.Image.MAX_IMAGE_PIXELS`, or a download failed.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, f"the given {source.mode} image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), f"the image of {len(bytes(source))} bytes")
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith(("http://", "https://")):
            return _decode(io.BytesIO(_download(source)), source)
        if scheme.startswith("data:"):
            return _decode(io.BytesIO(_decode_data_url(source)), f"the image in {_short(source)}")
        if "://" in source[:12]:
            raise ImageError(f"{_short(source)} is no URL this library reads; use http, https, data or a path")
    if not isinstance(source, (str, Path)):
        raise ImageError(
            f"an image cannot be a {type(source).__name__}; give a path, a URL, bytes, a base64 data URL or a PIL image"
        )
    try:
        path = Path(source).expanduser()
        with path.open("rb") as file:
            return _decode(file, str(path))
    except ImageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"cannot open the image file {_short(str(source))}: {error}"
        if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == errno.ENAMETOOLONG:
            reason = f"no such image file: {_short(str(source))}; check the path"
        if isinstance(source, str) and (data := _decode_base64(source)):
            try:
                return _decode(io.BytesIO(data), "in base64 it")
            except ImageError as other:
                reason += f"; {other}"
        raise ImageError(reason) from error


def _decode_base64(text: str) -> bytes | None:
    """The bytes that a text is in base64; None if it is not, or too short to be an image."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if len(data) >= MIN_IMAGE_BYTES else None


def _decode(file: IO[bytes], name: str) -> Image.Image:
    Image.init()
    if not file.read(1):
        raise ImageError(f"{name} is empty; it holds no image")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=[format for format in FORMATS if format in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name} is too large ({error}); make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except Exception as error:  # PIL's parsers raise whatever a malformed header leads them to
        raise ImageError(
            f"{name} is not an image that can be read; give a JPEG, PNG, WebP, GIF, BMP or TIFF file, whole"
        ) from error
    with image:
        return _upright_rgb(image, name)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
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
        return ImageOps.exif_transpose(image)
    except Exception:  # as for the decoders
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "I" or image.mode.startswith("I;"):
        return _to_8_bits(image, name).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point pixels, whose range is unknown; save it with 8 bits per channel")
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
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ImageError(f"{_short(url)} is no base64 data URL; write data:image/png;base64,...")
    try:
        return base64.b64decode("".join(urllib.parse.unquote(payload).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data in {_short(url)} is not base64 ({error}); encode it again") from None


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "llama4"})
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    data = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            while chunk := response.read1(1 << 16):
                data += chunk
                if len(data) > MAX_DOWNLOAD_BYTES:
                    raise ImageError(
                        f"{url} is larger than {MAX_DOWNLOAD_BYTES >> 20} MiB; download it yourself and give its path"
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done after {DOWNLOAD_SECONDS:g} seconds")
    except urllib.error.HTTPError as error:
        raise ImageError(f"cannot download {url}: HTTP {error.code} {error.reason}; check the address") from None
    except ImageError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ImageError(f"cannot download {url}: {error}; check the address and the connection") from error
    return bytes(data)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:77]}...{text[-40:]}"
