"""OpenAI's chat completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import Response

from llama4.engine.replies import Delta, TextDelta
from llama4.engine.tokens import Token
from llama4.serve.answer import Answer, as_event
from llama4.serve.conversation import MESSAGE, TOOL, TOOL_CHOICE, with_media
from llama4.serve.engine import EngineStream
from llama4.serve.errors import Names, RequestError
from llama4.serve.http import Call, Route, Service, respond
from llama4.serve.options import (
    FORM,
    FORMS_OF_OTHERS,
    MAX_ALTERNATIVES,
    MAX_CHOICES,
    MAX_LENGTH,
    SAMPLING,
    USAGE,
    WITHOUT_EFFECT,
    check_usage,
    choices_of,
    form_of,
    sampling_of,
)
from llama4.serve.schema import (
    FLAG,
    NULL,
    OBJECT,
    STRING,
    TEXT,
    Field,
    Fields,
    any_of,
    array,
    ignored,
    integer,
    one_of,
    record,
    refused,
    required,
)
from llama4.text.messages import is_continued, read_messages

FORMAT: Mapping[str, Field] = {
    "messages": required(array(MESSAGE, 1)),
    "model": Field(STRING),
    "tools": Field(array(TOOL)),
    "tool_choice": Field(TOOL_CHOICE),
    "chat_template_kwargs": Field(OBJECT, note="further variables of the prompt's format"),
    "continue_final_message": Field(FLAG, note="absent: where the last message is the assistant's and calls no tools"),
    "add_generation_prompt": Field(FLAG, True, note="false beside continue_final_message alone"),
}
"""What the prompt is made of."""

CHAT = Fields(
    "ChatRequest",
    **FORMAT,
    **SAMPLING,
    response_format=Field(FORM),
    n=Field(integer(1, MAX_CHOICES), 1),
    max_tokens=Field(integer(1, MAX_LENGTH)),
    max_completion_tokens=Field(integer(1, MAX_LENGTH), note="counts before max_tokens; absent: to the window's end"),
    logprobs=Field(FLAG, False),
    top_logprobs=Field(integer(0, MAX_ALTERNATIVES)),
    stream=Field(FLAG, False),
    stream_options=Field(USAGE),
    parallel_tool_calls=Field(FLAG, True),
    store=ignored(FLAG),
    **WITHOUT_EFFECT,
    **FORMS_OF_OTHERS,
    audio=refused(),
    modalities=refused(["text"]),
    functions=refused([]),
    function_call=refused("none"),
    web_search_options=refused(),
)

USED = record(
    ("prompt_tokens", "completion_tokens", "total_tokens"),
    prompt_tokens=integer(0, MAX_LENGTH),
    completion_tokens=integer(0, MAX_LENGTH),
    total_tokens=integer(0, MAX_LENGTH),
)
SAID = record(
    ("index", "message", "finish_reason"),
    index=integer(0, MAX_LENGTH),
    message=record(("role", "content"), role=one_of("assistant"), content=any_of(STRING, NULL)),
    finish_reason=one_of("stop", "length", "tool_calls"),
)
COMPLETION = record(
    ("id", "object", "created", "model", "choices", "usage"),
    id=TEXT,
    object=one_of("chat.completion"),
    model=STRING,
    choices=array(SAID, 1),
    usage=USED,
)


async def prompt_of(service: Service, fields: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """Messages, and the options of `Engine.stream` that `FORMAT` asks for."""
    options = {name: fields[name] for name in ("tool_choice", "chat_template_kwargs", "continue_final_message")}
    options["tools"] = fields["tools"] or None
    messages = await asyncio.to_thread(with_media, fields["messages"], service.settings.media_directory)
    if not (fields["add_generation_prompt"] or continues_last(messages, options["continue_final_message"])):
        message = "add_generation_prompt is false; leave it out, or continue the last message (continue_final_message)"
        raise RequestError(message, field="add_generation_prompt")
    return messages, options


def continues_last(messages: Sequence[Mapping[str, Any]], asked: bool | None) -> bool:
    """Whether a reply continues the last message, as `continue_final_message` says."""
    return is_continued(read_messages(messages)) if asked is None else asked


async def chat(service: Service, call: Call) -> Response:
    fields = call.fields
    if fields["top_logprobs"] and not fields["logprobs"]:
        raise RequestError("top_logprobs is for logprobs: true", field="top_logprobs")
    tells_usage, model = check_usage(fields), service.model(fields["model"])
    messages, options = await prompt_of(service, fields)
    options |= sampling_of(fields)
    options["max_new_tokens"] = (
        fields["max_completion_tokens"] or fields["max_tokens"] or service.engine.scheduler.window
    )
    options["top_logprobs"] = fields["top_logprobs"] or 0
    parallel = fields["parallel_tool_calls"]
    streams = choices_of(service.engine, model.adapter, messages, fields["n"], options, parallel_tool_calls=parallel)
    names = Names(form=form_of(fields))
    answer = Chat(streams, model.name, tells_usage, fields["logprobs"], names)
    return await respond(service, call, answer)


class OpenAIAnswer(Answer):
    """What chats and completions have in common.

    Args:
        kind: of the object that is answered.
        name: of the model.
        tells_usage: whether a stream ends with how many tokens it took.
        choices: how many replies each prompt has.
    """

    last_event = as_event("[DONE]")

    def __init__(
        self,
        streams: Sequence[EngineStream],
        kind: str,
        prefix: str,
        name: str,
        tells_usage: bool,
        choices: int,
        names: Names,
    ) -> None:
        super().__init__(streams, names)
        self._tells_usage, self._choices = tells_usage, choices
        self._frame = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }
        self._reported = [0] * len(self.streams)

    def failure(self, error: RequestError) -> str:
        return as_event(error.to_json())

    def new_tokens(self, index: int) -> Sequence[Token]:
        """The tokens of a reply since the last call, up to its last delta."""
        begin, self._reported[index] = self._reported[index], self.num_tokens[index]
        return self.streams[index].tokens[begin : self._reported[index]]

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {**self._frame, "choices": choices, "usage": usage}

    def chunk(self, choice: dict[str, Any]) -> str:
        """An event with a piece of one reply."""
        unknown = {"usage": None} if self._tells_usage else {}
        return as_event({**self._frame, "choices": [choice], **unknown})

    def usage_chunk(self) -> str:
        return as_event(self.body([], self.usage())) if self._tells_usage else ""

    def usage(self) -> dict[str, Any]:
        """A prompt that several choices answer counts once."""
        usages = [stream.reply.usage for stream in self.streams]
        prompt = sum(usage.prompt_tokens for usage in usages[:: self._choices])
        completion = sum(usage.completion_tokens for usage in usages)
        reused = sum(stream.request.reused for stream in self.streams[:: self._choices])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": reused},
        }


class Chat(OpenAIAnswer):
    """The answer to a chat; `tells_logprobs` says whether with the probability of each token."""

    def __init__(
        self, streams: Sequence[EngineStream], name: str, tells_usage: bool, tells_logprobs: bool, names: Names
    ) -> None:
        super().__init__(streams, "chat.completion", "chatcmpl", name, tells_usage, len(streams), names)
        self._tells_logprobs = tells_logprobs

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(i, stream) for i, stream in enumerate(self.streams)]
        return self.body(choices, self.usage())

    def _choice(self, index: int, stream: EngineStream) -> dict[str, Any]:
        reply = stream.reply
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        if calls := [*reply.tool_calls, *([reply.cut_call] if reply.cut_call else ())]:
            message["tool_calls"] = [call.to_openai() for call in calls]
            message["content"] = reply.text or None
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(reply.logprobs),
            "finish_reason": reply.finish_reason,
            "stop_reason": stream.stop_string,
        }

    async def events(self) -> AsyncIterator[str]:
        self._frame["object"] = "chat.completion.chunk"
        for i in range(len(self.streams)):
            yield self._piece(i, {"role": "assistant", "content": ""})
        async for i, delta in self.deltas():
            reason = self.streams[i].reply.finish_reason if delta is None else None
            yield self._piece(i, as_delta(delta), self.new_tokens(i), reason)
        yield self.usage_chunk()

    def _piece(self, index: int, delta: dict[str, Any], tokens: Sequence[Token] = (), reason: str | None = None) -> str:
        logprobs = self._logprobs(tokens) if tokens else None
        return self.chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._tells_logprobs:
            return None
        return {"content": logprob_entries(tokens, self.streams[0].decode_bytes), "refusal": None}


def logprob_entries(tokens: Sequence[Token], decode: Callable[[Sequence[int]], bytes]) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities, and the likely ones beside each."""

    def entry(data: bytes, value: float) -> dict[str, Any]:
        return {"token": data.decode(errors="replace"), "logprob": value, "bytes": list(data)}

    return [
        {
            **entry(token.bytes, token.logprob),
            "top_logprobs": [entry(decode([id_]), value) for id_, value in token.alternatives],
        }
        for token in tokens
    ]


def as_delta(delta: Delta | None) -> dict[str, Any]:
    if delta is None:
        return {}
    if isinstance(delta, TextDelta):
        return {"content": delta.text}
    return {"tool_calls": [{"index": delta.index, **delta.to_openai()}]}


ROUTES = (Route("POST", "/v1/chat/completions", chat, "Answer a conversation", CHAT, COMPLETION, can_stream=True),)
