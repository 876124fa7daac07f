"""Lines of a data file -> conversations and texts to learn from. Nothing is guessed: a line that is not of one of these
kinds is named by its number, with the field and what would be right.

| kind | fields |
|---|---|
| messages | `messages`: as `chat` takes them, with pictures; `tools`: optional |
| ShareGPT | `conversations`: a list of `{"from": ..., "value": ...}` |
| completion | `prompt`: a question or messages; `completion`: the reply |
| Alpaca | `instruction`, `input` (optional), `output`; `history`: pairs of a question and its reply |
| preference | `prompt`: a question or messages; `chosen`, `rejected`: replies |
| text | `text`: as it is, all of it learnt |

All but a text may have `system`, `tools`, and `image` or `images`, whose pictures go where `<image>` stands in what the
user says and tools answer.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4.errors import Llama4Error
from llama4.files import user_path
from llama4.progress import Bar
from llama4.reading import MAX_JSON_DEPTH, MAX_JSON_MEMORY, MAX_TEXT_RATIO, check_regular, json_depth, json_memory
from llama4.text.messages import ImagePart, Message, ParsedMessage, read_messages
from llama4.text.tool_calls import check_tools, short
from llama4.vision.images import decode_base64

PARQUET, HUB_ID = ".parquet", re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*?(:[\w.]+)?(?<!\.jsonl)(?<!\.json)(?<!\.gz)")
MAX_LINE = 64 << 20
"""Bytes of a line, pictures in it included."""


class DataError(Llama4Error):
    """A data file, or a line of one, that cannot be learnt from."""


@dataclass(frozen=True)
class Record:
    """What one line says.

    Attributes:
        line: its number in the file, from 1.
        messages: a conversation that ends with what is learnt; none for a text.
        text: a text without roles.
        rejected: the conversation with the worse reply; none but for preferences.
        tools: functions that the conversation may call.
    """

    line: int
    messages: tuple[ParsedMessage, ...] = ()
    text: str | None = None
    rejected: tuple[ParsedMessage, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


def read_records(path: str | Path, bar: Bar | None = None) -> Iterator[Record]:
    """The lines of a file of JSON objects, `.jsonl` or `.jsonl.gz`, without empty ones; or the rows of a `.parquet`
    file, if the package `pyarrow` is installed, or of a data set on the Hub, `owner/name` or `owner/name:split`, if
    `datasets` is.

    Args:
        bar: is moved by the bytes of the file.

    Raises:
        DataError: no such file, or the first line that is wrong, by number.
    """
    path = user_path(path)
    for number, line in _rows(path) if is_table(path) else _lines(path, bar):
        if not line.strip():
            continue
        try:
            yield _record(number, line, path.parent)
        except Llama4Error as error:
            raise DataError(f"{path}, line {number}: {error}") from None


def is_table(path: Path) -> bool:
    """Whether another package reads it: a parquet file, or the id of a data set on the Hub. A name in a folder that is
    there is a file's."""
    return path.suffix == PARQUET or (not path.parent.exists() and HUB_ID.fullmatch(str(path)) is not None)


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """The rows of a table as lines of JSON; columns without a value are left out, as tables have all columns.

    Raises:
        DataError: the package that reads it is not installed, or cannot read it; or it unpacks to what no text does.
    """
    is_file = path.suffix == PARQUET
    package, size = "pyarrow" if is_file else "datasets", 0
    try:
        for number, row in enumerate(_parquet_rows(path) if is_file else _hub_rows(path), 1):
            content = {key: _json_value(value) for key, value in row.items() if value is not None}
            try:
                line = json.dumps(content).encode()
            except (TypeError, ValueError) as error:
                why = f"{error}; its columns must be texts, numbers and lists"
                raise DataError(f"{path}, line {number}: {why}") from None
            size += len(line)
            _check_line(path, number, len(line))
            if is_file:
                _check_packed(path, number, size, path.stat().st_size)
            yield number, line
    except DataError:
        raise
    except ImportError:
        why = f"is read by the package {package}, which is not here: pip install {package}"
        raise DataError(f"{path} {why}") from None
    except Exception as error:  # of many packages
        raise DataError(f"{path} cannot be read ({error}); give a file of JSON lines, or convert it") from None


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """One by one: a few bytes may stand for any number of rows, and of values in a row."""
    from pyarrow import parquet

    check_regular(path)
    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        columns = (group.column(i) for group in groups for i in range(group.num_columns))
        unpacked = sum(max(column.num_values, column.total_uncompressed_size) for column in columns)
        _check_packed(path, 1, unpacked, path.stat().st_size)
        for batch in file.iter_batches(batch_size=1):
            yield from batch.to_pylist()


