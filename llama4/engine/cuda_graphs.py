"""Steps of decoding on a GPU: each one replay of a CUDA graph.

A graph is of a number of rows, and of the width of the block tables; it is captured when a cache of that shape first
decodes, and serves all caches of it, one after the other. What a cache's next steps need is copied into the graph's
buffers by a `GraphSession`: for as many steps as stay within the last blocks of all rows and their current chunks.

Shapes: B rows, L layers, W blocks of a row, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llama4.cache.formats import CacheFormat
from llama4.cache.sequence import SequenceCache
from llama4.cache.view import CacheView
from llama4.config.window import SlidingWindow
from llama4.engine.snapshot import Snapshot, UnsupportedError, check_frame, require
from llama4.engine.static_step import StaticStep
from llama4.kernels.triton import common, support
from llama4.model.attention import Attention
from llama4.model.decoder import DecoderLayer
from llama4.model.experts import GroupedExperts
from llama4.model.feed_forward import FeedForward
from llama4.model.moe import MixtureOfExperts, Router
from llama4.model.multimodal import Llama4Model, check_ids, check_rows
from llama4.model.norm import RMSNorm
from llama4.ops import attention_gpu, quantized_gpu
from llama4.ops.linear import Linear
from llama4.quantization.modules import QuantizedEmbedding, QuantizedExperts
from llama4.quantization.weight import QuantizedWeight

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

_MODULES = {
    *(Attention, DecoderLayer, FeedForward, GroupedExperts, Linear, MixtureOfExperts, RMSNorm, Router),
    *(QuantizedExperts, QuantizedWeight),
}
"""Modules that a static step computes, or calls without waiting; a subclass may do something else."""
LEAST_WIDTH = 64
"""Blocks of a row that a table has room for at least. A graph is captured anew when twice as many are needed."""

MAX_GRAPHS = 64
"""That are kept; those used longest ago are captured anew."""


class GraphSession:
    """The next steps of one cache, prepared. It is current as long as nothing but its own steps changes the cache, and
    no other session uses the graph. It keeps the weights that it was made with in memory."""

    def __init__(self, runner: CudaGraphRunner, snapshot: Snapshot, cache: SequenceCache) -> None:
        view = CacheView.of_step(cache)
        self._left = view.steps_left
        tables = view.reserve_step()
        self._step = runner.step_of(cache, max(table.shape[1] for table in tables))
        self._runner, self._snapshot = runner, snapshot
        self._version, self._hooks = cache.version, RemovableHandle.next_id
        self._vocab_size = runner.model.config.text.num_embeddings
        for own_BW, table_BW in zip(self._step.tables_LBW, tables, strict=True):
            own_BW[:, : table_BW.shape[1]].copy_(table_BW, non_blocking=True)
        _upload(self._step.start_B, view.batch.start)
        _upload(self._step.position_B, view.batch.query_start)
        runner.capture(self._step)
        self._step.user = self._key = object()
        self._weights = snapshot.weights()  # which the graph reads, whatever takes their places

    @property
    def logits_BV(self) -> Tensor:
        """Logits after the last step, overwritten by the next."""
        return self._step.logits_BV

    def is_current(self, cache: SequenceCache) -> bool:
        return (
            self._version == cache.version
            and self._left > 0
            and self._step.user is self._key
            and self._hooks == RemovableHandle.next_id
            and self._runner.snapshot is self._snapshot
        )

    @torch.inference_mode()
    def run(self, ids: list[int], cache: SequenceCache) -> None:
        """One more token in every row. The host waits for nothing."""
        check_rows(len(ids), cache)
        check_ids(min(ids), max(ids), self._vocab_size)
        _upload(self._step.ids_B, ids)
        self._step.run()
        self._left -= 1
        self._version = cache.commit_step()

    def greedy_token(self) -> tuple[list[int], list[float]]:
        """The index of each row's largest logit, the lowest on ties, and its log_softmax in float32."""
        return self._step.greedy_B.tolist(), self._step.logprobs_B.tolist()


