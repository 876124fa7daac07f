"""Prefill and decode: a batch of prompts -> tokens and text, one event per token.

Shapes: B rows still at work, T columns of the prompts, V vocabulary, D hidden size, n tiles.
"""

from __future__ import annotations

import codecs
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from llama4.cache import Cache
from llama4.errors import ContextLengthError
from llama4.model import Llama4Model
from llama4.processor import Inputs
from llama4.sampling import Sampler

FinishReason = Literal["stop", "length"]

PREFILL_TOKENS = 2048
"""Tokens of all rows together that go through the model at once: bounds the memory a long prompt takes."""
VISION_TILES = 16
"""Tiles that go through the vision tower at once."""


class SupportsDecode(Protocol):
    """What generation asks of a tokenizer."""

    @property
    def special_tokens(self) -> dict[str, int]: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token: its id, its bytes (perhaps part of a character), and the natural logarithm of the probability
    that the model gave it, before temperature, top_p and top_k."""

    id: int
    bytes: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.bytes.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Event:
    """One more token of a row, and the text that has become certain with it: whole characters that cannot be the
    beginning of a stop string. `finish_reason` is set with the row's last token."""

    row: int
    token: Token
    text: str
    finish_reason: FinishReason | None


class TextAssembler:
    """Bytes of tokens -> text, held back while a character is incomplete or a stop string may have begun.

    The text ends before the stop string that is complete first (of those, before the longest). Bytes that are no UTF-8
    become U+FFFD; a character that the end cuts off is left out.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """Add bytes; return the text that is certain now."""
        assert not self.stopped
        self._held += self._decoder.decode(data)
        ends = [(at + len(stop), at) for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._begun())

    def finish(self) -> str:
        """What was held back, once no more bytes come."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _begun(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = min(len(self._held), max(map(len, self.stop), default=1) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self.stop)), 0)


