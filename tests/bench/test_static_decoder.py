"""Decoding in static buffers: the same logits as eager steps, and nothing that the host would have to wait for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama4.bench.device.static_decoder import StaticDecoder
from llama4.model.experts import GroupedExperts
from llama4.model.multimodal import Llama4Model
from tests import small_model

IDS = torch.randint(0, small_model.RANKS, (3, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Llama4Model:
    return small_model.model()


@torch.inference_mode()
def compare(model: Llama4Model, prompt: int, padding: list[int], steps: int, dtype: str | None = None) -> None:
    """Of a batch whose rows are padded on the left."""
    mask = torch.arange(prompt) >= torch.tensor(padding)[:, None]
    cache = model.new_cache(3, dtype)
    model(IDS[:, :prompt], cache=cache, attention_mask=mask)
    before = cache.next_position
    decoder = StaticDecoder(model, cache, steps)
    assert cache.next_position == before
    for ids_B in IDS[:, prompt : prompt + steps].unbind(1):
        eager = model(ids_B[:, None], cache=cache)[:, 0]
        static = decoder.step(ids_B)
        assert (static - eager).abs().max() < 1e-5 * eager.abs().max(), "sums in another order"
    with pytest.raises(ValueError, match="no room for another step"):
        decoder.step(IDS[:, 0])


@pytest.mark.parametrize("padding", [[0, 0, 0], [0, 5, 12]])
@pytest.mark.parametrize(("prompt", "steps"), [(20, 40), (1, 5), (31, 3), (32, 2), (33, 2)])
def test_is_what_eager_steps_are(model: Llama4Model, prompt: int, padding: list[int], steps: int) -> None:
    """Across borders of the chunks of 32 tokens, which rows of different length cross at different steps."""
    compare(model, prompt, [min(p, prompt - 1) for p in padding], steps)


def test_beyond_the_least_bound(model: Llama4Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound grows while the steps go on."""
    monkeypatch.setattr("llama4.bench.device.static_decoder.LEAST_SLOTS", 8)
    compare(model, 5, [0, 2, 4], 50)


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU's host would wait: it reads a value, or copies between it and the device."""

    reading = ("_local_scalar_dense", "item", "nonzero", "bincount", "equal", "is_nonzero", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.reading, f"{name} reads a value"
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor) and leaf.ndim]
        assert len({tensor.device for tensor in tensors}) <= 1, f"{name} copies between devices"
        return out


def test_the_host_waits_for_nothing() -> None:
    """On tensors that are only said to be on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.inference_mode():
        model = Llama4Model(small_model.config(), GroupedExperts)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                values = torch.empty_like(parameter, dtype=torch.bfloat16)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
        cache = model.new_cache(2)
        model(torch.zeros(2, 10, dtype=torch.int64), cache=cache)
        decoder = StaticDecoder(model, cache, 4, capture=False)
        ids_B = torch.zeros(2, dtype=torch.int64)
        decoder.step(ids_B)  # what is computed once for the device
        with NoWaiting():
            logits_BV = decoder.step(ids_B)
        assert logits_BV.shape == (2, small_model.config().text.vocab_size)
        with pytest.raises(AssertionError, match="copies between devices"), NoWaiting():
            ids_B.cpu()
        with pytest.raises(AssertionError, match="reads a value"), NoWaiting():
            ids_B[0].item()
        with pytest.raises(AssertionError, match="copies between devices"), NoWaiting():
            model(ids_B[:, None], cache=cache)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_a_cuda_graph(model: Llama4Model) -> None:
    there = Llama4Model(small_model.config(), GroupedExperts).eval()
    there.load_state_dict(model.state_dict())
    there = there.to("cuda", torch.bfloat16)
    ids = IDS.cuda()
    with torch.inference_mode():
        cache = there.new_cache(3)
        there(ids[:, :20], cache=cache)
        decoders = [StaticDecoder(there, cache, 40, capture=capture) for capture in (True, False)]
        for ids_B in ids[:, 20:].unbind(1):
            replayed, run = (decoder.step(ids_B) for decoder in decoders)
            assert torch.allclose(replayed.float(), run.float(), atol=1e-2 * run.abs().max().item())
