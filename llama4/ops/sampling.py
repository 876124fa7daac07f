"""A token of a row of logits: the most likely one, or one drawn.

Shapes: B sequences, V vocabulary, K or F of its tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.kernels import cpu
from llama4.ops import cpu_kernels


def greedy_token(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each row's largest logit, the lowest on ties, and its log_softmax in float32, [B] each."""
    if unsupported_reason(logits_BV):
        logits_BV = logits_BV.float()
        ids_B = logits_BV.argmax(dim=-1)
        return ids_B, logits_BV.log_softmax(dim=-1).gather(1, ids_B[:, None]).squeeze(1)
    return cpu.greedy_token(logits_BV)


class Draw(NamedTuple):
    """How to draw a token.

    Attributes:
        row: of the logits.
        top_k, temperature, top_p, min_p: as in a `Sampler`, top_k 0 for all.
        uniform: a random number, at least 0 and below 1.
        penalties: the address of an `abi.Penalties`, where `applies_penalties`; 0 for none.
    """

    row: int
    top_k: int
    temperature: float
    top_p: float
    min_p: float
    uniform: float
    penalties: int = 0


def draw_token(logits_BV: Tensor, draws: Sequence[Draw]) -> list[tuple[int, float]]:
    """For each draw the token, and its log_softmax in float32.

    It is inverse transform sampling, in order of id: the first token at which the sum of probabilities, over the tokens
    that top_k, top_p and min_p leave, is larger than the random number. Ties are broken by the lower id.
    """
    if draw_unsupported_reason(logits_BV) is None:
        return cpu.draw_token(logits_BV, draws)
    assert not any(draw.penalties for draw in draws), "only the kernel applies them"
    drawn = [(0, 0.0)] * len(draws)
    alike: dict[tuple[float, ...], list[int]] = {}
    for i, draw in enumerate(draws):
        alike.setdefault(draw[1:5], []).append(i)
    for places in alike.values():
        rows = [draws[i].row for i in places]
        own_BV = (logits_BV[rows] if rows != list(range(len(logits_BV))) else logits_BV).float()
        ids_of = _draw if own_BV.is_cpu else _draw_without_waiting
        ids_B = ids_of(own_BV, draws[places[0]], [draws[i].uniform for i in places])
        logprobs_B = own_BV.log_softmax(dim=-1).gather(1, ids_B[:, None]).squeeze(1)
        for i, id_, logprob in zip(places, ids_B.tolist(), logprobs_B.tolist(), strict=True):
            drawn[i] = id_, logprob
    return drawn


def applies_penalties(logits_BV: Tensor) -> bool:
    """Whether draws from these may have penalties."""
    return draw_unsupported_reason(logits_BV) is None


def _draw(logits_BV: Tensor, how: Draw, uniform: Sequence[float]) -> Tensor:
    """The ids [B] of rows that are drawn alike, but for their random numbers."""
    # The largest logit is subtracted first, so that no temperature, however small, overflows.
    ids_BK = largest(logits_BV, how.top_k or logits_BV.shape[1])
    shifted_BK = logits_BV.gather(1, ids_BK).double() - logits_BV.amax(dim=-1, keepdim=True)
    weights_BK = (shifted_BK * min(1 / how.temperature, sys.float_info.max)).exp()
    if how.top_p < 1:
        chosen_BK, weights_BK = nucleus(weights_BK, how.top_p)
        ids_BK = ids_BK.gather(1, chosen_BK)
    sums_BK = weights_BK.masked_fill(weights_BK < how.min_p, 0).cumsum(dim=-1)  # the largest weight is 1
    uniform_B1 = torch.tensor(uniform, dtype=torch.float64)[:, None].to(sums_BK.device)
    drawn_B1 = _find(sums_BK, uniform_B1)
    return ids_BK.gather(1, drawn_B1).squeeze(1)


def _draw_without_waiting(logits_BV: Tensor, how: Draw, uniform: Sequence[float]) -> Tensor:
    """`_draw` on a GPU: all tokens are sorted there, which takes less time than asking how many are needed."""
    ranked_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    weights_BV = ((ranked_BV.double() - ranked_BV[:, :1]) * min(1 / how.temperature, sys.float_info.max)).exp()
    if how.top_k:
        weights_BV[:, how.top_k :] = 0
    if how.top_p < 1:
        needed_B1 = how.top_p * weights_BV.sum(dim=-1, keepdim=True)
        weights_BV = weights_BV.masked_fill(_running_sum(weights_BV) - weights_BV >= needed_B1, 0)
    weights_BV = weights_BV.masked_fill(weights_BV < how.min_p, 0)
    sums_BV = _running_sum(torch.zeros_like(weights_BV).scatter_(1, ids_BV, weights_BV))
    uniform_B1 = torch.tensor(uniform, dtype=torch.float64)[:, None].to(sums_BV.device, non_blocking=True)
    return _find(sums_BV, uniform_B1)[:, 0]