class CudaGraphRunner:
    """Steps by CUDA graphs.

    Attributes:
        snapshot: the model as it was when the graphs were captured.
    """

    name, device = "CUDA graph", "cuda"

    def __init__(self, model: Llama4Model) -> None:
        self.model = model
        self.snapshot: Snapshot | None = None
        self._unsupported: str | None = None
        self._steps: dict[tuple[int, int, tuple[CacheFormat, ...]], StaticStep] = {}
        self._pool: _POOL_HANDLE | None = None

    def is_worthwhile(self) -> bool:
        return self._absent_reason() is None

    def _absent_reason(self) -> str | None:
        return support.unsupported_reason(self.model.device, self.model.dtype)

    def unsupported_reason(self, cache: SequenceCache) -> str | None:
        model, text = self.model, self.model.config.text
        if (reason := self._absent_reason()) is not None:
            return reason
        if torch.is_autocast_enabled("cuda"):
            return "autocast chooses dtypes"
        if torch.is_grad_enabled():
            return "gradients are being recorded; decode inside torch.inference_mode()"
        if not cache.is_consistent:
            return "a forward that was adding tokens to the cache broke off"
        if any(isinstance(window, SlidingWindow) and max(cache.lengths) >= window for window in set(cache.windows)):
            return "the window of attention slides"
        if text.rope_scaling is not None and text.rope_scaling.by_length:
            return "RoPE's frequencies depend on the length of the prompt"
        for layer in cache.layers:
            places = layer.format, model.device, layer.device
            if (reason := attention_gpu.unsupported_reason(model.dtype, text.head_dim, *places)) is not None:
                return reason
        if self.snapshot is None or not self.snapshot.is_current(model):
            self.release()
            self.snapshot, self._unsupported = Snapshot.taken(model), _unsupported_reason(model)
        if self._unsupported is not None:
            return self._unsupported
        hooked = self.snapshot.hooked(model)
        return None if hooked is None else f"{hooked} has a hook, or a forward of its own"

    def open(self, cache: SequenceCache) -> GraphSession:
        """Raises:
        UnsupportedError: a graph cannot be captured, as there is no memory, or for whatever else; nor will the next.
        """
        assert self.snapshot is not None, "unsupported_reason comes first"
        return GraphSession(self, self.snapshot, cache)

    def step_of(self, cache: SequenceCache, width: int) -> StaticStep:
        """That of the caches with so many rows and formats, and room for tables of this width."""
        width = max(LEAST_WIDTH, common.next_power_of_two(width))
        formats = tuple(layer.format for layer in cache.layers)
        key = cache.batch_size, width, formats
        step = self._steps.pop(key, None) or StaticStep(self.model, cache.batch_size, width, formats)
        self._steps[key] = step  # the last one used
        while len(self._steps) > MAX_GRAPHS:
            self._steps.pop(next(iter(self._steps)))
        return step

    def capture(self, step: StaticStep) -> None:
        """All graphs share the memory of what is between their kernels: only one is replayed at a time."""
        if step.is_captured:
            return
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            step.capture(self._pool)
        except Exception as error:  # of CUDA, the compiler of kernels, the driver
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.release()
            self._unsupported = f"a step could not be captured: {said}"
            raise UnsupportedError(self._unsupported) from error

    def release(self) -> None:
        """Let go of all graphs."""
        self._steps.clear()
        self._pool = None


def _unsupported_reason(model: Llama4Model) -> str | None:
    """Why a static step does not compute what the modules of a model do; None if it does."""
    inner = model.language_model
    try:
        check_frame(model, (nn.Embedding, QuantizedEmbedding))
        for name, module in inner.model.layers.named_modules():
            is_known = not name or type(module) in _MODULES
            require(is_known, f"layers.{name} is {type(module).__name__}, which it does not compute")
            if isinstance(module, QuantizedExperts):
                for part in module.matrices:
                    _check_waits_not(f"layers.{name}.{part}", getattr(module, part), model)
        require(type(inner.lm_head) in (Linear, QuantizedWeight), f"lm_head is {type(inner.lm_head).__name__}")
    except UnsupportedError as error:
        return str(error)
    return None


def _check_waits_not(name: str, weight: QuantizedWeight, model: Llama4Model) -> None:
    """Experts whose matrices no kernel reads are computed one by one, and the host must know which."""
    x, format = torch.empty(0, dtype=model.dtype, device=model.device), weight.format
    reason = quantized_gpu.unsupported_reason(format.kind, x, weight.shape[-1], format.group_size)
    require(reason is None, f"{name}: {reason}")


def _upload(buffer_B: Tensor, values: tuple[int, ...] | list[int]) -> None:
    """So few bytes are taken from the host's memory before the call returns, which is not kept waiting."""
    buffer_B.copy_(torch.tensor(values), non_blocking=True)
