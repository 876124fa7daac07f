"""Products with weights that are not trained: their gradients, and gradients of these."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llama4.ops.cpu_kernels import any_size
from llama4.ops.frozen import frozen_product
from llama4.ops.linear import linear, linear_in_out


def as_stored(matrix_OI: Tensor, product: Callable[..., Tensor]) -> Tensor:
    return matrix_OI if product is linear else matrix_OI.mT.contiguous()


@pytest.mark.parametrize("product", [linear, linear_in_out])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_of_the_rows(dtype: torch.dtype, rows: int, product: Callable[..., Tensor]) -> None:
    """Against float64; rows and gradients that are parts of larger tensors, too."""
    generator = torch.Generator().manual_seed(0)
    wide_x, matrix_OI, wide_dy = (torch.randn(n, m, generator=generator) for n, m in ((rows, 80), (48, 64), (rows, 64)))
    x, dy, matrix_OI = wide_x.to(dtype)[:, :64].requires_grad_(), wide_dy.to(dtype)[:, :48], matrix_OI.to(dtype)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float64: 1e-12}[dtype]
    with any_size():
        y = product(x, as_stored(matrix_OI, product))
        (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype
    assert (y.double() - x.detach().double() @ matrix_OI.double().mT).abs().max() < tolerance
    assert (dx.double() - dy.double() @ matrix_OI.double()).abs().max() < tolerance


@pytest.mark.parametrize("product", [linear, linear_in_out])
def test_in_float32_torch_multiplies_nothing_itself(product: Callable[..., Tensor]) -> None:
    """Its own product goes to a slower library, forward and backward."""
    x, matrix_OI = torch.randn(24, 64, requires_grad=True), torch.randn(48, 64)
    with torch.profiler.profile() as profile:
        product(x, as_stored(matrix_OI, product)).sum().backward()
    names = [event.name for event in profile.events() or ()]
    assert names.count("mkldnn::_linear_pointwise") == 2 and "aten::mm" not in names


def test_few_numbers_of_rows_reach_onednn() -> None:
    """It keeps a megabyte of compiled code for each."""
    matrix_OI = torch.randn(48, 64)
    with torch.profiler.profile(record_shapes=True) as profile:
        for rows in range(256, 512, 5):
            y = linear(torch.randn(rows, 64, requires_grad=True), matrix_OI)
            assert y.shape == (rows, 48)
    shapes = [e.input_shapes[0] for e in profile.events() or () if e.name == "mkldnn::_linear_pointwise"]
    assert len(shapes) == 52 and len({rows for rows, _ in shapes}) <= 17


@pytest.mark.parametrize("product", [linear, linear_in_out])
def test_gradients_of_gradients(product: Callable[..., Tensor]) -> None:
    x, matrix_OI = torch.randn(3, 64, requires_grad=True), torch.randn(48, 64)
    with any_size():
        (dx,) = torch.autograd.grad(product(x, as_stored(matrix_OI, product)).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.sum(), x)
    gram = (matrix_OI.double().mT @ matrix_OI.double()).sum(0)
    assert (second.double() - 2 * gram).abs().max() < 1e-3


def test_nothing_of_its_own_is_kept() -> None:
    """What the product makes on its way is gone when it returns: autograd keeps neither rows nor matrix."""
    kept: list[Tensor] = []
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor):
        frozen_product(x, lambda x: (x.exp() @ torch.ones(5, 4)).sigmoid(), lambda dy: dy @ torch.ones(4, 5))
    assert not kept
