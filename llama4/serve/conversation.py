"""Messages and tools of a request in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from llama4.reading import read_bytes
from llama4.serve.errors import RequestError
from llama4.serve.schema import FLAG, NULL, OBJECT, STRING, TEXT, Schema, any_of, array, one_of, record
from llama4.text.messages import ROLES
from llama4.vision.limits import LIMITS

LINK = any_of(STRING, record(("url",), url=STRING))
PART: Schema = {
    **any_of(
        record(("type", "text"), type=one_of("text", "input_text", "output_text"), text=STRING),
        record(("type", "image_url"), type=one_of("image_url", "input_image"), image_url=LINK),
        record(("type",), type=one_of("image"), image=STRING, url=STRING, data=STRING, base64=STRING),
        record(("type", "refusal"), type=one_of("refusal"), refusal=STRING),
    ),
    "description": "a part of type text or image_url; this model reads text and images",
}
CALL = record(("function",), id=STRING, function=record(("name",), name=STRING, arguments=any_of(STRING, OBJECT)))
MESSAGE = record(
    ("role",),
    role=one_of(*ROLES),
    content=any_of(STRING, array(PART), OBJECT, NULL),
    name=STRING,
    tool_calls=array(CALL),
    tool_call_id=STRING,
    refusal=STRING,
)
FUNCTION = record(("name",), name=TEXT, description=STRING, parameters=OBJECT, strict=FLAG)
TOOL = record(("type", "function"), type=one_of("function"), function=FUNCTION)
TOOL_CHOICE: Schema = {
    **any_of(
        one_of("none", "auto", "required"),
        record(("type", "function"), type=one_of("function"), function=record(("name",), name=STRING)),
    ),
    "description": '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
}


def with_media(messages: Sequence[Mapping[str, Any]], directory: Path | None) -> list[Mapping[str, Any]]:
    """Messages as the library has them: a refusal is what was said, and pictures that are named by `file://` are read,
    if they are in the media directory; here, as the reader of pictures opens no file for a server.

    Raises:
        RequestError: one is elsewhere.
    """
    return [_as_ours(message, f"messages[{i}]", directory) for i, message in enumerate(messages)]


def _as_ours(message: Mapping[str, Any], at: str, directory: Path | None) -> Mapping[str, Any]:
    content = message.get("content")
    if content is None and "refusal" in message:
        return {**message, "content": message["refusal"]}
    if not isinstance(content, list):
        return message
    parts = []
    for i, part in enumerate(content):
        link = part.get("image_url")
        url = link.get("url") if isinstance(link, dict) else link
        if isinstance(url, str) and url.startswith("file://"):
            part = {"type": "image", "image": read_media(url, directory, f"{at}.content[{i}].image_url")}
        elif part["type"] == "refusal":
            part = {"type": "text", "text": part["refusal"]}
        parts.append(part)
    return {**message, "content": parts}


def read_media(url: str, directory: Path | None, field: str) -> bytes:
    """What a `file://` URL names, in the media directory or by its whole path.

    Raises:
        RequestError: no file in the media directory.
    """
    if directory is None:
        raise RequestError("file:// pictures are not read here; send the data, as a data: URL", field=field)
    root = directory.resolve()
    with suppress(OSError, RuntimeError, ValueError):  # names that are too long, circles of links, no names
        parts = urlsplit(url)
        name = url2pathname(("" if parts.netloc == "localhost" else parts.netloc) + parts.path)
        for path in ((root / name.lstrip("/")).resolve(), Path(name).resolve()):
            if path.is_relative_to(root) and path.is_file():
                return read_bytes(path, LIMITS.max_bytes)
    raise RequestError(f"{url!r:.200} is no picture in the media directory", field=field)
