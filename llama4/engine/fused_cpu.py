"""Steps of decoding on a CPU: each one call of compiled code.

Between two products of a single token stand dozens of small operations. Each costs torch and Python microseconds, more
when the weights that were just read have evicted them from the processor's caches: a third of a step, and half of one
with four-bit weights. `decode` in `kernels/cpp/decoder.h` computes what `Llama4Model.forward` computes, in the same
order and precision; tests compare the two.

What stays the same from step to step is found out once: a `Description` says where a model's weights are, a
`FusedSession` what else some steps of one cache need.

Shapes: B rows, V vocabulary, S steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from llama4.cache.sequence import SequenceCache
from llama4.cache.view import CacheView
from llama4.config.window import SlidingWindow
from llama4.engine.fused_model import EXPERTS_IN_FILES, Description
from llama4.errors import ArgumentError
from llama4.kernels import loader, threads
from llama4.kernels.abi import LayerStep, Tokens, check
from llama4.model.decoder import DecoderLayer
from llama4.model.multimodal import Llama4Model, check_ids, check_rows
from llama4.model.positions import PositionFactors
from llama4.ops import cpu_kernels
from llama4.ops.attention import format_unsupported_reason

MAX_STEPS = 64
"""Steps that are prepared at once."""


def make_batch_invariant(model: Llama4Model, device: torch.device, dtype: torch.dtype) -> None:
    """From now on a token's logits are the same bits, whatever tokens are computed beside it.

    Raises:
        ArgumentError: steps on this device, in this dtype or by these kernels are not.
    """
    reason = cpu_kernels.library_unsupported_reason()
    if device.type != "cpu":
        reason = f"the model is on {device}"
    elif dtype not in (torch.float32, torch.bfloat16):
        reason = f"it computes in {str(dtype).removeprefix('torch.')}"
    elif reason is None and not (level := loader.found().level).startswith(("avx512", "amx")):
        reason = f"sums of the kernels for {level} go with the rows, since registers are few"
    if reason is not None:
        raise ArgumentError(f"batch_invariant=True does nothing here: {reason}; leave it out")
    model.is_batch_invariant = True


@torch.inference_mode()
def check_batch_invariant(model: Llama4Model, cache_dtype: str | torch.dtype) -> None:
    """Once the weights are there.

    Raises:
        ArgumentError: that was asked for, and steps of this model with such a cache are not compiled code.
    """
    if not model.is_batch_invariant:
        return
    cache = model.new_cache(1, cache_dtype)
    reason = FusedCpuRunner(model).undescribed_reason(cache)
    if reason is None and any(isinstance(window, SlidingWindow) for window in cache.windows):
        reason = "the window of its attention slides, for which steps are not compiled code"
    if reason is not None:
        raise ArgumentError(f"batch_invariant=True does nothing here: {reason}; leave it out")


def layer_steps(
    model: Llama4Model,
    cache: SequenceCache,
    tables: Sequence[Tensor],
    factors: PositionFactors,
    lengths: Mapping[int | None, Tensor],
) -> ctypes.Array[LayerStep]:
    """What each layer needs for some steps, as addresses: it does not keep the tensors alive.

    Args:
        tables: the block table of each layer, [B, blocks].
        factors: of the tokens of all steps.
        lengths: by window, how many keys each of these sees, int64.
    """
    attentions = [block.self_attn for block in model.language_model.model.layers if isinstance(block, DecoderLayer)]
    steps = (LayerStep * len(tables))()
    for i, (attention, table, window) in enumerate(zip(attentions, tables, cache.windows, strict=True)):
        steps[i] = LayerStep(
            rotations=factors.rotations[window].data_ptr() if attention.uses_rope else 0,
            temperatures=factors.temperature_N.data_ptr() if attention.uses_temperature else 0,
            lengths=lengths[window].data_ptr(),
            block_table=table.data_ptr(),
            width=table.shape[1],
            format=loader.loaded().cache_formats[cache.layers[i].format.name].number,
        )
    return steps


class FusedSession:
    """The next steps of one cache, prepared: as many as stay within its last block and its current chunk.

    It is current as long as nothing but its own steps changes the cache. It keeps the weights that it was made with in
    memory, whatever replaces them in the model.

    A line of Python between two steps costs ten times what it seems to: the weights have evicted Python and torch from
    the processor's caches. So outputs stay in place, no tensor is made, and little is checked.

    Attributes:
        logits_BV: of the last step, overwritten by the next.
    """

    def __init__(self, model: Llama4Model, description: Description, cache: SequenceCache) -> None:
        assert description.decoder is not None
        config, dtype, rows = model.config.text, model.dtype, cache.batch_size
        view = CacheView.of_step(cache)
        batch, windows = view.batch, set(cache.windows)
        self.count = min(MAX_STEPS, view.steps_left)
        ahead_S1 = torch.arange(self.count)[:, None]
        factors = PositionFactors.of_batch(config, batch, dtype, self.count)
        lengths_SB = {window: batch.key_lengths(window) + ahead_S1 for window in windows}
        tables = view.reserve_step()

        self.description = description
        self.step, self.version, self.hooks = 0, cache.version, RemovableHandle.next_id
        self.vocab_size = config.vocab_size
        self.logits_BV = torch.empty(rows, config.vocab_size, dtype=dtype)
        self._ids, self._greedy = ((ctypes.c_int64 * rows)() for _ in range(2))
        self._logprobs = (ctypes.c_float * rows)()
        self._layers = layer_steps(model, cache, tables, factors, lengths_SB)
        self._alive = factors, lengths_SB, tables, description.weights()
        self._decode = loader.function("decode", dtype)
        self._model = threads.count(), description.decoder, self._layers
        self._tokens = Tokens(
            ids=ctypes.addressof(self._ids),
            B=rows,
            num_outputs=rows,
            logits=self.logits_BV.data_ptr(),
            greedy=ctypes.addressof(self._greedy),
            logprobs=ctypes.addressof(self._logprobs),
        )

    def is_current(self, cache: SequenceCache) -> bool:
        """Whether the cache is as the last step left it, a step is left, and no hook was added anywhere."""
        return (
            self.version == cache.version
            and self.step < self.count
            and self.hooks == RemovableHandle.next_id
            and not self.description.is_outdated
        )

    def run(self, ids: list[int], cache: SequenceCache) -> None:
        """One more token in every row."""
        if len(ids) != len(self._ids):
            check_rows(len(ids), cache)
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            check_ids(min(ids), max(ids), self.vocab_size)
        self._ids[:] = list(ids)
        if (problem := self._decode(*self._model, self.step, self._tokens)) is not None:
            check(problem)
        self.step += 1
        self.version = cache.commit_step()

    def greedy_token(self) -> tuple[list[int], list[float]]:
        """The index of each row's largest logit, the lowest on ties, and its log_softmax in float32."""
        return self._greedy[:], self._logprobs[:]


