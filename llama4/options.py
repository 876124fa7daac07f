"""What a call of `chat` takes: `Options`; what they say of the reply's tokens; and `Prepared`, what is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

from llama4.config import GenerationConfig
from llama4.engine.grammar import Form, Matcher, Vocabulary
from llama4.engine.replies import ReplyBuilder
from llama4.engine.sampling import Sampler, SamplingOptions, check_choice
from llama4.errors import ArgumentError, Llama4Error, nearest
from llama4.inputs import Inputs
from llama4.text.messages import Message
from llama4.text.tokenizer import Tokenizer
from llama4.text.tool_calls import chosen_tools, free_call

P = ParamSpec("P")
R = TypeVar("R")

MAX_NEW_TOKENS = 256
"""Of a reply, where a caller does not say."""

Prompt: TypeAlias = str | Sequence[Message] | Inputs
"""A question, a conversation, or what the processor made of one (for instance `processor.complete(text)`)."""


@dataclass(frozen=True)
class Prepared:
    """A call of `chat` or `chat_batch`, ready to be computed.

    Attributes:
        inputs: a row for each conversation.
        stop, stop_ids: strings and tokens that end a reply.
        top_logprobs: of how many of the most likely tokens each token tells the probability.
    """

    inputs: Inputs
    sampler: Sampler
    max_new_tokens: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    tools: Sequence[Mapping[str, Any]] | None
    form: Form | None = None
    top_logprobs: int = 0

    def matcher(self, tokenizer: Tokenizer, vocab_size: int) -> Matcher | None:
        """What one reply is held to; None for any text.

        Raises:
            Llama4Error: no token ends a reply.
        """
        if self.form is None:
            return None
        if not self.stop_ids:
            raise Llama4Error("no token of the vocabulary ends a reply, so none has a form; set eos_token_id")
        return Matcher(self.form, Vocabulary.of(tokenizer, vocab_size, self.stop_ids))

    def builders(self, tokenizer: Tokenizer, one_call: bool = False) -> list[ReplyBuilder]:
        """What makes a reply of each row's events, perhaps no further than its first tool call."""
        lengths = self.inputs.attention_mask.sum(dim=1).tolist()
        special = tokenizer.special_tokens
        return [ReplyBuilder(length, self.tools, special, self.form, self.stop_ids, one_call) for length in lengths]

    def builder(self, tokenizer: Tokenizer, one_call: bool = False) -> ReplyBuilder:
        """That of the only row.

        Raises:
            Llama4Error: there are several.
        """
        builders = self.builders(tokenizer, one_call)
        if len(builders) != 1:
            raise Llama4Error(f"these are {len(builders)} conversations; use chat_batch for more than one")
        return builders[0]


class Options(SamplingOptions, total=False):
    """Keyword arguments of `Llama4.chat`, where they are explained."""

    max_new_tokens: int
    stop: str | Sequence[str] | None
    tools: Sequence[Mapping[str, Any]] | None
    continue_final_message: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    response_format: Any
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None
    tool_choice: str | Mapping[str, Any] | None
    ignore_eos: bool
    top_logprobs: int


_OTHERS = Options.__annotations__.keys() - SamplingOptions.__annotations__.keys()
"""Options that no `Sampler` takes."""


def check_options(names: Iterable[str]) -> None:
    """Raises:
    TypeError: an option that there is not.
    """
    if unknown := set(names) - Options.__annotations__.keys():
        name = min(unknown)
        raise TypeError(f"{name} is no option of a reply{nearest(name, Options.__annotations__)}")


def options_checked(call: Callable[P, R]) -> Callable[P, R]:
    """A call that takes options by name: of one that there is not, its error names the nearest."""
    known = inspect.signature(call).parameters

    @wraps(call)
    def checked(*arguments: P.args, **options: P.kwargs) -> R:
        check_options(options.keys() - known)
        return call(*arguments, **options)

    return checked


def choice_of(
    options: Options, defaults: GenerationConfig, vocab_size: int
) -> tuple[Sampler, Sequence[Mapping[str, Any]] | None, Form | None]:
    """How the tokens of a reply are chosen: by which sampler, with which tools, and held to which form.

    Args:
        defaults: what the checkpoint says.

    Raises:
        Llama4Error: an option out of its range, or options that contradict each other.
        TypeError: an option that there is not.
    """
    check_options(options)
    for name in ("ignore_eos", "continue_final_message"):
        if not isinstance(flag := options.get(name), bool | None):
            raise ArgumentError(f"{name} is {flag!r:.80}; it must be True or False")
    tools, called = chosen_tools(options.get("tools"), options.get("tool_choice"))
    text_form = options.get("response_format") if called is None else None  # of texts: a call has none, as with OpenAI
    call = free_call(tools) if tools and text_form is not None else None  # which it may be instead, as with OpenAI
    form = Form.of(text_form, options.get("regex"), options.get("choices"), options.get("grammar"), called, call)
    sampling = {name: value for name, value in options.items() if name not in _OTHERS}
    sampler = Sampler.from_options(cast(SamplingOptions, sampling), defaults)
    check_choice(sampler, vocab_size, options.get("top_logprobs", 0))
    if form is not None:
        if options.get("ignore_eos") or options.get("min_tokens"):
            name = "ignore_eos" if options.get("ignore_eos") else "min_tokens"
            raise ArgumentError(f"{name} is given with a form of the reply, which has an end; choose one")
        sampler = replace(sampler, min_tokens=0)  # whatever the checkpoint says
    return sampler, tools, form


def has_form(options: Options) -> bool:
    """Whether a reply is held to a form, which may take long to read."""
    given = [options.get(name) for name in ("response_format", "regex", "choices", "grammar", "tool_choice")]
    return any(each not in (None, "auto", "none", {"type": "text"}) for each in given)


def conversation_rows(given: Iterable[str | Iterable[Message]]) -> list[list[Message]]:
    """Several conversations.

    Raises:
        ArgumentError: it is one conversation, or no list; or a row is none.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ArgumentError(f"conversations is {given!r:.80}; it must be a list, with one for each reply")
    rows = list(given)
    if any(isinstance(row, Mapping) for row in rows):
        raise ArgumentError("conversations is a list of messages; give a list of conversations: [messages]")
    for i, row in enumerate(rows):
        if isinstance(row, bytes) or not isinstance(row, Iterable):
            raise ArgumentError(f"conversation {i} is {row!r:.80}; it must be a text, or a list of messages")
    return [list(conversation(row)) if isinstance(row, str) else list(row) for row in rows]


def conversation(messages: str | Sequence[Message]) -> Sequence[Message]:
    """A string is one question."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
