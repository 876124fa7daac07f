"""What Python and the compiled kernels must agree on: constants, structures, signatures.

The library exports what its own C++ says of each (`kernels/cpp/api.cpp`). `bind` compares all of it with what stands
here, and refuses a library that differs. Only the quantized formats of weights and the formats of caches do not stand
here: `bind` reads them from the library, by name.

Shapes: N rows or tokens, I inputs, O outputs, B sequences.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_char_p, c_double, c_float, c_int64, c_long, c_void_p
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from llama4.config import CACHE_BLOCK

MAX_GEMV_ROWS = 12
"""Most rows of a product that takes as long as reading its matrix does: with more it computes for longer."""
MAX_HEAD_DIM = 1024
LANES = 16
"""Numbers in a vector: whatever is no matrix has a last dimension that is a multiple of it."""
INTERLEAVE = 16
"""Outputs of an int4 matrix that are stored interleaved."""
STRIP = 32
"""Outputs that a product of more rows than MAX_GEMV_ROWS computes at a time."""
INPUTS = {"float32": 16, "bfloat16": 32}
"""By dtype, what the inputs of a dense matrix must be a multiple of."""

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Dtypes of rows that have kernels."""


class MatrixLayout(IntEnum):
    """Of a dense matrix, [O, I] or [I, O]. A quantized one is [O, I], and has the number of its format."""

    OUT_IN = 0
    IN_OUT = 1


class Matrix(ctypes.Structure):
    """A matrix, or all of a layer's experts. It does not keep its tensors alive.

    Fields:
        w: address.
        scales: address, 0 without; `float32_scales` 1 for float32, 0 for bfloat16.
        layout: a `MatrixLayout`, or the number of a format of weights.
        group_size: inputs that share a scale, 0 for all.
        stride, scale_stride: bytes from one expert to the next.
    """

    _fields_ = [
        (name, c_int64)
        for name in ("w", "scales", "float32_scales", "layout", "group_size", "I", "O", "stride", "scale_stride")
    ]


class Layer(ctypes.Structure):
    """A decoder layer: H query heads and K key/value heads of dimension C.

    Fields:
        gate_up, expert_up, down: experts; the address of `expert_up` is 0 where `gate_up` holds both.
        gate, up, shared_down: the shared expert, or the MLP of a dense layer.
        input_norm, post_norm, router: addresses of weights; the router's is 0 in a dense layer.
        E, experts_per_token: 0 in a dense layer.
        qk_eps: negative without QK-norm.
    """

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate_up", "expert_up", "down", "gate", "up", "shared_down")),
        *((name, c_int64) for name in ("input_norm", "post_norm", "router", "H", "K", "C", "E", "experts_per_token")),
        *((name, c_double) for name in ("eps", "qk_eps")),
    ]


class Decoder(ctypes.Structure):
    """A model. `layers` is the address of an array of `Layer`, `norm` that of weights; `is_batch_invariant` is 1 if a
    row's logits shall be the same bits, whatever rows stand beside it."""

    _fields_ = [
        *((name, c_int64) for name in ("layers", "num_layers")),
        ("embedding", Matrix),
        ("norm", c_int64),
        ("head", Matrix),
        ("eps", c_double),
        ("is_batch_invariant", c_int64),
    ]


class LayerStep(ctypes.Structure):
    """What a layer needs for some steps of N tokens of B sequences.

    Fields:
        rotations: address of [steps, N, C / 2] complex64, 0 without RoPE.
        temperatures: address of [steps, N] float32, 0 without.
        lengths: address of [steps, N] int64: how many tokens of its sequence, or of its chunk in a chunked layer, each
            token sees, itself included.
        block_table: address of [B, width] int64: the addresses of the blocks of each sequence, or of its chunk.
        format: the number of a format of the cache.
    """

    _fields_ = [(name, c_int64) for name in ("rotations", "temperatures", "lengths", "block_table", "width", "format")]


