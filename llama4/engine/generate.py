"""Prefill and decode: a batch of prompts -> tokens and text, one event per token.

Shapes: B rows still at work, T columns of the prompts, V vocabulary, D hidden size, n tiles.
"""

from __future__ import annotations

import codecs
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from llama4.cache.sequence import Cache
from llama4.engine.runner import ModelRunner
from llama4.engine.sampling import Sampler
from llama4.errors import ContextLengthError
from llama4.inputs import Inputs
from llama4.model.multimodal import Llama4Model

FinishReason = Literal["stop", "length"]

PREFILL_TOKENS = 2048
"""Most tokens of all rows together that go through the model at once: bounds the memory a long prompt takes."""
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
    runner: ModelRunner,
    tokenizer: SupportsDecode,
    inputs: Inputs,
    *,
    sampler: Sampler,
    max_new_tokens: int = 256,
    stop_ids: Sequence[int] = (),
    stop: str | Sequence[str] | None = None,
    max_context: int | None = None,
    cache: Cache | None = None,
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
        cache: what is known of the prompts already: the same number of tokens of each. It goes on to take the rest.
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
    model = runner.model
    window = model.config.text.max_position_embeddings if max_context is None else max_context
    if max(lengths) >= window:
        raise ContextLengthError(
            f"the prompt has {max(lengths)} tokens, but the window holds {window}, reply included; shorten the prompt"
            + ("" if max_context is None else f", or raise max_context={max_context}")
        )
    budgets = [min(max_new_tokens, window - length) for length in lengths]
    silent = frozenset(tokenizer.special_tokens.values())
    rows = [_Row(i, budget, TextAssembler(stops)) for i, budget in enumerate(budgets)]
    cache = cache or model.new_cache(len(rows))
    return _generate(runner, tokenizer, inputs, sampler, rows, frozenset(stop_ids), silent, cache, progress)


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
    runner: ModelRunner,
    tokenizer: SupportsDecode,
    inputs: Inputs,
    sampler: Sampler,
    rows: list[_Row],
    stop_ids: frozenset[int],
    silent_ids: frozenset[int],
    cache: Cache,
    progress: bool,
) -> Iterator[Event]:
    generators = sampler.generators(len(rows))
    ids_B, logprobs_B = sampler(prefill(runner.model, inputs, cache, progress), generators)
    ids, logprobs = ids_B.tolist(), logprobs_B.tolist()
    try:
        while True:
            live = []
            for i, (row, id_, logprob) in enumerate(zip(rows, ids, logprobs, strict=True)):
                if math.isnan(logprob):
                    raise ValueError(
                        f"the model's logits are not numbers in {runner.model.dtype}; load it with dtype='float32'"
                    )
                event = row.push(Token(id_, tokenizer.decode_bytes([id_]), logprob), id_ in stop_ids, id_ in silent_ids)
                if event.finish_reason is None:
                    live.append(i)
                yield event
            if not live:
                return
            if len(live) < len(rows):
                rows, generators = [rows[i] for i in live], [generators[i] for i in live]
                ids = [ids[i] for i in live]
                cache.keep(live)
            ids, logprobs = runner.advance(ids, cache, sampler, generators)
    finally:
        runner.release(cache)


