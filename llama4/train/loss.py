"""Cross-entropy without all logits at once, and what keeps a router's experts in work.

A vocabulary of 202,048 makes logits the largest tensor of a step of training by far. Here they exist for a slice of the
tokens at a time: the slice's loss and gradients are computed, added up in float32, and its logits forgotten.

Shapes: N packed tokens, D hidden size, V vocabulary, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama4.model.moe import Router
from llama4.ops.precision import upcast

IGNORED = -100
"""The label of a token that nothing is to be learnt from, as torch and transformers have it."""
MAX_LOGIT_BYTES = 64 << 20
"""Of the float32 logits of a slice."""

Head = Callable[[Tensor], Tensor]
Losses = Callable[[Tensor, slice], Tensor]


def tokens_per_slice(vocab_size: int) -> int:
    """How many tokens' logits are there at once."""
    return max(1, MAX_LOGIT_BYTES // (4 * vocab_size))


def cross_entropy(
    hidden_ND: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    weights_N: Tensor | None = None,
    trained: Sequence[Tensor] = (),
    slice_size: int | None = None,
) -> Tensor:
    """The sum of -log softmax(head(hidden))[label] over the tokens whose label is not `IGNORED`.

    Args:
        hidden_ND: what goes into the head, any floating-point dtype.
        labels_N: int64, the token that comes next, or `IGNORED`.
        head: rows [n, D] -> logits [n, V].
        weights_N: a factor for each token; by default 1.
        trained: tensors within `head` that need a gradient.
        slice_size: tokens whose logits are there at once; by default all, see `tokens_per_slice`.

    Returns:
        A scalar in float32 or better. Divide it by the number of labels for the mean.
    """
    kept = (labels_N != IGNORED).nonzero().squeeze(1)
    hidden_nD, labels_n = hidden_ND[kept], labels_N[kept]
    weights_n = torch.ones_like(labels_n, dtype=hidden_ND.dtype) if weights_N is None else weights_N[kept]
    weights_n = upcast(weights_n)

    def losses(logits_nV: Tensor, rows: slice) -> Tensor:
        return F.cross_entropy(logits_nV, labels_n[rows], reduction="none") * weights_n[rows]

    return sliced_sum(hidden_nD, head, losses, trained=trained, slice_size=slice_size)


def sliced_sum(
    hidden_ND: Tensor,
    head: Head,
    losses: Losses,
    *,
    trained: Sequence[Tensor] = (),
    slice_size: int | None = None,
) -> Tensor:
    """The sum of a loss of each token that follows from its logits, of which a slice is there at a time.

    Args:
        hidden_ND, head, trained, slice_size: see `cross_entropy`.
        losses: logits [n, V] in float32 or better, and which of the N rows they are of -> [n].

    Returns:
        A scalar in float32 or better.
    """
    loss: Tensor = _SlicedLoss.apply(hidden_ND, losses, head, slice_size, *trained)
    return loss


def token_log_probs(hidden_ND: Tensor, labels_N: Tensor, head: Head, *, slice_size: int | None = None) -> Tensor:
    """log softmax(head(hidden))[label] of each token, [N] in float32 or better, 0 where the label is `IGNORED`: for
    losses that are no sum over tokens. The logits of a slice are there at a time, and once more in the backward pass.

    Args: see `cross_entropy`.
    """
    kept = (labels_N != IGNORED).nonzero().squeeze(1)
    hidden_nD, labels_n = hidden_ND[kept], labels_N[kept]

    def of_slice(x_nD: Tensor, labels_n: Tensor) -> Tensor:
        return -F.cross_entropy(upcast(head(x_nD)), labels_n, reduction="none")

    size = slice_size or max(1, len(kept))
    slices = [slice(begin, begin + size) for begin in range(0, max(1, len(kept)), size)]
    found_n = torch.cat([checkpoint(of_slice, hidden_nD[rows], labels_n[rows], use_reentrant=False) for rows in slices])
    return found_n.new_zeros(len(labels_N)).index_copy(0, kept, found_n)


class _SlicedLoss(torch.autograd.Function):
    """The gradients of each slice are computed with its loss, while its logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, losses: Losses, head: Head, slice_size: int | None, *trained: Tensor
    ) -> Tensor:
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        gradients: list[Tensor | None] = [None] * len(needed)
        if needed[0]:
            gradients[0] = torch.zeros_like(hidden_ND)
        total = upcast(hidden_ND.new_zeros(()))
        for begin in range(0, len(hidden_ND), slice_size or len(hidden_ND) or 1):
            rows = slice(begin, begin + (slice_size or len(hidden_ND)))
            with torch.enable_grad():
                x_nD = hidden_ND[rows].detach().requires_grad_(needed[0])
                loss = losses(upcast(head(x_nD)), rows).sum()
            total += loss.detach()
            inputs = [x_nD, *trained]
            wanted = [i for i, needs in enumerate(needed) if needs]
            if not wanted:
                continue
            found = torch.autograd.grad(loss, [inputs[i] for i in wanted], allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if gradient is None:
                    continue
                if i == 0:
                    gradients[0][rows] = gradient  # type: ignore[index]
                else:
                    sums = gradients[i]
                    gradients[i] = upcast(gradient) if sums is None else sums.add_(gradient)
        ctx.dtypes = [hidden_ND.dtype, *(tensor.dtype for tensor in trained)]
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = gradients
        first, *rest = (
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return first, None, None, None, *rest


class RouterWatch:
    """What the routers of a model do with the tokens of a forward, and losses on it. To be used in a `with` around
    forward and backward: activations that are computed again must find what they found. Forwards without gradients,
    those of a reference or a teacher, are not watched.

    Attributes:
        loads: for each layer with experts, how many tokens each expert got, [E] int64, of all forwards so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        self._hooks: list[Any] = []
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._open = False
        self.loads: dict[str, Tensor] = {}

    def __enter__(self) -> RouterWatch:
        self._open = True
        for name, router in self._routers.items():
            self._hooks.append(router.register_forward_hook(lambda *call, name=name: self._note(name, *call)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen.clear()

    def _note(self, name: str, router: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        assert isinstance(router, Router)
        logits_NE, experts_Nk = router.logits(inputs[0]), output[1]
        if self._open and torch.is_grad_enabled():
            self._seen[name] = logits_NE, experts_Nk
            load_E = torch.bincount(experts_Nk.flatten(), minlength=logits_NE.shape[1])
            self.loads[name] = self.loads[name] + load_E if name in self.loads else load_E

    def losses(self, *, balance: float = 0.0, z_loss: float = 0.0) -> Tensor | None:
        """Of the forward that just ended: the mean over its layers of the weighted `balance_loss` and `router_z_loss`;
        None if the model has no routers."""
        self._open = False
        terms = [
            balance * balance_loss(logits_NE, experts_Nk) + z_loss * router_z_loss(logits_NE)
            for logits_NE, experts_Nk in self._seen.values()
        ]
        self._seen.clear()
        return torch.stack(terms).mean() if terms else None

    def shares(self) -> dict[str, list[float]]:
        """For each layer with experts, the share of all tokens so far that each expert got."""
        return {name: (load_E / load_E.sum().clamp(min=1)).tolist() for name, load_E in self.loads.items()}


def balance_loss(logits_NE: Tensor, experts_Nk: Tensor) -> Tensor:
    """E * sum over the experts of (share of tokens that it got) * (mean probability of it), 1 * k where all are alike
    (Fedus et al. 2022, "Switch Transformers", equation 4)."""
    N, E = logits_NE.shape
    share_E = torch.bincount(experts_Nk.flatten(), minlength=E).to(logits_NE.dtype) / max(N, 1)
    return E * (share_E * logits_NE.softmax(-1).mean(0)).sum()


def router_z_loss(logits_NE: Tensor) -> Tensor:
    """The mean of logsumexp(logits)^2, which keeps logits small (Zoph et al. 2022, "ST-MoE", equation 5)."""
    return logits_NE.logsumexp(-1).square().mean()
