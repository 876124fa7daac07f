"""Decoding in buffers that stay where they are: a step waits for nothing, and can be replayed from a CUDA graph.

An eager step asks the host where each key goes and how many there are. Here positions are on the device, each layer has
a buffer of fixed size for keys and values, and attention reads all of it up to a bound, with a mask for what a row does
not see. The bound is a power of two that the host knows from counting; each bound has a graph of its own.

The keys that steps add are in the buffers alone: the cache that a decoder is made from is not changed. To be a runner,
it would have to read and write the blocks of the cache.

Shapes: B rows, D hidden size, H query heads, K key/value heads, G = H / K, C head_dim, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.cache.sequence import SequenceCache
from llama4.config.window import chunk_offset, visible_tokens
from llama4.errors import Llama4Error
from llama4.model.decoder import DecoderLayer
from llama4.model.multimodal import Llama4Model
from llama4.model.positions import PositionFactors
from llama4.ops.precision import upcast
from llama4.ops.rope import apply_rope

LEAST_SLOTS = 256
"""The smallest bound."""


class StaticDecoder:
    """Steps of all rows of a cache.

    Args:
        model: its weights must stay where they are.
        cache: where the prompts are.
        room: how many steps there are to be at most.
        capture: replay steps from CUDA graphs, where the model is on a GPU. Experts must not make the host wait.

    Attributes:
        logits_BV: of the last step, until the next one.
    """

    def __init__(self, model: Llama4Model, cache: SequenceCache, room: int, *, capture: bool = True) -> None:
        text, device = model.config.text, model.device
        self.model = model
        self.room = room
        self.captures = capture and device.type == "cuda"
        self._first, self._next = list(cache.start), list(cache.next_position)
        self._windows = [*cache.windows]
        B = cache.batch_size
        self._ids_B = torch.zeros(B, dtype=torch.int64, device=device)
        self._rows_B = torch.arange(B, device=device)
        self._first_B, self._position_B = (torch.tensor(x, device=device) for x in (self._first, self._next))
        self.logits_BV = torch.empty(B, text.vocab_size, dtype=model.dtype, device=device)
        slots = {window: self._slots(window, room) for window in self._windows}
        shape = 2, B, text.num_key_value_heads
        self._keys_values = [
            torch.zeros(*shape, slots[window], text.head_dim, dtype=model.dtype, device=device)
            for window in self._windows
        ]
        for layer, window, buffer in zip(cache.layers, self._windows, self._keys_values, strict=True):
            for row in range(B):
                begin = 0
                for keys_KSC, values_KSC in layer.read(row, self._seen(row, window), model.dtype, device):
                    end = begin + keys_KSC.shape[1]
                    buffer[0, row, :, begin:end], buffer[1, row, :, begin:end] = keys_KSC, values_KSC
                    begin = end
        self._graphs: dict[tuple[int, ...], Callable[[], None]] = {}

    @torch.inference_mode()
    def step(self, ids_B: Tensor) -> Tensor:
        """One more token in every row -> logits of the next, [B, V], which the next step overwrites.

        Args:
            ids_B: int64, on the device, within the vocabulary.

        Raises:
            Llama4Error: more steps than there is room for.
        """
        if self.room < 1:
            raise Llama4Error("the decoder has no room for another step; make it with a larger one")
        self._ids_B.copy_(ids_B)
        bounds = {window: self._slots(window, 1) for window in self._windows}
        if self.captures:
            key = tuple(bounds.values())
            if key not in self._graphs:
                self._graphs[key] = self._captured(bounds)
            self._graphs[key]()
        else:
            self._run(bounds)
        self._next = [position + 1 for position in self._next]
        self.room -= 1
        return self.logits_BV

    def _seen(self, row: int, window: int | None) -> int:
        """Cached tokens that the last token of a row saw, and itself."""
        end = self._next[row]
        return visible_tokens(end - 1, window, self._first[row]) if end > self._first[row] else 0

    def _slots(self, window: int | None, steps: int) -> int:
        """A bound for the slots that layers with a window use in so many steps: a power of two, or the window."""
        longest = max(end + steps - first for first, end in zip(self._first, self._next, strict=True))
        if window is not None:
            longest = min(longest, window if steps > 1 else max(chunk_offset(end, window) + 1 for end in self._next))
        bound = max(LEAST_SLOTS, 1 << (longest - 1).bit_length())
        return bound if window is None else min(bound, -(-window // 8) * 8)

    def _captured(self, bounds: dict[int | None, int]) -> Callable[[], None]:
        position_B = self._position_B.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels, which cannot be captured
            for _ in range(2):
                self._run(bounds)
                self._position_B.copy_(position_B)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(bounds)
        return graph.replay

    def _run(self, bounds: dict[int | None, int]) -> None:
        """What a graph holds: from the ids to the logits, and the next position."""
        decoder, head = self.model.language_model.model, self.model.language_model.lm_head
        factors = PositionFactors(self.model.config.text, self._position_B, self.model.dtype)
        places = {window: self._place(window, bound) for window, bound in bounds.items()}
        x_BD = upcast(decoder.embed_tokens(self._ids_B))
        for layer, window, buffer in zip(decoder.layers, self._windows, self._keys_values, strict=True):
            assert isinstance(layer, DecoderLayer)
            x_BD = x_BD + self._attention(layer, x_BD, factors, buffer, *places[window])
            x_BD = x_BD + layer.feed_forward(layer.post_attention_layernorm(x_BD))
        self.logits_BV.copy_(head(decoder.norm(x_BD)))
        self._position_B.add_(1)

    def _place(self, window: int | None, bound: int) -> tuple[Tensor, Tensor]:
        """The slot of each row's new token, [B], and which slots it sees, [B, 1, 1, bound]."""
        slot_B = torch.minimum(self._position_B - self._first_B, chunk_offset(self._position_B, window))
        slots = torch.arange(bound, device=slot_B.device)
        return slot_B, (slots <= slot_B[:, None])[:, None, None]

    def _attention(
        self, layer: DecoderLayer, x_BD: Tensor, factors: PositionFactors, buffer: Tensor, slot_B: Tensor, seen: Tensor
    ) -> Tensor:
        """As `Attention.forward`, with the keys and values of the buffer."""
        attention = layer.self_attn
        x_BD = layer.input_layernorm(x_BD)
        q_BHC, k_BKC, v_BKC = (
            projection(x_BD).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        rotation = factors.rotations[attention.window] if attention.uses_rope else None
        temperature_B = factors.temperature_N if attention.uses_temperature else None
        q_BHC, k_BKC = apply_rope(q_BHC, k_BKC, rotation, attention.qk_norm_eps, temperature_B)
        keys_BKSC, values_BKSC = buffer[..., : seen.shape[-1], :].unbind(0)
        keys_BKSC[self._rows_B, :, slot_B], values_BKSC[self._rows_B, :, slot_B] = k_BKC, v_BKC
        q_BKGC = q_BHC.unflatten(1, (keys_BKSC.shape[1], -1))
        out_BKGC = F.scaled_dot_product_attention(q_BKGC, keys_BKSC, values_BKSC, attn_mask=seen)
        out: Tensor = attention.o_proj(out_BKGC.flatten(1))
        return out