def _hub_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import datasets

    name, _, split = str(path).partition(":")
    yield from datasets.load_dataset(name, split=split or "train")


def _json_value(value: Any) -> Any:
    """Without the fields that only other rows have: a table gives each of its structures all of them."""
    if isinstance(value, Mapping):
        return {key: _json_value(each) for key, each in value.items() if each is not None}
    return [_json_value(each) for each in value] if isinstance(value, list) else value


def _lines(path: Path, bar: Bar | None) -> Iterator[tuple[int, bytes]]:
    try:
        check_regular(path)
        with path.open("rb") as packed, gzip.open(packed) if path.suffix == ".gz" else packed as file:
            number = size = at = 0
            while line := file.readline(MAX_LINE + 1):
                number, size, before = number + 1, size + len(line), at
                _check_line(path, number, len(line))
                at = packed.tell()
                _check_packed(path, number, size, at)
                if bar is not None:
                    bar.advance(at - before)
                yield number, line
    except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}); give a file of JSON lines, .jsonl or .jsonl.gz") from None


def _check_line(path: Path, number: int, size: int) -> None:
    if size > MAX_LINE:
        raise DataError(f"{path}, line {number}: it is longer than {MAX_LINE >> 20} MiB; split it")


def _check_packed(path: Path, number: int, size: int, packed: int) -> None:
    if size > 1 << 20 and size > MAX_TEXT_RATIO * packed:
        raise DataError(f"{path}, line {number}: no text packs so well; unpack the file and look at it")


def _record(number: int, line: bytes, folder: Path) -> Record:
    if json_memory(line) > MAX_JSON_MEMORY:
        raise DataError("it has too many values; write them as texts, or split it")
    try:
        text = line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8")  # some editors mark a file's beginning
        content = json.loads(text, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"it is not JSON: {error.msg} at column {error.colno}; write one object in each line") from None
    except DataError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"it is not JSON that can be read: {error}") from None
    except RecursionError:
        raise DataError(f"it is nested deeper than {MAX_JSON_DEPTH}") from None
    if not isinstance(content, dict):
        raise DataError(f'it is {short(content)}; write an object, such as {{"prompt": "...", "completion": "..."}}')
    if json_depth(content) > MAX_JSON_DEPTH:
        raise DataError(f"it is nested deeper than {MAX_JSON_DEPTH}")
    for field, read in _KINDS.items():
        if field in content:
            _check_all_read(content, field)
            return read(number, content, folder)
    fields = short(", ".join(content)) if content else "none"
    raise DataError(
        f"its fields are {fields}; there must be messages, conversations, prompt and completion, prompt with chosen "
        "and rejected, instruction and output, or text"
    )


def _no_constant(name: str) -> None:
    raise DataError(f"{name} is not JSON; write null, or a number")


# -- kinds -------------------------------------------------------------------------------------------------------------


def _messages(number: int, content: Mapping[str, Any], folder: Path) -> Record:
    messages = _conversation(content["messages"], content, folder)
    _check_learnt(messages, "messages")
    return Record(number, messages, tools=_tools(content))


_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"} | {
    name: "ipython" for name in ("tool", "observation", "function_response")
}


