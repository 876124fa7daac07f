"""The MLP of a dense layer, and the shared expert of a mixture.

Shapes: N packed tokens, D hidden size, F width of the MLP.
"""

from __future__ import annotations

from torch import Tensor, nn

from llama4.ops.linear import Linear, linear_of_swiglu, linears


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D], in the dtype of x."""
        gate_NF, up_NF = linears((self.gate_proj, self.up_proj), x_ND)
        return linear_of_swiglu(self.down_proj, gate_NF, up_NF)
