"""A model described for the compiled step: where its weights are, and what keeps it from being described.

The description holds addresses. It says when they are no longer those of the model.

Shapes: D hidden size, C head_dim, O outputs, I inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from llama4.engine.snapshot import Snapshot, UnsupportedError, check_frame, require
from llama4.kernels.abi import LANES, MAX_HEAD_DIM, Decoder, Layer, Matrix
from llama4.model.attention import Attention
from llama4.model.decoder import DecoderLayer, LanguageModel
from llama4.model.experts import LoopExperts
from llama4.model.feed_forward import FeedForward
from llama4.model.moe import MixtureOfExperts, Router
from llama4.model.multimodal import Llama4Model
from llama4.model.norm import RMSNorm
from llama4.ops.linear import Linear, in_out_matrix, in_out_unsupported_reason, matrix_unsupported_reason, out_in_matrix
from llama4.quantization.modules import (
    MappedEmbedding,
    MappedExperts,
    QuantizedEmbedding,
    QuantizedExperts,
    SplitExperts,
)
from llama4.quantization.weight import QuantizedWeight

_MODULES = {
    *(Attention, DecoderLayer, FeedForward, Linear, LoopExperts, MixtureOfExperts, RMSNorm, Router),
    *(MappedExperts, QuantizedEmbedding, QuantizedExperts, QuantizedWeight, SplitExperts),
}
"""Modules whose forward the compiled step computes; a subclass may compute something else. Those that stay in files are
computed by kernels, too, but not in one call."""
_EMBEDDINGS = nn.Embedding, MappedEmbedding, QuantizedEmbedding
EXPERTS_IN_FILES = "its routed experts stay in files"
"""The reason where it is the only one."""


@dataclass(kw_only=True)
class Description(Snapshot):
    """A model as the compiled step reads it, and what this was read from. It does not keep the model alive.

    Attributes:
        decoder: the description; None if the step cannot compute this model.
        unsupported_reason: why.
        is_outdated: whether another description has taken its place.
    """

    decoder: Decoder | None
    unsupported_reason: str | None
    is_outdated: bool = False
    _layers: ctypes.Array[Layer] | None = field(repr=False, default=None)

    @classmethod
    def of(cls, model: Llama4Model) -> Description:
        snapshot = Snapshot.taken(model)
        try:
            check_frame(model, _EMBEDDINGS)
            decoder, layers = _describe(model.language_model)
            is_mapped = any(isinstance(module, MappedExperts) for module in snapshot.modules.values())
            require(not is_mapped, EXPERTS_IN_FILES)
            decoder.is_batch_invariant = model.is_batch_invariant
        except UnsupportedError as error:
            return cls(decoder=None, unsupported_reason=str(error), **vars(snapshot))
        return cls(decoder=decoder, unsupported_reason=None, _layers=layers, **vars(snapshot))


def _describe(language_model: LanguageModel) -> tuple[Decoder, ctypes.Array[Layer]]:
    inner, head = language_model.model, language_model.lm_head
    embedding, norm, dtype = inner.embed_tokens, inner.norm, inner.norm.weight.dtype
    for name, module in inner.layers.named_modules():
        if isinstance(module, QuantizedWeight) and not module.format.has_cpu_kernels:
            raise UnsupportedError(f"layers.{name} is {module.format.kind} weights, which it does not compute")
        if name and type(module) not in _MODULES:
            raise UnsupportedError(f"layers.{name} is {type(module).__name__}, which it does not compute")
    config, layers = inner.config, inner.layers
    require(len(layers) == config.num_hidden_layers, f"it has {len(layers)} layers, not {config.num_hidden_layers}")
    decoder = Decoder(
        num_layers=len(layers),
        embedding=_embedding(embedding, dtype),
        head=_matrix("lm_head", head, dtype, is_head=True),
        eps=norm.eps,
    )
    D, outputs = decoder.head.I, decoder.head.O
    require(outputs == config.vocab_size, f"lm_head has {outputs} outputs for {config.vocab_size} tokens")
    require(outputs <= decoder.embedding.O, f"lm_head has {outputs} outputs for {decoder.embedding.O} embeddings")
    decoder.norm = _norm("the last norm", norm, D, dtype)
    described = (Layer * len(layers))(*(_layer(f"layers.{i}", x, D, dtype) for i, x in enumerate(layers)))
    decoder.layers = ctypes.addressof(described)
    return decoder, described


def _norm(name: str, norm: nn.Module, D: int, dtype: torch.dtype) -> int:
    """The address of its weight."""
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    require(weight.dtype == dtype, f"{name} is not {dtype}")
    require(weight.shape == (D,) and weight.is_contiguous(), f"{name} is not {D} numbers one behind the other")
    return weight.data_ptr()


def _layer(name: str, layer: nn.Module, D: int, dtype: torch.dtype) -> Layer:
    assert isinstance(layer, DecoderLayer)
    attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
    require(norms[0].eps == norms[1].eps, f"the norms of {name} have different eps")
    C = attention.head_dim
    require(C % LANES == 0 and C <= MAX_HEAD_DIM, f"head_dim {C} is no multiple of {LANES}, or above {MAX_HEAD_DIM}")
    described = Layer(
        **{
            part: _matrix(f"{name}.self_attn.{part}_proj", getattr(attention, f"{part}_proj"), dtype) for part in "qkvo"
        },
        input_norm=_norm(f"{name}.input_layernorm", norms[0], D, dtype),
        post_norm=_norm(f"{name}.post_attention_layernorm", norms[1], D, dtype),
        C=C,
        eps=norms[0].eps,
        qk_eps=-1.0 if attention.qk_norm_eps is None else attention.qk_norm_eps,
    )
    described.H, described.K = described.q.O // C, described.k.O // C
    dense, path = layer.feed_forward, f"{name}.feed_forward"
    if isinstance(dense, MixtureOfExperts):
        router, E = dense.router, dense.dispatcher.num_experts
        require(router.weight.shape == (E, D), f"{path}.router is not of {E} experts and {D} inputs")
        require(router.weight.dtype == dtype and router.weight.is_contiguous(), f"{path}.router is not {dtype}")
        described.router, described.E = router.weight.data_ptr(), E
        described.experts_per_token = router.k
        for part, matrix in _experts(f"{path}.experts", dense.experts, E, dtype):
            setattr(described, part, matrix)
        dense, path = dense.shared_expert, f"{path}.shared_expert"
    parts = {part: _matrix(f"{path}.{part}_proj", getattr(dense, f"{part}_proj"), dtype) for part in ("gate", "up")}
    described.gate, described.up = parts["gate"], parts["up"]
    described.shared_down = _matrix(f"{path}.down_proj", dense.down_proj, dtype)
    return described


def _experts(name: str, experts: nn.Module, E: int, dtype: torch.dtype) -> Iterator[tuple[str, Matrix]]:
    """The matrices of a layer's experts, by their fields of `Layer`."""
    if type(experts) is MappedExperts:
        return
    fields = {"gate_up": "gate_up_proj", "down": "down_proj"}
    if isinstance(experts, SplitExperts):
        fields = {"gate_up": "gate_proj", "expert_up": "up_proj", "down": "down_proj"}
    for field_, part in fields.items():
        weight = getattr(experts, part)
        require(weight.shape[0] == E, f"{name}.{part} is of {weight.shape[0]} experts, not {E}")
        if isinstance(weight, QuantizedWeight):
            yield field_, _matrix(f"{name}.{part}", weight, dtype)
        else:
            reason = in_out_unsupported_reason(weight, dtype)
            yield field_, _known(f"{name}.{part}", in_out_matrix(weight, dtype), reason)


