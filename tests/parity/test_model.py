"""Our logits against transformers', in float32, on small random models of Scout's and of Maverick's logic.

Tolerance 1e-5 relative to the largest logit: float32 sums in another order differ by about 1e-6 here.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4.config import CACHE_BLOCK, Llama4Config
from llama4.model.experts import Experts, GroupedExperts, LoopExperts
from llama4.model.multimodal import Llama4Model
from llama4.ops.routing import top_k
from tests import small_model
from tests.parity.references import CHUNK, PATCH, ReferenceModel, reference_config, reference_model, relative_error

TOLERANCE = 1e-5


@dataclass
class Pair:
    theirs: ReferenceModel
    ours: Llama4Model


def make_pair(maverick: bool, experts: type[Experts] = LoopExperts, **text: object) -> Pair:
    config = reference_config(maverick, **text)
    theirs = reference_model(config)
    ours = Llama4Model(Llama4Config.from_dict(config.to_dict()), experts)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return Pair(theirs, ours.eval())


@pytest.fixture(scope="module", params=[False, True], ids=["scout", "maverick"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param)


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.inference_mode():
        yield


def random_ids(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 490, (rows, columns), generator=torch.Generator().manual_seed(seed))


def with_images(tiles: int, columns: int = 150) -> tuple[Tensor, Tensor]:
    """A prompt with `tiles` tiles of 4 patch tokens each, spread over it, and their pixels."""
    ids = random_ids(1, columns)
    for i in range(tiles):
        start = 10 + i * (columns - 20) // tiles
        ids[0, start : start + 4] = PATCH
    return ids, torch.randn(tiles, 3, 56, 56, generator=torch.Generator().manual_seed(2))


def in_pieces(model: Llama4Model, ids: Tensor, pixels: Tensor | None, lengths: list[int]) -> Tensor:
    """Prefill piece by piece, each with its share of the image features."""
    cache, features = model.new_cache(len(ids)), model.encode_images(pixels) if pixels is not None else None
    logits, borders = [], [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for start, end in pairwise(borders):
        piece = ids[:, start:end]
        count = int((piece == PATCH).sum())
        mine, features = (features[:count], features[count:]) if features is not None else (None, None)
        logits.append(model(piece, image_features=mine if count else None, cache=cache))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("columns", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_text_across_chunk_borders(pair: Pair, columns: int) -> None:
    ids = random_ids(2, columns)
    assert relative_error(pair.ours(ids), pair.theirs(ids).logits) < TOLERANCE


@pytest.mark.parametrize("tiles", [1, 3, 7])
def test_images(pair: Pair, tiles: int) -> None:
    ids, pixels = with_images(tiles)
    assert relative_error(pair.ours(ids, pixel_values=pixels), pair.theirs(ids, pixel_values=pixels).logits) < TOLERANCE


def test_images_of_a_batch_belong_to_their_rows(pair: Pair) -> None:
    (first, some), (second, more) = with_images(2), with_images(5)
    logits = pair.ours(torch.cat([first, second]), pixel_values=torch.cat([some, more]))
    assert relative_error(logits[:1], pair.theirs(first, pixel_values=some).logits) < TOLERANCE
    assert relative_error(logits[1:], pair.theirs(second, pixel_values=more).logits) < TOLERANCE


@pytest.mark.parametrize("chunk", [300, 512])
@pytest.mark.parametrize("lengths", [[900], [250, 6, 1, 1, 300, 342], [255, 1, 1, 643]])
def test_pieces_across_blocks_of_the_cache(chunk: int, lengths: list[int]) -> None:
    """Blocks hold 256 tokens, whatever the chunk."""
    pair, ids = make_pair(False, attention_chunk_size=chunk), random_ids(1, 900)
    assert relative_error(in_pieces(pair.ours, ids, None, lengths), pair.theirs(ids).logits) < TOLERANCE


@pytest.mark.parametrize("lengths", [[7, 30, 1, 1, 5, 60, 46], [100, 50], [CHUNK, CHUNK, 86], [1] * 150])
def test_prefill_in_pieces_and_token_by_token(pair: Pair, lengths: list[int]) -> None:
    ids, pixels = with_images(3)
    truth = pair.theirs(ids, pixel_values=pixels).logits
    assert relative_error(in_pieces(pair.ours, ids, pixels, lengths), truth) < TOLERANCE


@pytest.mark.parametrize("experts", [LoopExperts, GroupedExperts])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_more_than_one_expert_per_token(experts: type[Experts], k: int) -> None:
    pair = make_pair(False, experts, num_experts_per_tok=k)
    ids = random_ids(1, 70)
    assert relative_error(pair.ours(ids), pair.theirs(ids).logits) < TOLERANCE


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_go_to_the_lowest_index(k: int) -> None:
    logits = torch.randint(0, 3, (200, 8), generator=torch.Generator().manual_seed(k)).float()
    values, indices = top_k(logits, k)
    for row, its_values, its_indices in zip(logits.tolist(), values.tolist(), indices.tolist(), strict=True):
        wanted = sorted(range(8), key=lambda e: (-row[e], e))[:k]
        assert its_indices == wanted
        assert its_values == [row[e] for e in wanted]


@pytest.mark.parametrize("experts", [LoopExperts, GroupedExperts])
def test_no_token_at_all(experts: type[Experts]) -> None:
    ours = make_pair(True, experts).ours
    assert ours(random_ids(2, 0)).shape == (2, 0, 512)


def test_rows_of_unequal_length_are_as_alone(pair: Pair) -> None:
    """Padding on either side, then decoding across chunk borders. The truth is each row alone: transformers counts left
    padding into the temperature of NoPE layers."""
    ids, following = random_ids(4, 100), random_ids(4, 40, seed=3)
    spans = [slice(0, 60), slice(37, 100), slice(0, 100), slice(99, 100)]
    mask = torch.zeros(4, 100, dtype=torch.long)
    for row, span in enumerate(spans):
        mask[row, span] = 1
    cache = pair.ours.new_cache(4)
    prefill = pair.ours(ids, attention_mask=mask, cache=cache)
    steps = torch.cat([pair.ours(following[:, t : t + 1], cache=cache) for t in range(40)], dim=1)
    last = pair.ours(ids, attention_mask=mask, last_only=True)
    for row, span in enumerate(spans):
        alone = torch.cat([ids[row, span], following[row]])[None]
        truth, length = pair.theirs(alone).logits[0], span.stop - span.start
        assert relative_error(prefill[row, span], truth[:length]) < TOLERANCE
        assert relative_error(steps[row], truth[length:]) < TOLERANCE
        assert relative_error(last[row, 0], truth[length - 1]) < TOLERANCE
        assert not prefill[row][mask[row] == 0].any()


def test_transformers_left_padding_moves_its_answer() -> None:
    """The disagreement that makes 'each row alone' the truth above."""
    pair = make_pair(False)
    ids = random_ids(1, 60)
    padded = torch.cat([torch.full((1, 40), 502), ids], dim=1)
    mask = (torch.arange(100) >= 40).long()[None]
    alone = pair.theirs(ids).logits
    moved = pair.theirs(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 40:]
    assert relative_error(moved, alone) > 10 * TOLERANCE
    assert relative_error(pair.ours(padded, attention_mask=mask)[:, 40:], alone) < TOLERANCE


def test_explicit_positions(pair: Pair) -> None:
    """A sequence that starts elsewhere: transformers takes position_ids for RoPE but not for the temperature, so
    compare where the temperature has one step only."""
    config = replace(pair.ours.config, text=replace(pair.ours.config.text, attn_temperature_tuning=False))
    ours = Llama4Model(config)
    ours.load_state_dict(pair.ours.state_dict())
    theirs = make_pair(not config.text.use_qk_norm, attn_temperature_tuning=False).theirs
    ids = random_ids(1, 20)
    positions = torch.arange(CHUNK * 5 + 3, CHUNK * 5 + 23)[None]
    truth = theirs(ids, position_ids=positions).logits
    assert relative_error(ours(ids, positions=positions), truth) < TOLERANCE


def test_llama_guard_4_has_no_experts_and_no_chunks() -> None:
    """transformers cannot run a null chunk size; a chunk longer than the prompt is the same."""
    text: dict[str, Any] = {
        "num_local_experts": 0,
        "moe_layers": [],
        "no_rope_layers": [1] * 4,
        "attn_temperature_tuning": False,
    }
    config = reference_config(**text | {"attention_chunk_size": 4096, "num_local_experts": 1})
    theirs = reference_model(config)
    content = config.to_dict()
    content["text_config"] |= {"attention_chunk_size": None, "num_local_experts": 0}
    ours = Llama4Model(Llama4Config.from_dict(content))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = random_ids(1, 90)
    assert relative_error(ours(ids), theirs(ids).logits) < TOLERANCE


def rounded(model: Llama4Model, dtype: torch.dtype) -> Llama4Model:
    """The same model with weights that the dtype holds exactly."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model


