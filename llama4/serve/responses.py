"""OpenAI's Responses: conversations that the server remembers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response

from llama4.serve.answer import Answer, as_event
from llama4.serve.engine import EngineStream
from llama4.serve.errors import Names, Place, RequestError
from llama4.serve.http import Call, Route, Service, check_taking, note, respond
from llama4.serve.openai_chat import logprob_entries
from llama4.serve.options import (
    FORMS_OF_OTHERS,
    MAX_ALTERNATIVES,
    MAX_LENGTH,
    SAMPLING,
    WITHOUT_EFFECT,
    choices_of,
    form_of,
    sampling_of,
)
from llama4.serve.response_items import INPUT, ItemWriter, fields_of, messages_of, new_id, with_ids
from llama4.serve.schema import (
    FLAG,
    NULL,
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
    one_of,
    record,
    refused,
    required,
)
from llama4.serve.store import Stored

logger = logging.getLogger(__name__)

MAX_CHAIN = 1000
"""Responses before one another that a conversation may have."""

TOOL = record(("type", "name"), type=one_of("function"), name=TEXT, description=STRING, parameters=OBJECT)
TOOL_CHOICE: Schema = {
    **any_of(one_of("none", "auto", "required"), record(("type", "name"), type=one_of("function"), name=STRING)),
    "description": '"none", "auto", "required" or {"type": "function", "name": ...}',
}
FORMAT = any_of(
    record(("type",), type=one_of("text", "json_object")),
    record(("type", "schema"), type=one_of("json_schema"), name=STRING, schema=OBJECT),
)
LOGPROBS = "message.output_text.logprobs"

RESPOND = Fields(
    "ResponseRequest",
    input=required(INPUT),
    model=Field(STRING),
    instructions=Field(STRING),
    previous_response_id=Field(STRING),
    store=Field(FLAG, True),
    background=Field(FLAG, False, note="answer at once, and go on; ask for the response by its id"),
    stream=Field(FLAG, False),
    max_output_tokens=Field(integer(1, MAX_LENGTH)),
    tools=Field(array(TOOL)),
    tool_choice=Field(TOOL_CHOICE),
    text=Field(record(format=FORMAT)),
    top_logprobs=Field(integer(0, MAX_ALTERNATIVES), 0),
    include=Field(array(STRING), note=f"{LOGPROBS}; others have no effect"),
    **SAMPLING,
    **WITHOUT_EFFECT,
    **FORMS_OF_OTHERS,
    reasoning=ignored(OBJECT),
    parallel_tool_calls=Field(FLAG, True),
    truncation=refused("disabled"),
    stream_options=ignored(OBJECT),
    max_tool_calls=ignored(integer(0, MAX_LENGTH)),
    conversation=refused(),
    prompt=refused(),
)

RESPONSE = record(
    ("id", "object", "created_at", "status", "model", "output"),
    id=STRING,
    object=one_of("response"),
    status=one_of("queued", "in_progress", "completed", "incomplete", "failed", "cancelled"),
    model=STRING,
    output=array(OBJECT),
    error=any_of(OBJECT, NULL),
)


async def create(service: Service, call: Call) -> Response:
    fields = call.fields
    model = service.model(fields["model"])
    if fields["background"] and (fields["stream"] or not fields["store"]):
        raise RequestError("background is for store: true, without stream", field="background")
    items = with_ids(fields["input"])
    before = await asyncio.to_thread(_before, service, fields["previous_response_id"])
    told = fields_of(len(before), fields["input"])
    messages, places = await asyncio.to_thread(messages_of, [*before, *items], told, service.settings)
    if not messages:
        raise RequestError("input has no message", field="input")
    if fields["instructions"]:
        messages.insert(0, {"role": "system", "content": fields["instructions"]})
        places.insert(0, Place("instructions"))
    names = Names("input", places, form_of(fields, "text.format"))
    options, parallel = _options(service, fields), fields["parallel_tool_calls"]
    (stream,) = choices_of(service.engine, model.adapter, messages, 1, options, parallel_tool_calls=parallel)
    answer = ResponseAnswer(service, stream, model.name, fields, items, names)
    if not fields["background"]:
        return await respond(service, call, answer)
    check_taking(service)
    try:
        await answer.open()
        await answer.save()
    except BaseException:
        answer.cancel()
        raise
    task = service.keep_running(_run(service, answer))
    service.background[answer.id] = task, answer
    task.add_done_callback(lambda _: service.background.pop(answer.id, None))
    return JSONResponse(answer.whole())


def _options(service: Service, fields: Mapping[str, Any]) -> dict[str, Any]:
    form = (fields["text"] or {}).get("format")
    if form is not None and form["type"] == "json_schema":
        form = {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    options = sampling_of({**fields, "response_format": form})
    tools = [{"type": "function", "function": _without_type(tool)} for tool in fields["tools"] or ()]
    choice = fields["tool_choice"]
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    length = fields["max_output_tokens"] or service.engine.scheduler.window
    return options | {
        "tools": tools or None,
        "tool_choice": choice,
        "max_new_tokens": length,
        "top_logprobs": fields["top_logprobs"],
    }


def _without_type(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tool.items() if name != "type" and value is not None}


def _before(service: Service, identity: str | None) -> list[dict[str, Any]]:
    """The items of all responses that a conversation continues: no more than a request may send.

    Raises:
        RequestError: one is not there, or they are too many or too long.
    """
    turns: list[list[dict[str, Any]]] = []
    most = left = service.settings.max_body
    while identity is not None:
        left -= service.store.size(identity)
        if left < 0:
            message = f"the responses before this one have more than {most >> 20} MiB; begin anew, with what matters"
            raise RequestError(message, field="previous_response_id")
        stored = service.store.get(identity)
        if stored is None:
            message = f"there is no response {identity!r:.80} to continue"
            raise RequestError(message, field="previous_response_id", status=404)
        if len(turns) == MAX_CHAIN:
            message = f"more than {MAX_CHAIN} responses are before this one; begin anew, with the items that matter"
            raise RequestError(message, field="previous_response_id")
        if stored.response["status"] in ("queued", "in_progress"):
            raise RequestError(f"response {identity} is not complete", field="previous_response_id")
        turns.append([*stored.input, *stored.response["output"]])
        identity = stored.response["previous_response_id"]
    return [item for turn in reversed(turns) for item in turn]


async def _run(service: Service, answer: ResponseAnswer) -> None:
    """Answer in the background."""
    try:
        await answer.finish()
    except Exception as error:
        answer.fail(RequestError.of(error) or RequestError("an error of the server", status=500))
        logger.info("a response in the background failed", exc_info=error)
        await answer.save_if_possible()
    finally:
        answer.cancel()
        note(service, answer)


class ResponseAnswer(Answer):
    """One response.

    Attributes:
        id: its own.
    """

    last_event = as_event("[DONE]")

    def __init__(
        self,
        service: Service,
        stream: EngineStream,
        model: str,
        fields: Mapping[str, Any],
        items: list[dict[str, Any]],
        names: Names,
    ) -> None:
        super().__init__([stream], names)
        self.id, self._created = new_id("resp"), int(time.time())
        self._completed: int | None = None
        self._service, self._model, self._fields, self._input = service, model, fields, items
        self._writer, self._status = ItemWriter(), "in_progress"
        self._error: dict[str, Any] | None = None
        self._number = self._reported = 0

    async def finish(self) -> None:
        async for _ in self._events():
            pass

    async def events(self) -> AsyncIterator[str]:
        try:
            async for event in self._told():
                yield event
        except Exception as error:
            self.fail(RequestError.of(error) or RequestError("an error of the server", status=500))
            await self.save_if_possible()
            raise

    async def _told(self) -> AsyncIterator[str]:
        yield self._event({"type": "response.created", "response": self.whole()})
        yield self._event({"type": "response.in_progress", "response": self.whole()})
        async for event in self._events():
            yield self._event(event)
        yield self._event({"type": f"response.{self._status}", "response": self.whole()})

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        """Those between the first and the last; after them the response is complete, and stored."""
        async for _, delta in self.deltas():
            if delta is not None:
                for event in self._writer.push(delta, self._new_logprobs()):
                    yield event
        status = "incomplete" if self.streams[0].reply.finish_reason == "length" else "completed"
        for event in self._writer.finish(self._new_logprobs(), status):
            yield event
        self._status = status
        self._completed = int(time.time())
        await self.save()

    def _new_logprobs(self) -> list[dict[str, Any]]:
        """Of the tokens since the last call, if they are asked for."""
        if not self._fields["top_logprobs"] and LOGPROBS not in (self._fields["include"] or ()):
            return []
        (stream,) = self.streams
        begin, self._reported = self._reported, self.num_tokens[0]
        return logprob_entries(stream.tokens[begin : self._reported], stream.decode_bytes)

    async def save(self) -> None:
        """Keep it for those who ask again, unless the client does not want that."""
        if self._fields["store"]:
            stored = Stored(self.whole(), self._input)
            saving = asyncio.ensure_future(asyncio.to_thread(self._service.store.put, stored))
            try:
                await asyncio.shield(saving)
            finally:
                await asyncio.wait((saving,))  # also when cancelled: a later state, or none, is not put back

    async def save_if_possible(self) -> None:
        """The end of what did not end well. What a full disk does not take is in memory, if it is known by its id."""
        with suppress(RequestError):
            await self.save()

    def fail(self, error: RequestError) -> None:
        self._writer.break_off()
        self._status = "failed"
        self._error = {"code": error.code or "server_error", "message": str(error)}

    def stop(self) -> None:
        """At the client's wish, unless it is complete."""
        if self._status == "in_progress":
            self._writer.break_off()
            self._status = "cancelled"
        super().cancel()

    def cancel(self) -> None:
        """Stop the engine's work. A client that leaves a stream has its id, and may ask for what has come."""
        if self._number > 0 and self._status == "in_progress":
            self.stop()
            self._service.keep_running(self.save_if_possible())
        super().cancel()

    def failure(self, error: RequestError) -> str:
        self.fail(error)
        return self._event({"type": "response.failed", "response": self.whole()})

    def _event(self, event: dict[str, Any]) -> str:
        numbered = {"type": event["type"], "sequence_number": self._number, **event}
        self._number += 1
        return as_event(numbered, event["type"])

    def whole(self) -> dict[str, Any]:
        fields, is_cut = self._fields, self._status == "incomplete"
        defaults = self._service.engine.llm.generation_config.sampling()
        said = {name: fields[name] if fields[name] is not None else default for name, default in _ECHOED.items()}
        for name in ("temperature", "top_p"):
            said[name] = fields[name] if fields[name] is not None else defaults.get(name, _ECHOED[name])
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._model,
            "output": self._writer.items,
            **said,
            "usage": self._usage() if self._completed is not None else None,
        }

    def _usage(self) -> dict[str, Any]:
        (stream,) = self.streams
        usage = stream.reply.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stream.request.reused, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }


_ECHOED: Mapping[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "prompt_cache_key": None,
    "reasoning": None,
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 0.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
"""Fields of a request that its response repeats, and what they are where it has none."""


ROUTES = (Route("POST", "/v1/responses", create, "Answer, and remember", RESPOND, RESPONSE, can_stream=True),)
