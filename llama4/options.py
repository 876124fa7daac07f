"""What a call of `chat` takes: `Options`, and `Prepared`, what is computed for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from llama4.engine.grammar import Form, Matcher, Vocabulary
from llama4.engine.replies import ReplyBuilder
from llama4.engine.sampling import Sampler, SamplingOptions
from llama4.errors import Llama4Error
from llama4.inputs import Inputs
from llama4.text.messages import Message
from llama4.text.tokenizer import Tokenizer

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
        """What one reply is held to; None for any text."""
        if self.form is None:
            return None
        return Matcher(self.form, Vocabulary.of(tokenizer, vocab_size, self.stop_ids))

    def builders(self, tokenizer: Tokenizer) -> list[ReplyBuilder]:
        """What makes a reply of each row's events."""
        lengths = self.inputs.attention_mask.sum(dim=1).tolist()
        return [ReplyBuilder(length, self.tools, tokenizer.special_tokens, self.form) for length in lengths]

    def builder(self, tokenizer: Tokenizer) -> ReplyBuilder:
        """That of the only row.

        Raises:
            Llama4Error: there are several.
        """
        builders = self.builders(tokenizer)
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


def conversation(messages: str | Sequence[Message]) -> Sequence[Message]:
    """A string is one question."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