COPIES: dict[str, Callable[[Llama4Model], Llama4Model]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "double and float": lambda model: copy.deepcopy(model).double().float(),
    "bfloat16 and float": lambda model: copy.deepcopy(model).bfloat16().float(),
    "half and float": lambda model: copy.deepcopy(model).half().float(),
    "to": lambda model: copy.deepcopy(model).to(torch.bfloat16).to("cpu", torch.float32),
}


@pytest.mark.parametrize("how", COPIES)
def test_survives_copies_and_casts(pair: Pair, how: str) -> None:
    """There is no table that a cast could round: weights that bfloat16 and float16 hold exactly come back, and so do
    the logits."""
    exact = {"bfloat16": torch.bfloat16, "half": torch.float16, "to": torch.bfloat16}.get(how.split()[0])
    model = rounded(pair.ours, exact) if exact else pair.ours
    ids, pixels = with_images(3)
    truth = model(ids, pixel_values=pixels)
    torch.testing.assert_close(COPIES[how](model)(ids, pixel_values=pixels), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("maverick", [False, True], ids=["scout", "maverick"])
def test_compiled_by_torch(maverick: bool) -> None:
    """It keeps to torch's products, which add in another order."""
    ours = make_pair(maverick, num_hidden_layers=2, no_rope_layers=[1, 0]).ours
    ids, pixels = with_images(1, columns=50)
    truth = ours(ids, pixel_values=pixels)
    compiled: Any = torch.compile(ours, backend="eager")
    torch.testing.assert_close(compiled(ids, pixel_values=pixels), truth, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_a_cast_breaks_transformers_vision() -> None:
    """Its table of 2-D RoPE is complex; `.to(dtype)` throws the imaginary part away, and a cast back does not help."""
    pair = make_pair(False)
    ids, pixels = with_images(3)
    ours, theirs = rounded(pair.ours, torch.bfloat16), copy.deepcopy(pair.theirs)
    theirs.load_state_dict(ours.state_dict())
    truth = ours(ids, pixel_values=pixels)
    assert relative_error(theirs(ids, pixel_values=pixels).logits, truth) < TOLERANCE
    assert relative_error(theirs.bfloat16().float()(ids, pixel_values=pixels).logits, truth) > 1e-3
    assert relative_error(ours.to(torch.bfloat16).float()(ids, pixel_values=pixels), truth) < TOLERANCE


def test_float64_is_the_reference_that_float32_approaches(pair: Pair) -> None:
    ids, pixels = with_images(3)
    exact = copy.deepcopy(pair.ours).double()(ids, pixel_values=pixels)
    assert exact.dtype == torch.float64
    assert 1e-9 < relative_error(pair.ours(ids, pixel_values=pixels), exact) < TOLERANCE


def test_cache_of_chunked_layers_stays_bounded() -> None:
    pair = make_pair(False)
    cache = pair.ours.new_cache(1)
    pair.ours(random_ids(1, 10 * CHUNK + 1), cache=cache)
    rooms = [len(layer.rows[0]) for layer in cache.layers]
    assert all(room == -(-CHUNK // CACHE_BLOCK) for room in rooms[:3])
    assert rooms[3] == -(-(10 * CHUNK + 1) // CACHE_BLOCK)
    assert cache.lengths == [10 * CHUNK + 1]


def test_only_routed_experts_are_computed() -> None:
    """An expert full of NaN that no token chooses does no harm."""
    pair = make_pair(False)
    ids = random_ids(1, 5)
    truth, poisoned = pair.ours(ids), copy.deepcopy(pair.ours)
    chosen: dict[int, Tensor] = {}
    for i, layer in enumerate(small_model.layers(poisoned)):
        layer.feed_forward.router.register_forward_hook(lambda m, a, out, i=i: chosen.update({i: out[1]}))
    poisoned(ids)
    idle = 0
    for i, layer in enumerate(small_model.layers(poisoned)):
        for expert in set(range(4)) - set(chosen[i].flatten().tolist()):
            layer.feed_forward.experts.gate_up_proj.data[expert] = torch.nan
            idle += 1
    assert idle, "every expert was chosen; use fewer tokens"
    assert torch.equal(poisoned(ids), truth)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_transformers(recompute: bool) -> None:
    """Of every parameter: the router's come through the score alone, and those before it through the scaled input."""
    pair = make_pair(False)
    ids, pixels = with_images(3, columns=80)
    with torch.inference_mode(False), torch.enable_grad():
        ids, pixels = ids.clone(), pixels.clone()
        pair = make_pair(False)
        pair.ours.checkpoint_activations(recompute)
        pair.ours(ids, pixel_values=pixels).log_softmax(-1)[..., 7].mean().backward()
        pair.theirs(input_ids=ids, pixel_values=pixels).logits.log_softmax(-1)[..., 7].mean().backward()
    theirs = dict(pair.theirs.named_parameters())
    for name, parameter in pair.ours.named_parameters():
        truth = theirs[name].grad
        assert truth is not None, name
        mine = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        # Gradients sum over all tokens in another order, and small ones stand beside large ones.
        torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-5 * truth.abs().max().item() + 1e-9, msg=name)


def test_checkpointing_keeps_little_and_computes_the_same() -> None:
    ours = make_pair(False).ours
    ids, pixels = with_images(3, columns=80)
    kept, gradients = [], []
    with torch.inference_mode(False), torch.enable_grad():
        ids, pixels = ids.clone(), pixels.clone()
        ours = make_pair(False).ours
        for recompute in (False, True):
            sizes: dict[int, int] = {}
            ours.checkpoint_activations(recompute)
            ours.zero_grad()

            def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = ours(ids, pixel_values=pixels).log_softmax(-1)[..., 7].mean()
            kept.append(sum(sizes.values()))
            loss.backward()
            gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert kept[1] < 0.6 * kept[0]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=0)


class TestBadInput:
    def test_more_patches_than_features(self, pair: Pair) -> None:
        ids, pixels = with_images(3)
        with pytest.raises(ValueError, match=r"12 <\|patch\|> tokens, but the images give 8"):
            pair.ours(ids, pixel_values=pixels[:2])

    def test_patches_without_an_image(self, pair: Pair) -> None:
        with pytest.raises(ValueError, match=r"12 <\|patch\|> tokens but no image"):
            pair.ours(with_images(3)[0])

    def test_pixels_of_another_size(self, pair: Pair) -> None:
        with pytest.raises(ValueError, match=r"\[tiles, 3, 56, 56\], not \[1, 3, 55, 56\]"):
            pair.ours(random_ids(1, 5), pixel_values=torch.zeros(1, 3, 55, 56))

    @pytest.mark.parametrize("bad", [-1, 512])
    def test_ids_outside_the_vocabulary(self, pair: Pair, bad: int) -> None:
        """Wherever the model is. What padding is does not matter."""
        for model in (pair.ours, copy.deepcopy(pair.ours).to("meta")):
            with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 512"):
                model(torch.tensor([[1, bad]]))
        assert pair.ours(torch.tensor([[1, bad]]), attention_mask=torch.tensor([[1, 0]])).isfinite().all()

    def test_padding_inside_a_row(self, pair: Pair) -> None:
        with pytest.raises(ValueError, match="padding between a row's tokens"):
            pair.ours(random_ids(1, 3), attention_mask=torch.tensor([[1, 0, 1]]))

    def test_positions_with_gaps(self, pair: Pair) -> None:
        with pytest.raises(ValueError, match="must be consecutive"):
            pair.ours(random_ids(1, 3), positions=torch.tensor([[0, 1, 3]]))

    def test_positions_that_do_not_follow_the_cache(self, pair: Pair) -> None:
        cache = pair.ours.new_cache(1)
        pair.ours(random_ids(1, 3), cache=cache)
        with pytest.raises(ValueError, match="start at 5, but the cache goes on at 3"):
            pair.ours(random_ids(1, 1), positions=torch.tensor([[5]]), cache=cache)

    def test_a_cache_for_another_batch(self, pair: Pair) -> None:
        with pytest.raises(ValueError, match="2 rows, but the cache was made for 1"):
            pair.ours(random_ids(2, 3), cache=pair.ours.new_cache(1))
