"""What one forward of one batch sees of a cache: which slots its tokens read, and where their own keys and values go.

Shapes: N packed tokens, K key/value heads, C head_dim.
"""

from __future__ import annotations

from torch import Tensor

from llama4.cache.batch import Batch, make_batch
from llama4.cache.layer import LayerCache
from llama4.cache.pictures import Picture, PictureView
from llama4.cache.sequence import SequenceCache
from llama4.config import CACHE_BLOCK
from llama4.config.window import SlidingWindow, slots_end
from llama4.ops.attention import write_step


class LayerView:
    """One layer of a cache, for the tokens of one batch. New tokens are written here alone, or by a kernel into the
    blocks that `CacheView.reserve_step` took.

    Attributes:
        blocks: what attention reads.
    """

    def __init__(self, cache: SequenceCache, layer: int, batch: Batch) -> None:
        self._cache = cache
        self.blocks: LayerCache = cache.layers[layer]
        self._window = cache.windows[layer]
        self._batch = batch
        self._spans = [span for span in batch.spans(self._window) if span.is_last]

    def write(self, k_NKC: Tensor, v_NKC: Tensor) -> None:
        """Write the keys and values of the batch. Of a row that crosses chunk borders only the last chunk is kept: no
        token will see the others again."""
        self._cache.begin_write()
        if self._batch.is_decode:
            self._take_blocks()
            slots = [span.slot(self._window) for span in self._spans]
            write_step(k_NKC, v_NKC, self.blocks, slots, lambda: self._batch.slots(self._window))
            return
        for span in self._spans:
            k, v = k_NKC[span.begin : span.end], v_NKC[span.begin : span.end]
            if isinstance(self._window, SlidingWindow):
                self.blocks.write_ring(span.row, span.before, self._window, k, v)
            else:
                self.blocks.write(span.row, span.past, k, v)

    def reserve(self) -> Tensor:
        """Take the blocks that `write` would write to, for a kernel that does so; -> the block table."""
        self._take_blocks()
        return self.blocks.block_table()

    def _take_blocks(self) -> None:
        """To a ring go no more tokens than it has slots."""
        for span in self._spans:
            new = span.end - span.begin
            if isinstance(self._window, SlidingWindow):
                self.blocks.reserve_ring(span.row, span.before, new, self._window)
            else:
                self.blocks.reserve(span.row, span.past, new)


class CacheView:
    """A cache for the tokens of one batch. `commit` comes after all layers are written, or a kernel that writes does
    both: after `reserve_step`, `SequenceCache.commit_step` counts what it wrote.

    Attributes:
        layers: those whose keys come from tokens.
        cross_layers: those whose keys come from pictures.
        of_layer: each layer of the decoder, of one or the other kind.
    """

    def __init__(self, cache: SequenceCache, batch: Batch) -> None:
        self.cache, self.batch = cache, batch
        self.layers = [LayerView(cache, i, batch) for i in range(len(cache.layers))]
        self.cross_layers = [PictureView(cache.pictures, i) for i in range(len(cache.cross_layers))]
        tokens, pictures = iter(self.layers), iter(self.cross_layers)
        count = len(self.layers) + len(self.cross_layers)
        self.of_layer = [next(pictures) if i in cache.cross_layers else next(tokens) for i in range(count)]

    @classmethod
    def of_step(cls, cache: SequenceCache) -> CacheView:
        """For one more token in every row."""
        batch = make_batch(
            cache.batch_size,
            1,
            cache.device,
            start=cache.start,
            next_position=cache.next_position,
            rope_lengths=cache.rope_lengths,
        )
        return cls(cache, batch)

    @property
    def steps_left(self) -> int:
        """Steps, this one the first, for which the blocks that it takes suffice, and in which no row begins a chunk or
        another round of a ring."""
        windows, batch = set(self.cache.windows), self.batch
        room = [CACHE_BLOCK - span.past % CACHE_BLOCK for window in windows for span in batch.spans(window)]
        places = list(zip(batch.query_start, batch.start, strict=True))
        room += [end - p for window in windows for p, s in places if (end := slots_end(p, window, s)) is not None]
        return min(room)

    def commit(self) -> None:
        """Count the batch's tokens, and its pictures."""
        sight = self.batch.sight
        if sight is not None:
            self.cache.add_pictures(
                [
                    [
                        Picture(picture.position, tuple(layer.new[row][i] for layer in self.cross_layers))
                        for i, picture in enumerate(pictures)
                    ]
                    for row, pictures in enumerate(sight.new)
                ]
            )
        self.cache.commit(self.batch.start, self.batch.next_position, self.batch.rope_lengths)

    def reserve_step(self) -> list[Tensor]:
        """Take the blocks that the batch's tokens go to, for a kernel that writes them; -> each layer's block table.

        No token is counted yet, but the cache has another version: what others prepared for its next steps is void.
        """
        tables = [layer.reserve() for layer in self.layers]
        self.cache.commit(self.batch.start, self.batch.query_start, self.batch.rope_lengths)
        return tables