class Tokens(ctypes.Structure):
    """The tokens of a step, and what is wanted of them.

    Those of a sequence are consecutive and see each other causally; in chunked layers all of them must be in the same
    chunk. Their keys and values are written to the cache, and read from there by all of them.

    Fields:
        ids: address of [N] int64.
        sequence_starts: address of [B + 1] int64: the tokens of sequence b are sequence_starts[b] to
            sequence_starts[b + 1] - 1; 0 where each
            sequence has one.
        features: address of [N] addresses of what stands in the place of a token's embedding, [D] in the dtype of the
            model, 0 where that itself is meant; 0 for none.
        outputs: address of [num_outputs] int64: tokens whose logits are wanted; 0 for the first `num_outputs`.
        logits: address of [num_outputs, V] in the dtype of the model.
        greedy: address of [num_outputs] int64: the index of each largest logit, the lowest on ties.
        logprobs: address of [num_outputs] float32: its log_softmax.
        hidden: address of [N, D] in the dtype of the model: what the head is given for each token; 0 if not wanted.
        residual, layer: address of [N, D] float32, where a call computes one layer alone: what that is given, and gives
            to the next one; the call for the first layer begins with the embeddings, that for the last ends with the
            head. 0 if the call is for all layers.
        is_prompt: 1 if there are so many tokens of each sequence that attention pays in tiles of queries; keys and
            values of these tokens are then used as they are, not as the cache holds them.
    """

    _fields_ = [
        (name, c_int64)
        for name in (
            *("ids", "sequence_starts", "features", "outputs", "B", "num_outputs"),
            *("logits", "greedy", "logprobs", "hidden", "residual", "layer", "is_prompt"),
        )
    ]


class Penalties(ctypes.Structure):
    """What is done to the logits of some tokens before one is drawn: see `Sampler`.

    Fields:
        seen, counts: addresses of [num_seen] int64: tokens of prompt and reply, each once, and how often the reply has
            it.
        biased, biases: addresses of [num_biased] int64 and float64: tokens, and what is added to their logits, last.
        repetition, presence, frequency: 1, 0 and 0 for none.
    """

    _fields_ = [
        *((name, c_int64) for name in ("seen", "counts", "biased", "biases", "num_seen", "num_biased")),
        *((name, c_double) for name in ("repetition", "presence", "frequency")),
    ]


class Draw(ctypes.Structure):
    """How to draw a token of a row, and what was drawn.

    Fields:
        row: of the logits.
        top_k: of how many of the most likely tokens, 0 for all.
        top_p, min_p: 1 and 0 for all.
        uniform: a random number, at least 0 and below 1.
        penalties: address of `Penalties`, 0 for none.
        id, logprob: of the token; its log_softmax, NaN if the logits are not numbers.
    """

    _fields_ = [
        *((name, c_int64) for name in ("row", "top_k")),
        *((name, c_double) for name in ("temperature", "top_p", "min_p", "uniform")),
        *((name, c_int64) for name in ("penalties", "id")),
        ("logprob", c_double),
    ]


