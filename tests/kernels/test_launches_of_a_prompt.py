"""How much a GPU is asked to launch for a prompt, counted without one: each launch takes a host as long as the GPU
computes, and with a prompt of 2,048 tokens it waits for the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama4.bench.device import workload
from llama4.cache import batch, layer
from llama4.cache.layer import LayerCache
from llama4.kernels.triton import common, support
from llama4.model.experts import BACKENDS
from llama4.model.multimodal import Llama4Model
from llama4.ops import fp8
from llama4.quantization.modules import swap_modules

pytest.importorskip("triton")

GPU = torch.device("cuda", 0)
LAUNCH_NOTHING = {
    *("_unsafe_view", "alias", "as_strided", "detach", "expand", "select", "slice", "split", "split_with_sizes"),
    *("squeeze", "t", "transpose", "unsqueeze", "view", "view_as_real"),
    *("device", "empty", "empty_like", "empty_strided", "new_empty"),
}
"""Operations of torch: views, and memory without values."""


class Launches(TorchDispatchMode):
    """Notes operations on a GPU that is not there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        if name not in LAUNCH_NOTHING and any(tensor.is_cuda for tensor in tensors):
            self.names.append(name)
        return result


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()

    def launch(kernel: Any, *given: Any, **sizes: Any) -> None:
        launches.names.append(kernel.fn.__name__)

    def attention(q: Tensor, *given: Any, **options: Any) -> Tensor:
        launches.names.append("attention")
        return torch.empty_like(q)

    def to_device(values: Sequence[Any], device: torch.device) -> Tensor:
        return torch.tensor(values).to(device)

    monkeypatch.setattr(common, "launch", launch)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(batch, "to_device", to_device)
    monkeypatch.setattr(layer, "to_device", to_device)
    monkeypatch.setattr(LayerCache, "block_table", lambda self: to_device([[0] * len(row) for row in self.rows], GPU))
    monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: None if device == GPU else "not a GPU")
    monkeypatch.setattr(support, "grouped_mm_unsupported_reason", lambda device: None)
    monkeypatch.setattr(fp8, "has_fp8_matmul", lambda device, grouped=False: device == GPU)
    monkeypatch.setitem(common.GPUS, GPU, common.Gpu(90, 132))
    return launches


ATTENTION = ["attention", "_to_copy", "write"]
"""Between are the addresses of the blocks."""
ROUTING = ["mm", "max", "sigmoid", "sort_by_expert", "scatter_scaled"]
LAYERS = {
    None: [
        *("rms_norm", "mm", "mm", "mm", "apply_rope", *ATTENTION, "mm"),
        *("rms_norm", *ROUTING, "grouped_mm", "swiglu", "grouped_mm"),
        *("mm", "mm", "swiglu", "mm", "combine", "add"),
    ],
    "int4": [
        *("rms_norm", *["unpack", "mm"] * 3, "apply_rope", *ATTENTION, "unpack", "mm"),
        *("rms_norm", *ROUTING, "grouped_gemm", "swiglu", "grouped_gemm"),
        *(*["unpack", "mm"] * 2, "swiglu", "unpack", "mm", "combine", "add"),
    ],
    "fp8": [
        *("rms_norm", "to_fp8", *["_scaled_mm"] * 3, "apply_rope", *ATTENTION, "to_fp8", "_scaled_mm", "rms_norm"),
        *(*ROUTING, "to_fp8", "cumsum", "_scaled_grouped_mm", "swiglu_to_fp8", "cumsum", "_scaled_grouped_mm"),
        *("to_fp8", "_scaled_mm", "_scaled_mm", "swiglu_to_fp8", "_scaled_mm", "combine", "add"),
    ],
}
"""What a layer of Scout launches for 2,048 tokens, in order."""
AROUND = 24
"""Launches before and behind the layers: embeddings, the factors of positions, the last norm and the head."""


@pytest.mark.parametrize("scheme", LAYERS)
def test_a_prompt(scheme: str | None, launches: Launches) -> None:
    text = workload.text_config("scout", layers=4)
    with torch.device("meta"):
        model = Llama4Model(workload.config(text), BACKENDS["grouped"])
    swap_modules(model, workload.plan_for(scheme, model))
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        workload.fill(model, lambda name: GPU)
        ids_BT, cache = torch.empty(1, 2048, dtype=torch.int64, device=GPU), model.new_cache()
        with launches:
            model(ids_BT, cache=cache, last_only=True)
    of_layer = LAYERS[scheme]
    begin = launches.names.index("rms_norm")
    assert launches.names[begin : begin + 4 * len(of_layer)] == 4 * of_layer
    assert len(launches.names) - 4 * len(of_layer) <= AROUND
