"""One prompt on its way to one reply, as the scheduler sees it: tokens in, tokens out.

Shapes: T tokens of the prompt, V vocabulary, D hidden size, n tiles, Q tokens per tile.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llama4.cache.prefixes import next_key
from llama4.cache.sequence import SequenceCache
from llama4.config import CACHE_BLOCK
from llama4.engine.grammar import Matcher
from llama4.engine.observers import Observer
from llama4.engine.prefix_cache import identities
from llama4.engine.sampling import Sampler
from llama4.engine.tokens import Token
from llama4.errors import Llama4Error
from llama4.inputs import Inputs
from llama4.model.multimodal import Llama4Model, check_ids

Delivery = Token | Exception
"""What a request is given: its next token, or why there is none."""


@dataclass
class Times:
    """When things happened to a request, by `time.monotonic`; None if they have not."""

    arrival: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class Request:
    """A prompt, how its reply is chosen, and how far it has come.

    Attributes:
        ids: of the prompt, and of the reply so far.
        tokens: the same as identities: what stands for a picture tells which picture.
        prompt_length: tokens of the prompt.
        computed: how many of `ids` have their keys and values in `cache`.
        cache: of this request alone; None while it waits, and while it decodes in a cache with others.
        entered: how many of its blocks have been entered in the index.
        arrival: a number that orders requests.
        choice: how its tokens are chosen, but for the seed, and whether they may be any; equal where that is alike.
        state: what the choice of its next token depends on.
        reused: tokens of the prompt that were not computed again when it was first read.
    """

    def __init__(
        self,
        inputs: Inputs,
        model: Llama4Model,
        sampler: Sampler,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        deliver: Callable[[Delivery], None],
        alternatives: int = 0,
        matcher: Matcher | None = None,
        observer: Observer | None = None,
        adapter: str | None = None,
        group: Hashable = (),
    ) -> None:
        """
        Args:
            inputs: one prompt.
            max_new_tokens: most tokens of its reply, at least 1.
            stop_ids: tokens that end it.
            deliver: is called by the thread that computes, with every token as it comes; a token that ends the reply
                is the last. After an exception nothing follows.
            matcher: what its reply must be.
            alternatives: of how many of the most likely tokens it is told the probability.
            observer: is told the hidden states of the prompt as it is read.
            adapter: the name of that which it is computed with.
            group: equal for requests that may be computed in one forward.
        """
        (own,) = identities(inputs, model)
        self.ids: list[int] = inputs.input_ids[0][inputs.attention_mask[0].bool()].tolist()
        if not self.ids:
            raise Llama4Error("the prompt is empty: the checkpoint's chat template writes nothing for these messages")
        check_ids(min(self.ids), max(self.ids), model.config.text.num_embeddings)
        self.tokens: list[int] = own.tolist()
        self.prompt_length = len(self.ids)
        self.sampler = sampler
        self.choice = replace(sampler, seed=None), matcher is None
        self.state = sampler.row(self.ids[:], tuple(stop_ids), matcher)
        self.max_new_tokens = max_new_tokens
        self.stop_ids = frozenset(stop_ids)
        self.deliver = deliver
        self.alternatives = alternatives
        self.observer = observer
        self.adapter, self.group = adapter, group
        self.pictures = PromptPictures(model, inputs, self.ids)
        self.cache: SequenceCache | None = None
        self.computed = 0
        self.entered = 0
        scaling = model.config.text.rope_scaling
        rope_length = scaling.effective_length(self.prompt_length) if scaling is not None else 0
        # Blocks are shared where RoPE rotates them alike, and one adapter computed them.
        self._root = repr((rope_length, adapter)).encode()
        self._keys: list[bytes] = []
        self.arrival = 0
        self.reused: int | None = None
        self.times = Times()

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 of a reply that is being decoded."""
        return len(self.ids) - self.computed

    @property
    def own_cache(self) -> SequenceCache:
        assert self.cache is not None, "it waits, or decodes with others"
        return self.cache

    def key(self, index: int) -> bytes:
        """The key in the prefix index of a full block; that before the first is empty."""
        while index >= len(self._keys):
            begin = len(self._keys) * CACHE_BLOCK
            previous = self._keys[-1] if self._keys else self._root
            self._keys.append(next_key(previous, self.tokens[begin : begin + CACHE_BLOCK]))
        return self._keys[index] if index >= 0 else b""

    def share(self, cache: SequenceCache, blocks: Sequence[Sequence[Tensor]]) -> None:
        """Begin with an empty cache, and in it what another request has computed: full blocks."""
        cache.announce([self.prompt_length])
        cache.share(blocks)
        self.cache, self.entered, self.computed = cache, len(blocks), cache.lengths[0]
        if self.observer is not None:
            self.observer.begin()

    def reset(self) -> None:
        """Forget what was computed, for others to have the memory."""
        self.cache, self.computed, self.entered = None, 0, 0
        self.pictures.forget()

    def add(self, token: Token) -> bool:
        """Take the next token of the reply; -> whether it is the last."""
        self.times.last_token = time.monotonic()
        self.times.first_token = self.times.first_token or self.times.last_token
        self.ids.append(token.id)
        self.tokens.append(token.id)
        ends = token.id in self.stop_ids or len(self.ids) - self.prompt_length == self.max_new_tokens
        self.deliver(token)
        return ends


