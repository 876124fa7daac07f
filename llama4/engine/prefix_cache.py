"""The tokens of a conversation, images among them, with the keys and values that the model computed for them.

The next prompt with the same beginning is computed from where it differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from llama4.adapters.lora import Adapter
from llama4.cache.saved import load_cache, save_cache
from llama4.cache.sequence import SequenceCache
from llama4.engine.tokens import Event
from llama4.errors import Llama4Error
from llama4.inputs import Inputs
from llama4.model.multimodal import Llama4Model
from llama4.progress import PIECE, Bar
from llama4.weights.model_source import ModelSource

MIN_SHARED = 64
"""Tokens from which a common beginning is not computed again."""


def identities(inputs: Inputs, model: Llama4Model) -> list[Tensor]:
    """What each token of each row stands for, [T] int64 without padding: its id; of an image, the picture.

    A `<|patch|>` is a number below zero that is drawn from the pixels of its tile, or an `<|image|>` one drawn from
    those of its picture and from how its tiles are arranged.
    """
    vision, patch = model.config.vision, model.config.image_token_index
    tokens_BT, mask_BT = inputs.input_ids.cpu().clone(), inputs.attention_mask.cpu().bool()
    is_patch_BT = (tokens_BT == patch) & mask_BT
    if inputs.pixel_values is not None and vision is not None:
        digests = [hashlib.blake2b(_data(tile), digest_size=7) for tile in inputs.pixel_values]
        if inputs.image_grids is not None:
            for digest, grid in zip(digests, inputs.image_grids, strict=True):
                digest.update(_data(grid))
        of_tiles = torch.tensor([-1 - int.from_bytes(digest.digest(), "little") for digest in digests])
        count = int(is_patch_BT.sum())
        if count == len(digests) * vision.tokens_per_tile:
            tokens_BT[is_patch_BT] = of_tiles.repeat_interleave(vision.tokens_per_tile)
    return [row[mask] for row, mask in zip(tokens_BT, mask_BT, strict=True)]


class PromptCache:
    """The tokens of one conversation that the model has computed. `Llama4.cache` is the last one. An older one can be
    assigned to it again; prompts that begin like that one then skip what they have in common.

    Attributes:
        cache: keys and values.
        state: what the model computed with beside its weights: an adapter, or what else is the same object as long as
            these keys and values are of use.
        tokens: identities of the computed tokens, and perhaps of a last token that is not computed yet.
        progress: show bars while it is saved.
    """

    def __init__(
        self, model: Llama4Model, cache: SequenceCache, tokens: Tensor, progress: bool = False, state: object = None
    ) -> None:
        self.model = model
        self.cache = cache
        self.state = state
        self.tokens = [int(token) for token in tokens]
        self.progress = progress

    def __len__(self) -> int:
        """Tokens computed."""
        return self.cache.lengths[0]

    @property
    def num_bytes(self) -> int:
        """Memory that the keys and values take; other caches may share it."""
        return self.cache.num_bytes

    def beginning(self, rows: Sequence[Tensor]) -> SequenceCache | None:
        """A cache of the tokens that all rows begin with; None if there are fewer than `MIN_SHARED`.

        It shares memory with this one, which does not change. Its keys and values may differ in the last bit from those
        of a whole prompt computed at once, so a short common beginning is computed again. A prompt that is the same
        from end to end gets the same reply, unless chunked layers have gone on to another chunk.
        """
        if not self.cache.is_consistent or not self._has_frequencies_of(rows):
            return None
        own = torch.tensor(self.tokens[: len(self)])
        common = min(_agreement(own, row) for row in rows)
        shortest = min(map(len, rows))
        is_answered = len(rows) == 1 and self.cache.logits_after(shortest) is not None
        if common == shortest and not is_answered:
            common -= 1
        if common < MIN_SHARED and not (is_answered and common == shortest):
            return None
        cut = self.cache.fork()
        if not cut.truncate(common):
            return None
        return cut if len(rows) == 1 else cut.fork([0] * len(rows))

    def _has_frequencies_of(self, rows: Sequence[Tensor]) -> bool:
        """Whether RoPE rotates all rows as it rotated what is here; where it depends on lengths, they may differ."""
        scaling = self.model.config.text.rope_scaling
        lengths = [*self.cache.rope_lengths, *map(len, rows)]
        return scaling is None or len(set(map(scaling.effective_length, lengths))) == 1

    def recorded(self, events: Iterator[Event]) -> Iterator[Event]:
        """Pass on a reply's events, and add its tokens, which the model computes one by one."""
        for event in events:
            self.tokens.append(event.token.id)
            yield event

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file, complete or not at all, for `Llama4.load_cache`.

        Raises:
            Llama4Error: the file cannot be written, or a forward was broken off while it added to the cache.
        """
        if not self.cache.is_consistent:
            raise Llama4Error("this cache is of a prompt whose reading was broken off; read the prompt again")
        tokens = torch.tensor(self.tokens[: len(self)])
        model = fingerprint(self.model, self.progress, self.state)
        save_cache(Path(path), self.cache, tokens, model, self.progress)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Llama4Model,
        dtype: str | torch.dtype | None = None,
        device: torch.device | None = None,
        progress: bool = False,
        state: object = None,
    ) -> PromptCache:
        """Read what `save` wrote.

        Args:
            model: that which made it.
            dtype, device: of the cache, as in `Llama4Model.new_cache`.
            progress: show bars, now and when it is saved again.
            state: what the model computes with beside its weights.

        Raises:
            Llama4Error: no such file, a damaged one, or the cache of another model, adapter or dtype.
        """
        cache = model.new_cache(1, dtype, device)
        window = model.config.text.max_position_embeddings
        tokens = load_cache(path, cache, fingerprint(model, progress, state), window)
        return cls(model, cache, tokens, progress, state)


def fingerprint(model: Llama4Model, progress: bool = False, state: object = None) -> str:
    """Of a model's configuration and of every number of its weights, as a checkpoint has them, and of the adapter that
    it computes with: kernels on another machine may want another order. All weights are read, at 1 to 2 GB/s per
    core."""
    source = ModelSource(model)
    names = sorted(source.names())
    sizes = {name: source.spec(name).nbytes for name in names}
    bar = Bar("hashing weights", sum(sizes.values()), "bytes", shown=progress)
    with bar, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = list(pool.map(lambda name: _digest(name, source.read(name), bar), names))
    if isinstance(state, Adapter):
        for name, lora in state.items():
            digests += [_digest(f"{name} {lora.scale}", matrix, bar) for matrix in (lora.a, lora.b)]
    return hashlib.sha256(repr((model.config.text, model.config.vision)).encode() + b"".join(digests)).hexdigest()


def _digest(name: str, tensor: Tensor, bar: Bar) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    data = _data(tensor)
    for at in range(0, len(data), PIECE):
        digest.update(piece := data[at : at + PIECE])
        bar.advance(len(piece))
    return digest.digest()


def _data(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any dtype, order and device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _agreement(ours: Tensor, theirs: Tensor) -> int:
    """How many tokens two rows begin with alike."""
    length = min(len(ours), len(theirs))
    differs = (ours[:length] != theirs[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
