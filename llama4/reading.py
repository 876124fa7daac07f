"""Reading files that anyone may have written: only regular ones, up to a size, and JSON up to a depth.

All limits of such files are here. They are far beyond what models have; a file that is beyond them is not what its name
says, or is meant to use up the machine.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

from llama4.errors import CheckpointError, ConfigError, Llama4Error
from llama4.units import bytes_text

MAX_CONFIG_BYTES = 4 << 20
"""Of a configuration, a chat template or another small file of text."""
MAX_TOKENIZER_BYTES = 64 << 20
"""Of a vocabulary: Llama 4's has 27 MiB."""
MAX_INDEX_BYTES = 32 << 20
"""Of an index of shards, or of the header of one."""
MAX_JSON_DEPTH = 64
"""Objects and lists inside each other."""
MAX_JSON_MEMORY = 300 << 20
"""Of what JSON becomes when it is read, as `json_memory` estimates it: Llama 4's tokenizer.json takes 170 MiB."""
MAX_INT = 2**31 - 1
"""Of any size, count or token id in a configuration."""
LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "n_layers"), 1024),
    **dict.fromkeys(("num_local_experts", "num_experts", "num_attention_heads", "n_heads"), 4096),
    **dict.fromkeys(("image_size", "patch_size"), 4096),
    **dict.fromkeys(("max_tiles", "max_patches"), 1024),
}
"""Of some, by name: what is built or looked at one by one."""
MAX_TEXT_BYTES = 1 << 30
"""Of a text that a user names: for calibration, or to be judged or measured."""
MAX_PARAMETERS = 10**15
"""Of a model: Behemoth has 2 * 10^12."""
MAX_GGUF_HEADER_BYTES = 32 << 20
"""Of the head of a GGUF file: Llama 4's vocabulary and merges take 12 MiB."""
MAX_GGUF_COUNT = 1 << 16
"""Of keys, and of tensors, in a GGUF file."""
MAX_GGUF_TEXTS = 1 << 20
"""Of a list in a GGUF file: Llama 4's vocabulary has 202,048, and 439,802 merges."""
MAX_ZIP_DIRECTORY = 4 << 20
"""Bytes in which a .pth lists its tensors."""
MAX_TEXT_RATIO = 200
"""Bytes that one of a packed text of more than a MiB may become: of prose it is four, of one line again and again a
thousand."""
MAX_PICKLE_BYTES = 16 << 20
"""Of the part of a .pth that is not tensors."""


