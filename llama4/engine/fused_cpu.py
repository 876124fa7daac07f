"""A step of decoding on a CPU: one call of compiled code.

Between two products of a single token stand dozens of small operations, each of which costs torch and Python
microseconds, more when the weights that were just read have pushed them out of the processor's caches: a third of a
step, and half of one with four-bit weights. `decode` in `kernels/cpp/decode.cpp` does what `Llama4Model.forward` says,
in the same order and precision; the tests hold the two together. Whatever it does not know, a hook, a module that was
put in the place of another, a gradient, goes the ordinary way.

What does not change from step to step is found out once: a `Plan` says where a model's weights are, `Steps` what else
some steps to come need.

A model here is a `Llama4Model`, which this module comes before. Shapes: B rows, V vocabulary, S steps.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llama4.cache.sequence import Cache
from llama4.config import CACHE_BLOCK
from llama4.kernels import build
from llama4.kernels.abi import MAX_GEMV_ROWS, MAX_HEAD_DIM, Decoder, Layer, LayerStep, Matrix, Tokens
from llama4.model.attention import Attention
from llama4.model.batch import make_batch
from llama4.model.experts import LoopExperts
from llama4.model.feed_forward import FeedForward
from llama4.model.moe import MixtureOfExperts, Router
from llama4.model.norm import RMSNorm
from llama4.model.positions import PositionFactors
from llama4.ops import cpu_kernels
from llama4.ops.attention import format_unsupported_reason
from llama4.ops.linear import Linear, in_out_matrix, out_in_matrix
from llama4.quantization.fp8 import Fp8Weight
from llama4.quantization.int4 import Int4Weight
from llama4.quantization.int8 import Int8Weight
from llama4.quantization.modules import PackedExperts
from llama4.quantization.weight import PackedWeight

MOST_STEPS = 64
"""That are prepared at once."""

_PACKED = {Int8Weight, Fp8Weight, Int4Weight}
_KNOWN = {*_PACKED, Attention, FeedForward, Linear, LoopExperts, MixtureOfExperts, PackedExperts, RMSNorm, Router}


class _UnknownError(Exception):
    """Something in the model that the compiled step does not know."""


@dataclass(frozen=True)
class Plan:
    """A model as the compiled step takes it, None if that does not know it, and all that this was read from, to see
    when it no longer holds. It knows what is in the model but not the model, which it must not keep alive."""

    decoder: Decoder | None
    layers: ctypes.Array[Layer] | None
    modules: list[nn.Module]
    children: list[tuple[nn.Module, str, nn.Module]]
    parameters: list[tuple[nn.Module, str, int]]

    def holds(self, model: Any) -> bool:
        """Whether every module is still in its place, and every parameter where it was."""
        return (
            model.language_model is self.modules[0]
            and all(parent._modules.get(name) is child for parent, name, child in self.children)
            and all(
                (parameter := module._parameters.get(name)) is not None and parameter.data_ptr() == pointer
                for module, name, pointer in self.parameters
            )
        )

    def is_hooked(self, model: Any) -> bool:
        return any(module._forward_hooks or module._forward_pre_hooks for module in (model, *self.modules))


_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


class Steps:
    """Some steps to come of the rows of a cache, as many as need no more room there than there is.

    They are of use while nobody else adds to the cache or takes from it. Weights stay where they are while this exists,
    whatever is put in their places.

    What stands between two steps costs ten times what it seems to: the weights have pushed Python and torch out of the
    processor's caches. So results stay where they are, not a tensor is made, and little is asked: whoever else changes
    a cache gives it another `nexts`.

    Attributes:
        logits_BV: what comes after the tokens of the last step, until the next one.
    """

    def __init__(self, model: Any, plan: Plan, cache: Cache) -> None:
        assert plan.decoder is not None
        config, dtype = model.config.text, model.dtype
        batch = make_batch(cache.batch_size, 1, model.device, firsts=cache.firsts, nexts=cache.nexts)
        firsts = {window: batch.step(window) for window in set(cache.windows)}
        rooms = [CACHE_BLOCK - slot % CACHE_BLOCK for first in firsts.values() for slot in first.slots]
        rooms += [window - start % window for window in firsts if window for start in batch.starts]
        count = min(MOST_STEPS, *rooms)
        ahead_S1 = torch.arange(count)[:, None]
        factors = PositionFactors(config, (batch.positions_N + ahead_S1).flatten(), dtype)
        lengths_SB = {window: first.lengths_B + ahead_S1 for window, first in firsts.items()}
        for held, window in zip(cache.layers, cache.windows, strict=True):
            held.make_room(firsts[window])
        cache.firsts = tuple(batch.firsts)

        self.plan = plan
        self.hooks = RemovableHandle.next_id
        self.nexts = cache.nexts = tuple(batch.starts)
        self.step, self.count, self.vocabulary = 0, count, config.vocab_size
        self.logits_BV = torch.empty(cache.batch_size, config.vocab_size, dtype=dtype)
        self._given, self._greedy_token = ((ctypes.c_int64 * cache.batch_size)() for _ in range(2))
        self._logprobs = (ctypes.c_float * cache.batch_size)()
        weights = [module._parameters[name] for module, name, _ in plan.parameters]
        tables = [held.table() for held in cache.layers]
        self._kept = factors, lengths_SB, tables, [weight.detach() for weight in weights if weight is not None]
        self._held = (LayerStep * len(tables))()
        self._decode = build.function("decode", dtype)
        self._model = plan.decoder, self._held
        self._tokens = Tokens(
            ids=ctypes.addressof(self._given),
            B=cache.batch_size,
            num_outputs=cache.batch_size,
            logits=self.logits_BV.data_ptr(),
            greedy=ctypes.addressof(self._greedy_token),
            logprobs=ctypes.addressof(self._logprobs),
        )
        for i, (layer, table) in enumerate(zip(model.language_model.model.layers, tables, strict=True)):
            attention, window = layer.self_attn, cache.windows[i]
            self._held[i] = LayerStep(
                rotations=factors.rotations[window].data_ptr() if attention.uses_rope else 0,
                temperatures=factors.temperature_N.data_ptr() if attention.uses_temperature else 0,
                lengths=lengths_SB[window].data_ptr(),
                table=table.data_ptr(),
                width=table.shape[1],
                format=cache.layers[i].format.number,
            )

    def are_next(self, cache: Cache) -> bool:
        """Whether the cache is as the last step left it, and has room for one more."""
        return self.nexts is cache.nexts and self.step < self.count and cache.is_consistent

    def take(self, ids: list[int], cache: Cache) -> bool:
        """One more token in every row, if the ids are such."""
        if len(ids) != len(self.nexts) or min(ids) < 0 or max(ids) >= self.vocabulary:
            return False
        self._given[:] = list(ids)
        self._decode(*self._model, self.step, self._tokens)
        self.step += 1
        self.nexts = cache.nexts = tuple([position + 1 for position in self.nexts])
        return True

    def greedy_token(self) -> tuple[list[int], list[float]]:
        """The index of each row's largest logit, of equals the lowest, and its log_softmax in float32."""
        return self._greedy_token[:], self._logprobs[:]


