"""Chats and completions in OpenAI's form: JSON or a stream of events <-> the engine's streams."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import torch

from llama4.engine.replies import Delta, Reply, TextDelta
from llama4.engine.tokens import Token
from llama4.inputs import Inputs
from llama4.serve.engine import Engine, EngineOptions, EngineStream
from llama4.serve.schema import Asked


class Answer:
    """The replies to one request, as the engine gives them.

    Attributes:
        streams: one for each choice.
        asked: the request.
        name: of the model.
    """

    def __init__(self, streams: Sequence[EngineStream], asked: Asked, name: str, *, is_chat: bool) -> None:
        self.streams, self.asked, self.name, self.is_chat = list(streams), asked, name, is_chat
        prefix, self.kind = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
        self.id, self.created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())

    async def open(self) -> None:
        """Prepare all prompts; what is wrong with them is raised here, before anything is sent."""
        await asyncio.gather(*(asyncio.to_thread(stream.open) for stream in self.streams))

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()

    async def whole(self, echo: Sequence[str] = ()) -> dict[str, Any]:
        """The answer in one piece."""

        async def run(stream: EngineStream) -> Reply:
            async for _ in stream.async_events():
                pass
            return stream.reply

        replies = await asyncio.gather(*map(run, self.streams))
        choices = [self._choice(i, reply, echo[i] if echo else "") for i, reply in enumerate(replies)]
        return {**self._frame(self.kind), "choices": choices, "usage": self._usage()}

    async def events(self, echo: Sequence[str] = ()) -> AsyncIterator[dict[str, Any]]:
        """The answer in pieces."""
        kind = f"{self.kind}.chunk" if self.is_chat else self.kind
        reported = [0] * len(self.streams)
        for i in range(len(self.streams)):
            if self.is_chat:
                yield self._chunk(kind, i, {"role": "assistant", "content": ""})
            elif echo:
                yield self._chunk(kind, i, echo[i])
        async with aclosing(_merged([stream.async_events() for stream in self.streams])) as deltas:
            async for i, delta in deltas:
                new = self._new_tokens(i, reported)
                yield self._chunk(kind, i, self._delta(delta), new)
        for i, stream in enumerate(self.streams):
            left = self._new_tokens(i, reported)
            yield self._chunk(kind, i, {} if self.is_chat else "", left, stream.reply.finish_reason)
        if self.asked.include_usage:
            yield {**self._frame(kind), "choices": [], "usage": self._usage()}

    def _new_tokens(self, index: int, reported: list[int]) -> Sequence[Token]:
        """The tokens since the last event, if their probabilities are wanted."""
        if self.asked.alternatives is None:
            return ()
        tokens = self.streams[index].reply.logprobs
        new, reported[index] = tokens[reported[index] :], len(tokens)
        return new

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _choice(self, index: int, reply: Reply, echo: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(reply.logprobs)}
        if self.is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
            if reply.tool_calls:
                message["tool_calls"] = [call.to_openai() for call in reply.tool_calls]
                message["content"] = reply.text or None
            choice["message"] = message
        else:
            choice["text"] = echo + reply.text
        return {**choice, "finish_reason": reply.finish_reason, "stop_reason": None}

    def _chunk(
        self, kind: str, index: int, piece: Any, tokens: Sequence[Token] = (), reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta" if self.is_chat else "text": piece, "finish_reason": reason}
        choice["logprobs"] = self._logprobs(tokens) if tokens else None
        usage = {"usage": None} if self.asked.include_usage else {}
        return {**self._frame(kind), "choices": [choice], **usage}

    def _delta(self, delta: Delta) -> Any:
        if isinstance(delta, TextDelta):
            return {"content": delta.text} if self.is_chat else delta.text
        function = {"name": delta.name, "arguments": delta.arguments}
        return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}

    def _usage(self) -> dict[str, Any]:
        """A prompt that several choices answer counts once."""
        usages = [stream.reply.usage for stream in self.streams]
        prompt = sum(usage.prompt_tokens for usage in usages[:: self.asked.choices])
        completion = sum(usage.completion_tokens for usage in usages)
        reused = sum(stream.request.reused or 0 for stream in self.streams[:: self.asked.choices])
        details = {"prompt_tokens_details": {"cached_tokens": reused}}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            **details,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.asked.alternatives is None:
            return None
        decode = self.streams[0].decode_bytes
        if not self.is_chat:
            return {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [
                    {decode([id_]).decode(errors="replace"): value for id_, value in token.alternatives}
                    for token in tokens
                ],
            }

        def entry(data: bytes, value: float) -> dict[str, Any]:
            return {"token": data.decode(errors="replace"), "logprob": value, "bytes": list(data)}

        return {
            "content": [
                {
                    **entry(token.bytes, token.logprob),
                    "top_logprobs": [entry(decode([id_]), value) for id_, value in token.alternatives],
                }
                for token in tokens
            ],
            "refusal": None,
        }


async def _merged(sources: Sequence[AsyncIterator[Delta]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """What several iterators give, as it comes, with the number of each."""
    arrived: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue(maxsize=64)

    async def pump(index: int, source: AsyncIterator[Delta]) -> None:
        try:
            async for item in source:
                await arrived.put((index, item))
            await arrived.put((index, None))
        except Exception as error:
            await arrived.put((index, error))

    tasks = [asyncio.create_task(pump(i, source)) for i, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()


def choices_of(engine: Engine, prompts: Sequence[Any], asked: Asked, more: Mapping[str, Any]) -> list[EngineStream]:
    """A stream for each prompt and choice; each choice draws for itself."""
    options: dict[str, Any] = {**asked.options, **more}
    seed = options["seed"]
    return [
        engine.stream(prompt, **_seeded(options, seed + i if seed is not None else None))
        for prompt in prompts
        for i in range(asked.choices)
    ]


def _seeded(options: Mapping[str, Any], seed: int | None) -> EngineOptions:
    return {**options, "seed": seed}  # type: ignore[typeddict-item]


def inputs_of(ids: Sequence[int]) -> Inputs:
    """A prompt of token ids."""
    input_ids = torch.tensor([list(ids)])
    return Inputs(input_ids, torch.ones_like(input_ids), None)


def as_event(content: Mapping[str, Any] | str) -> str:
    """One event of a stream."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n"