SIGNATURES: dict[str, tuple[Any, ...]] = {
    # x, N, I, O, layout, weight, scales or None, whether these are float32, group size, y
    "linear": (c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p),
    # gate_up, down, rows of each expert, experts, x, y
    "experts": (POINTER(Matrix), POINTER(Matrix), c_void_p, c_int64, c_void_p, c_void_p),
    # weights, groups, group size, ranges, how many, packed, scales
    "quantize_int4": (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p),
    # x, N, D, weight, eps, y
    "rms_norm": (c_void_p, c_int64, c_int64, c_void_p, c_float, c_void_p),
    # x, stride of rows, N, heads, C, rotation or None, eps, negative without norm, factors or None, y
    "apply_rope": (c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_float, c_void_p, c_void_p),
    # gate, up, N, F, stride of rows, y
    "swiglu": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    # logits, N, V, ids, log-probabilities
    "greedy_token": (c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    # logits, N, V, draws, how many
    "draw_token": (c_void_p, c_int64, c_int64, POINTER(Draw), c_int64),
    # q, addresses of blocks, blocks per sequence, lengths, B, H, K, C, format, y
    "attend": (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_void_p),
    # q, k, v, N, addresses of blocks or None, how many, past, H, K, C, format, y
    "attend_causal": (c_void_p, c_void_p, c_void_p, *(c_int64, c_void_p), *(c_int64,) * 6, c_void_p),
    # model, what each layer needs, which of its steps, tokens
    "decode": (POINTER(Decoder), POINTER(LayerStep), c_int64, POINTER(Tokens)),
}
"""Arguments of each kernel, behind the number of threads; there is one for each of `DTYPES`. Tensors go by their
addresses. It returns None, or what is wrong with the arguments (kernels/cpp/check.h), in which case nothing was
computed."""


class Format(NamedTuple):
    """A format that the kernels read: its number there, and what the length of a row must be a multiple of."""

    number: int
    multiple: int


class Library(NamedTuple):
    """Kernels by name and dtype of their rows; and, by name, the quantized formats of weights and those of caches."""

    functions: Mapping[tuple[str, torch.dtype], Callable[..., bytes | None]]
    weight_formats: Mapping[str, Format]
    cache_formats: Mapping[str, Format]


class AbiError(RuntimeError):
    """The library and this file disagree."""


class KernelArgumentError(RuntimeError):
    """A kernel refused its arguments. Whoever calls kernels checks what users give, so this is a bug of the caller."""


def check(problem: bytes | None) -> None:
    """See that a kernel took its arguments.

    Raises:
        KernelArgumentError: it did not.
    """
    if problem is not None:
        raise KernelArgumentError(f"a CPU kernel refused its arguments: {problem.decode()}")


class _Function(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("dtype", c_char_p), ("arguments", c_char_p), ("address", c_void_p)]


class _Constant(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("value", c_int64)]


class _Format(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("number", c_int64), ("multiple", c_int64)]


def bind(library: ctypes.CDLL) -> Library:
    """What a library offers.

    Raises:
        AbiError: it does not agree with this file, with a list of what differs.
    """
    constants = {entry.name.decode(): entry.value for entry in _table(library.llama4_constants, _Constant)}
    functions = {
        (entry.name.decode(), entry.dtype.decode()): entry for entry in _table(library.llama4_functions, _Function)
    }
    arguments = {name: entry.arguments.decode() for name, entry in functions.items()}
    differences = [*_differences(expected_constants(), constants), *_differences(expected_arguments(), arguments)]
    if differences:
        raise AbiError(f"kernels/abi.py and kernels/cpp/api.cpp disagree: {'; '.join(differences)}")
    kernels = {
        (name, dtype): ctypes.CFUNCTYPE(c_char_p, c_int64, *types)(functions[name, DTYPES[dtype]].address)
        for name, types in SIGNATURES.items()
        for dtype in DTYPES
    }
    return Library(kernels, _formats(library.llama4_weight_formats), _formats(library.llama4_cache_formats))


def add_amx(library: ctypes.CDLL, amx: ctypes.CDLL) -> None:
    """From now on products of many rows go by AMX, which has a library of its own (kernels/cpp/amx.h).

    Raises:
        AbiError: they do not, since the system does not permit it, or since one product came out otherwise.
    """
    try:
        use_amx = library.llama4_use_amx
        use_amx.argtypes, use_amx.restype = (c_void_p,), c_char_p
        problem = use_amx(ctypes.cast(amx.llama4_amx, c_void_p))
    except AttributeError as error:
        raise AbiError(str(error)) from None
    if problem is not None:
        raise AbiError(problem.decode())


def expected_constants() -> dict[str, int]:
    """Sizes of structures, offsets of their fields, members of enums and other constants, by the names in api.cpp."""
    structures = {kind.__name__: kind for kind in (Matrix, Layer, Decoder, LayerStep, Tokens, Penalties, Draw)}
    return {
        **{name: ctypes.sizeof(kind) for name, kind in structures.items()},
        **{
            f"{name}.{field[0]}": getattr(kind, field[0]).offset
            for name, kind in structures.items()
            for field in kind._fields_
        },
        **{f"MatrixLayout.{member.name}": member.value for member in MatrixLayout},
        **{f"{format}_inputs": count for format, count in INPUTS.items()},
        "max_gemv_rows": MAX_GEMV_ROWS,
        "max_head_dim": MAX_HEAD_DIM,
        "lanes": LANES,
        "interleave": INTERLEAVE,
        "strip": STRIP,
        "block_slots": CACHE_BLOCK,
    }


def expected_arguments() -> dict[tuple[str, str], str]:
    """The types of the arguments of each kernel, a letter each, as api.cpp derives them."""
    letters = {c_int64: "q", c_float: "f"}
    return {
        (name, dtype): "".join(letters.get(type_, "p") for type_ in (c_int64, *types))
        for name, types in SIGNATURES.items()
        for dtype in DTYPES.values()
    }


def _table(function: Any, kind: type[Any]) -> list[Any]:
    """A table that the library exports."""
    function.argtypes, function.restype = (POINTER(c_long),), POINTER(kind)
    count = c_long()
    entries = function(ctypes.byref(count))
    return [entries[i] for i in range(count.value)]


def _formats(function: Any) -> dict[str, Format]:
    return {entry.name.decode(): Format(entry.number, entry.multiple) for entry in _table(function, _Format)}


def _differences(python: Mapping[Any, Any], compiled: Mapping[Any, Any]) -> list[str]:
    names = [*python, *(name for name in compiled if name not in python)]
    return [
        f"{name} is {python.get(name)} in Python and {compiled.get(name)} in C++"
        for name in names
        if python.get(name) != compiled.get(name)
    ]