def again(model: Any, ids: list[int], cache: Cache) -> Steps | None:
    """One more token in every row, if that is as it was the last time and no weight nor module was exchanged since; to
    see whether takes 0.3 ms."""
    steps: Steps | None = cache.steps
    if steps is None or not steps.are_next(cache):
        return None
    is_as_before = steps.hooks == RemovableHandle.next_id and steps.plan is _plans.get(model)
    return steps if is_as_before and steps.take(ids, cache) else None


def step(model: Any, ids: list[int], cache: Cache) -> Steps | None:
    """One more token in every row; None if that has to go the ordinary way."""
    cache.steps = steps = _next(model, cache)
    return steps if steps is not None and steps.take(ids, cache) else None


def _next(model: Any, cache: Cache) -> Steps | None:
    """Those that the cache has, if all is as it was, or new ones; None if there is what compiled code does not know."""
    norm = model.language_model.model.norm
    dtype, head_dim = norm.weight.dtype, model.config.text.head_dim
    if torch.is_grad_enabled() or cache.batch_size > MAX_GEMV_ROWS or not cache.is_consistent:
        return None
    if cpu_kernels.elementwise_unsupported_reason(norm.weight.shape[0], norm.weight):
        return None
    for held in cache.layers:
        if held.device.type != "cpu" or format_unsupported_reason(held.format, dtype, head_dim):
            return None
    plan = _plans.get(model)
    if plan is None or not plan.holds(model):
        plan = _plans[model] = _make(model)
    if plan.decoder is None or plan.is_hooked(model):
        return None
    steps: Steps | None = cache.steps
    if steps is None or steps.plan is not plan or not steps.are_next(cache):
        return Steps(model, plan, cache)
    steps.hooks = RemovableHandle.next_id
    return steps


