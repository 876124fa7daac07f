"""OpenAI's completions: texts or token ids -> what follows them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from starlette.responses import Response

from llama4.engine.observers import PromptLogprobs
from llama4.engine.tokens import Token
from llama4.inputs import Inputs
from llama4.serve.engine import EngineStream
from llama4.serve.errors import Names, RequestError
from llama4.serve.http import Call, Route, Service, respond, unless_gone
from llama4.serve.openai_chat import USED, OpenAIAnswer
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
    max_tokens=Field(integer(0, MAX_LENGTH), 16, note="0 with echo alone"),
    logprobs=Field(integer(0, MAX_ALTERNATIVES)),
    echo=Field(FLAG, False),
    stream=Field(FLAG, False),
    stream_options=Field(USAGE),
    **WITHOUT_EFFECT,
    **FORMS_OF_OTHERS,
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
    if not fields["max_tokens"] and not fields["echo"]:
        raise RequestError("max_tokens is 0; it must be at least 1, without echo", field="max_tokens")
    tells_usage = check_usage(fields)
    model = service.model(fields["model"])
    prompts = await asyncio.to_thread(prompts_of, fields["prompt"])
    llm = service.engine.llm
    names = names_of(prompts, "prompt", fields["prompt"], form_of(fields))
    inputs = await unless_gone(call.request, inputs_of_all(service, prompts, names))
    count = fields["logprobs"]
    options = {**sampling_of(fields), "max_new_tokens": max(fields["max_tokens"], 1), "top_logprobs": count or 0}
    options["tools"] = ()  # what follows is text, whatever it is
    streams: list[EngineStream] = []
    echoes: list[Echo | None] = []
    for prompt, row in zip(prompts, inputs, strict=True):
        echo = Echo() if fields["echo"] else None
        if echo is not None:
            echo.text = prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)
            if count is not None:
                echo.first = _first_token(service, row)
                echo.shows_first = not isinstance(prompt, str) or echo.first.id != llm.tokenizer.bos_id
                echo.rest = PromptLogprobs(row.input_ids.shape[1], count, llm.tokenizer.decode_bytes)
        observer = echo.rest if echo is not None else None
        streams += choices_of(service.engine, model.adapter, row, fields["n"], options, observer)
        echoes += [echo] * fields["n"]
    answer = Completion(
        streams,
        model.name,
        tells_usage,
        fields["n"],
        echoes,
        [each for each in names for _ in range(fields["n"])],
        tells_logprobs=count is not None,
        only_echo=not fields["max_tokens"],
    )
    return await respond(service, call, answer)


@dataclass
class Echo:
    """A prompt that is repeated before its replies.

    Attributes:
        first: its first token, of which no probability is known; None where probabilities are not told.
        shows_first: whether the text holds that; a begin of text that was put before it does not stand there.
        rest: those of its other tokens, once it has been read.
    """

    text: str = ""
    first: Token | None = None
    shows_first: bool = True
    rest: PromptLogprobs | None = None


def _first_token(service: Service, row: Inputs) -> Token:
    id_ = int(row.input_ids[0, 0])
    return Token(id_, service.engine.llm.tokenizer.decode_bytes([id_]), math.nan)


def prompts_of(value: Any) -> list[str | list[int]]:
    """A text, a list of token ids, or a list of these -> the list."""
    if isinstance(value, str):
        return [value]
    if all(isinstance(each, (int, float)) for each in value):
        return [list(map(int, value))]
    return [each if isinstance(each, str) else list(map(int, each)) for each in value]


def names_of(prompts: Sequence[Any], field: str, value: Any, form: str = "response_format") -> list[Names]:
    """How the field of each prompt is called: that of all, or a place in its list."""
    if len(prompts) == 1 and (isinstance(value, str) or value != prompts):
        return [Names(field, form=form)]
    return [Names(f"{field}[{i}]", form=form) for i in range(len(prompts))]


async def inputs_of_all(service: Service, prompts: Sequence[str | list[int]], names: Sequence[Names]) -> list[Inputs]:
    """One after the other: a client that leaves is seen between them."""
    inputs = []
    for prompt, each in zip(prompts, names, strict=True):
        with each.told():
            inputs.append(await asyncio.to_thread(input_of, service, prompt))
    return inputs


def input_of(service: Service, prompt: str | list[int]) -> Inputs:
    if isinstance(prompt, str):
        return service.engine.llm.processor.complete(prompt, limit=service.engine.scheduler.limit)
    service.engine.scheduler.limit.check(len(prompt))
    return inputs_of(prompt)


def inputs_of(ids: Sequence[int]) -> Inputs:
    """A prompt of token ids."""
    input_ids = torch.tensor([list(ids)])
    return Inputs(input_ids, torch.ones_like(input_ids), None)


class Completion(OpenAIAnswer):
    """The answer to completions.

    Args:
        echoes: what stands before each reply.
        names: those of each reply's prompt.
        tells_logprobs: whether with the probability of each token.
        only_echo: whether there is nothing behind it.
    """

    def __init__(
        self,
        streams: Sequence[EngineStream],
        name: str,
        tells_usage: bool,
        choices: int,
        echoes: Sequence[Echo | None],
        names: Sequence[Names],
        *,
        tells_logprobs: bool,
        only_echo: bool,
    ) -> None:
        super().__init__(streams, "text_completion", "cmpl", name, tells_usage, choices, names[0])
        self._echoes, self._names_of_each = list(echoes), list(names)
        self._tells_logprobs, self._only_echo = tells_logprobs, only_echo
        self._offsets = [0] * len(self.streams)  # characters of each reply's text whose tokens were told

    def names(self, index: int) -> Names:
        return self._names_of_each[index]

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "text": self._echoed(i) + ("" if self._only_echo else stream.reply.text),
                "logprobs": self._logprobs(i, [*self._prompt(i), *self._told(stream.reply.logprobs)]),
                "finish_reason": self._reason(i),
                "stop_reason": stream.stop_string,
            }
            for i, stream in enumerate(self.streams)
        ]
        return self.body(choices, self.usage())

    async def events(self) -> AsyncIterator[str]:
        held = {i: "" for i, echo in enumerate(self._echoes) if echo is not None}  # until their prompts are told
        async for i, delta in self.deltas():
            text = getattr(delta, "text", "")
            if i in held:
                held[i] += text
                if not self._is_read(i):
                    continue
                yield self._piece(i, self._echoed(i), self._prompt(i))
                text = held.pop(i)
            if delta is None:
                yield self._end(i, text)
            elif not self._only_echo:
                yield self._piece(i, text, self.new_tokens(i))
        for i, text in held.items():  # which have ended before their prompts were told
            yield self._piece(i, self._echoed(i), self._prompt(i))
            yield self._end(i, text)
        yield self.usage_chunk()

    def _end(self, index: int, text: str) -> str:
        """The last piece of a reply."""
        tokens = self._told(self.new_tokens(index))
        return self._piece(index, "" if self._only_echo else text, tokens, self._reason(index))

    def usage(self) -> dict[str, Any]:
        used = super().usage()
        return used | {"completion_tokens": 0, "total_tokens": used["prompt_tokens"]} if self._only_echo else used

    def _reason(self, index: int) -> str | None:
        return "length" if self._only_echo else self.streams[index].reply.finish_reason

    def _echoed(self, index: int) -> str:
        echo = self._echoes[index]
        return echo.text if echo is not None else ""

    def _prompt(self, index: int) -> list[Token]:
        """The tokens of a prompt whose probabilities are told; its replies have the same."""
        echo = self._echoes[index]
        if echo is None or echo.first is None or echo.rest is None:
            return []
        return [echo.first, *echo.rest.tokens]

    def _is_read(self, index: int) -> bool:
        """Whether all probabilities of a prompt are known: another choice may be the one that is observed."""
        echo = self._echoes[index]
        return echo is None or echo.rest is None or echo.rest.is_complete

    def _told(self, tokens: Sequence[Token]) -> Sequence[Token]:
        return () if self._only_echo else tokens

    def _piece(self, index: int, text: str, tokens: Sequence[Token] = (), reason: str | None = None) -> str:
        logprobs = self._logprobs(index, tokens) if tokens else None
        return self.chunk({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Of the next tokens of a reply, or of its prompt."""
        if not self._tells_logprobs:
            return None
        decode = self.streams[0].decode_bytes
        likely = [
            {decode([id_]).decode(errors="replace"): value for id_, value in token.alternatives} for token in tokens
        ]
        lengths = (self._length(index, token) for token in tokens)
        *offsets, self._offsets[index] = accumulate(lengths, initial=self._offsets[index])
        return {
            "text_offset": offsets,
            "tokens": [token.text for token in tokens],
            "token_logprobs": [None if math.isnan(token.logprob) else token.logprob for token in tokens],
            "top_logprobs": [
                None if math.isnan(token.logprob) else each for token, each in zip(tokens, likely, strict=True)
            ],
        }

    def _length(self, index: int, token: Token) -> int:
        """Characters that begin in a token, of which the text holds some."""
        echo = self._echoes[index]
        if echo is not None and token is echo.first and not echo.shows_first:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in token.bytes)


ROUTES = (Route("POST", "/v1/completions", complete, "Continue texts", COMPLETE, COMPLETION, can_stream=True),)
