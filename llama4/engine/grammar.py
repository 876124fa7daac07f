"""Replies in a given form: JSON of a schema, a regular expression, one of several texts, or a grammar.

Before each token is chosen, those that the form does not allow are ruled out. What is allowed is computed by
llguidance, in 50 microseconds or some milliseconds, in a thread of its own while the model computes the next logits.
What may come first is computed where the form is read, as both may take tenths of a second.

Shapes: V vocabulary.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary, proxy

import numpy as np
import torch
from torch import Tensor

from llama4.engine.form_limits import MAX_EXPRESSIONS, MAX_SIZE, check_grammar, check_schema, check_size
from llama4.engine.tokens import SupportsDecode
from llama4.errors import ArgumentError
from llama4.text.tool_calls import as_resource

_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python writes JSON: a model that may write spaces without end may do so."""
_MAX_JSON_ITEMS = 20_000
"""What may come next in JSON, in llguidance's words: of each property that may be left out, four."""
_MAX_JSON_FUEL = 1_000_000
"""What llguidance may make of a schema's expressions for one token: multiples of thousands between two bounds need more
than its own 200,000, and take 0.03 s for some."""


class SupportsText(SupportsDecode, Protocol):
    """What a grammar asks of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, eq=False)
class Form:
    """What a reply may be.

    Attributes:
        grammar: in llguidance's words.
        model: a pydantic class that the reply becomes, or None.
        is_json: whether the reply is JSON.
        is_call: whether it is a tool call, or may be one instead.
    """

    grammar: str
    model: Any = None
    is_json: bool = False
    is_call: bool = False

    @classmethod
    def of(
        cls,
        response_format: Any = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        call: Mapping[str, Any] | None = None,
        instead: Mapping[str, Any] | None = None,
    ) -> Form | None:
        """The form that a caller asks for; None for any text.

        Args:
            response_format: a JSON schema, a pydantic class, or OpenAI's {"type": "json_object"} or
                {"type": "json_schema", "json_schema": {"schema": ...}}.
            regex: what the whole reply matches.
            choices: texts, one of which the reply is.
            grammar: in Lark's syntax.
            call: the JSON schema of a tool call.
            instead: the JSON schema of what the reply may be instead of `response_format`; without that it counts not.

        Raises:
            ArgumentError: more than one of these, or one that is not well formed or not supported; its name is in the
                message.
        """
        given = {"response_format": response_format, "regex": regex, "choices": choices}
        given |= {"grammar": grammar, "tool_choice": call}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ArgumentError(f"{' and '.join(names)} are given; a reply has one form, so choose one")
        for name, expression in (("regex", regex), ("grammar", grammar)):
            if expression is not None and not _is_text(expression):
                raise ArgumentError(f"{name} is {expression!a:.80}; it must be a text")
        if call is not None:
            return replace(cls._of_schema(call, name="the schema of a tool"), is_call=True)
        if response_format is not None:
            return cls._of_format(response_format, instead)
        if choices is not None:
            is_list = isinstance(choices, Sequence) and not isinstance(choices, str) and len(choices) > 0
            if not is_list or not all(_is_text(each) and each for each in choices):
                raise ArgumentError(f"choices is {choices!a:.80}; it must be a list of texts, none of them empty")
            check_size("choices", sum(len(each) + len("()|") for each in choices), MAX_SIZE, ", joined by '()|',")
            regex = "|".join(f"({re.escape(each)})" for each in choices)
        elif regex is not None:
            check_size("regex", len(regex), MAX_EXPRESSIONS)
        if regex is not None:
            return cls._checked(_llguidance().LLMatcher.grammar_from_regex(regex), names[0])
        if grammar is not None:
            check_grammar(grammar)
            return cls._checked(_llguidance().LLMatcher.grammar_from_lark(grammar), "grammar")
        return None

    @classmethod
    def _of_format(cls, wanted: Any, instead: Mapping[str, Any] | None) -> Form | None:
        if isinstance(wanted, type) and hasattr(wanted, "model_json_schema"):
            return cls._of_schema(wanted.model_json_schema(), instead, wanted)
        if not isinstance(wanted, Mapping):
            raise ArgumentError(f"response_format is {wanted!r:.80}; it must be a JSON schema or a pydantic class")
        kind = wanted.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return cls._of_schema({"type": "object"}, instead)
        if kind == "json_schema" and isinstance(inner := wanted.get("json_schema"), Mapping):
            if not isinstance(schema := inner.get("schema"), Mapping):
                raise ArgumentError("response_format.json_schema has no schema; give one, as an object")
            return cls._of_schema(schema, instead)
        return cls._of_schema(wanted, instead)

    @classmethod
    def _of_schema(
        cls,
        schema: Mapping[str, Any],
        instead: Mapping[str, Any] | None = None,
        model: Any = None,
        name: str = "response_format",
    ) -> Form:
        plain = {key: value for key, value in schema.items() if key != "x-guidance"}  # options of the library
        if instead is not None:
            plain = {"anyOf": [as_resource(plain, "https://reply/"), instead]}
        try:
            text = json.dumps(plain)
            check_size(name, len(text), MAX_SIZE)
            check_schema(json.loads(text), name)
            grammar = _llguidance().LLMatcher.grammar_from_json_schema(text, overrides=_WRITING)
        except ArgumentError:
            raise
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ArgumentError(f"{name} is no JSON schema ({error})") from None
        return replace(cls._checked(grammar, name, model, is_json=True), is_call=instead is not None)

    @classmethod
    def _checked(cls, grammar: str, name: str, model: Any = None, is_json: bool = False) -> Form:
        if problem := _llguidance().LLMatcher.validate_grammar(grammar, limits=_limits(is_json)):
            keyword = "pattern: " if is_json and problem.startswith("regex") else ""
            raise ArgumentError(f"{name} cannot be followed: {keyword}{' '.join(problem.split()):.300}")
        return cls(grammar, model, is_json)

    def parse(self, text: str, *, is_ended: bool = True) -> Any:
        """What a reply says; None if it is no JSON, or was cut off.

        Args:
            is_ended: whether the model ended it. Else it counts as cut off if it could go on, as a number often can.
        """
        if not self.is_json:
            return None
        try:
            parsed = self.model.model_validate_json(text) if self.model is not None else json.loads(text)
        except (ValueError, RecursionError):
            return None
        return parsed if is_ended or self._is_full(text) else None

    def follower(self, tokenizer: Any) -> Any:
        """What follows a reply from its beginning, for one of llguidance's tokenizers."""
        return _llguidance().LLMatcher(tokenizer, self.grammar, log_level=0, limits=_limits(self.is_json))

    def _is_full(self, text: str) -> bool:
        """Whether it is a whole reply, behind which nothing may come."""
        data = text.encode()
        matcher = self.follower(_llguidance().LLTokenizer("byte"))
        return bool(matcher.try_consume_tokens([*data]) == len(data) and matcher.is_stopped())


