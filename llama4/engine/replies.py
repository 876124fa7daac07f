"""Replies of a model, whole or streamed."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama4.engine.grammar import Form
from llama4.engine.tokens import Event, FinishReason, Token
from llama4.text.tool_calls import MARKS, CallReader, CutCall, ToolCall, WholeCallReader, names_of, new_id

CALLS_TOOLS = ("<|eom|>", "<|eom_id|>")
"""Tokens that end a reply which calls tools: Llama 4's, and Llama 3's."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a prompt, images and format included, and of its reply, that which ended it included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of a reply's text, never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call. The pieces of `arguments` with one `index` join to the JSON of the call's arguments.

    A call comes when it is complete, as one piece: before that, it may still turn out to be text. One that the form of
    the reply has comes when the reply ends, as far as it came.

    Attributes:
        index: of the call in the reply's `tool_calls`; of one that was cut off 0, as there is no other.
        id, name: the call's.
        is_cut: whether the reply ended before it was complete; its arguments may be no JSON then.
    """

    index: int
    id: str
    name: str
    arguments: str
    is_cut: bool = False

    def to_openai(self) -> dict[str, Any]:
        """As an entry of `tool_calls` in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


Delta = TextDelta | ToolCallDelta


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said.

    Attributes:
        text: without tool calls, stop strings and special tokens.
        tool_calls: the functions it wants called.
        finish_reason: "tool_calls" if there are any; else "stop" if the model ended or a stop string came, "length" at
            a limit, None if interrupted.
        usage: how many tokens it took.
        logprobs: every generated token with its log-probability before temperature and the like.
        parsed: where JSON was asked for and the reply is complete, what it says: a dictionary, or the pydantic object.
        others: where `n` asked for more replies, those after this one.
        cut_call: where the reply's form is a tool call, or has one beside it, and the reply ended before that was
            complete, what came of it; None where not even its arguments began: what came is `text` then.
    """

    text: str
    tool_calls: list[ToolCall]
    finish_reason: FinishReason | Literal["tool_calls"] | None
    usage: Usage
    logprobs: list[Token]
    parsed: Any = None
    others: tuple[Reply, ...] = ()
    cut_call: ToolCallDelta | None = None

    def __str__(self) -> str:
        return self.text


class ReplyBuilder:
    """A reply, event by event.

    Args:
        prompt_tokens: how many.
        tools: the function schemas that the model was given. Of none, and where a form leaves no room for calls, all
            is text. Where it is not known (None), the model may have been told of tools in the conversation: its calls
            are read after `<|python_start|>`, and at the end of a reply that ends with `<|eom|>`.
        special_tokens: the tokenizer's, name -> id.
        form: what the reply must be.
        stop_ids: tokens by which the model ends it.
        one_call: whether it ends with its first tool call.
    """

    def __init__(
        self,
        prompt_tokens: int,
        tools: Sequence[Mapping[str, Any]] | None,
        special_tokens: Mapping[str, int],
        form: Form | None = None,
        stop_ids: Collection[int] = (),
        one_call: bool = False,
    ) -> None:
        self._one_call = one_call
        self._form, self._stop_ids = form, stop_ids
        self._prompt_tokens = prompt_tokens
        calls = bool(tools) or (tools is None and form is None)
        self._reader: CallReader | WholeCallReader | None = None
        if form is not None and form.is_call:
            self._reader = WholeCallReader(names_of(tools) or ())
        elif calls:
            self._reader = CallReader(names_of(tools), certain=bool(tools))
        self._marks = {special_tokens[name]: name for name in MARKS if name in special_tokens}
        self._calls_tools = {special_tokens[name] for name in CALLS_TOOLS if name in special_tokens}
        self._text: list[str] = []
        self._tool_calls: list[ToolCall] = []
        self._cut_call: ToolCallDelta | None = None
        self._tokens: list[Token] = []
        self._finish_reason: FinishReason | None = None
        self._parsed: Any = None

    @property
    def tokens(self) -> Sequence[Token]:
        """Those that have come."""
        return self._tokens

    def add(self, event: Event) -> list[Delta]:
        """Take one more token; return what is certain now."""
        self._tokens.append(event.token)
        self._finish_reason = event.finish_reason
        deltas: list[Delta] = []
        for piece in self._read(event):
            if not self.is_complete:
                deltas.append(self._delta(piece))
        if self._form is not None and event.finish_reason:
            self._parsed = self._form.parse("".join(self._text), is_ended=event.token.id in self._stop_ids)
        return deltas

    def _read(self, event: Event) -> Sequence[str | ToolCall | CutCall]:
        if self._reader is None:
            return [event.text] if event.text else []
        if isinstance(self._reader, WholeCallReader):
            return [*self._reader.push(event.text), *(self._reader.finish() if event.finish_reason else ())]
        pieces = self._reader.push(event.text)
        if mark := self._marks.get(event.token.id):
            pieces += self._reader.mark(mark)
        if event.finish_reason:
            pieces += self._reader.finish(calls_tools=event.token.id in self._calls_tools)
        return pieces

    @property
    def is_complete(self) -> bool:
        """Whether no more of the reply is wanted, though the model goes on."""
        return self._one_call and bool(self._tool_calls)

    def _delta(self, piece: str | ToolCall | CutCall) -> Delta:
        if isinstance(piece, CutCall):
            self._cut_call = ToolCallDelta(0, new_id(), piece.name, piece.arguments, is_cut=True)
            return self._cut_call
        if isinstance(piece, str):
            self._text.append(piece)
            return TextDelta(piece)
        self._tool_calls.append(piece)
        return ToolCallDelta(len(self._tool_calls) - 1, piece.id, piece.name, json.dumps(piece.arguments))

    def reply(self) -> Reply:
        """What is certain so far; after the last token, the whole reply."""
        count = len(self._tokens)
        return Reply(
            "".join(self._text),
            list(self._tool_calls),
            "tool_calls" if self._tool_calls else self._finish_reason,
            Usage(self._prompt_tokens, count, self._prompt_tokens + count),
            list(self._tokens),
            self._parsed,
            cut_call=self._cut_call,
        )


class Stream(Iterator[str]):
    """A streamed reply: an iterator of pieces of text, none of them empty or with half a character.

    The pieces join to the reply's text, without tool calls; `events` has these, too. Iteration may stop at any point.
    """

    def __init__(self, events: Iterator[Event], builder: ReplyBuilder) -> None:
        self._events = events
        self._builder = builder
        self._deltas: deque[Delta] = deque()

    def __next__(self) -> str:
        return next(delta.text for delta in self.events() if isinstance(delta, TextDelta))

    def events(self) -> Iterator[TextDelta | ToolCallDelta]:
        """The rest of the reply: pieces of text, and tool calls as they come."""
        while True:
            while self._deltas:
                yield self._deltas.popleft()
            event = next(self._events, None)
            if event is None:
                return
            self._deltas.extend(self._builder.add(event))

    @property
    def reply(self) -> Reply:
        """What has come so far; once the iterator has ended, the whole reply."""
        return self._builder.reply()