@torch.inference_mode()
def prefill(model: Llama4Model, inputs: Inputs, cache: Cache, progress: bool = False) -> Tensor:
    """Read the prompts into the cache in pieces of bounded size; -> logits of their last tokens, [B, V].

    Prompts are padded on the left. What the cache holds of them, the same number of tokens of each, is left out. Images
    are encoded once, and their features cut along with the tokens.
    """
    ids_BT, mask_BT = inputs.input_ids, inputs.attention_mask.bool()
    assert bool(mask_BT[:, -1].all()), "prompts are padded on the left"
    (past,) = set(cache.lengths)
    is_patch_BT = (ids_BT == model.config.image_token_index) & mask_BT
    if cache.answer is not None and cache.answer[0] == past == int(mask_BT.sum()):
        return cache.answer[1]
    mask_BT = mask_BT & (mask_BT.cumsum(1) > past)
    images = ImageFeatures(model, inputs.pixel_values, is_patch_BT, is_patch_BT & mask_BT)
    batch_size, columns = ids_BT.shape
    size = max(piece_size(model) // batch_size, 1)
    first = int(mask_BT.any(0).int().argmax())
    starts = range(first, columns, size)
    quiet = not progress or len(starts) < 2 or not sys.stderr.isatty()
    logits_B1V = torch.empty(0)
    with tqdm(total=int(mask_BT.sum()), unit="token", desc="reading", leave=False, disable=quiet) as bar:
        for start in starts:
            piece = slice(start, start + size)
            mask = mask_BT[:, piece]
            logits_B1V = model(
                ids_BT[:, piece],
                image_features=images.of(piece),
                cache=cache,
                attention_mask=mask,
                last_only=True,
            )
            bar.update(int(mask.sum()))
    if batch_size == 1:
        cache.answer = cache.lengths[0], logits_B1V[:, -1]
    return logits_B1V[:, -1]


class ImageFeatures:
    """Image tokens for the pieces of a prompt, [n * Q, D] in all; only tiles that are still to be read are encoded.

    Args:
        pixel_values: [n, 3, S, S], None if there is no image.
        is_patch_BT: where the prompts have `<|patch|>`; is_new_BT: those among them that the cache does not hold.

    Raises:
        ValueError: the prompts have more or fewer patches than the tiles give.
    """

    def __init__(self, model: Llama4Model, pixel_values: Tensor | None, is_patch_BT: Tensor, is_new_BT: Tensor) -> None:
        self.is_new_BT = is_new_BT
        self.features_ND = None
        if pixel_values is None:
            return
        vision, count = model.config.vision, int(is_patch_BT.sum())
        per_tile = vision.tokens_per_tile if vision is not None else 0
        if count != len(pixel_values) * per_tile:
            raise ValueError(
                f"the prompt holds {count} <|patch|> tokens, but its images give {len(pixel_values) * per_tile} "
                "features; let the processor of this model prepare both"
            )
        places_BT = (is_patch_BT.flatten().cumsum(0) - 1).view_as(is_patch_BT)
        tiles, inverse = torch.unique(places_BT[is_new_BT] // max(per_tile, 1), return_inverse=True)
        places_BT[is_new_BT] = inverse * per_tile + places_BT[is_new_BT] % max(per_tile, 1)
        self.places_BT = places_BT
        self.features_ND = encode_tiles(model, pixel_values[tiles]) if len(tiles) else None

    def of(self, columns: slice) -> Tensor | None:
        """Those of some columns of the prompts, None if the prompts have none."""
        if self.features_ND is None:
            return None
        places = self.places_BT[:, columns][self.is_new_BT[:, columns]]
        return self.features_ND[places.to(self.features_ND.device)]


def encode_tiles(model: Llama4Model, pixel_values: Tensor) -> Tensor:
    """Tiles [n, 3, S, S] -> image tokens [n * Q, D], a few tiles at a time."""
    return torch.cat([model.encode_images(tiles) for tiles in torch.split(pixel_values, VISION_TILES)])


def piece_size(model: Llama4Model) -> int:
    """Tokens that go through the model at once: 2,048, or fewer where their activations would take more than a quarter
    of the memory that is free."""
    text = model.config.text
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    widest = max(text.intermediate_size_mlp, 3 * text.intermediate_size, heads * text.head_dim)
    per_token = 4 * (4 * text.hidden_size + 3 * widest)  # the residual and what is added to it; what is between
    return max(64, min(PREFILL_TOKENS, free_memory(model.device) // 4 // per_token))


def free_memory(device: torch.device) -> int:
    """Bytes that could be had now; without an answer from the system, plenty."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 40