class PromptPictures:
    """The tiles of a prompt, each encoded when the tokens that stand for it are read.

    Raises:
        Llama4Error: the prompt has more or fewer patches than the tiles give.
    """

    def __init__(self, model: Llama4Model, inputs: Inputs, ids: Sequence[int]) -> None:
        self._model, self._pixel_values, self._grids = model, inputs.pixel_values, inputs.image_grids
        pixel_values = inputs.pixel_values
        self._prompt_length = len(ids)
        self._patch, vision = model.config.image_token_index, model.config.vision
        self._places = [i for i, id_ in enumerate(ids) if id_ == self._patch]
        self._per_tile = vision.tokens_per_tile if vision is not None else 0
        given = self._per_tile * (len(pixel_values) if pixel_values is not None else 0)
        if len(self._places) != given:
            raise Llama4Error(
                f"the prompt holds {len(self._places)} {model.image_name} tokens, but its images give {given} "
                "features; let the processor of this model prepare both"
            )
        self._encoded: tuple[int, Tensor] | None = None  # a tile may be read in two pieces

    def forget(self) -> None:
        """Free what was encoded."""
        self._encoded = None

    def of(self, ids: Sequence[int], begin: int, end: int) -> list[Tensor]:
        """What stands for each `<|patch|>` among tokens [begin, end) of prompt and reply, [n * Q, D] in parts. One that
        the model itself wrote is no picture, but its own embedding."""
        first, last = bisect_left(self._places, begin), bisect_left(self._places, end)
        parts = []
        for tile in range(first // self._per_tile, -(-last // self._per_tile)) if first < last else ():
            place = tile * self._per_tile
            parts.append(self._tile(tile)[max(first - place, 0) : last - place])
        if written := ids[max(begin, self._prompt_length) : end].count(self._patch):
            patches = torch.full((written,), self._patch, device=self._model.device)
            parts.append(self._model.language_model.model.embed_tokens(patches))
        return parts

    def grids(self, begin: int, end: int) -> list[Tensor]:
        """`image_grids` of the pictures among these tokens, in parts; none where the model takes none."""
        if self._grids is None:
            return []
        return [self._grids[bisect_left(self._places, begin) : bisect_left(self._places, end)]]

    def keys(self, begin: int, end: int) -> int:
        """Keys that layers of cross-attention keep of the pictures among these tokens."""
        vision = self._model.config.vision
        per_tile = vision.keys_per_tile if vision is not None else 0
        return sum(int(part.prod(dim=1).sum()) for part in self.grids(begin, end)) * per_tile

    def _tile(self, index: int) -> Tensor:
        assert self._pixel_values is not None
        if self._encoded is None or self._encoded[0] != index:
            grids = self._grids[index : index + 1] if self._grids is not None else None
            self._encoded = index, self._model.encode_images(self._pixel_values[index : index + 1], grids)
        return self._encoded[1]
