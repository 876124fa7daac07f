"""A step of decoding on a GPU in buffers that stay where they are, so that it can be replayed from a CUDA graph.

A step by `Llama4Model.forward` launches a thousand kernels from Python, each of which takes the host longer than the
GPU computes. Here the host decides nothing: positions, lengths and the addresses of the cache's blocks are read on the
device, so one captured step serves all contexts. What is computed is what the model's modules compute, in the same
order and precision; of the operations between products several are one kernel.

Shapes: B rows, L layers, W blocks of a row, D hidden size, H query heads, K key/value heads, C head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llama4.cache.formats import CacheFormat
from llama4.config.window import chunk_offset
from llama4.model.attention import Attention
from llama4.model.decoder import DecoderLayer
from llama4.model.feed_forward import FeedForward
from llama4.model.moe import MixtureOfExperts
from llama4.model.multimodal import Llama4Model
from llama4.model.norm import RMSNorm
from llama4.model.positions import PositionFactors
from llama4.ops import attention_gpu
from llama4.ops.linear import linears
from llama4.ops.norm import add_experts_rms_norm, add_rms_norm
from llama4.ops.precision import upcast
from llama4.ops.rope import apply_rope
from llama4.ops.routing import dispatch_top_k
from llama4.ops.sampling import greedy_token

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE


class StaticStep:
    """One more token in every row.

    Args:
        model: its weights must stay where they are.
        rows: B.
        width: W.
        formats: in which each layer's keys and values are stored.

    Attributes:
        tables_LBW: addresses of the blocks of each layer.
        ids_B: the tokens.
        start_B: positions of the first tokens of the rows.
        position_B: positions of the tokens; a step counts them up.
        logits_BV: of the next tokens.
        greedy_B, logprobs_B: the index of each row's largest logit, and its log_softmax.
        user: a key of the session that last filled the buffers.
    """

    def __init__(self, model: Llama4Model, rows: int, width: int, formats: Sequence[CacheFormat]) -> None:
        device = model.device
        self.model = model
        self.tables_LBW = torch.zeros(len(formats), rows, width, dtype=torch.int64, device=device)
        self.ids_B, self.start_B, self.position_B, self.greedy_B = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.logits_BV = torch.empty(rows, model.config.text.vocab_size, dtype=model.dtype, device=device)
        self.logprobs_B = torch.zeros(rows, device=device)
        self._formats = tuple(formats)
        self._branch = Branch(device)
        self._replay: Callable[[], None] | None = None
        self.user: object = None

    @property
    def is_captured(self) -> bool:
        """Whether it is replayed."""
        return self._replay is not None

    @torch.inference_mode()
    def run(self) -> None:
        """Compute the step, from `ids_B` to `greedy_B`. The host does not wait for it."""
        with torch.cuda.device_of(self.ids_B):
            if self._replay is not None:
                self._replay()
            else:
                self._compute()

    @torch.inference_mode()
    def capture(self, pool: _POOL_HANDLE) -> None:
        """Have steps replayed from a CUDA graph from now on, whose memory is of a pool that graphs share.

        The buffers must be those of a cache that is there: the step is computed, which changes no more of it than the
        slots that its own step will write, and counted back.
        """
        with torch.cuda.device_of(self.ids_B):
            position_B = self.position_B.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels, which cannot be captured
                for _ in range(2):
                    self._compute()
                    self.position_B.copy_(position_B)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._compute()
            self._replay = graph.replay

    def _compute(self) -> None:
        decoder, head = self.model.language_model.model, self.model.language_model.lm_head
        factors = PositionFactors(self.model.config.text, self.position_B, self.model.dtype)
        layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        slots = {window: self._slots(window) for window in {layer.self_attn.window for layer in layers}}
        x_BD = upcast(decoder.embed_tokens(self.ids_B))
        normed_BD = layers[0].input_layernorm(x_BD)
        norms = [*(layer.input_layernorm for layer in layers[1:]), decoder.norm]
        for i, (layer, next_norm) in enumerate(zip(layers, norms, strict=True)):
            window, norm = layer.self_attn.window, layer.post_attention_layernorm
            attended_BD = self._attention(layer.self_attn, i, normed_BD, factors, *slots[window])
            x_BD, normed_BD = add_rms_norm(x_BD, attended_BD, norm.weight, norm.eps)
            x_BD, normed_BD = self._feed_forward(layer.feed_forward, x_BD, normed_BD, next_norm)
        self.logits_BV.copy_(head(normed_BD))
        greedy_B, logprobs_B = greedy_token(self.logits_BV)
        self.greedy_B.copy_(greedy_B)
        self.logprobs_B.copy_(logprobs_B)
        self.position_B.add_(1)

    def _slots(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Where the keys of each row's token go in layers with a window, and how many keys it sees, [B]."""
        slots_B = torch.minimum(self.position_B - self.start_B, chunk_offset(self.position_B, window))
        return slots_B, slots_B + 1

    def _attention(
        self,
        attention: Attention,
        layer: int,
        x_BD: Tensor,
        factors: PositionFactors,
        slots_B: Tensor,
        lengths_B: Tensor,
    ) -> Tensor:
        """As `Attention.forward`, over the blocks of the cache."""
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q_BHC, k_BKC, v_BKC = (x.unflatten(-1, (-1, attention.head_dim)) for x in linears(projections, x_BD))
        rotation = factors.rotations[attention.window] if attention.uses_rope else None
        temperature_B = factors.temperature_N if attention.uses_temperature else None
        q_BHC, k_BKC = apply_rope(q_BHC, k_BKC, rotation, attention.qk_norm_eps, temperature_B)
        table_BW, format = self.tables_LBW[layer], self._formats[layer]
        out_BHC = attention_gpu.write_and_attend(q_BHC, k_BKC, v_BKC, table_BW, slots_B, lengths_B, format)
        out: Tensor = attention.o_proj(out_BHC.flatten(1))
        return out

    def _feed_forward(self, block: nn.Module, x_BD: Tensor, normed_BD: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """The residual stream behind a block, as the modules compute it, and its norm. The shared expert is computed
        beside the routed ones."""
        if isinstance(block, FeedForward):
            return add_rms_norm(x_BD, block(normed_BD), norm.weight, norm.eps)
        assert isinstance(block, MixtureOfExperts)
        shared_BD = self._branch.fork(lambda: block.shared_expert(normed_BD))
        routed = dispatch_top_k(normed_BD, block.router.logits(normed_BD), block.router.k)
        routed_RD = block.experts(routed.x_RD, routed.num_tokens_per_expert_E)
        self._branch.join()
        return add_experts_rms_norm(x_BD, shared_BD, routed_RD, routed.rows_Nk, norm.weight, norm.eps)


class Branch:
    """What may be computed beside other work: a branch of a CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fork(self, compute: Callable[[], Tensor]) -> Tensor:
        """Begin it. What it reads must be kept until `join`."""
        if self._stream is None:
            return compute()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            return compute()

    def join(self) -> None:
        """What follows comes after it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