@contextmanager
def only_our_threads(fused: FusedCpuRunner, cache: SequenceCache) -> Iterator[None]:
    """Around a forward: where every product and attention is that of a kernel, what hooks and adapters add apart, torch
    computes with one thread."""
    if fused.undescribed_reason(cache) not in (None, EXPERTS_IN_FILES):
        yield
        return
    with threads.torch_by_one_thread():
        yield


class FusedCpuRunner:
    """Steps by compiled code."""

    name, device = "fused CPU", "cpu"

    def __init__(self, model: Llama4Model) -> None:
        self.model = model
        self._description: Description | None = None

    def is_worthwhile(self) -> bool:
        """Whether the model is on a CPU, there are kernels, and it is so wide that another way is a loss to be told."""
        width = len(self.model.language_model.model.norm.weight)
        return width >= 4 * cpu_kernels.MIN_WIDTH and self._absent_reason() is None

    def _absent_reason(self) -> str | None:
        weight = self.model.language_model.model.norm.weight
        if not weight.is_cpu:
            return f"the model is on {weight.device}"
        return cpu_kernels.library_unsupported_reason()

    def unsupported_reason(self, cache: SequenceCache) -> str | None:
        if (reason := self.undescribed_reason(cache)) is not None:
            return reason
        assert self._description is not None
        if (hooked := self._description.hooked(self.model)) is not None:
            return f"{hooked} has a hook, or a forward of its own"
        return None

    def undescribed_reason(self, cache: SequenceCache) -> str | None:
        """Why the modules of the model do not compute what these steps do, whatever hangs on them."""
        model, head_dim = self.model, self.model.config.text.head_dim
        if (reason := self._absent_reason()) is not None:
            return reason
        if torch.compiler.is_compiling():
            return "torch.compile is tracing"
        if torch.is_autocast_enabled("cpu"):
            return "autocast chooses dtypes"
        if torch.is_grad_enabled():
            return "gradients are being recorded; decode inside torch.inference_mode()"
        if model.dtype not in (torch.float32, torch.bfloat16):
            return f"it computes in float32 and bfloat16, not in {model.dtype}"
        if not cache.is_consistent:
            return "a forward that was adding tokens to the cache broke off"
        if any(isinstance(window, SlidingWindow) and max(cache.lengths) >= window for window in set(cache.windows)):
            return "the window of attention slides"
        for layer in cache.layers:
            if layer.device.type != "cpu":
                return f"keys and values are on {layer.device}"
            if (unread := format_unsupported_reason(layer.format, model.dtype, head_dim)) is not None:
                return unread
        if self._description is None or not self._description.is_current(model):
            if self._description is not None:
                self._description.is_outdated = True
            self._description = Description.of(model)
        return self._description.unsupported_reason

    @property
    def description(self) -> Description:
        """Of the model, as `unsupported_reason` found it."""
        assert self._description is not None, "unsupported_reason comes first"
        return self._description

    def prompt_description(self, cache: SequenceCache) -> Description | None:
        """The description of the model, if prompts of a cache can be computed as steps are."""
        slides = any(isinstance(window, SlidingWindow) for window in cache.windows)
        return None if slides or self.unsupported_reason(cache) is not None else self.description

    def open(self, cache: SequenceCache) -> FusedSession:
        return FusedSession(self.model, self.description, cache)
