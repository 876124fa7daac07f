"""Prompts on a CPU by the same compiled code as decoding: a call for each layer, between which Ctrl-C is answered.

For a model that is batch-invariant, what a token gets there does not depend on the tokens beside it: each sum of a
product goes in one order, and the token's attention goes block by block of the cache, counted from where its sequence
or chunk begins. So a prompt gives the same bits in pieces of any sizes, token by token, behind what another prompt left
in the cache, and in any company.

Shapes: B rows, N tokens of a step, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4.cache.batch import Batch, make_batch
from llama4.cache.sequence import SequenceCache
from llama4.cache.view import CacheView
from llama4.config.window import slots_end
from llama4.engine.fused_cpu import layer_steps
from llama4.engine.fused_model import Description
from llama4.engine.prompt import Piece
from llama4.kernels import loader, threads
from llama4.kernels.abi import Tokens, check
from llama4.model.multimodal import Llama4Model, check_ids
from llama4.model.positions import PositionFactors
from llama4.progress import track

INVARIANT_TOKENS = 256
"""Most tokens of a call for a model that is batch-invariant: each token's attention keeps parts of its own."""


@torch.inference_mode()
def read_by_steps(
    model: Llama4Model, description: Description, cache: SequenceCache, pieces: Sequence[Piece]
) -> tuple[Tensor, Tensor]:
    """Compute the next piece of the prompt in each row of a cache.

    Returns:
        What the head is given for all tokens, packed, [N, D]; and the logits behind each piece, [B, V].
    """
    read, ends = [0] * len(pieces), [len(piece.ids) for piece in pieces]
    x_ND = torch.empty(sum(ends), len(model.language_model.model.norm.weight), dtype=model.dtype)
    hidden = x_ND.split(ends)
    logits_BV = torch.empty(len(pieces), model.config.text.vocab_size, dtype=model.dtype)
    features = [_features(model, piece) for piece in pieces]
    while read != ends:
        left = [end - begin for begin, end in zip(read, ends, strict=True)]
        sizes = _next_sizes(cache, left, INVARIANT_TOKENS if model.is_batch_invariant else sum(left))
        parts = [slice(begin, begin + size) for begin, size in zip(read, sizes, strict=True)]
        read = [part.stop for part in parts]
        last = [row for row, size in enumerate(sizes) if size and read[row] == ends[row]]
        step = _Step(
            ids=[id_ for piece, part in zip(pieces, parts, strict=True) for id_ in piece.ids[part]],
            features=[each for own, part in zip(features, parts, strict=True) for each in own[part]],
            sizes=sizes,
            outputs=[sum(sizes[: row + 1]) - 1 for row in last],
        )
        x, logits = step.run(model, description, cache)
        for own, part, new in zip(hidden, parts, x.split(sizes), strict=True):
            own[part] = new
        logits_BV[last] = logits
    return x_ND, logits_BV


def _next_sizes(cache: SequenceCache, left: Sequence[int], room: int) -> list[int]:
    """How many tokens of each row are computed next, no more than `room` together: none crosses the border of a
    chunk."""
    sizes = []
    for row, count in enumerate(left):
        start, position = cache.start[row], cache.next_position[row]
        ends = [slots_end(position, window, start) for window in set(cache.windows)]
        size = min([count, room, *(end - position for end in ends if end is not None)])
        sizes.append(size)
        room -= size
    return sizes


def _features(model: Llama4Model, piece: Piece) -> list[Tensor | None]:
    """What stands in the place of each token's embedding, [D]; None for that itself."""
    patches = torch.cat(list(piece.features)).to(model.dtype).contiguous() if piece.features else ()
    is_patch = [id_ == model.config.image_token_index for id_ in piece.ids]
    assert sum(is_patch) == len(patches), f"{sum(is_patch)} tokens stand for {len(patches)} patches"
    given = iter(patches)
    return [next(given) if is_one else None for is_one in is_patch]


@dataclass(frozen=True)
class _Step:
    """Tokens that go through the model at once.

    Attributes:
        ids, features: of the tokens of all rows.
        sizes: tokens of each row.
        outputs: tokens whose logits are wanted.
    """

    ids: list[int]
    features: list[Tensor | None]
    sizes: list[int]
    outputs: list[int]

    def run(self, model: Llama4Model, description: Description, cache: SequenceCache) -> tuple[Tensor, Tensor]:
        """-> hidden states of all tokens, [N, D], and the logits that are wanted."""
        check_ids(min(self.ids), max(self.ids), model.config.text.num_embeddings)
        batch = self._batch(cache)
        view = CacheView(cache, batch)
        cache.begin_write()
        rows = torch.tensor([row for row, size in enumerate(self.sizes) if size])
        tables = [layer.reserve()[rows] for layer in view.layers]
        factors = PositionFactors.of_batch(model.config.text, batch, model.dtype)
        lengths_N = {window: _key_lengths(batch, window) for window in set(cache.windows)}
        steps = layer_steps(model, cache, tables, factors, lengths_N)
        ids, places = (torch.tensor(numbers) for numbers in (self.ids, self.outputs))
        starts = torch.tensor([0, *itertools.accumulate(size for size in self.sizes if size)])
        features = torch.tensor([each.data_ptr() if each is not None else 0 for each in self.features])
        x_ND = torch.empty(len(ids), len(model.language_model.model.norm.weight), dtype=model.dtype)
        residual_ND = torch.empty_like(x_ND, dtype=torch.float32)
        logits = torch.empty(len(places), model.config.text.vocab_size, dtype=model.dtype)
        greedy, logprobs = torch.empty(len(places), dtype=torch.long), torch.empty(len(places))
        tokens = Tokens(
            ids=ids.data_ptr(),
            sequence_starts=starts.data_ptr(),
            features=features.data_ptr(),
            outputs=places.data_ptr(),
            B=len(rows),
            num_outputs=len(places),
            logits=logits.data_ptr(),
            greedy=greedy.data_ptr(),
            logprobs=logprobs.data_ptr(),
            hidden=x_ND.data_ptr(),
            residual=residual_ND.data_ptr(),
            is_prompt=not model.is_batch_invariant,
        )
        decode = loader.function("decode", model.dtype)
        for tokens.layer in track(range(len(tables))):
            check(decode(threads.count(), description.decoder, steps, 0, tokens))
        view.commit()
        return x_ND, logits

    def _batch(self, cache: SequenceCache) -> Batch:
        columns = max(self.sizes)
        return make_batch(
            len(self.sizes),
            columns,
            cache.device,
            torch.arange(columns) < torch.tensor(self.sizes)[:, None],
            start=cache.start,
            next_position=cache.next_position,
            rope_lengths=cache.rope_lengths,
        )


def _key_lengths(batch: Batch, window: int | None) -> Tensor:
    """How many keys each token sees, its own included, [N]."""
    return torch.cat([torch.arange(s.past + 1, s.past + 1 + s.end - s.begin) for s in batch.spans(window)])