def _embedding(embedding: nn.Module, dtype: torch.dtype) -> Matrix:
    if type(embedding) is QuantizedEmbedding:
        return _matrix("embed_tokens", embedding, dtype, is_head=True)
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    require(weight.dtype == dtype, f"embeddings are {weight.dtype} in a model of {dtype}")
    return _known("embed_tokens", out_in_matrix(weight, dtype), matrix_unsupported_reason(weight, dtype))


def _matrix(name: str, module: nn.Module, dtype: torch.dtype, *, is_head: bool = False) -> Matrix:
    require(getattr(module, "bias", None) is None, f"{name} has a bias")
    if type(module) is Linear:
        weight = module.weight
        matrix = _known(name, out_in_matrix(weight, dtype), matrix_unsupported_reason(weight, dtype))
    else:
        require(type(module) in _MODULES, f"{name} is {type(module).__name__}")
        assert isinstance(module, QuantizedWeight)
        require(module.order is None, f"{name} has its inputs in an order of their own")
        if module.keeps_checkpoint_layout and module.format.has_kernel_layout(module.shape):
            matrix = Matrix(O=module.shape[-2], I=module.shape[-1])  # in a file until its first use, as experts are
        else:
            matrix = _known(name, module.matrix(), f"it does not read {module.format.kind} weights of this shape")
    require(is_head or matrix.O % LANES == 0, f"{name} has {matrix.O} outputs, no multiple of {LANES}")
    return matrix


def _known(name: str, matrix: Matrix | None, reason: str | None) -> Matrix:
    if matrix is None:
        raise UnsupportedError(f"{name}: {reason}")
    return matrix
