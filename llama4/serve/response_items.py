"""Items of OpenAI's Responses: what is asked -> messages, and a reply -> items and the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama4.engine.replies import Delta, TextDelta
from llama4.errors import Llama4Error
from llama4.serve.conversation import read_media
from llama4.serve.errors import Place, RequestError
from llama4.serve.schema import STRING, Schema, any_of, array, known, one_of, record
from llama4.serve.settings import Settings
from llama4.text.messages import ROLES
from llama4.text.tool_calls import read_call

PART: Schema = {
    **any_of(
        record(("type", "text"), type=one_of("input_text", "output_text", "text"), text=STRING),
        record(("type", "image_url"), type=one_of("input_image"), image_url=STRING, detail=STRING),
        record(("type", "refusal"), type=one_of("refusal"), refusal=STRING),
    ),
    "description": "a part of type input_text or input_image; this model reads text and images",
}
MESSAGE = record(
    ("role", "content"), type=one_of("message"), role=one_of(*ROLES), content=any_of(STRING, array(PART)), id=STRING
)
CALL = record(
    ("type", "call_id", "name", "arguments"),
    type=one_of("function_call"),
    call_id=STRING,
    name={"type": "string", "minLength": 1},
    arguments=STRING,
    id=STRING,
    status=one_of("in_progress", "completed", "incomplete"),
)
OUTPUT = record(
    ("type", "call_id", "output"),
    type=one_of("function_call_output"),
    call_id=STRING,
    output=any_of(STRING, array(PART)),
    id=STRING,
)
REASONING = record(("type",), type=one_of("reasoning"), id=STRING)
ITEM: Schema = any_of(MESSAGE, CALL, OUTPUT, REASONING)
INPUT: Schema = {**any_of(STRING, array(ITEM, 1)), "description": "a text, or a list of items"}


def with_ids(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is asked, as items, each with an id. They are kept: fields that nothing reads are left out."""
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    items = []
    for item in given:
        kind = item.get("type", "message")
        prefix = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}.get(kind, "rs")
        items.append({**known({"type": kind, **item}, ITEM), "id": item.get("id") or new_id(prefix)})
    return items


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def fields_of(before: int, given: str | Sequence[Any]) -> list[str]:
    """Where the request says each item: so many are of the response that it continues."""
    own = ["input"] if isinstance(given, str) else [f"input[{i}]" for i in range(len(given))]
    return ["previous_response_id"] * before + own


def messages_of(
    items: Sequence[Mapping[str, Any]], fields: Sequence[str], settings: Settings
) -> tuple[list[dict[str, Any]], list[Place]]:
    """Items -> messages in the form of chats, and where the request says each; a call belongs to the assistant's
    message before it.

    Args:
        fields: of each item.

    Raises:
        RequestError: a picture that may not be read, or the arguments of a call that are no JSON.
    """
    messages: list[dict[str, Any]] = []
    places: list[Place] = []
    for item, field in zip(items, fields, strict=True):
        kind = item["type"]
        if kind == "function_call" and item.get("status") == "incomplete":
            continue  # it was cut off, so it was not called, and its arguments may be no JSON
        if kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            _check_call(call, _inside(field, "arguments"))
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None, "tool_calls": []})
                places.append(Place(field))
            messages[-1].setdefault("tool_calls", []).append(call)
            continue
        if kind not in ("function_call_output", "message"):
            continue
        at = _inside(field, "output" if kind == "function_call_output" else "content")
        told = item["output" if kind == "function_call_output" else "content"]
        content = _content(told, at, settings)
        role = {"role": "tool", "tool_call_id": item["call_id"]} if "call_id" in item else {"role": item["role"]}
        messages.append({**role, "content": content})
        places.append(Place(field, [_inside(at, i) for i in range(len(told))] if isinstance(told, list) else ()))
    return messages, places


def _inside(field: str, key: str | int) -> str:
    """A place inside a field; what a stored response says, and a text, are named as a whole."""
    if "[" not in field:
        return field
    return f"{field}[{key}]" if isinstance(key, int) else f"{field}.{key}"


def _check_call(call: Mapping[str, Any], field: str) -> None:
    try:
        read_call(call)
    except Llama4Error as error:
        raise RequestError(f"{field}: {error}", field=field) from None


def _content(content: str | Sequence[Mapping[str, Any]], at: str, settings: Settings) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        if part["type"] == "input_image":
            url: str = part["image_url"]
            if url.startswith("file://"):
                data = read_media(url, settings.media_directory, _inside(_inside(at, i), "image_url"))
                parts.append({"type": "image", "image": data})
            else:
                parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            parts.append({"type": "text", "text": part["refusal"] if part["type"] == "refusal" else part["text"]})
    return parts


class ItemWriter:
    """A reply, delta by delta -> items, and the events that tell of them.

    Attributes:
        items: so far; the last may not be complete.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._text: str | None = None  # of the message that is being written
        self._logprobs: list[Mapping[str, Any]] = []  # of its tokens

    def push(self, delta: Delta, logprobs: Sequence[Mapping[str, Any]] = ()) -> Iterator[dict[str, Any]]:
        """Take a delta; -> its events.

        Args:
            logprobs: of the tokens since the last one.
        """
        if isinstance(delta, TextDelta):
            if self._text is None:
                yield from self._begin_message()
            assert self._text is not None
            self._text += delta.text
            self._logprobs += logprobs
            told = {"delta": delta.text, "logprobs": list(logprobs)}
            yield {"type": "response.output_text.delta", **self._part_place(), **told}
            return
        yield from self.end()
        call = {"type": "function_call", "id": new_id("fc"), "call_id": delta.id, "name": delta.name}
        self.items.append(
            {**call, "arguments": delta.arguments, "status": "incomplete" if delta.is_cut else "completed"}
        )
        opened = {**call, "arguments": "", "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": self._index, "item": opened}
        place = {"item_id": call["id"], "output_index": self._index}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": delta.arguments}
        done = {"arguments": delta.arguments, "name": delta.name}
        yield {"type": "response.function_call_arguments.done", **place, **done}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.items[-1]}

    def end(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """Complete the message that is being written, if there is one.

        Args:
            status: of it; "incomplete" where the reply is cut off.
        """
        if self._text is None:
            return
        told = {"text": self._text, "logprobs": self._logprobs}
        part = {"type": "output_text", "annotations": [], **told}
        self._text, self._logprobs = None, []
        self.items[-1] = {**self.items[-1], "status": status, "content": [part]}
        place = self._part_place()
        yield {"type": "response.output_text.done", **place, **told}
        yield {"type": "response.content_part.done", **place, "part": part}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.items[-1]}

    def finish(self, logprobs: Sequence[Mapping[str, Any]], status: str) -> Iterator[dict[str, Any]]:
        """The reply has ended; one that says nothing is an empty message."""
        if not self.items:
            yield from self._begin_message()
        self._logprobs += logprobs
        yield from self.end(status)

    def break_off(self) -> None:
        """Nothing more comes; what has come stays."""
        for _ in self.end("incomplete"):
            pass

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _part_place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": self._index, "content_index": 0}

    def _begin_message(self) -> Iterator[dict[str, Any]]:
        self._text = ""
        item = {"type": "message", "id": new_id("msg"), "status": "in_progress", "role": "assistant", "content": []}
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield {"type": "response.content_part.added", **self._part_place(), "part": part}
