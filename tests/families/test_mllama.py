"""Llama 3.2 Vision against transformers: a random model in float32, to 1e-5 of the largest logit."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

from llama4.api import Llama4
from llama4.engine.request import Delivery, Request
from llama4.engine.runner import ModelRunner
from llama4.engine.sampling import Sampler
from llama4.engine.scheduler import Scheduler
from llama4.errors import ConfigError, Llama4Error
from llama4.families import FAMILIES, PRESETS
from llama4.families import mllama as family
from llama4.inputs import Inputs
from llama4.model.cross_model import CrossAttentionModel
from tests.config.test_fields import missing, of_config
from tests.families import mllama_models as made
from tests.families.mllama_models import IMAGE
from tests.parity.references import relative_error

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write(tmp_path_factory.mktemp("mllama"))


@pytest.fixture(scope="module")
def ours(directory: Path) -> CrossAttentionModel:
    model = Llama4.from_pretrained(directory, progress=False).model
    assert isinstance(model, CrossAttentionModel)
    return model


def prompt(length: int, places: tuple[int, ...], seed: int = 1) -> Tensor:
    ids = torch.randint(0, 800, (1, length), generator=torch.Generator().manual_seed(seed))
    ids[:, list(places)] = IMAGE
    return ids


PROMPTS: dict[str, tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = {
    "text": ((), ()),
    "one": ((3,), ((1, 3),)),
    "first": ((0,), ((2, 2),)),
    "last": ((29,), ((1, 1),)),
    "several": ((2, 9, 17), ((1, 1), (4, 1), (1, 2))),
    "side by side": ((4, 5, 6, 20, 21), ((1, 2), (1, 1), (3, 1), (1, 1), (2, 1))),
}


@pytest.mark.parametrize("kind", PROMPTS)
@torch.inference_mode()
def test_logits(ours: CrossAttentionModel, kind: str) -> None:
    """In one prefill; and with a cache, in pieces and token by token, where each picture comes with its token."""
    places, grids_of = PROMPTS[kind]
    ids = prompt(30, places)
    pixels, grids = made.pictures(grids_of)
    wanted = made.theirs(ids, pixels, grids)
    given = {"pixel_values": pixels, "image_grids": grids} if places else {}
    assert relative_error(ours(ids, **given), wanted) < TOLERANCE
    features = ours.encode_images(pixels, grids) if places else None
    for pieces in ((5, 1, 12, 12), (1,) * 30):
        cache, parts, begin = ours.new_cache(), [], 0
        for size in pieces:
            some = [i for i, place in enumerate(places) if begin <= place < begin + size]
            own: dict[str, Any] = {}
            if features is not None and some:
                own = {"image_features": features[some], "image_grids": grids[some]}
            parts.append(ours(ids[:, begin : begin + size], cache=cache, **own))
            begin += size
        assert relative_error(torch.cat(parts, dim=1), wanted) < TOLERANCE


class NoText:
    """A tokenizer for tokens whose text nobody reads."""

    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b""


def test_a_prompt_of_pictures_delays_others_by_one_at_a_time(
    ours: CrossAttentionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though each is a single token."""
    encoded, encode, scheduler = [0], ours.encode_images, Scheduler(ModelRunner(ours), NoText())

    def counted(*given: Any) -> Tensor:
        encoded[0] += 1
        return encode(*given)

    def ask(ids: Tensor, length: int, *pictures: Tensor) -> list[Delivery]:
        got: list[Delivery] = []
        inputs = Inputs(ids, torch.ones_like(ids), *(pictures or (None,)))
        settings: dict[str, Any] = {"max_new_tokens": length, "stop_ids": ()}
        scheduler.add(Request(inputs, ours, Sampler(), deliver=got.append, **settings))
        return got

    monkeypatch.setattr(ours, "encode_images", counted)
    talking = ask(prompt(9, (), 2), 50)
    while not talking:
        scheduler.step()
    seeing = ask(prompt(20, (2, 3, 7), 1), 1, *made.pictures(((1, 2), (2, 2), (1, 1))))
    while not seeing:
        before, said = encoded[0], len(talking)
        scheduler.step()
        assert encoded[0] <= before + 1 and len(talking) == said + 1
    assert encoded[0] == 3 and not isinstance(seeing[0], Exception)


