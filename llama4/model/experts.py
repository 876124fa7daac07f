"""The routed experts of a layer: SwiGLU MLPs, each applied to the tokens that were sent to it and to no others.

Every class here holds the same two parameters under Hugging Face's names, gate_up_proj [E, D, 2F] (gate first) and
down_proj [E, F, D], both "in x out", and has the same forward. `resolve_experts` turns a name into a class, once, at
build.

Shapes: N rows sorted by expert, D hidden size, E experts, F expert width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.config import TextConfig
from llama4.ops.experts import swiglu_experts
from llama4.ops.linear import in_out_matrix, linear_in_out
from llama4.ops.swiglu import swiglu

logger = logging.getLogger(__name__)


class Experts(nn.Module):
    """Base of the backends: the parameters. A backend says where it cannot run, and computes."""

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

    def forward(self, x_ND: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """expert(x) = (silu(x @ gate) * (x @ up)) @ down, row by row.

        Args:
            x_ND: rows sorted by expert, already multiplied by their router scores.
            num_tokens_per_expert_E: int64, sums to N; zeros are welcome.

        Returns:
            [N, D], in the order of the rows.
        """
        raise AssertionError("a backend computes")


class LoopExperts(Experts):
    """The readable reference: one expert after the other, those that nobody chose are not touched. Runs everywhere."""

    name = "loop"

    def forward(self, x_ND: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        matrices = in_out_matrix(self.gate_up_proj, x_ND.dtype), in_out_matrix(self.down_proj, x_ND.dtype)
        return swiglu_experts(self.expert, x_ND, num_tokens_per_expert_E, *matrices)

    def expert(self, x_ND: Tensor, expert: int) -> Tensor:
        """What one expert makes of its tokens."""
        hidden_NF = swiglu(*linear_in_out(x_ND, self.gate_up_proj[expert]).chunk(2, dim=-1))
        return linear_in_out(hidden_NF, self.down_proj[expert])


class GroupedExperts(Experts):
    """All experts in two grouped matrix products, `torch.nn.functional.grouped_mm`; no host round trip."""

    name = "grouped"

    @staticmethod
    def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cuda" and dtype != torch.bfloat16:
            return f"torch's grouped_mm wants bfloat16 on CUDA, not {dtype}"
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"torch's grouped_mm does not take {dtype}"
        return None

    def forward(self, x_ND: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        ends = num_tokens_per_expert_E.cumsum(0).to(torch.int32)
        hidden_NF = swiglu(*F.grouped_mm(x_ND, self.gate_up_proj, offs=ends).chunk(2, dim=-1))
        return F.grouped_mm(hidden_NF, self.down_proj, offs=ends)


class MegaBlocksExperts(Experts):
    """The grouped products of MegaBlocks (Gale et al. 2023): no expert has a capacity, so no token is dropped."""

    name = "megablocks"

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        megablocks_product()  # says what is missing before anything is loaded

    @staticmethod
    def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"MegaBlocks is for CUDA, not for {device.type}"
        if dtype != torch.bfloat16:
            return f"MegaBlocks wants bfloat16, not {dtype}"
        if not (find_spec("megablocks") or find_spec("kernels")):
            return f"MegaBlocks is not installed: {_INSTALL}"
        return None

    def forward(self, x_ND: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        if not len(x_ND):
            return x_ND
        product, counts_E = megablocks_product(), num_tokens_per_expert_E.cpu()
        hidden_NF = swiglu(*product(x_ND.contiguous(), self.gate_up_proj, counts_E).chunk(2, dim=-1))
        return product(hidden_NF.contiguous(), self.down_proj, counts_E)


_HUB_BUILD = "kernels-community/megablocks"
_INSTALL = "pip install kernels, or build megablocks for your torch as docs/gpu.md tells"


@cache
def megablocks_product() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """MegaBlocks' product of rows [N, I] with matrices [E, I, O], all contiguous and bfloat16, given the rows of each
    expert, int64 on the host -> [N, O].

    It is that of the package `megablocks`. Where that is not installed, it is the build of it that Hugging Face keeps,
    compiled code that the package `kernels` fetches and runs. Only those who name this backend get here.

    Raises:
        ValueError: neither can be had, and why.
    """
    reasons = []
    if find_spec("megablocks"):
        try:
            from megablocks import grouped_gemm_util

            if grouped_gemm_util.grouped_gemm_is_available():
                return grouped_gemm_util.ops.gmm
            reasons.append("the package megablocks has no grouped_gemm beside it")
        except Exception as error:  # of a package that was built for another torch, anything
            reasons.append(f"the package megablocks does not load ({error})")
    if find_spec("kernels"):
        try:
            from kernels import get_kernel

            product: Callable[[Tensor, Tensor, Tensor], Tensor] = get_kernel(_HUB_BUILD, version=1).gg_ops.gmm
            logger.info("experts: MegaBlocks as built at %s", _HUB_BUILD)
            return product
        except Exception as error:  # of the network, of the Hub, of a torch it was not built for
            reasons.append(f"{_HUB_BUILD} does not load ({error})")
    raise ValueError(f"MegaBlocks cannot be had: {'; '.join(reasons) or 'it is not installed'}; {_INSTALL}")


BACKENDS: dict[str, type[Experts]] = {cls.name: cls for cls in (LoopExperts, GroupedExperts, MegaBlocksExperts)}


def backends_for(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of those that run there."""
    return [name for name, backend in BACKENDS.items() if backend.unsupported_reason(device, dtype) is None]


def resolve_experts(name: str, device: torch.device, dtype: torch.dtype) -> type[Experts]:
    """The class of experts to build.

    Args:
        name: "auto" or a key of `BACKENDS`.

    Raises:
        ValueError: an unknown name, or a backend that cannot run there, with its reason.
    """
    if name == "auto":
        # On a CPU the loop is as fast as a grouped product and reads only the experts that were chosen.
        preferred = GroupedExperts if device.type == "cuda" else LoopExperts
        chosen: type[Experts] = LoopExperts if preferred.unsupported_reason(device, dtype) else preferred
        logger.info("experts: %s on %s in %s", chosen.name, device, dtype)
        return chosen
    if name not in BACKENDS:
        raise ValueError(f"experts={name!r} is not known; choose 'auto' or one of {sorted(BACKENDS)}")
    if reason := BACKENDS[name].unsupported_reason(device, dtype):
        raise ValueError(f"experts={name!r} cannot run here: {reason}; choose another or 'auto'")
    return BACKENDS[name]
