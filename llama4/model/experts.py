"""The routed experts of a layer: SwiGLU MLPs, each applied to the rows that were dispatched to it and to no others.

Every class here has the same two parameters under Hugging Face's names, gate_up_proj [E, D, 2F] (gate first) and
down_proj [E, F, D], both in x out, and the same forward. `resolve_experts` turns a name into a class once, when the
model is built. A new backend is a class of this file and a place in `BACKENDS`.

Shapes: R routed rows sorted by expert, D hidden size, E experts, F expert width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from llama4.config import TextConfig
from llama4.errors import ArgumentError, Llama4Error
from llama4.ops.experts import product_of_all, product_of_each, swiglu_experts
from llama4.ops.linear import linear_in_out
from llama4.ops.swiglu import swiglu

logger = logging.getLogger(__name__)


class Experts(nn.Module):
    """Base of the backends: the parameters. A backend adds `forward`, and where it cannot run.

    Attributes:
        name: what users choose it by.
    """

    name = ""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        E, D, F_ = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * F_))
        self.down_proj = nn.Parameter(torch.empty(E, F_, D))

    @staticmethod
    def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot run there; None if it can."""
        return None

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """expert(x) = (silu(x @ gate) * (x @ up)) @ down, row by row.

        Args:
            x_RD: rows sorted by expert, already multiplied by their router scores.
            num_tokens_per_expert_E: int64, on the device of the rows; they sum to R, and any may be 0.

        Returns:
            [R, D], in the order of the rows.
        """
        hidden_RF = swiglu(*self.gate_up(x_RD, num_tokens_per_expert_E).chunk(2, dim=-1))
        return self.down(hidden_RF, num_tokens_per_expert_E)

    def gate_up(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """The first product, [R, 2F]."""
        return self.product(x_RD, num_tokens_per_expert_E, self.gate_up_proj)

    def down(self, hidden_RF: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """The last product, [R, D]."""
        return self.product(hidden_RF, num_tokens_per_expert_E, self.down_proj)

    def product(self, x_RI: Tensor, num_tokens_per_expert_E: Tensor, weight_EIO: Tensor) -> Tensor:
        """Each row by the matrix of its expert, [R, O]."""
        raise AssertionError("a backend computes")


class LoopExperts(Experts):
    """The readable reference: one expert after the other. Those without rows are not read. Runs everywhere."""

    name = "loop"

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        if self.gate_up_proj.requires_grad and torch.is_grad_enabled():
            return super().forward(x_RD, num_tokens_per_expert_E)
        return swiglu_experts(self.expert, x_RD, num_tokens_per_expert_E, self.gate_up_proj, self.down_proj)

    def product(self, x_RI: Tensor, num_tokens_per_expert_E: Tensor, weight_EIO: Tensor) -> Tensor:
        return product_of_each(x_RI, num_tokens_per_expert_E, weight_EIO)

    def expert(self, x_RD: Tensor, expert: int) -> Tensor:
        """One expert, applied to its rows."""
        hidden_RF = swiglu(*linear_in_out(x_RD, self.gate_up_proj[expert]).chunk(2, dim=-1))
        return linear_in_out(hidden_RF, self.down_proj[expert])


class GroupedExperts(Experts):
    """All experts in two grouped matrix products, torch's or on Hopper our own. The host never waits."""

    name = "grouped"

    @staticmethod
    def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cuda" and dtype != torch.bfloat16:
            return f"torch's grouped_mm wants bfloat16 on CUDA, not {dtype}"
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"torch's grouped_mm does not take {dtype}"
        return None

    def product(self, x_RI: Tensor, num_tokens_per_expert_E: Tensor, weight_EIO: Tensor) -> Tensor:
        return product_of_all(x_RI, num_tokens_per_expert_E, weight_EIO)


class MegaBlocksExperts(Experts):
    """The grouped products of MegaBlocks (Gale et al. 2023). Experts have no capacity limit: no token is dropped."""

    name = "megablocks"

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        megablocks_product()  # fails here, before anything is loaded

    @staticmethod
    def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"MegaBlocks is for CUDA, not for {device.type}"
        if dtype != torch.bfloat16:
            return f"MegaBlocks wants bfloat16, not {dtype}"
        if not (find_spec("megablocks") or find_spec("kernels")):
            return f"MegaBlocks is not installed: {_INSTALL}"
        return None

    def product(self, x_RI: Tensor, num_tokens_per_expert_E: Tensor, weight_EIO: Tensor) -> Tensor:
        if not len(x_RI):
            return x_RI.new_zeros(0, weight_EIO.shape[2])
        return megablocks_product()(x_RI.contiguous(), weight_EIO, num_tokens_per_expert_E.cpu())


_HUB_BUILD = "kernels-community/megablocks"
_INSTALL = "pip install kernels, or build megablocks for your torch as docs/gpu.md tells"


@cache
def megablocks_product() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """MegaBlocks' grouped product: rows [R, I], matrices [E, I, O], both contiguous and bfloat16, and how many rows
    each expert has, int64 on the host -> [R, O].

    It comes from the package `megablocks`. Where that is not installed, it is the build that Hugging Face keeps:
    compiled code, which the package `kernels` downloads and runs. So nothing but this backend's own name leads here.

    Raises:
        Llama4Error: neither is available, and why.
    """
    reasons = []
    if find_spec("megablocks"):
        try:
            from megablocks import grouped_gemm_util

            if grouped_gemm_util.grouped_gemm_is_available():
                return grouped_gemm_util.ops.gmm
            reasons.append("the package megablocks has no grouped_gemm beside it")
        except Exception as error:  # a package built for another torch may raise anything
            reasons.append(f"the package megablocks does not load ({error})")
    if find_spec("kernels"):
        try:
            from kernels import get_kernel

            product: Callable[[Tensor, Tensor, Tensor], Tensor] = get_kernel(_HUB_BUILD, version=1).gg_ops.gmm
            logger.info("experts: MegaBlocks as built at %s", _HUB_BUILD)
            return product
        except Exception as error:  # the network, the Hub, a torch it was not built for
            reasons.append(f"{_HUB_BUILD} does not load ({error})")
    raise Llama4Error(f"MegaBlocks is not available: {'; '.join(reasons) or 'it is not installed'}; {_INSTALL}")


BACKENDS: dict[str, type[Experts]] = {cls.name: cls for cls in (LoopExperts, GroupedExperts, MegaBlocksExperts)}
"""By the name that users give."""


def backends_for(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of those that run there."""
    return [name for name, backend in BACKENDS.items() if backend.unsupported_reason(device, dtype) is None]


def resolve_experts(name: str, device: torch.device, dtype: torch.dtype) -> type[Experts]:
    """The class of experts to build.

    Args:
        name: "auto" or a key of `BACKENDS`.

    Raises:
        Llama4Error: an unknown name, or a backend that cannot run there, with its reason.
    """
    if name == "auto":
        # On a CPU the loop is as fast as a grouped product, and it reads only the experts that were chosen.
        preferred = GroupedExperts if device.type == "cuda" else LoopExperts
        chosen: type[Experts] = LoopExperts if preferred.unsupported_reason(device, dtype) else preferred
        logger.info("experts: %s on %s in %s", chosen.name, device, dtype)
        return chosen
    if name not in BACKENDS:
        raise ArgumentError(f"experts={name!r} is not known; choose 'auto' or one of {sorted(BACKENDS)}")
    if reason := BACKENDS[name].unsupported_reason(device, dtype):
        raise ArgumentError(f"experts={name!r} cannot run here: {reason}; choose another or 'auto'")
    return BACKENDS[name]
