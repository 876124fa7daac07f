"""OpenAI's completions: texts or token ids -> what follows them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from starlette.responses import Response

from llama4.engine.tokens import Token
from llama4.inputs import Inputs
from llama4.serve.engine import EngineStream
from llama4.serve.errors import RequestError
from llama4.serve.http import Call, Route, Service, respond
from llama4.serve.openai_chat import USED, OpenAIAnswer
from llama4.serve.options import (
    FORM,
    MAX_ALTERNATIVES,
    MAX_CHOICES,
    MAX_LENGTH,
    SAMPLING,
    USAGE,
    WITHOUT_EFFECT,
    check_usage,
    choices_of,
    sampling_of,
)
from llama4.serve.schema import (
    FLAG,
    MAX_ID,
    STRING,
    TEXT,
    Field,
    Fields,
    Schema,
    any_of,
    array,
    integer,
    one_of,
    record,
    refused,
    required,
)

MAX_PROMPTS = 128

IDS = array(integer(0, MAX_ID), 1)
PROMPT: Schema = {
    **any_of(TEXT, IDS, array(any_of(TEXT, IDS), 1, MAX_PROMPTS)),
    "description": f"a text, a list of token ids, or a list of up to {MAX_PROMPTS} of these; none may be empty",
}

COMPLETE = Fields(
    "CompletionRequest",
    prompt=required(PROMPT),
    model=Field(STRING),
    **SAMPLING,
    response_format=Field(FORM),
    n=Field(integer(1, MAX_CHOICES), 1),
    max_tokens=Field(integer(1, MAX_LENGTH), 16),
    logprobs=Field(integer(0, MAX_ALTERNATIVES)),
    echo=Field(FLAG, False),
    stream=Field(FLAG, False),
    stream_options=Field(USAGE),
    **WITHOUT_EFFECT,
    suffix=refused(""),
)

COMPLETION = record(
    ("id", "object", "created", "model", "choices", "usage"),
    id=TEXT,
    object=one_of("text_completion"),
    model=STRING,
    choices=array(record(("index", "text", "finish_reason"), text=STRING), 1),
    usage=USED,
)


async def complete(service: Service, call: Call) -> Response:
    fields = call.fields
    if fields["echo"] and fields["logprobs"] is not None:
        raise RequestError("echo with logprobs is not supported; ask for one of them", field="echo")
    tells_usage = check_usage(fields)
    service.check_model(fields["model"])
    prompts = prompts_of(fields["prompt"])
    llm = service.engine.llm
    inputs = await asyncio.to_thread(lambda: [_inputs_of(service, prompt) for prompt in prompts])
    options = {**sampling_of(fields), "max_new_tokens": fields["max_tokens"], "top_logprobs": fields["logprobs"] or 0}
    streams = [each for row in inputs for each in choices_of(service.engine, row, fields["n"], options)]
    echo = [
        prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)
        for prompt in (prompts if fields["echo"] else ())
        for _ in range(fields["n"])
    ]
    answer = Completion(
        streams, service.settings.name, tells_usage, fields["n"], echo, tells_logprobs=fields["logprobs"] is not None
    )
    return await respond(service, call, answer)


def prompts_of(value: Any) -> list[str | list[int]]:
    """A text, a list of token ids, or a list of these -> the list."""
    if isinstance(value, str):
        return [value]
    if all(isinstance(each, (int, float)) for each in value):
        return [list(map(int, value))]
    return [each if isinstance(each, str) else list(map(int, each)) for each in value]


def _inputs_of(service: Service, prompt: str | list[int]) -> Inputs:
    if isinstance(prompt, str):
        return service.engine.llm.processor.complete(prompt)
    return inputs_of(prompt)


def inputs_of(ids: Sequence[int]) -> Inputs:
    """A prompt of token ids."""
    input_ids = torch.tensor([list(ids)])
    return Inputs(input_ids, torch.ones_like(input_ids), None)


class Completion(OpenAIAnswer):
    """The answer to completions.

    Args:
        echo: what stands before each reply; nothing if it is empty.
        tells_logprobs: whether with the probability of each token.
    """

    def __init__(
        self,
        streams: Sequence[EngineStream],
        name: str,
        tells_usage: bool,
        choices: int,
        echo: Sequence[str],
        *,
        tells_logprobs: bool,
    ) -> None:
        super().__init__(streams, "text_completion", "cmpl", name, tells_usage, choices)
        self._echo = list(echo) or [""] * len(streams)
        self._tells_logprobs = tells_logprobs

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "text": self._echo[i] + stream.reply.text,
                "logprobs": self._logprobs(stream.reply.logprobs),
                "finish_reason": stream.reply.finish_reason,
                "stop_reason": stream.stop_string,
            }
            for i, stream in enumerate(self.streams)
        ]
        return self.body(choices, self.usage())

    async def events(self) -> AsyncIterator[str]:
        for i, text in enumerate(self._echo):
            if text:
                yield self._piece(i, text)
        async for i, delta in self.deltas():
            yield self._piece(i, getattr(delta, "text", ""), self.new_tokens(i))
        for i, stream in enumerate(self.streams):
            yield self._piece(i, "", self.new_tokens(i), stream.reply.finish_reason)
        yield self.usage_chunk()

    def _piece(self, index: int, text: str, tokens: Sequence[Token] = (), reason: str | None = None) -> str:
        logprobs = self._logprobs(tokens) if tokens else None
        return self.chunk({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._tells_logprobs:
            return None
        decode = self.streams[0].decode_bytes
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {decode([id_]).decode(errors="replace"): value for id_, value in token.alternatives} for token in tokens
            ],
        }


ROUTES = (Route("POST", "/v1/completions", complete, "Continue texts", COMPLETE, COMPLETION, can_stream=True),)