@torch.inference_mode()
def test_ragged_batches(ours: CrossAttentionModel) -> None:
    """Rows with two pictures, with none and with one, each as if alone: then a token for each."""
    rows = [prompt(20, (2, 7), 1), prompt(9, (), 2), prompt(14, (5,), 3)]
    grids_of = [((1, 2), (2, 2)), (), ((3, 1),)]
    ids = torch.zeros(3, 20, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, 20 - row.shape[1] :], mask[i, 20 - row.shape[1] :] = row, 1
    pixels, grids = made.pictures([grid for row in grids_of for grid in row])
    cache = ours.new_cache(3)
    logits = ours(ids, pixel_values=pixels, image_grids=grids, attention_mask=mask, cache=cache)
    step = ours(torch.full((3, 1), 7), cache=cache)
    first = 0
    for i, row in enumerate(rows):
        count = len(grids_of[i])
        longer = torch.cat((row, torch.full((1, 1), 7)), dim=1)
        wanted = made.theirs(longer, pixels[first : first + count], grids[first : first + count])
        got = torch.cat((logits[i : i + 1, 20 - row.shape[1] :], step[i : i + 1]), dim=1)
        assert relative_error(got, wanted) < TOLERANCE
        first += count


@torch.inference_mode()
def test_rows_before_the_first_picture(ours: CrossAttentionModel) -> None:
    """In transformers they attend to all tiles, empty ones too. That is the only difference: with Meta's rule for these
    rows, and nothing else changed, it gives what we give; and if there are no such rows, it gives that as it is."""
    pixels, grids = made.pictures(((1, 2),))
    at_once = prompt(12, (0,))
    got = ours(at_once, pixel_values=pixels, image_grids=grids)
    assert relative_error(got, made.theirs(at_once, pixels, grids, as_meta=False)) < TOLERANCE
    later = prompt(12, (3,))
    got = ours(later, pixel_values=pixels, image_grids=grids)
    assert relative_error(got[:, :3], made.theirs(later, pixels, grids, as_meta=False)[:, :3]) > 0.01
    assert relative_error(got, made.theirs(later, pixels, grids)) < TOLERANCE
    assert relative_error(got[:, :3], ours(later[:, :3])) < TOLERANCE  # a text alone


@torch.inference_mode()
def test_a_cache_is_forked_cut_and_joined_with_its_pictures(ours: CrossAttentionModel) -> None:
    ids = prompt(16, (2, 9))
    pixels, grids = made.pictures(((1, 2), (2, 1)))
    cache = ours.new_cache()
    ours(ids, pixel_values=pixels, image_grids=grids, cache=cache)
    assert len(cache.pictures[0]) == 2
    cut = cache.fork()
    assert cut.truncate(9) == 9 and len(cut.pictures[0]) == 1 and len(cache.pictures[0]) == 2
    again = ours(ids[:, 9:], pixel_values=pixels[1:], image_grids=grids[1:], cache=cut)
    assert relative_error(again, made.theirs(ids, pixels, grids)[:, 9:]) < TOLERANCE
    text = ours.new_cache()
    ours(ids[:, 3:5], cache=text)
    joined = type(cache).join([text, cache])
    step = ours(torch.full((2, 1), 5), cache=joined)
    longer = torch.cat((ids, torch.full((1, 1), 5)), dim=1)
    assert relative_error(step[1:], made.theirs(longer, pixels, grids)[:, -1:]) < TOLERANCE
    assert [len(each.pictures[0]) for each in joined.split()] == [0, 2]


def test_configurations_come_back(directory: Path) -> None:
    config = FAMILIES["mllama"].read_config(directory)
    assert config.num_parameters() == sum(parameter.numel() for parameter in made.reference().parameters())
    written = FAMILIES["mllama"].write_config(config)
    assert family.read_config(written).text == config.text
    back_of_theirs = MllamaConfig(**written).to_dict()
    for part in ("text_config", "vision_config"):
        original = made.reference().config.to_dict()[part]
        for name in {*original} - {"initializer_range", "architectures", "dtype", "rope_parameters", "eos_token_id"}:
            assert back_of_theirs[part][name] == original[name], name