def generate(
    model: Llama4Model,
    tokenizer: SupportsDecode,
    inputs: Inputs,
    *,
    sampler: Sampler,
    max_new_tokens: int = 256,
    stop_ids: Sequence[int] = (),
    stop: str | Sequence[str] | None = None,
    max_context: int | None = None,
    progress: bool = False,
) -> Iterator[Event]:
    """Continue every prompt of a batch until it stops by itself, at a stop string, or at a limit.

    A row gives what it would give alone, and costs nothing once it is finished. Closing the iterator, or Ctrl-C, leaves
    the model as it was.

    Args:
        inputs: prompts as the processor makes them, padded on the left.
        stop_ids: tokens that end a reply; their text is not part of it.
        stop: strings that end a reply and are not part of it.
        max_context: most tokens of prompt and reply together; by default the model's window. A reply that reaches it
            ends with finish_reason "length".
        progress: show a bar on a terminal while a long prompt is read.

    Returns:
        An iterator of one event per token and row, the rows in turn.

    Raises:
        ContextLengthError: a prompt leaves no room for a reply.
        ValueError: an argument out of its range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; a reply has at least 1 token")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in stops:
        raise ValueError("a stop string is empty; every text holds that, so give at least one character or none at all")
    lengths: list[int] = inputs.attention_mask.sum(dim=1).tolist()
    window = model.config.text.max_position_embeddings if max_context is None else max_context
    if max(lengths) >= window:
        raise ContextLengthError(
            f"the prompt has {max(lengths)} tokens, but the window holds {window}, reply included; shorten the prompt"
            + ("" if max_context is None else f", or raise max_context={max_context}")
        )
    budgets = [min(max_new_tokens, window - length) for length in lengths]
    silent = frozenset(tokenizer.special_tokens.values())
    rows = [_Row(i, budget, TextAssembler(stops)) for i, budget in enumerate(budgets)]
    return _generate(model, tokenizer, inputs, sampler, rows, frozenset(stop_ids), silent, progress)


@dataclass
class _Row:
    """A reply on its way."""

    index: int
    budget: int
    text: TextAssembler

    def push(self, token: Token, ends: bool, silent: bool) -> Event:
        """Take one more token; `ends` says that it ends the reply, `silent` that it is no text."""
        self.budget -= 1
        text = self.text.push(b"" if ends or silent else token.bytes)
        reason: FinishReason | None = "stop" if ends or self.text.stopped else None if self.budget else "length"
        return Event(self.index, token, text + self.text.finish() if reason else text, reason)


def _generate(
    model: Llama4Model,
    tokenizer: SupportsDecode,
    inputs: Inputs,
    sampler: Sampler,
    rows: list[_Row],
    stop_ids: frozenset[int],
    silent_ids: frozenset[int],
    progress: bool,
) -> Iterator[Event]:
    generators = sampler.generators(len(rows))
    cache = model.new_cache(len(rows))
    logits_BV = prefill(model, inputs, cache, progress)
    while True:
        ids_B, logprobs_B = sampler(logits_BV, generators)
        live = []
        for i, (row, id_, logprob) in enumerate(zip(rows, ids_B.tolist(), logprobs_B.tolist(), strict=True)):
            if math.isnan(logprob):
                raise ValueError(f"the model's logits are not numbers in {model.dtype}; load it with dtype='float32'")
            event = row.push(Token(id_, tokenizer.decode_bytes([id_]), logprob), id_ in stop_ids, id_ in silent_ids)
            if event.finish_reason is None:
                live.append(i)
            yield event
        if not live:
            return
        if len(live) < len(rows):
            rows, generators = [rows[i] for i in live], [generators[i] for i in live]
            ids_B = ids_B[live]
            cache.keep(live)
        logits_BV = step(model, ids_B, cache)


@torch.inference_mode()
def prefill(model: Llama4Model, inputs: Inputs, cache: Cache, progress: bool = False) -> Tensor:
    """Read the prompts into the cache in pieces of bounded size; -> logits of their last tokens, [B, V].

    Prompts are padded on the left. Images are encoded once, and their features cut along with the tokens.
    """
    ids_BT, mask_BT = inputs.input_ids, inputs.attention_mask.bool()
    assert bool(mask_BT[:, -1].all()), "prompts are padded on the left"
    patches_BT = (ids_BT == model.config.image_token_index) & mask_BT
    places_BT = (patches_BT.flatten().cumsum(0) - 1).view_as(patches_BT)
    features_ND = encode_tiles(model, inputs.pixel_values)
    if features_ND is not None and len(features_ND) != int(patches_BT.sum()):
        raise ValueError(
            f"the prompt holds {int(patches_BT.sum())} <|patch|> tokens, but its images give {len(features_ND)} "
            "features; let the processor of this model prepare both"
        )
    batch_size, columns = ids_BT.shape
    size = max(PREFILL_TOKENS // batch_size, 1)
    starts = range(0, columns, size)
    quiet = not progress or len(starts) < 2 or not sys.stderr.isatty()
    logits_B1V = torch.empty(0)
    with tqdm(total=int(mask_BT.sum()), unit="token", desc="reading", leave=False, disable=quiet) as bar:
        for start in starts:
            piece = slice(start, start + size)
            mask = mask_BT[:, piece]
            features = None
            if features_ND is not None:
                features = features_ND[places_BT[:, piece][patches_BT[:, piece]].to(features_ND.device)]
            logits_B1V = model(
                ids_BT[:, piece],
                image_features=features,
                cache=cache,
                attention_mask=mask,
                last_only=True,
            )
            bar.update(int(mask.sum()))
    return logits_B1V[:, -1]


def encode_tiles(model: Llama4Model, pixel_values: Tensor | None) -> Tensor | None:
    """Tiles [n, 3, S, S] -> image tokens, a few tiles at a time; None if there are none."""
    if pixel_values is None:
        return None
    return torch.cat([model.encode_images(tiles) for tiles in torch.split(pixel_values, VISION_TILES)])


@torch.inference_mode()
def step(model: Llama4Model, ids_B: Tensor, cache: Cache) -> Tensor:
    """One token more in every row; -> logits of the next, [B, V]."""
    logits_B1V: Tensor = model(ids_B[:, None], cache=cache, last_only=True)
    return logits_B1V[:, 0]