def _make(model: Any) -> Plan:
    modules = list(model.language_model.modules())
    places = [(parent, name, child) for parent in modules for name, child in parent._modules.items()]
    pointers = [
        (module, name, parameter.data_ptr())
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    children = [(parent, name, child) for parent, name, child in places if child is not None]
    try:
        return Plan(*_describe(model.language_model), modules, children, pointers)
    except _UnknownError:
        return Plan(None, None, modules, children, pointers)


def _describe(language_model: Any) -> tuple[Decoder, ctypes.Array[Layer]]:
    inner, head = language_model.model, language_model.lm_head
    embedding, norm, dtype = inner.embed_tokens, inner.norm, inner.norm.weight.dtype
    children = [child for layer in inner.layers for child in layer.children()]
    _check(all(type(module) in _KNOWN for child in children for module in child.modules()))
    _check(type(embedding) is nn.Embedding and embedding.max_norm is None and type(norm) is RMSNorm)
    _check(embedding.weight.dtype == dtype and embedding.weight.is_contiguous())
    layers = (Layer * len(inner.layers))(*(_layer(layer, dtype) for layer in inner.layers))
    decoder = Decoder(
        layers=ctypes.addressof(layers),
        num_layers=len(layers),
        embedding=embedding.weight.data_ptr(),
        norm=norm.weight.data_ptr(),
        head=_matrix(head, dtype, is_head=True),
        eps=norm.eps,
    )
    return decoder, layers


def _layer(layer: Any, dtype: torch.dtype) -> Layer:
    attention, forward = layer.self_attn, layer.feed_forward
    norms = layer.input_layernorm, layer.post_attention_layernorm
    _check(norms[0].eps == norms[1].eps and all(norm.weight.dtype == dtype for norm in norms))
    C = attention.head_dim
    _check(C % 16 == 0 and C <= MAX_HEAD_DIM)
    described = Layer(
        **{part: _matrix(getattr(attention, f"{part}_proj"), dtype) for part in "qkvo"},
        input_norm=norms[0].weight.data_ptr(),
        post_norm=norms[1].weight.data_ptr(),
        C=C,
        eps=norms[0].eps,
        qk_eps=-1.0 if attention.qk_norm_eps is None else attention.qk_norm_eps,
    )
    described.H, described.K = described.q.O // C, described.k.O // C
    dense = forward
    if isinstance(forward, MixtureOfExperts):
        router = forward.router
        _check(router.weight.dtype == dtype and router.weight.is_contiguous())
        described.router, described.E, described.experts_per_token = (
            router.weight.data_ptr(),
            forward.dispatcher.num_experts,
            router.k,
        )
        described.gate_up, described.down = _experts(forward.experts, dtype)
        dense = forward.shared_expert
    described.gate, described.up = _matrix(dense.gate_proj, dtype), _matrix(dense.up_proj, dtype)
    described.shared_down = _matrix(dense.down_proj, dtype)
    return described


def _experts(experts: Any, dtype: torch.dtype) -> Iterator[Matrix]:
    for part in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, part)
        if isinstance(weight, PackedWeight):
            yield _matrix(weight, dtype)
        else:
            _check(type(experts) is LoopExperts)
            yield _known(in_out_matrix(weight, dtype))


def _matrix(module: nn.Module, dtype: torch.dtype, *, is_head: bool = False) -> Matrix:
    if type(module) is Linear:
        _check(module.bias is None)
        matrix = _known(out_in_matrix(module.weight, dtype))
    else:
        _check(type(module) in _PACKED)
        assert isinstance(module, PackedWeight)
        matrix = _known(module.matrix())
    _check(is_head or matrix.O % 16 == 0)
    return matrix


def _known(matrix: Matrix | None) -> Matrix:
    _check(matrix is not None)
    assert matrix is not None
    return matrix


def _check(known: bool) -> None:
    if not known:
        raise _UnknownError
