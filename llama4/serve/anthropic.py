"""Anthropic's Messages."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.responses import JSONResponse, Response

from llama4.engine.replies import Delta, TextDelta
from llama4.serve.answer import Answer, as_event
from llama4.serve.conversation import read_media
from llama4.serve.engine import EngineStream
from llama4.serve.errors import ErrorForm, Names, Place, RequestError
from llama4.serve.http import Call, Route, Service, respond
from llama4.serve.options import MAX_LENGTH, choices_of, top_k_of
from llama4.serve.schema import (
    ANYTHING,
    FLAG,
    OBJECT,
    STRING,
    TEXT,
    Field,
    Fields,
    Schema,
    any_of,
    array,
    ignored,
    integer,
    number,
    one_of,
    record,
    refused,
    required,
)
from llama4.serve.settings import Settings

TEXT_BLOCK = record(("type", "text"), type=one_of("text"), text=STRING)
SOURCE = any_of(
    record(("type", "data"), type=one_of("base64"), media_type=STRING, data=STRING),
    record(("type", "url"), type=one_of("url"), url=STRING),
)
IMAGE_BLOCK = record(("type", "source"), type=one_of("image"), source=SOURCE)
RESULT_BLOCK = record(
    ("type", "tool_use_id"),
    type=one_of("tool_result"),
    tool_use_id=STRING,
    content=any_of(STRING, array(any_of(TEXT_BLOCK, IMAGE_BLOCK))),
)
BLOCK: Schema = {
    **any_of(
        TEXT_BLOCK,
        IMAGE_BLOCK,
        record(("type", "id", "name", "input"), type=one_of("tool_use"), id=STRING, name=TEXT, input=OBJECT),
        RESULT_BLOCK,
        record(("type",), type=one_of("thinking", "redacted_thinking")),
    ),
    "description": "a block of text, image, tool_use or tool_result; this model reads text and images",
}
MESSAGE = record(("role", "content"), role=one_of("user", "assistant"), content=any_of(STRING, array(BLOCK)))
TOOL = record(("name", "input_schema"), name=TEXT, description=STRING, input_schema=OBJECT)
TOOL_CHOICE = any_of(
    record(("type",), type=one_of("auto", "any", "none"), disable_parallel_tool_use=FLAG),
    record(("type", "name"), type=one_of("tool"), name=STRING),
)
PROMPT: Mapping[str, Field] = {
    "model": Field(STRING),
    "messages": required(array(MESSAGE, 1)),
    "system": Field(any_of(STRING, array(TEXT_BLOCK))),
    "tools": Field(array(TOOL)),
    "tool_choice": Field(TOOL_CHOICE),
    "thinking": ignored(OBJECT),
}
MESSAGES = Fields(
    "MessagesRequest",
    **PROMPT,
    max_tokens=required(integer(1, MAX_LENGTH)),
    temperature=Field(number(0, 100)),
    top_p=Field(number(1e-9, 1)),
    top_k=Field(integer(-1, MAX_LENGTH)),
    stop_sequences=Field(array(TEXT, most=64)),
    stream=Field(FLAG, False),
    output_config=Field(
        record(format=record(("type", "schema"), type=one_of("json_schema"), schema=OBJECT)), note="JSON of a schema"
    ),
    metadata=ignored(),
    service_tier=ignored(STRING),
    container=refused(),
    mcp_servers=refused([]),
    context_management=ignored(ANYTHING),
)
COUNT = Fields("CountTokensRequest", **PROMPT)

SAID = any_of(TEXT_BLOCK, record(("type", "id", "name", "input"), type=one_of("tool_use")))
ANSWER = record(
    ("id", "type", "role", "model", "content", "stop_reason", "usage"),
    id=STRING,
    type=one_of("message"),
    role=one_of("assistant"),
    content=array(SAID),
    stop_reason=one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
)

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def _error(error: RequestError) -> dict[str, Any]:
    kind = _KINDS.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error), "param": error.field}}


ERRORS = ErrorForm(
    "AnthropicError",
    record(("type", "error"), type=one_of("error"), error=record(("type", "message"), type=STRING, message=STRING)),
    _error,
)


def messages_of(fields: Mapping[str, Any], settings: Settings) -> tuple[list[dict[str, Any]], Names]:
    """Messages in the form of chats, and where the request says them."""
    turns: list[tuple[dict[str, Any], Place]] = []
    if system := fields["system"]:
        text = system if isinstance(system, str) else "\n".join(block["text"] for block in system)
        turns.append(({"role": "system", "content": text}, Place("system")))
    for i, message in enumerate(fields["messages"]):
        content = message["content"]
        if isinstance(content, str):
            turns.append(({"role": message["role"], "content": content}, Place(f"messages[{i}]")))
        else:
            turns += _read_blocks(message["role"], content, f"messages[{i}]", settings)
    places = tuple(place for _, place in turns)
    return [message for message, _ in turns], Names(messages=places, form="output_config.format")


def _read_blocks(
    role: str, blocks: Sequence[Any], message: str, settings: Settings
) -> Iterator[tuple[dict[str, Any], Place]]:
    """Results of tools are messages of their own, before what else the message says."""
    calls, at = [], f"{message}.content"
    for i, block in enumerate(blocks):
        if block["type"] == "tool_result":
            names: list[str] = []
            content = block.get("content", "")
            if not isinstance(content, str):
                content, names = _parts(content, f"{at}[{i}].content", settings)
            result = {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}
            yield result, Place(f"{at}[{i}]", names)
        elif block["type"] == "tool_use":
            function = {"name": block["name"], "arguments": block["input"]}
            calls.append({"id": block["id"], "type": "function", "function": function})
    if role == "user" and calls:
        raise RequestError(f"{at} has tool_use; only the assistant's messages have", field=at)
    parts, names = _parts(blocks, at, settings)
    if calls:
        yield {"role": role, "content": parts or None, "tool_calls": calls}, Place(message, names)
    elif parts or not any(block["type"] == "tool_result" for block in blocks):
        yield {"role": role, "content": parts}, Place(message, names)


def _parts(blocks: Sequence[Any], at: str, settings: Settings) -> tuple[list[dict[str, Any]], list[str]]:
    """Texts and pictures among some blocks, and where each is."""
    parts: list[dict[str, Any]] = []
    names: list[str] = []
    for i, block in enumerate(blocks):
        if block["type"] in ("text", "image"):
            names.append(f"{at}[{i}]")
        if block["type"] == "text":
            parts.append({"type": "text", "text": block["text"]})
        elif block["type"] == "image":
            source = block["source"]
            if source["type"] == "base64":
                url = f"data:{source.get('media_type', '')};base64,{source['data']}"
                parts.append({"type": "image_url", "image_url": {"url": url}})
            elif source["url"].startswith("file://"):
                data = read_media(source["url"], settings.media_directory, f"{at}[{i}].source.url")
                parts.append({"type": "image", "image": data})
            else:
                parts.append({"type": "image_url", "image_url": {"url": source["url"]}})
    return parts, names


def tools_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The tools, and which must be called, as options of `Engine.stream`."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                "description": tool.get("description", ""),
                "parameters": tool["input_schema"],
            },
        }
        for tool in fields["tools"] or ()
    ]
    choice: Any = None
    if (wanted := fields["tool_choice"]) is not None:
        named = {"type": "function", "function": {"name": wanted.get("name")}}
        choice = {"auto": "auto", "any": "required", "none": "none", "tool": named}[wanted["type"]]
    return {"tools": tools or None, "tool_choice": choice}


async def create(service: Service, call: Call) -> Response:
    fields = call.fields
    model = service.model(fields["model"])
    options: dict[str, Any] = {
        **tools_of(fields),
        "max_new_tokens": fields["max_tokens"],
        "temperature": fields["temperature"],
        "top_p": fields["top_p"],
        "top_k": top_k_of(fields),
        "stop": fields["stop_sequences"],
        "seed": None,
    }
    if (form := (fields["output_config"] or {}).get("format")) is not None:
        options["response_format"] = {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    messages, names = await asyncio.to_thread(messages_of, fields, service.settings)
    parallel = not (fields["tool_choice"] or {}).get("disable_parallel_tool_use")
    (stream,) = choices_of(service.engine, model.adapter, messages, 1, options, parallel_tool_calls=parallel)
    return await respond(service, call, MessageAnswer(stream, model.name, names))


async def count_tokens(service: Service, call: Call) -> Response:
    fields = call.fields
    service.model(fields["model"])
    messages, names = await asyncio.to_thread(messages_of, fields, service.settings)
    tools = tools_of(fields)
    shown = tools["tools"] if tools["tool_choice"] != "none" else None
    read = partial(service.engine.llm.processor, messages, tools=shown, limit=service.counted)
    with names.told():
        inputs = await service.engine.in_thread(messages, read)
    return JSONResponse({"input_tokens": inputs.input_ids.shape[1]})


class MessageAnswer(Answer):
    """One message."""

    def __init__(self, stream: EngineStream, name: str, names: Names) -> None:
        super().__init__([stream], names)
        self._stream, self._name, self._id = stream, name, f"msg_{uuid.uuid4().hex}"

    def whole(self) -> dict[str, Any]:
        reply = self._stream.reply
        content: list[dict[str, Any]] = [{"type": "text", "text": reply.text}] if reply.text else []
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments} for call in reply.tool_calls
        ]
        if reply.cut_call is not None:
            content.append(_begun(reply.cut_call))  # without its input, which is no whole object
        return {**self._frame(), "content": content, **self._ending(), "usage": self._usage()}

    def _frame(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._name}

    def _ending(self) -> dict[str, Any]:
        stop = self._stream.stop_string
        reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
        reason = reasons.get(str(self._stream.reply.finish_reason), "stop_sequence" if stop is not None else "end_turn")
        return {"stop_reason": reason, "stop_sequence": stop}

    def _usage(self) -> dict[str, Any]:
        usage, reused = self._stream.reply.usage, self._stream.request.reused
        return {
            "input_tokens": usage.prompt_tokens - reused,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": reused,
            "output_tokens": usage.completion_tokens,
        }

    async def events(self) -> AsyncIterator[str]:
        empty = {**self._frame(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
        yield _event("message_start", message=empty)
        index, in_text = -1, False
        async for _, delta in self.deltas():
            if delta is not None:
                if not (in_text and isinstance(delta, TextDelta)):
                    if index >= 0:
                        yield _event("content_block_stop", index=index)
                    index, in_text = index + 1, isinstance(delta, TextDelta)
                    yield _event("content_block_start", index=index, content_block=_begun(delta))
                yield _event("content_block_delta", index=index, delta=_delta(delta))
        if index >= 0:
            yield _event("content_block_stop", index=index)
        yield _event("message_delta", delta=self._ending(), usage=self._usage())
        yield _event("message_stop")

    def failure(self, error: RequestError) -> str:
        return as_event(_error(error), "error")


def _begun(delta: Delta) -> dict[str, Any]:
    """The block that a delta begins."""
    if isinstance(delta, TextDelta):
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}


def _delta(delta: Delta) -> dict[str, Any]:
    if isinstance(delta, TextDelta):
        return {"type": "text_delta", "text": delta.text}
    return {"type": "input_json_delta", "partial_json": delta.arguments}


def _event(name: str, **content: Any) -> str:
    return as_event({"type": name, **content}, name)


ROUTES = (
    Route("POST", "/v1/messages", create, "Answer a conversation", MESSAGES, ANSWER, can_stream=True, errors=ERRORS),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        count_tokens,
        "How long a prompt is",
        COUNT,
        record(("input_tokens",), input_tokens=integer(0, MAX_LENGTH)),
        errors=ERRORS,
    ),
)