def _sharegpt(number: int, content: Mapping[str, Any], folder: Path) -> Record:
    turns = content["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f'conversations is {short(turns)}; it must be a list of {{"from": "human", "value": "..."}}')
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f'turn {i} of conversations is {short(turn)}; it must have a text under "value"')
        role = _SHAREGPT.get(speaker) if isinstance(speaker := turn.get("from"), str) else None
        if role is None:
            raise DataError(f"turn {i} of conversations is from {short(speaker)}; choose of {', '.join(_SHAREGPT)}")
        messages.append({"role": role, "content": turn["value"]})
    parsed = _conversation(messages, content, folder)
    _check_learnt(parsed, "conversations")
    return Record(number, parsed, tools=_tools(content))


def _prompted(number: int, content: Mapping[str, Any], folder: Path) -> Record:
    prompt = _as_messages(content["prompt"], "prompt", "user")

    def with_reply(field: str) -> tuple[ParsedMessage, ...]:
        if field not in content:
            raise DataError(f"it has a prompt and no {field}; add it")
        reply = _as_messages(content[field], field, "assistant")
        parsed = _conversation([*prompt, *reply], content, folder)
        _check_learnt(parsed[-len(reply) :], field)
        return parsed

    tools = _tools(content)
    if "chosen" in content or "rejected" in content:
        return Record(number, with_reply("chosen"), rejected=with_reply("rejected"), tools=tools)
    return Record(number, with_reply("completion"), tools=tools)


def _alpaca(number: int, content: Mapping[str, Any], folder: Path) -> Record:
    history = content.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history
    ):
        raise DataError(f'history is {short(history)}; it must be a list of ["question", "reply"]')
    instruction, more = _text(content, "instruction"), content.get("input") or ""
    if not isinstance(more, str):
        raise DataError(f"input is {short(more)}; it must be a text")
    question = f"{instruction}\n\n{more}" if more else instruction
    turns = [*history, (question, _text(content, "output"))]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return Record(number, _conversation(messages, content, folder), tools=_tools(content))


def _plain(number: int, content: Mapping[str, Any], folder: Path) -> Record:
    return Record(number, text=_text(content, "text"))


_KINDS: dict[str, Callable[[int, Mapping[str, Any], Path], Record]] = {
    "messages": _messages,
    "conversations": _sharegpt,
    "prompt": _prompted,
    "instruction": _alpaca,
    "text": _plain,
}
"""The field that tells a kind -> how it is read."""

_PICTURES = ("image", "images")
_ADDED = {field: set(_KINDS) - {"text"} for field in ("system", "tools", *_PICTURES)}
_ADDED |= {"history": {"instruction"}, "chosen": {"prompt"}, "rejected": {"prompt"}}
_ADDED |= {field: set() for field in ("video", "videos", "audio", "audios")}
"""Fields that add to what a line says -> the kinds that read them. Any others are notes, such as `id` or `source`."""


def _check_all_read(content: Mapping[str, Any], kind: str) -> None:
    unread = [field for field, kinds in _ADDED.items() if content.get(field) and kind not in kinds]
    if unread:
        raise DataError(f"{', '.join(unread)} is not read beside {kind}; say it in {kind}, or leave it out")


# -- parts -------------------------------------------------------------------------------------------------------------


def _text(content: Mapping[str, Any], field: str) -> str:
    text = content.get(field)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{field} is {short(text)}; it must be a text that is not empty")
    return text


def _as_messages(value: Any, field: str, role: str) -> Any:
    """A text is one message."""
    if not isinstance(value, (str, list)):
        raise DataError(f"{field} is {short(value)}; it must be a text or a list of messages")
    if not (value.strip() if isinstance(value, str) else value):
        raise DataError(f"{field} is empty; write a text")
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _conversation(messages: Any, content: Mapping[str, Any], folder: Path) -> tuple[ParsedMessage, ...]:
    """Messages with what the line's other fields add to them."""
    if not isinstance(messages, list):
        raise DataError(f"messages is {short(messages)}; it must be a list of messages")
    if system := content.get("system"):
        if not isinstance(system, str):
            raise DataError(f"system is {short(system)}; it must be a text")
        messages = [{"role": "system", "content": system}, *messages]
    if pictures := _pictures(content):
        messages = _with_pictures(messages, pictures)
    return tuple(read_messages([_beside(message, folder) for message in messages]))


