"""The key/value cache: a chunked layer never holds more than one chunk, a NoPE layer every token.

Keys of row b live in slots that count from the beginning of what a token can see: of its chunk, or of its sequence. At
a chunk border counting starts anew and the old chunk is overwritten, so attention reads slots [0, past + new) and
needs no mask.

Shapes: B rows, K key/value heads, S slots, C head_dim, n new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama4.config import TextConfig
from llama4.packing import Packing, Segment, Step


class LayerCache:
    """Keys and values of one layer, [B, K, S, C]; S grows as tokens come, up to the layer's window."""

    def __init__(
        self, batch_size: int, config: TextConfig, layer: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.window = config.window(layer)
        shape = (batch_size, config.num_key_value_heads, 0, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)

    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens of a row."""
        room = self.keys.shape[2]
        if slots <= room:
            return
        wanted = max(slots, room + room // 2, 64)
        wanted = wanted if self.window is None else min(wanted, self.window)
        self.keys, self.values = (self._grown(old, wanted) for old in (self.keys, self.values))

    @staticmethod
    def _grown(old: Tensor, slots: int) -> Tensor:
        # Zeros, not whatever is in memory: a masked NaN is still a NaN in the product with the values.
        new = old.new_zeros(*old.shape[:2], slots, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new

    def extend(self, segment: Segment, keys_nKC: Tensor, values_nKC: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of a segment; return all that its tokens may see, each [K, past + n, C]."""
        new_keys, new_values = keys_nKC.transpose(0, 1), values_nKC.transpose(0, 1)
        past, end = segment.past, segment.past + segment.end - segment.start
        if not segment.last and not past:  # nobody will ask for this chunk again
            return new_keys, new_values
        self.reserve(end)
        for held, new in ((self.keys, new_keys), (self.values, new_values)):
            held[segment.row, :, past:end] = new
        return self.keys[segment.row, :, :end], self.values[segment.row, :, :end]

    def step(self, step: Step, keys_BKC: Tensor, values_BKC: Tensor) -> tuple[Tensor, Tensor]:
        """Keep one new token of every row; return keys and values up to the longest row, each [B, K, S, C]."""
        self.reserve(step.longest)
        for held, new_BKC in ((self.keys, keys_BKC), (self.values, values_BKC)):
            if step.is_ragged:
                held[torch.arange(len(new_BKC), device=held.device), :, step.lengths_B - 1] = new_BKC.to(held.dtype)
            else:
                held[:, :, step.longest - 1] = new_BKC
        return self.keys[:, :, : step.longest], self.values[:, :, : step.longest]


class Cache:
    """What the decoder remembers of B sequences.

    Attributes:
        firsts: position of the first token of each row.
        nexts: position that the next token of each row will have.
        layers: one `LayerCache` per decoder layer.
    """

    def __init__(self, config: TextConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        if batch_size < 1:
            raise ValueError(f"a cache needs at least one row, not batch_size={batch_size}")
        self.firsts = [0] * batch_size
        self.nexts = [0] * batch_size
        self.layers = [LayerCache(batch_size, config, i, device, dtype) for i in range(config.num_hidden_layers)]

    @property
    def batch_size(self) -> int:
        return len(self.nexts)

    @property
    def lengths(self) -> list[int]:
        """Tokens seen so far, per row."""
        return [end - begin for begin, end in zip(self.firsts, self.nexts, strict=True)]

    @property
    def num_bytes(self) -> int:
        """Bytes that the keys and values occupy now."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in (layer.keys, layer.values))

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self.firsts, self.nexts = ([values[row] for row in rows] for values in (self.firsts, self.nexts))
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def advance(self, packing: Packing) -> None:
        """Count the new tokens, once all layers have them."""
        self.firsts = list(packing.firsts)
        self.nexts = [start + length for start, length in zip(packing.starts, packing.lengths, strict=True)]
