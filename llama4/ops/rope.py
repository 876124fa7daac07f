"""What positions do to queries and keys: RoPE, then QK-norm, then the attention temperature.

Shapes: N packed tokens, H query heads, K key/value heads, C head_dim, n tiles, L patches of a tile and the class token.
"""

from __future__ import annotations

from torch import Tensor

from llama4.kernels import abi, cpu
from llama4.kernels.triton import launch_elementwise
from llama4.ops import cpu_kernels, gpu_kernels
from llama4.ops.norm import rms_normalise
from llama4.vision.rope import rotate, rotate_both


def apply_rope(
    q_NHC: Tensor, k_NKC: Tensor, rotation: Tensor | None, qk_norm_eps: float | None, temperature_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a layer, ready for attention. Each step is left out where its argument is None.

    Args:
        q_NHC: queries, before positions are applied.
        k_NKC: keys.
        rotation: [N, C / 2], complex: what RoPE multiplies the pairs (2i, 2i + 1) of each head by (Su et al. 2021).
        qk_norm_eps: normalise each head, without a weight, after the rotation (Henry et al. 2020).
        temperature_N: factor of the queries alone.

    Returns:
        Both in their own dtype; computed in float32 or better.
    """
    q, k = q_NHC, k_NKC
    if unsupported_reason(q, k) is None:
        if rotation is not None or qk_norm_eps is not None:
            k = cpu.apply_rope(k, rotation, qk_norm_eps, None)
        if rotation is not None or qk_norm_eps is not None or temperature_N is not None:
            q = cpu.apply_rope(q, rotation, qk_norm_eps, temperature_N)
        return q, k
    if gpu_kernels.unsupported_reason(q, k) is None:
        return launch_elementwise.apply_rope(q, k, rotation, qk_norm_eps, temperature_N)
    q = _rotate_normalise_scale(q, rotation, qk_norm_eps, temperature_N)
    return q, _rotate_normalise_scale(k, rotation, qk_norm_eps, None)


def rotate_patches(q_nLHC: Tensor, k_nLHC: Tensor, rotation_L1C: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate_both` of a vision tower's queries and keys: patches have the same rotations in every tile."""
    if gpu_kernels.unsupported_reason(q_nLHC, k_nLHC):
        return rotate_both(q_nLHC, k_nLHC, rotation_L1C)
    q, k = launch_elementwise.apply_rope(q_nLHC.flatten(0, 1), k_nLHC.flatten(0, 1), rotation_L1C[:, 0], None, None)
    return q.view_as(q_nLHC), k.view_as(k_nLHC)


def _rotate_normalise_scale(
    x_NHC: Tensor, rotation: Tensor | None, eps: float | None, factor_N: Tensor | None
) -> Tensor:
    x = x_NHC
    if rotation is not None:
        x = rotate(x, rotation[:, None])
    if eps is not None:
        x = rms_normalise(x, eps)
    if factor_N is not None:
        x = x * factor_N[:, None, None]
    return x.type_as(x_NHC)


def unsupported_reason(q_NHC: Tensor, k_NKC: Tensor) -> str | None:
    """Why the compiled kernel does not take these; None if it does."""
    _, heads, head_dim = q_NHC.shape
    if head_dim > abi.MAX_HEAD_DIM:
        return f"heads are larger than {abi.MAX_HEAD_DIM}"
    return cpu_kernels.elementwise_unsupported_reason(heads * head_dim, q_NHC, k_NKC)