def _pictures(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of `image` and `images`, as parts of messages."""
    found: list[dict[str, Any]] = []
    for field in _PICTURES:
        given = content.get(field) or []
        for each in given if isinstance(given, list) else [given]:
            if not isinstance(each, str) or not each:
                raise DataError(f"{field} holds {short(each)}; a picture is a path, a URL or base64")
            found.append({"type": "image", "image": each})
    return found


_MARK = re.compile("<image>\\n?")
"""Where a picture of `image` or `images` goes, with the line break that LLaVA writes after it."""
_PLACE = {"type": "image"}
"""The same as a part of a message."""
_SHOWING = ("user", "tool", "function", "ipython")
"""Roles whose messages have such places: a system or an assistant only speaks of `<image>`."""


def _with_pictures(messages: list[Any], pictures: Sequence[Mapping[str, Any]]) -> list[Any]:
    split = [_split_at_marks(message) for message in messages]
    places = sum(part == _PLACE for parts in split for part in parts or ())
    if places != len(pictures):
        raise DataError(
            f"it has <image> {places} times in turns of the user and tools, and {len(pictures)} pictures under image "
            "and images; give one for each"
        )
    rest = iter(pictures)
    return [
        message if parts is None else {**message, "content": [next(rest) if part == _PLACE else part for part in parts]}
        for message, parts in zip(messages, split, strict=True)
    ]


def _split_at_marks(message: Any) -> list[Any] | None:
    """The parts of a message, in which a picture goes to each `_PLACE`; None for one without."""
    shows = isinstance(message, Mapping) and message.get("role") in _SHOWING
    content = message.get("content") if shows else None
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts: list[Any] = []
    for part in content if isinstance(content, list) else ():
        if isinstance(part, Mapping) and isinstance(text := part.get("text"), str):
            for i, piece in enumerate(_MARK.split(text)):
                if i:
                    parts.append(_PLACE)
                if piece:
                    parts.append({**part, "text": piece})
        else:
            parts.append(part)
    return parts if _PLACE in parts else None


def _beside(message: Any, folder: Path) -> Message:
    """A message whose pictures, where they are relative paths, are beside the file."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        result: Message = message
        return result
    return {**message, "content": [_found(part, folder) for part in content]}


def _found(part: Any, folder: Path) -> Any:
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url", "input_image"):
        return part
    source = next((part[key] for key in ("image", "url", "path", "image_url") if part.get(key) is not None), None)
    source = source.get("url") if isinstance(source, Mapping) else source
    if not isinstance(source, str) or "://" in source[:12] or source[:5].lower() == "data:":
        return part
    if not os.path.isfile(folder / source) and decode_base64(source):
        return part
    return {"type": "image", "image": str(folder / source)}


def _tools(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = content.get("tools") or []
    if isinstance(tools, str):  # as columns of tables have it
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise DataError(f"tools is {short(tools)}; it must be a list of functions") from None
        if json_depth(tools) > MAX_JSON_DEPTH:
            raise DataError(f"tools is nested deeper than {MAX_JSON_DEPTH}")
    if not isinstance(tools, list):
        raise DataError(f"tools is {short(tools)}; it must be a list of functions")
    if tools:
        check_tools(tools)
    return tuple(tools)


def _check_learnt(messages: Sequence[ParsedMessage], field: str) -> None:
    if not any(message.role == "assistant" and (any(message.parts) or message.tool_calls) for message in messages):
        raise DataError(f"{field} has no text of the assistant, so there is nothing to learn; add its reply")
    for i, message in enumerate(messages):
        if any(isinstance(part, ImagePart) and part.source is None for part in message.parts):
            raise DataError(f'message {i} of {field} has an image without a picture; write {{"image": "file.png"}}')
