"""Records -> examples, tokens with what is learnt of each; examples -> batches of so many tokens.

An example is rendered by the code that `chat` renders with, so that a model is asked as it was taught. A batch is
several examples as the model packs them: without padding, each with its own positions and chunks, none seeing another
(docs/design/packed-tokens.md), so a batch of short examples costs what their tokens cost.

Shapes: B rows, T columns, n tiles of all rows in order, A side of a tile in pixels.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.errors import ArgumentError, Llama4Error
from llama4.files import user_path
from llama4.inputs import Processor
from llama4.progress import PIECE, Bar
from llama4.text.messages import ParsedMessage, image_sources
from llama4.train.loss import IGNORED
from llama4.train.records import DataError, Record, read_records
from llama4.vision.tiling import Tiles

LEARN = ("assistant", "last", "all")
"""What is learnt of a conversation: what the assistant says, its last message alone, or every token."""
END_OF_TEXT = "<|end_of_text|>"
"""Ends a text without roles; where a vocabulary lacks it, what ends everything does."""
KEPT_PIXELS = 256 << 20
"""Bytes of tiles that are kept; those of further pictures are read again for each batch."""


@dataclass(frozen=True)
class Example:
    """A sequence to learn from.

    Attributes:
        line: of the data file.
        ids: its tokens.
        is_learnt: for each, whether it is to be predicted.
        sources: its pictures.
        tiles: how many tiles they have in all.
    """

    line: int
    ids: tuple[int, ...]
    is_learnt: tuple[bool, ...]
    sources: tuple[object, ...] = ()
    tiles: int = 0

    @property
    def num_learnt(self) -> int:
        """Tokens that count in the loss; the first of a sequence is never predicted."""
        return sum(self.is_learnt[1:])


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        input_ids: [B, T] int64, padded on the right.
        attention_mask: [B, T] int64.
        labels: [B, T] int64, the token that comes next, or `IGNORED`.
        pixel_values, image_grids: of the pictures, see `Inputs`; or None.
        lines: of the data file, one of each example, or of each pair.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    lines: tuple[int, ...]
    image_grids: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())

    @property
    def is_learnt(self) -> Tensor:
        """[B, T] bool."""
        return self.labels != IGNORED

    @property
    def num_learnt(self) -> int:
        return int(self.is_learnt.sum())


@dataclass
class Dataset:
    """All examples of a data file.

    Attributes:
        examples: in the file's order.
        rejected: of preferences, the same with the worse reply, one for each example.
        cut: examples that were cut to the length, and how many tokens went.
        dropped: lines of which nothing that is learnt was left.
        digest: SHA-256 of the file, or of the records where there is no file.
    """

    path: str
    examples: list[Example]
    rejected: list[Example] = field(default_factory=list)
    cut: int = 0
    cut_tokens: int = 0
    dropped: tuple[int, ...] = ()
    digest: str = ""

    @cached_property
    def num_tokens(self) -> int:
        return sum(len(example.ids) for example in (*self.examples, *self.rejected))

    @cached_property
    def has_pictures(self) -> bool:
        return any(example.sources for example in (*self.examples, *self.rejected))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example, or pair of examples."""
        return max(map(_length, _units(self.examples, self.rejected)))

    def notes(self) -> list[str]:
        """What was left out, in sentences."""
        notes = []
        if self.cut:
            notes.append(f"{self.path}: {self.cut} of {len(self.examples)} examples are cut, {self.cut_tokens} tokens")
        if self.dropped:
            lines = ", ".join(map(str, self.dropped[:5])) + (", ..." if len(self.dropped) > 5 else "")
            notes.append(f"{self.path}: {len(self.dropped)} examples are left out, nothing is learnt of them ({lines})")
        return notes