def _limits(is_json: bool) -> Any:
    """Of llguidance; those for JSON, whose schemas are checked before, are higher."""
    limits = {"max_items_in_row": _MAX_JSON_ITEMS, "step_lexer_fuel": _MAX_JSON_FUEL} if is_json else {}
    return _llguidance().LLParserLimits(**limits)


def _is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 can encode."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


class _Tokens:
    """A tokenizer's tokens, as llguidance reads them. It keeps this object for ever if that has what it makes of it."""

    def __init__(self, tokenizer: SupportsText, size: int, stop_ids: Sequence[int]) -> None:
        self.eos_token_id, self.bos_token_id = stop_ids[0], None
        self.special_token_ids = sorted(tokenizer.special_tokens.values())
        self.tokens = [tokenizer.decode_bytes([id_]) for id_ in range(size)]
        self._tokenizer = proxy(tokenizer)  # of which `_VOCABULARIES` has this only as long as it lives

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("texts, not bytes")
        ids: list[int] = self._tokenizer.encode(text)
        return ids


class Vocabulary:
    """A tokenizer's tokens, and which of them end a reply."""

    def __init__(self, tokenizer: SupportsText, size: int, stop_ids: Sequence[int]) -> None:
        library = _llguidance()
        wrapper = library.TokenizerWrapper(_Tokens(tokenizer, size, stop_ids))
        self.size = size
        self.end_V = torch.full((size,), -torch.inf)
        self.end_V[list(stop_ids)] = 0
        self.tokenizer = library.LLTokenizer(wrapper, n_vocab=size, eos_token=list(stop_ids))

    @classmethod
    def of(cls, tokenizer: SupportsText, size: int, stop_ids: Sequence[int]) -> Vocabulary:
        """That of a tokenizer; made once, in about a second for 200,000 tokens."""
        made = _VOCABULARIES.setdefault(tokenizer, {})
        key = size, tuple(stop_ids)
        if key not in made:
            made[key] = cls(tokenizer, size, stop_ids)
        return made[key]


_VOCABULARIES: WeakKeyDictionary[SupportsText, dict[tuple[int, tuple[int, ...]], Vocabulary]] = WeakKeyDictionary()


_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_PENALTIES = np.where(_BITS, 0, -np.inf).astype(np.float32)
"""Of each byte of a mask, what its eight tokens' scores have added."""


class Matcher:
    """Follows one reply, and says which tokens may come next."""

    def __init__(self, form: Form, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._matcher = form.follower(vocabulary.tokenizer)  # a copy of another would share its lexer, and its end
        self._check()
        self._penalties_V = Future[Tensor]()
        try:
            self._penalties_V.set_result(self._compute())  # here: in `_thread` all other replies would wait for it
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of llguidance is no Exception
            self._penalties_V.set_exception(error)

    def _check(self) -> None:
        if self._matcher.is_error():
            problem = self._matcher.get_error().partition("\n<state>")[0]  # behind it is what the reply says
            problem = "no text has it" if problem == "NoExtensionBias" else problem
            raise ArgumentError(f"the reply's form cannot be followed: {problem:.300}")

    def problem(self) -> Exception | None:
        """The error that made the grammar unusable, or None."""
        error = self._penalties_V.exception()
        return error if isinstance(error, Exception | None) else RuntimeError(f"a grammar cannot be followed: {error}")

    def allows(self, id_: int) -> bool:
        """Whether a token may come next."""
        return bool(self._penalties_V.result()[id_] == 0)

    def allow(self, scores_V: Tensor) -> Tensor:
        """Scores in float32 of the tokens that may come next; minus infinity for all others."""
        return scores_V + self._penalties_V.result().to(scores_V.device)

    def accept(self, id_: int) -> None:
        """The token that was chosen; what may follow it is computed from now on."""
        self._penalties_V = _thread().submit(self._compute, id_)

    def _compute(self, id_: int | None = None) -> Tensor:
        """0 for the tokens that may come after this one, minus infinity for all others."""
        if id_ is not None and not self._matcher.is_stopped():
            self._matcher.consume_token(id_)
            self._check()
        if self._matcher.is_stopped():
            return self._vocabulary.end_V
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(_PENALTIES[packed].reshape(-1)[: self._vocabulary.size])


@lru_cache(maxsize=1)
def _thread() -> ThreadPoolExecutor:
    """That in which masks are computed; llguidance lets others run meanwhile."""
    return ThreadPoolExecutor(1, "llama4 masks")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_thread.cache_clear)  # a fork has no threads


def _llguidance() -> Any:
    import llguidance

    return llguidance
