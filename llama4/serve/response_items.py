"""Items of OpenAI's Responses: what is asked -> messages, and a reply -> items and the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama4.engine.replies import Delta, TextDelta
from llama4.serve.conversation import read_media
from llama4.serve.schema import NULL, STRING, Schema, any_of, array, known, maybe, one_of, record
from llama4.serve.settings import Settings
from llama4.text.messages import ROLES

PART: Schema = {
    **any_of(
        record(("type", "text"), type=one_of("input_text", "output_text", "text"), text=STRING),
        record(("type", "image_url"), type=one_of("input_image"), image_url=STRING, detail=any_of(STRING, NULL)),
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
    id=maybe(STRING),
)
OUTPUT = record(
    ("type", "call_id", "output"),
    type=one_of("function_call_output"),
    call_id=STRING,
    output=any_of(STRING, array(PART)),
    id=maybe(STRING),
)
REASONING = record(("type",), type=one_of("reasoning"), id=maybe(STRING))
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


def messages_of(items: Sequence[Mapping[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Items -> messages in the form of chats; a call belongs to the assistant's message before it."""
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        kind = item["type"]
        if kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None, "tool_calls": []})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = _content(item["output"], f"input[{i}].output", settings)
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        elif kind == "message":
            content = _content(item["content"], f"input[{i}].content", settings)
            messages.append({"role": item["role"], "content": content})
    return messages


def _content(content: str | Sequence[Mapping[str, Any]], at: str, settings: Settings) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        if part["type"] == "input_image":
            url: str = part["image_url"]
            if url.startswith("file://"):
                data = read_media(url, settings.media_directory, f"{at}[{i}].image_url")
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

    def push(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Take a delta; -> its events."""
        if isinstance(delta, TextDelta):
            if self._text is None:
                yield from self._begin_message()
            assert self._text is not None
            self._text += delta.text
            yield {"type": "response.output_text.delta", **self._part_place(), "delta": delta.text, "logprobs": []}
            return
        yield from self.end()
        call = {"type": "function_call", "id": new_id("fc"), "call_id": delta.id, "name": delta.name}
        self.items.append({**call, "arguments": delta.arguments, "status": "completed"})
        opened = {**call, "arguments": "", "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": self._index, "item": opened}
        place = {"item_id": call["id"], "output_index": self._index}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": delta.arguments}
        told = {"arguments": delta.arguments, "name": delta.name}
        yield {"type": "response.function_call_arguments.done", **place, **told}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.items[-1]}

    def end(self, logprobs: Sequence[Mapping[str, Any]] = ()) -> Iterator[dict[str, Any]]:
        """Complete the message that is being written, if there is one."""
        if self._text is None:
            return
        text, self._text = self._text, None
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
        self.items[-1] = {**self.items[-1], "status": "completed", "content": [part]}
        place = self._part_place()
        yield {"type": "response.output_text.done", **place, "text": text, "logprobs": list(logprobs)}
        yield {"type": "response.content_part.done", **place, "part": part}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.items[-1]}

    def finish(self, logprobs: Sequence[Mapping[str, Any]] = ()) -> Iterator[dict[str, Any]]:
        """The reply has ended; one that says nothing is an empty message."""
        if not self.items:
            yield from self._begin_message()
        yield from self.end(logprobs)

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
