"""What Python and the compiled kernels agree on: constants, structures, signatures.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int64, c_void_p
from enum import IntEnum
from typing import Any

import torch

MAX_GEMV_ROWS = 12
"""Most rows of a product that takes as long as reading its matrix does: with more it computes for longer."""
MAX_HEAD_DIM = 1024
LANES = 16
"""Elements that are computed together: the last dimension of what is no matrix is a multiple of it."""
INTERLEAVE = 16
"""Outputs that matrices of four bits have side by side."""
STRIP = 32
"""Outputs that a product of many rows works on at a time."""
INPUTS = {"float32": 16, "bfloat16": 32, "int8": 64, "fp8": 64, "int4": 128}
"""Inputs that are read at a time, by format: rows of a matrix are multiples of it."""

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Those of rows; a kernel for each."""
SUFFIXES = {torch.float32: "f", torch.bfloat16: "b"}


class Layout(IntEnum):
    """Of a matrix: dense, [O, I] or [I, O], or of quantized values, [O, I]."""

    OUT_IN = 0
    IN_OUT = 1
    INT8 = 2
    FP8 = 3
    INT4 = 4


QUANTIZED = {"int8": Layout.INT8, "fp8": Layout.FP8, "int4": Layout.INT4}
"""Layouts of quantized weights, by the names of formats."""


class CacheFormat(IntEnum):
    """Of keys and values."""

    UNQUANTIZED = 0
    INT8 = 1
    FP8 = 2
    INT4 = 3


class Matrix(ctypes.Structure):
    """A matrix of any layout, or all of a layer's experts, `step` bytes apart, and their scales, `scale_step`. It does
    not keep its tensors alive."""

    _fields_ = [(name, c_int64) for name in ("w", "scales", "wide", "kind", "group", "I", "O", "step", "scale_step")]


class Layer(ctypes.Structure):
    """A decoder layer. The head dimension is C, the heads are H and K; `chosen` experts of E per token, none in a dense
    layer; qk_eps: negative without QK-norm."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate_up", "down", "gate", "up", "shared_down")),
        *((name, c_int64) for name in ("input_norm", "post_norm", "router", "H", "K", "C", "E", "chosen")),
        *((name, c_double) for name in ("eps", "qk_eps")),
    ]


class Decoder(ctypes.Structure):
    """A model of `count` layers."""

    _fields_ = [
        *((name, c_int64) for name in ("layers", "count", "embedding", "norm")),
        ("head", Matrix),
        ("eps", c_double),
    ]


class LayerStep(ctypes.Structure):
    """What a layer needs to know of the tokens of a step, and of where their keys and values are."""

    _fields_ = [(name, c_int64) for name in ("rotations", "temperatures", "lengths", "table", "width", "format")]


SIGNATURES: dict[str, tuple[Any, ...]] = {
    # x, N, I, O, layout, weight, scales or None, whether these are float32, group size, y
    "linear": (c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p),
    # gate_up, down, rows of each expert, experts, x, y
    "experts": (POINTER(Matrix), POINTER(Matrix), c_void_p, c_int64, c_void_p, c_void_p),
    # weights, groups, group size, ranges, how many, packed, scales
    "quantize_int4": (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p),
    # x, N, D, weight, eps, y
    "rms_norm": (c_void_p, c_int64, c_int64, c_void_p, c_float, c_void_p),
    # x, stride of rows, N, heads, head dim, rotation or None, eps, negative for no norm, factors or None, y
    "apply_rope": (
        *(c_void_p, c_int64, c_int64, c_int64, c_int64),
        *(c_void_p, c_float, c_void_p, c_void_p),
    ),
    # gate, up, N, F, stride of rows, y
    "swiglu": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    # logits, N, V, ids, log-probabilities
    "greedy_token": (c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    # q, addresses of blocks, blocks per row, lengths, B, H, K, C, format, y
    "attend": (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_void_p),
    # q, k, v, N, addresses of blocks or None, past, H, K, C, format, y
    "attend_causal": (
        *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
        *(c_int64, c_int64, c_int64, c_int64, c_void_p),
    ),
    # model, what each layer needs, step, ids, rows, logits, greedy tokens, their log-probabilities
    "decode": (POINTER(Decoder), POINTER(LayerStep), c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
}
"""Arguments of each kernel; there is one for each of `SUFFIXES`. Tensors go by their addresses."""


def declare(library: ctypes.CDLL) -> None:
    """Give every function its signature."""
    for name, arguments in SIGNATURES.items():
        for suffix in SUFFIXES.values():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