def _running_sum(weights_BV: Tensor) -> Tensor:
    """`cumsum` of each row of numbers that are not negative: those of runs of 1, 2, 4, ... numbers, joined two by two.

    So sums never fall, where a number is 0 they stay, and what they round to depends on no other row. Torch's own on a
    GPU is not deterministic, by its documentation.
    """
    B, V = weights_BV.shape
    sums_BV, size = F.pad(weights_BV, (0, (1 << (V - 1).bit_length()) - V)), 1
    while size < sums_BV.shape[1]:
        pairs = sums_BV.view(B, -1, 2, size)
        pairs[:, :, 1] += pairs[:, :, 0, -1:]
        size *= 2
    return sums_BV[:, :V].contiguous()


def _find(sums_BK: Tensor, uniform_B1: Tensor) -> Tensor:
    """The first place of each row at which the sum is larger than so much of the last one, [B, 1]."""
    totals_B1 = sums_BK[:, -1:]
    targets_B1 = uniform_B1 * totals_B1
    below_B1 = targets_B1.minimum(totals_B1.nextafter(torch.zeros_like(totals_B1)))  # however the product rounds
    return torch.searchsorted(sums_BK, below_B1, right=True).clamp(max=sums_BK.shape[1] - 1)  # NaN, too


def largest(values_BK: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest values in order, [B, count]; of equal values the first."""
    if count >= values_BK.shape[1]:
        return torch.arange(values_BK.shape[1], device=values_BK.device).expand_as(values_BK)
    least_B1 = values_BK.topk(count, sorted=False).values.amin(dim=-1, keepdim=True)
    row_M, index_M = (values_BK < least_B1).logical_not_().nonzero(as_tuple=True)  # M at least that large, or NaN
    if len(index_M) > len(values_BK) * count:  # some have equals
        is_least_M = (values_BK[row_M, index_M] > least_B1[row_M, 0]).logical_not_()
        least_B = row_M[is_least_M].bincount(minlength=len(values_BK))
        spare_B = row_M.bincount(minlength=len(values_BK)) - count
        last_B = least_B.cumsum(0) - spare_B  # of those that are taken, counted through all rows
        index_M = index_M[~is_least_M | (is_least_M.cumsum(0) <= last_B[row_M])]
    return index_M.view(-1, count)


def nucleus(weights_BK: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Of each row the fewest largest weights that sum to this share of all: indices in order, and the weights there,
    some of which are 0."""
    needed_B1 = share * weights_BK.sum(dim=-1, keepdim=True)
    for count in (FEW, weights_BK.shape[1]):
        indices_BF = largest(weights_BK, count)
        found_BF = weights_BK.gather(1, indices_BF)
        if (found_BF.sum(dim=-1, keepdim=True) >= needed_B1).all():
            break
    order_BF = found_BF.argsort(dim=-1, descending=True, stable=True)
    ranked_BF = found_BF.gather(1, order_BF)
    ranked_BF[ranked_BF.cumsum(dim=-1) - ranked_BF >= needed_B1] = 0  # those before it suffice
    return indices_BF, found_BF.scatter(1, order_BF, ranked_BF)


FEW = 1024
"""Among so many of the most likely tokens is nearly always all that top_p leaves. To sort 200,000 takes 60 ms."""


def unsupported_reason(logits_BV: Tensor) -> str | None:
    """Why the compiled kernel of the most likely token does not take these; None if it does. For the index alone torch
    takes six times as long, in bfloat16."""
    if logits_BV.numel() < cpu_kernels.MIN_WIDTH:
        return "there are too few logits for a call to pay"
    return draw_unsupported_reason(logits_BV)


def draw_unsupported_reason(logits_BV: Tensor) -> str | None:
    """Why the compiled kernel that draws does not take these; None if it does. A choice has no gradient."""
    return cpu_kernels.unsupported_reason(logits_BV.detach() if logits_BV.requires_grad else logits_BV)
