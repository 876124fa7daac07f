"""A step of decoding on a CPU: each layer is one call of compiled code.

Between two products of a single token stand dozens of small operations, each of which costs torch and Python
microseconds, more when the weights that were just read have pushed them out of the processor's caches: a third of a
step, and half of one with four-bit weights. `decode` in `kernels/cpp/decode.cpp` does what `DecoderLayer.forward` says,
in the same order and precision; the tests hold the two together. Whatever it does not know, a hook, a module that was
put in the place of another, a gradient, goes the ordinary way.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama4.attention import Attention, Turns
from llama4.cache import Cache
from llama4.experts import LoopExperts
from llama4.kernels import cpu
from llama4.kernels.dense import Linear
from llama4.layers import FeedForward, RMSNorm
from llama4.moe import MixtureOfExperts, Router
from llama4.packing import Packing
from llama4.quantization.fp8 import Fp8Weight
from llama4.quantization.int4 import Int4Weight
from llama4.quantization.int8 import Int8Weight
from llama4.quantization.modules import PackedExperts
from llama4.quantization.packed import PackedWeight

OUT_IN, IN_OUT, INT8, FP8, INT4 = range(5)
_KINDS: dict[type[nn.Module], tuple[int, str]] = {
    Int8Weight: (INT8, "int8"),
    Fp8Weight: (FP8, "fp8"),
    Int4Weight: (INT4, "int4"),
}
_KNOWN = {*_KINDS, Attention, FeedForward, Linear, LoopExperts, MixtureOfExperts, PackedExperts, RMSNorm, Router}


class Matrix(ctypes.Structure):
    """As in decode.cpp."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("w", "scales", "wide", "kind", "group", "I", "O", "step", "scale_step")
    ]