def read_bytes(path: Path, limit: int = MAX_CONFIG_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        Llama4Error: a pipe, a device, or a file of more bytes than `limit`.
        OSError: it cannot be read.
    """
    with os.fdopen(_open(path), "rb") as file:
        check_size(path, os.fstat(file.fileno()).st_size, limit)
        return file.read(limit + 1)


def read_text(path: str | Path) -> str:
    """A text that a user names.

    Raises:
        Llama4Error: a file that is not there, no regular file, or no text.
    """
    try:
        return read_bytes(Path(path), MAX_TEXT_BYTES).decode()
    except OSError as error:
        raise Llama4Error(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Llama4Error(f"{path} is no text in UTF-8 ({error}); give one that is") from None


def check_size(name: object, size: int, limit: int) -> None:
    """Raises:
    Llama4Error: a file of more bytes than a file of its kind has.
    """
    if size > limit:
        raise Llama4Error(
            f"{name} has {bytes_text(size)}, and may have {bytes_text(limit)}: it is not what its name says; fetch it "
            "again"
        )


def check_regular(path: Path) -> None:
    """Raises:
    Llama4Error: a pipe, a device or a directory where a file should be.
    OSError: it cannot be opened.
    """
    os.close(_open(path))


def check_safetensors(path: Path) -> None:
    """See that a safetensors file's header may be read.

    Raises:
        Llama4Error: no regular file, or a header of more bytes than an index has.
        OSError: it cannot be read.
    """
    with os.fdopen(_open(path), "rb") as file:
        check_size(f"the header of {path}", int.from_bytes(file.read(8), "little"), MAX_INDEX_BYTES)


def _open(path: Path) -> int:
    """A descriptor. Opening a pipe would wait for a writer."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise Llama4Error(f"{path} is no regular file, but a directory, pipe or device; put the model's file there")


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: no such file, no JSON object in it, or one that is beyond the limits.
    """
    try:
        data = read_bytes(path, limit)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: a model directory in Hugging Face's layout holds {path.name} beside its weights"
        ) from None
    except Llama4Error as error:
        raise ConfigError(str(error)) from None
    return parse_json(data, path)


def parse_json(data: bytes, name: object) -> dict[str, Any]:
    """The object in the content of a JSON file.

    Args:
        name: of the file, for errors.

    Raises:
        ConfigError: no JSON object, or one that is beyond the limits.
    """
    if (needed := json_memory(data)) > MAX_JSON_MEMORY:
        raise ConfigError(f"{name} holds JSON that takes {bytes_text(needed)} of memory; fetch the file again")
    try:
        content = json.loads(data.decode("utf-8"))
        depth = json_depth(content)
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON ({error}); fetch the file again") from None
    except RecursionError:
        depth = MAX_JSON_DEPTH + 1
    if depth > MAX_JSON_DEPTH:
        raise ConfigError(f"{name} holds JSON of more than {MAX_JSON_DEPTH} levels; fetch the file again")
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must hold a JSON object, not a {type(content).__name__}")
    return content


def json_memory(data: bytes | bytearray) -> int:
    """Bytes that JSON takes at most while it is read: 64 for each value, and its text, of which a character that is not
    ASCII may make all others take four bytes."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    return 64 * values + len(data) * (2 if data.isascii() else 4)


def json_depth(content: Any) -> int:
    """How many objects and lists are inside each other, up to one more than there may be."""
    level, depth = [content] if isinstance(content, (dict, list)) else [], 0
    while level and depth <= MAX_JSON_DEPTH:
        depth += 1
        inside = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in inside if isinstance(child, (dict, list))]
    return depth


def check_zip(path: Path) -> None:
    """See that a zip file, such as a .pth, is no larger when it is unpacked than it is: nothing in it is compressed.

    Raises:
        CheckpointError: something is, or it is no zip file.
        OSError: it cannot be read.
    """
    try:
        check_regular(path)
        size = path.stat().st_size
        if (listed := _directory_bytes(path, size)) > MAX_ZIP_DIRECTORY:
            raise CheckpointError(f"{path} lists its tensors in {bytes_text(listed)}; fetch the file again")
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except Llama4Error as error:
        raise CheckpointError(str(error)) from None
    except (zipfile.BadZipFile, ValueError, RuntimeError) as error:  # the last: a later version of the format
        raise CheckpointError(
            f"{path} cannot be read as weights: it is cut short or damaged ({error}); fetch it again"
        ) from None
    for entry in entries:
        pickled = entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size or pickled:
            raise CheckpointError(
                f"{path} holds {entry.filename} of {bytes_text(entry.file_size)}, compressed or larger than that can "
                "be; torch.save writes no such file: fetch it again"
            )
    if sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(f"{path} holds more than its {bytes_text(size)}; fetch it again")


def _directory_bytes(path: Path, size: int) -> int:
    """The length of a zip file's directory, as its last record says, or, of large files, the record before that."""
    with path.open("rb") as file:
        file.seek(max(0, size - (1 << 16) - 22))
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + 22 > len(tail):
            raise zipfile.BadZipFile("it has no directory")
        if tail[at - 20 : at - 16] != b"PK\x06\x07":
            return int.from_bytes(tail[at + 12 : at + 16], "little")
        file.seek(min(int.from_bytes(tail[at - 12 : at - 4], "little"), size))
        return int.from_bytes(file.read(56)[40:48], "little")
