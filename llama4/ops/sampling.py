"""The most likely token.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

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


def unsupported_reason(logits_BV: Tensor) -> str | None:
    """Why the compiled kernel does not take these; None if it does. For the index alone torch takes six times as long,
    in bfloat16."""
    if logits_BV.numel() < cpu_kernels.MIN_WIDTH:
        return "there are too few logits for a call to pay"
    return cpu_kernels.unsupported_reason(logits_BV.detach())