class Layer(ctypes.Structure):
    """As in decode.cpp."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate_up", "down", "gate", "up", "shared_down")),
        *((name, ctypes.c_int64) for name in ("input_norm", "post_norm", "router", "D", "H", "K", "C", "E", "chosen")),
        *((name, ctypes.c_double) for name in ("eps", "qk_eps")),
    ]


class _UnknownError(Exception):
    """Something in the model that the compiled step does not know."""


@dataclass(frozen=True)
class Plan:
    """The layers of a decoder as the compiled step takes them, none if it does not know them, and all that this was
    read from, to see when it no longer holds. It knows the layers but not their list, which it must not keep alive."""

    layers: list[Layer]
    dtype: torch.dtype
    modules: list[nn.Module]
    children: list[tuple[nn.Module, str, nn.Module]]
    parameters: list[tuple[nn.Module, str, int]]

    def holds(self, layers: nn.ModuleList) -> bool:
        """Whether every module is still in its place, and every parameter where it was."""
        return (
            [*layers] == self.modules
            and all(parent._modules.get(name) is child for parent, name, child in self.children)
            and all(
                (parameter := module._parameters.get(name)) is not None and parameter.data_ptr() == pointer
                for module, name, pointer in self.parameters
            )
        )

    def is_hooked(self) -> bool:
        inner = (child for _, _, child in self.children)
        return any(module._forward_hooks or module._forward_pre_hooks for module in (*self.modules, *inner))


_plans: weakref.WeakKeyDictionary[nn.ModuleList, Plan] = weakref.WeakKeyDictionary()


def plan(layers: nn.ModuleList, x_ND: Tensor, packing: Packing, cache: Cache | None) -> Plan | None:
    """The plan for the next step through these layers; None if it has to go the ordinary way."""
    if cache is None or not packing.is_step or not x_ND.is_cpu or x_ND.shape[0] > cpu.FEW:
        return None
    if torch.is_grad_enabled() or not cpu.usable(x_ND.shape[1], x_ND):
        return None
    found = _plans.get(layers)
    if found is None or not found.holds(layers):
        found = _plans[layers] = _make(layers)
    first: Any = layers[0]
    dtype, head_dim = first.input_layernorm.weight.dtype, first.self_attn.head_dim
    is_readable = all(cpu.reads(layer.format, dtype, head_dim) for layer in cache.layers)
    return found if found.layers and is_readable and not found.is_hooked() else None


def run(plan: Plan, layers: nn.ModuleList, x_ND: Tensor, packing: Packing, turns: Turns, cache: Cache) -> Tensor:
    """One new token of every row through all layers; x [N, D] float32, changed in place."""
    decode = cpu.function("decode", plan.dtype, 9)
    x_ND = x_ND.contiguous()
    temperature = turns.temperature.data_ptr()
    for layer, described, held in zip(layers, plan.layers, cache.layers, strict=True):
        attention: Any = layer.self_attn
        step = packing.step(attention.window)
        held.make_room(step)
        table = held.table()
        decode(
            ctypes.addressof(described),
            x_ND.data_ptr(),
            x_ND.shape[0],
            turns.rotations[attention.window].data_ptr() if attention.uses_rope else 0,
            temperature if attention.uses_temperature else 0,
            step.lengths_B.data_ptr(),
            table.data_ptr(),
            table.shape[1],
            held.format.number,
        )
    return x_ND


def _make(layers: nn.ModuleList) -> Plan:
    inner = [module for layer in layers for module in layer.modules()]
    children = [(parent, name, child) for parent in inner for name, child in parent._modules.items() if child]
    pointers = [
        (module, name, parameter.data_ptr())
        for module in inner
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        _check(all(type(child) in _KNOWN for _, _, child in children))
        described = [_describe(layer) for layer in layers]
    except _UnknownError:
        described = []
    first: Any = layers[0]
    return Plan(described, first.input_layernorm.weight.dtype, [*layers], children, pointers)


def _describe(layer: Any) -> Layer:
    attention, forward = layer.self_attn, layer.feed_forward
    dtype = layer.input_layernorm.weight.dtype
    D, C = layer.input_layernorm.weight.shape[0], attention.head_dim
    described = Layer(
        **{part: _matrix(getattr(attention, f"{part}_proj"), dtype) for part in "qkvo"},
        input_norm=layer.input_layernorm.weight.data_ptr(),
        post_norm=layer.post_attention_layernorm.weight.data_ptr(),
        D=D,
        C=C,
        chosen=1,
        eps=layer.input_layernorm.eps,
        qk_eps=-1.0 if attention.qk_norm_eps is None else attention.qk_norm_eps,
    )
    described.H, described.K = described.q.O // C, described.k.O // C
    dense = forward
    if isinstance(forward, MixtureOfExperts):
        router = forward.router
        _check(router.weight.dtype == dtype and router.weight.is_contiguous())
        described.router, described.E, described.chosen = router.weight.data_ptr(), forward.num_experts, router.k
        described.gate_up, described.down = _experts(forward.experts, dtype)
        dense = forward.shared_expert
    described.gate, described.up = _matrix(dense.gate_proj, dtype), _matrix(dense.up_proj, dtype)
    described.shared_down = _matrix(dense.down_proj, dtype)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    _check(norms[0].eps == norms[1].eps and norms[1].weight.dtype == dtype)
    _check(C % 16 == 0 and C <= cpu.MOST_HEAD_DIM and D % cpu.multiple_of(dtype) == 0)
    return described


def _experts(experts: Any, dtype: torch.dtype) -> Iterator[Matrix]:
    for part in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, part)
        if isinstance(weight, PackedWeight):
            yield _matrix(weight, dtype)
            continue
        _check(type(experts) is LoopExperts and weight.dtype == dtype and weight.is_contiguous())
        _check(weight.shape[2] % cpu.multiple_of(dtype) == 0 and weight.shape[1] % 16 == 0)
        step = weight.stride(0) * weight.element_size()
        yield Matrix(w=weight.data_ptr(), kind=IN_OUT, I=weight.shape[1], O=weight.shape[2], step=step)


def _matrix(module: nn.Module, dtype: torch.dtype) -> Matrix:
    if type(module) is Linear:
        weight = module.weight
        _check(module.bias is None and weight.dtype == dtype and weight.is_contiguous())
        _check(weight.shape[1] % cpu.multiple_of(dtype) == 0 and weight.shape[0] % 16 == 0)
        return Matrix(w=weight.data_ptr(), kind=OUT_IN, I=weight.shape[1], O=weight.shape[0])
    _check(type(module) in _KINDS)
    assert isinstance(module, PackedWeight)
    kind, name = _KINDS[type(module)]
    codes, scale, group_size = getattr(module, module.parts[0]), module.weight_scale, module.format.group_size or 0
    outputs, inputs = module.shape[-2:]
    _check(codes.is_contiguous() and scale.is_contiguous() and scale.dtype in (torch.bfloat16, torch.float32))
    _check(inputs % cpu.multiple_of(name) == 0 and outputs % 16 == 0)
    _check(group_size in (32, 64) or group_size % 128 == 0 if kind == INT4 else not group_size)
    return Matrix(
        w=codes.data_ptr(),
        scales=scale.data_ptr(),
        wide=scale.dtype == torch.float32,
        kind=kind,
        group=group_size,
        I=inputs,
        O=outputs,
        step=codes.stride(0) * codes.element_size() if codes.ndim == 3 else 0,
        scale_step=scale.stride(0) * scale.element_size() if scale.ndim == 3 else 0,
    )


def _check(known: bool) -> None:
    if not known:
        raise _UnknownError
