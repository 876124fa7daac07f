"""The Triton kernels between matrix products, and what torch gives for the same in float64.

Shapes: N tokens, D hidden size, F expert width, H query heads, K key/value heads, C head_dim, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4.config import TextConfig
from llama4.kernels.triton import launch_elementwise, launch_routing
from llama4.ops import fp8, norm, rope, routing, swiglu
from llama4.ops.routing import top_k
from llama4.vision.rope import unit_numbers

EPS = 1e-5


class Inputs:
    """Random tensors of a layer: the residual stream in float32, everything else in bfloat16."""

    def __init__(self, text: TextConfig, tokens: int, device: torch.device) -> None:
        D, F, E, C = text.hidden_size, text.intermediate_size, text.num_local_experts, text.head_dim
        queries, keys = text.num_attention_heads * C, text.num_key_value_heads * C
        self.residual_ND = torch.randn(tokens, D, device=device)
        self.x_ND, self.delta_ND, self.routed_RD = torch.randn(3, tokens, D, device=device).bfloat16()
        self.weight_D = torch.randn(D, device=device).bfloat16()
        self.router_ED = torch.randn(E, D, device=device).bfloat16()
        qkv = torch.randn(tokens, queries + 2 * keys, device=device).bfloat16()
        self.q_NHC, self.k_NKC, _ = (x.unflatten(-1, (-1, C)) for x in qkv.split([queries, keys, keys], dim=-1))
        self.rotation = unit_numbers(torch.randn(tokens, C // 2, device=device), torch.float32)
        self.temperature_N = torch.rand(tokens, device=device) + 0.5
        self.gate_NF, self.up_NF = torch.randn(tokens, 2 * F, device=device).bfloat16().chunk(2, dim=-1)
        self.logits_NE = torch.randn(tokens, E, device=device)
        self.scores_N1, self.experts_N1 = top_k(self.logits_NE, 1)
        self.scores_N1 = self.scores_N1.sigmoid()
        self.rows_N1 = torch.randperm(tokens, device=device)[:, None]


@dataclass(frozen=True)
class Case:
    """A kernel, by torch in float64, and how far they may be apart; 0: equal to the bit.

    Attributes:
        most_tokens: what the kernel takes.
    """

    run: Callable[[Inputs], Sequence[Tensor]]
    truth: Callable[[Inputs], Sequence[Tensor]]
    bound: float = 1e-2
    most_tokens: int = 1 << 30


def _summed(given: Inputs, *deltas: Tensor) -> tuple[Tensor, Tensor]:
    sum_ND = torch.stack([given.residual_ND.double(), *(delta.double() for delta in deltas)]).sum(0)
    return sum_ND, norm.rms_norm(sum_ND, given.weight_D.double(), EPS)


CASES: dict[str, Case] = {
    "norm": Case(
        lambda i: [launch_elementwise.rms_norm(i.residual_ND, i.weight_D, EPS)],
        lambda i: [norm.rms_norm(i.residual_ND.double(), i.weight_D.double(), EPS)],
    ),
    "sum and norm": Case(
        lambda i: launch_elementwise.add_rms_norm(i.residual_ND, i.delta_ND, i.weight_D, EPS),
        lambda i: _summed(i, i.delta_ND),
    ),
    "sum of experts and norm": Case(
        lambda i: launch_elementwise.add_rms_norm(i.residual_ND, i.delta_ND, i.weight_D, EPS, i.routed_RD, i.rows_N1),
        lambda i: _summed(i, i.delta_ND, i.routed_RD[i.rows_N1[:, 0]]),
    ),
    "rope and qk-norm": Case(
        lambda i: launch_elementwise.apply_rope(i.q_NHC, i.k_NKC, i.rotation, EPS, None),
        lambda i: rope.apply_rope(i.q_NHC.double(), i.k_NKC.double(), i.rotation.to(torch.complex128), EPS, None),
    ),
    "temperature": Case(
        lambda i: launch_elementwise.apply_rope(i.q_NHC, i.k_NKC, None, None, i.temperature_N),
        lambda i: rope.apply_rope(i.q_NHC.double(), i.k_NKC.double(), None, None, i.temperature_N.double()),
    ),
    "swiglu": Case(
        lambda i: [launch_elementwise.swiglu(i.gate_NF, i.up_NF)],
        lambda i: [swiglu.swiglu(i.gate_NF.double(), i.up_NF.double())],
    ),
    "e4m3": Case(
        lambda i: launch_elementwise.to_fp8(i.x_ND), lambda i: fp8.to_fp8(i.x_ND.cpu(), torch.float32), bound=0.0
    ),
    "swiglu in e4m3": Case(
        lambda i: launch_elementwise.swiglu_to_fp8(i.gate_NF, i.up_NF),
        lambda i: fp8.to_fp8(launch_elementwise.swiglu(i.gate_NF, i.up_NF).cpu(), torch.float32),
        bound=0.0,
    ),
    "router": Case(
        lambda i: [launch_routing.router_logits(i.x_ND, i.router_ED)],
        lambda i: [i.x_ND.double() @ i.router_ED.double().mT],
        bound=1e-5,
        most_tokens=launch_routing.MAX_TOP_1,
    ),
    "router by torch": Case(  # of more tokens than those
        lambda i: [routing.router_logits(i.x_ND, i.router_ED)],
        lambda i: [i.x_ND.double() @ i.router_ED.double().mT],
        bound=1e-4,
    ),
    "choice and dispatch": Case(
        lambda i: launch_routing.dispatch_top_1(i.x_ND, i.logits_NE),
        lambda i: routing.dispatch(i.x_ND.double(), i.scores_N1.double(), i.experts_N1, i.logits_NE.shape[1]),
        most_tokens=launch_routing.MAX_TOP_1,
    ),
    "dispatch": Case(
        lambda i: launch_routing.dispatch(i.x_ND, i.scores_N1, i.experts_N1, i.logits_NE.shape[1]),
        lambda i: routing.dispatch(i.x_ND.double(), i.scores_N1.double(), i.experts_N1, i.logits_NE.shape[1]),
    ),
    "combine": Case(
        lambda i: [launch_routing.combine(i.routed_RD, i.rows_N1, i.delta_ND)],
        lambda i: [routing.combine(i.routed_RD.double(), i.rows_N1, i.delta_ND.double())],
    ),
}