def load_dataset(
    path: str | Path,
    processor: Processor,
    *,
    max_length: int,
    learn: str = "assistant",
    ghost_attention: bool = False,
    progress: bool = True,
) -> Dataset:
    """Read a data file whole, render every line, and look at every picture.

    Args:
        max_length: tokens of an example; what is beyond is cut, and counted.
        learn: one of `LEARN`.
        ghost_attention: the system message stands in each turn of the user, and the last reply alone is learnt, so
            that the model holds on to it (Touvron et al. 2023, "Llama 2", section 3.3).

    Raises:
        DataError: a line that is wrong, by number; or no line at all.
        ArgumentError: an unknown `learn`.
    """
    if learn not in LEARN:
        raise ArgumentError(f"learn is {learn!r}; choose one of {', '.join(LEARN)}")
    if max_length < 2:
        raise ArgumentError(f"max_length is {max_length}; an example has at least 2 tokens")
    dataset, dropped = Dataset(str(path), []), []
    path = user_path(path)
    size = path.stat().st_size if path.is_file() else 0
    with Bar("reading data", size, "bytes", shown=progress) as bar:
        records = list(read_records(path, bar))
    if len({bool(record.rejected) for record in records}) > 1:
        raise DataError(f"{path} mixes preferences (chosen, rejected) with other lines; put them in two files")
    with Bar("tokenizing data", len(records), "steps", shown=progress) as bar:
        for record in records:
            with bar.step(1):
                try:
                    pair = [
                        example(each, processor, learn=learn, ghost_attention=ghost_attention)
                        for each in (
                            [record, replace(record, messages=record.rejected)] if record.rejected else [record]
                        )
                    ]
                    kept = [_cut(whole, max_length, processor) for whole in pair]
                except Llama4Error as error:
                    raise DataError(f"{path}, line {record.line}: {error}") from None
                if any(each is None or not each.num_learnt for each in kept):
                    dropped.append(record.line)
                    continue
                lost = sum(len(whole.ids) - len(each.ids) for whole, each in zip(pair, kept, strict=True) if each)
                dataset.cut, dataset.cut_tokens = dataset.cut + (lost > 0), dataset.cut_tokens + lost
                for each, home in zip(kept, (dataset.examples, dataset.rejected), strict=False):
                    assert each is not None
                    home.append(each)
    dataset.dropped = tuple(dropped)
    if not dataset.examples:
        why = f"nothing is learnt of its {len(records)} lines within {max_length} tokens" if records else "it is empty"
        raise DataError(f"{path} holds nothing to learn from: {why}")
    dataset.digest = _digest(path, records)
    return dataset