def test_layers_between_are_numbered_as_the_file_means(directory: Path) -> None:
    """Meta's code takes what goes into layers 3, 7 and so on, and transformers 4, which wrote the published files, did.
    transformers 5 takes what comes out of them."""
    content = json.loads((directory / "config.json").read_text())
    assert content["transformers_version"].startswith("5.")
    published = {**content, "transformers_version": "4.45.0.dev0"}
    published["vision_config"] = {**content["vision_config"], "intermediate_layers_indices": [1, 3]}
    assert family.read_config(published).vision == family.read_config(content).vision


@pytest.mark.parametrize(
    ("name", "count"), [("llama-3.2-11b-vision", 10_670_220_835), ("llama-3.2-90b-vision", 88_593_355_323)]
)
def test_presets(name: str, count: int) -> None:
    """The parameters of transformers' model with the same configuration."""
    config = PRESETS[name]()
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(MllamaConfig(**FAMILIES["mllama"].write_config(config)))
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("table", "cls"),
    [(family.CONFIG, MllamaConfig), (family.TEXT, MllamaTextConfig), (family.VISION, MllamaVisionConfig)],
)
def test_every_field_of_transformers_is_in_a_table(table: Any, cls: Any) -> None:
    names = of_config(cls)
    assert not missing(table, names)
    assert missing(table, {*names, "a_new_field"}) == ["a_new_field"]


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("text_config", "hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("text_config", "tie_word_embeddings", True, "tie_word_embeddings = True"),
        ("text_config", "cross_attention_layers", [1, 9], r"cross_attention_layers \[9\] beyond the 5 layers"),
        ("text_config", "head_dim", 64, "head_dim = 64, but hidden_size over num_attention_heads is 32"),
        ("vision_config", "vision_output_dim", 64, "vision_output_dim 64 must be 96"),
        ("vision_config", "supported_aspect_ratios", [[1, 1]], "numbers those of at most 4 tiles"),
        ("vision_config", "intermediate_layers_indices", [0, 4], "name layers beyond the 4 local ones"),
        ("vision_config", "patch_size", 5, "does not divide into patches of 5"),
    ],
)
def test_what_cannot_be_computed_is_named(part: str, field: str, value: object, message: str) -> None:
    content = made.config().to_dict()
    with pytest.raises(ConfigError, match=message):
        family.read_config({**content, part: {**content[part], field: value}})


def test_pictures_that_do_not_fit_are_refused(ours: CrossAttentionModel) -> None:
    pixels, grids = made.pictures(((1, 2),))
    with pytest.raises(Llama4Error, match="pictures need image_grids"):
        ours(prompt(5, (1,)), pixel_values=pixels)
    with pytest.raises(Llama4Error, match=r"holds 0 <\|image\|> tokens, but 1 pictures"):
        ours(prompt(5, ()), pixel_values=pixels, image_grids=grids)
    with pytest.raises(Llama4Error, match=r"holds 1 <\|image\|> tokens, but 0 pictures"):
        ours(prompt(5, (1,)))
    with pytest.raises(Llama4Error, match=r"pixel_values must be \[pictures, 4, 3, 28, 28\]"):
        ours(prompt(5, (1,)), pixel_values=pixels[0], image_grids=grids)
    with pytest.raises(Llama4Error, match="rows and columns of at most 4 tiles"):
        ours(prompt(5, (1,)), pixel_values=pixels, image_grids=torch.tensor([[3, 2]]))


def test_fresh_weights_leave_gates_closed(ours: CrossAttentionModel) -> None:
    fresh = copy.deepcopy(ours)
    fresh.init_weights(torch.Generator().manual_seed(0))
    gates = {name: parameter for name, parameter in fresh.named_parameters() if "gate" in name.rpartition(".")[2]}
    assert len(gates) == 2 * 2 + 2 * 2 + 3 and not any(parameter.any() for parameter in gates.values())
