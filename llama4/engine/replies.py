"""Replies of a model, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama4.engine.tokens import Event, FinishReason, Token
from llama4.text.tool_calls import ToolCall, parse_reply


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a prompt, images and format included, and of its reply, that which ended it included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said.

    Attributes:
        text: without tool calls, stop strings and special tokens.
        tool_calls: the functions it wants called.
        finish_reason: "stop" if the model ended or a stop string came, "length" at a limit, None if interrupted.
        usage: how many tokens it took.
        logprobs: every generated token with its log-probability before temperature and the like.
    """

    text: str
    tool_calls: list[ToolCall]
    finish_reason: FinishReason | None
    usage: Usage
    logprobs: list[Token]

    def __str__(self) -> str:
        return self.text


@dataclass
class ReplyBuilder:
    """A reply, event by event."""

    prompt_tokens: int
    tools: Sequence[Mapping[str, Any]] | None
    call_id: int | None
    """Id of `<|python_start|>`, which begins a tool call even where no tools were given."""
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, event: Event) -> None:
        self.text += event.text
        self.tokens.append(event.token)
        self.finish_reason = event.finish_reason

    def reply(self) -> Reply:
        text, calls = self.text, list[ToolCall]()
        if self.tools or any(token.id == self.call_id for token in self.tokens):
            text, calls = parse_reply(text, self.tools)
        usage = Usage(self.prompt_tokens, len(self.tokens), self.prompt_tokens + len(self.tokens))
        return Reply(text, calls, self.finish_reason, usage, list(self.tokens))


class Stream(Iterator[str]):
    """A streamed reply: an iterator of pieces of text, none of them empty or with half a character.

    The pieces join to the reply's text, with tool calls as the model wrote them. Iteration may stop at any point.
    """

    def __init__(self, events: Iterator[Event], builder: ReplyBuilder) -> None:
        self._events = events
        self._builder = builder

    def __next__(self) -> str:
        for event in self._events:
            self._builder.add(event)
            if event.text:
                return event.text
        raise StopIteration

    @property
    def reply(self) -> Reply:
        """What has come so far; once the iterator has ended, the whole reply."""
        return self._builder.reply()