def _digest(path: Path, records: Sequence[Record]) -> str:
    """SHA-256 of a file; of what has none, of what was read."""
    digest = hashlib.sha256()
    if not path.is_file():
        digest.update(repr(records).encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def example(record: Record, processor: Processor, *, learn: str, ghost_attention: bool = False) -> Example:
    """A record, rendered.

    Raises:
        Llama4Error: a picture cannot be read, or the checkpoint's template refuses the messages.
    """
    tokenizer = processor.tokenizer
    if record.text is not None:
        end = tokenizer.special(END_OF_TEXT) if END_OF_TEXT in tokenizer.special_tokens else tokenizer.eos_id
        ids = [*([tokenizer.bos_id] if tokenizer.adds_bos else []), *tokenizer.encode(record.text), end]
        return Example(record.line, tuple(ids), (True,) * len(ids))
    messages = _with_system_in_each(record.messages) if ghost_attention else list(record.messages)
    sources = tuple(image_sources(messages))
    tiles = [processor.tile(source) for source in sources]
    rendered = processor.render(messages, tiles, tools=record.tools or None, add_generation_prompt=False)
    is_learnt = list(rendered.is_reply)
    if learn == "all":
        is_learnt = [True] * len(is_learnt)
    elif learn == "last" or ghost_attention or record.rejected:
        is_learnt = _last_run(is_learnt)
    count = sum(len(image.pixel_values) for image in tiles)
    return Example(record.line, tuple(rendered.ids), tuple(is_learnt), sources, count)


def _with_system_in_each(messages: Sequence[ParsedMessage]) -> list[ParsedMessage]:
    """The text of a leading system message before each message of the user."""
    if messages[0].role != "system":
        return list(messages)
    system, *rest = messages
    return [
        ParsedMessage("user", (*system.parts, "\n\n", *message.parts)) if message.role == "user" else message
        for message in rest
    ]


def _last_run(is_learnt: Sequence[bool]) -> list[bool]:
    """The last unbroken run alone."""
    end = max((i + 1 for i, learnt in enumerate(is_learnt) if learnt), default=0)
    begin = end
    while begin and is_learnt[begin - 1]:
        begin -= 1
    return [begin <= i < end for i in range(len(is_learnt))]


def _cut(whole: Example, max_length: int, processor: Processor) -> Example | None:
    """The first tokens of an example; none if a picture would be cut."""
    if len(whole.ids) <= max_length:
        return whole
    if whole.sources:
        end = processor.tokenizer.special(processor.fusion.picture_end)
        if end in whole.ids[max_length:]:
            return None
    return replace(whole, ids=whole.ids[:max_length], is_learnt=whole.is_learnt[:max_length])


Unit = tuple[Example, ...]
"""What is in a batch whole or not at all: an example, or the better and the worse one of a pair."""


def _units(examples: Sequence[Example], rejected: Sequence[Example]) -> list[Unit]:
    return list(zip(examples, rejected, strict=True) if rejected else zip(examples, strict=True))


def _length(unit: Unit) -> int:
    return sum(len(example.ids) for example in unit)


class Batches:
    """The batches of a data set, in an order that follows from the seed, for any number of epochs.

    Args:
        examples: what they are of.
        processor: reads pictures.
        tokens: most tokens of a batch, padding not counted; an example that is longer is a batch of its own.
        seed: None for the file's order.
        rejected: of preferences, see `Dataset`; the rows of a batch are then all that are chosen, and after them all
            that are rejected.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Processor,
        tokens: int,
        seed: int | None = 0,
        rejected: Sequence[Example] = (),
    ) -> None:
        self._units = _units(examples, rejected)
        self._processor, self._tokens, self._seed = processor, tokens, seed
        self._plan: tuple[int, list[list[int]]] = (-1, [])
        self._counts: list[int] = []
        self._tiles: dict[object, Tiles] = {}
        self._kept = 0

    def plan(self, epoch: int) -> list[list[int]]:
        """The examples of each batch of an epoch, by index: shuffled, then taken as they come until one is full."""
        if self._plan[0] != epoch:
            order = list(range(len(self._units)))
            if self._seed is not None:
                random.Random(f"{self._seed}/{epoch}").shuffle(order)
            batches: list[list[int]] = []
            room = 0
            for index in order:
                length = _length(self._units[index])
                if length > room or not batches:
                    batches.append([])
                    room = self._tokens
                batches[-1].append(index)
                room -= length
            self._plan = (epoch, batches)
        return self._plan[1]

    def indices(self, step: int) -> list[int]:
        """The examples of the batch of a step, from 0, over epochs."""
        epoch = 0
        while step >= (count := self._count(epoch)):
            step -= count
            epoch += 1
        return self.plan(epoch)[step]

    def _count(self, epoch: int) -> int:
        """Batches of an epoch, whose plan is made once for that."""
        while epoch >= len(self._counts):
            self._counts.append(len(self.plan(len(self._counts))))
        return self._counts[epoch]

    def steps_of(self, epochs: float) -> int:
        """Steps that so many epochs take; the last one is cut."""
        whole = int(epochs)
        steps = sum(map(self._count, range(whole)))
        if epochs > whole:
            steps += round((epochs - whole) * self._count(whole))
        return max(1, steps)

    def __getitem__(self, step: int) -> Batch:
        return self._batch(self.indices(step))

    def __iter__(self) -> Iterator[Batch]:
        """Those of one epoch."""
        return map(self._batch, self.plan(0))

    def _batch(self, indices: Sequence[int]) -> Batch:
        units = [self._units[i] for i in indices]
        examples = [example for column in zip(*units, strict=True) for example in column]
        tiles = [self._tile(source) for example in examples for source in example.sources]
        batch = collate(examples, *self._processor.fusion.tensors(tiles, self._processor.max_tiles))
        return replace(batch, lines=tuple(unit[0].line for unit in units))

    def _tile(self, source: object) -> Tiles:
        key = source if isinstance(source, str) else id(source)
        if key not in self._tiles:
            tiles = self._processor.tile(source)
            if self._kept > KEPT_PIXELS:
                return tiles
            self._tiles[key] = tiles
            self._kept += tiles.pixel_values.nbytes
        return self._tiles[key]


def collate(
    examples: Sequence[Example], pixel_values: Tensor | None = None, image_grids: Tensor | None = None
) -> Batch:
    """Examples -> a batch, padded on the right."""
    T = max(len(example.ids) for example in examples)

    def padded(values: Sequence[int], fill: int) -> Tensor:
        return F.pad(torch.tensor(values, dtype=torch.int64), (0, T - len(values)), value=fill)

    labels = [
        [*(i if learnt else IGNORED for i, learnt in zip(e.ids[1:], e.is_learnt[1:], strict=True)), IGNORED]
        for e in examples
    ]
    return Batch(
        torch.stack([padded(e.ids, 0) for e in examples]),
        torch.stack([padded([1] * len(e.ids), 0) for e in examples]),
        torch.stack([padded(row, IGNORED) for row in labels]),
        pixel_values,
        tuple(e.line for e in examples),
        image_grids,
    )
