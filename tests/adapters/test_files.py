"""Adapters that PEFT reads and writes, on transformers' Llama 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4.adapters import files
from llama4.adapters.config import LoraConfig
from llama4.adapters.files import CONFIG_FILE, LAYOUTS, WEIGHTS_FILE, load_adapter, save_adapter
from llama4.adapters.lora import Adapter
from llama4.api import Llama4
from llama4.cli.main import main
from llama4.errors import ArgumentError, CheckpointError, ConfigError, Llama4Error
from tests import small_model
from tests.adapters.test_lora import IDS, logits, random_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it

STACKS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
CONFIG = LoraConfig(rank=3, alpha=6.0, ranks={"experts": 2}, targets=("attention", "experts", "shared", "projector"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("adapters") / "model")


@pytest.fixture
def llm(directory: Path) -> Llama4:
    return Llama4.from_pretrained(directory)


def theirs(directory: Path) -> Any:
    from transformers import Llama4ForConditionalGeneration

    return Llama4ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # parameters do match
def test_peft_computes_what_we_write(llm: Llama4, directory: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = random_adapter(llm.model, CONFIG)
    save_adapter(adapter, llm.model, tmp_path / "adapter", base="a/model")
    adapter.attach(llm.model)
    model = PeftModel.from_pretrained(theirs(directory), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert (model(IDS).logits - logits(llm.model)).abs().max() < 1e-5
        with model.disable_adapter(), adapter.detached(llm.model):
            assert (model(IDS).logits - logits(llm.model)).abs().max() < 1e-5


@pytest.mark.parametrize("transposed", [False, True], ids=["since 0.19", "before"])
def test_we_compute_what_peft_writes(llm: Llama4, directory: Path, tmp_path: Path, transposed: bool) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    base = theirs(directory)
    if transposed:  # what brings the older form back
        for module in base.modules():
            if type(module).__name__ == "Llama4TextExperts":
                module.is_transposed = True
    linears = r".*language_model.*(\.[qo]_proj|shared_expert\.\w+_proj)"
    config = PeftConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=linears, target_parameters=STACKS)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(str(tmp_path / "adapter"))
    adapter = load_adapter(tmp_path / "adapter", llm.model)
    assert len(adapter.names) == 4 * (2 + 3 + 2)
    adapter.attach(llm.model)
    with torch.no_grad():
        assert (model(IDS).logits - logits(llm.model)).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_peft_around_our_model_writes_what_it_writes_around_transformers(
    llm: Llama4, directory: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(r=2, target_modules=["q_proj", "fc1"], target_parameters=STACKS)
    for name, base in {"theirs": theirs(directory), "ours": llm.model}.items():
        get_peft_model(base, config).save_pretrained(str(tmp_path / name))
    found, wanted = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("ours", "theirs"))
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in wanted.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_comes_back(llm: Llama4, tmp_path: Path, layout: str) -> None:
    adapter = random_adapter(llm.model, LoraConfig(rank=4, alpha=3.0, rslora=True, targets=CONFIG.targets))
    save_adapter(adapter, llm.model, tmp_path, layout=layout)
    again = load_adapter(tmp_path, llm.model)
    assert set(again.names) == set(adapter.names)
    assert again.config.rank == 4 and again.config.rslora and set(again.config.targets) == set(CONFIG.targets)
    found, wanted = dict(again.items()), dict(adapter.items())
    for name in adapter.names:
        assert torch.equal(found[name].a, wanted[name].a) and torch.equal(found[name].b, wanted[name].b), name
        assert found[name].scale == pytest.approx(wanted[name].scale)


def test_experts_with_an_adapter_for_each_matrix(llm: Llama4, tmp_path: Path) -> None:
    """As vLLM's users write them: gate and up do not share their A. The sum is made by hand."""
    adapter = random_adapter(llm.model, LoraConfig(rank=2, alpha=4.0, targets=("experts",)))
    save_adapter(adapter, llm.model, tmp_path, layout="per-expert")
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    key = "base_model.model.language_model.model.layers.1.feed_forward.experts.{}.{}_proj.lora_{}.weight"
    for i in range(8):
        name = key.format(i, "up", "A")
        tensors[name] = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(i))
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    lora = dict(load_adapter(tmp_path, llm.model).items())[
        "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
    ]
    for i in range(8):
        halves = [tensors[key.format(i, m, "B")] @ tensors[key.format(i, m, "A")] * 2.0 for m in ("gate", "up")]
        assert (lora.delta(i) - torch.cat(halves)).abs().max() < 1e-5


def test_several_by_name(llm: Llama4, directory: Path, tmp_path: Path) -> None:
    places = {}
    for seed, name in enumerate(("one", "two")):
        save_adapter(random_adapter(llm.model, CONFIG, seed=seed), llm.model, tmp_path / name)
        places[name] = tmp_path / name
    several = Llama4.from_pretrained(directory, adapter=places)
    alone = Llama4.from_pretrained(directory, adapter=places["two"])
    assert several.adapters.active == "one" and alone.adapters.active == "default"
    first = several.chat("Hello", max_new_tokens=8).text
    several.set_adapter("two")
    assert several.chat("Hello", max_new_tokens=8).text == alone.chat("Hello", max_new_tokens=8).text != first
    several.set_adapter(None)
    assert several.chat("Hello", max_new_tokens=8).text == llm.chat("Hello", max_new_tokens=8).text
    with pytest.raises(ArgumentError, match="no adapter 'three'; those loaded: one, two"):
        several.set_adapter("three")


def test_merge_command(llm: Llama4, directory: Path, tmp_path: Path) -> None:
    adapter = random_adapter(llm.model, CONFIG)
    save_adapter(adapter, llm.model, tmp_path / "adapter")
    assert main(["merge", str(directory), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    adapter.attach(llm.model)
    merged = Llama4.from_pretrained(tmp_path / "merged")
    assert (logits(merged.model) - logits(llm.model)).abs().max() < 1e-4
    assert main(["merge", str(directory), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 1  # it is in use


def test_merged_into_packed_weights(directory: Path) -> None:
    """Rounded after the sum: what is stored is what quantizing the merged float matrix gives."""
    llm = Llama4.from_pretrained(directory, quantization="int8")
    adapter = random_adapter(llm.model, CONFIG)
    name = "language_model.model.layers.0.self_attn.q_proj"
    packed, lora = llm.model.get_submodule(name), dict(adapter.items())[name]
    wanted = packed.dequantize() + lora.delta()  # type: ignore[operator]
    llm.adapters.add("x", adapter)
    llm.set_adapter("x")
    llm.merge_adapter()
    assert llm.adapters.active is None and not len(llm.adapters)
    found = packed.dequantize()  # type: ignore[operator]
    assert (found - wanted).abs().amax(1).le(wanted.abs().amax(1) / 127 * 0.51).all()


def damage(directory: Path, **fields: Any) -> None:
    content = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps(content | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; this library computes LORA"),
        ({"use_dora": True}, "has use_dora True, which is not computed"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"alora_invocation_tokens": [1, 2]}, r"has alora_invocation_tokens \[1, 2\], which is not computed"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_niter_4': the adapter is for weights"),
        ({"lora_alpha": "much"}, "has lora_alpha or alpha_pattern 'much'"),
        ({"alpha_pattern": ["x"]}, "alpha_pattern that are no objects"),
        ({"rank_pattern": 5}, "rank_pattern or alpha_pattern that are no objects"),
        ({"lora_alpha": 10**400}, r"adapter_config\.json has lora_alpha or alpha_pattern 10"),
        ({"lora_alpha": -1}, "must be a number above 0"),
        ({"use_rslora": "false"}, "use_rslora 'false'; it must be true or false"),
        ({"alpha_pattern": {"(": 4}}, "has a key in alpha_pattern that cannot be used: .* is no regular expression"),
        ({"alpha_pattern": {f"(x{'|a' * 4000}){i}": 4 for i in range(100)}}, r"which takes more than 0\.05 s"),
        ({"alpha_pattern": {r"(.|\w)*_": 4}}, r"in alpha_pattern, which takes more than 0\.05 s; write names"),
        ({"target_parameters": 5}, "has target_parameters 5; it must be a list of names"),
    ],
)
def test_what_is_not_computed_is_refused(
    llm: Llama4, tmp_path: Path, fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    save_adapter(Adapter.create(llm.model, CONFIG), llm.model, tmp_path)
    damage(tmp_path, **fields)
    with pytest.raises(ConfigError, match=message):
        load_adapter(tmp_path, llm.model)


def test_keys_of_alpha_pattern_are_expressions(llm: Llama4, tmp_path: Path) -> None:
    """The first that fits the end of a name, as in PEFT's `get_pattern_key`."""
    from peft.utils.other import get_pattern_key

    save_adapter(Adapter.create(llm.model, LoraConfig(rank=8, targets=("attention",))), llm.model, tmp_path)
    alphas = {
        r"layers\.[01]\.self_attn\.q_proj": 16,
        "self_attn.k_proj": 24,
        r".*\.2\..*": 32,
        "q_proj": 40,
        "proj": 48,
    }
    damage(tmp_path, lora_alpha=8, alpha_pattern=alphas)
    scales = {name: lora.scale for name, lora in load_adapter(tmp_path, llm.model).items()}
    assert set(scales.values()) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert all(scale == alphas.get(get_pattern_key([*alphas], name), 8) / 8 for name, scale in scales.items())


@pytest.mark.parametrize("first", ["pissa", "olora"])
def test_adapters_for_other_weights_than_the_bases(llm: Llama4, directory: Path, tmp_path: Path, first: Any) -> None:
    """PEFT takes the first A and B out of the base; what it writes is for what is left of that."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(r=4, init_lora_weights=first, target_modules=r".*language_model.*\.q_proj")
    get_peft_model(theirs(directory), config).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=f"has init_lora_weights '{first}': the adapter is for weights that PEFT"):
        load_adapter(tmp_path, llm.model)


def test_weights_that_do_not_fit(llm: Llama4, tmp_path: Path) -> None:
    save_adapter(Adapter.create(llm.model, CONFIG), llm.model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    bad = next(key for key in tensors if "q_proj.lora_A" in key)
    save_file(tensors | {bad: torch.zeros(3, 47)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"does not fit this model[\s\S]*layers\.0\.self_attn\.q_proj"):
        load_adapter(tmp_path, llm.model)
    copy, size = "base_model.model.language_model.lm_head.weight", llm.model.language_model.lm_head.weight.shape
    for rows in (size[0], size[0] + 8):  # PEFT's copy of the model's own, and one of more tokens
        save_file(tensors | {copy: torch.zeros(rows, size[1])}, tmp_path / WEIGHTS_FILE)
        if rows == size[0]:
            load_adapter(tmp_path, llm.model)
    with pytest.raises(CheckpointError, match=r"in another shape[\s\S]*lm_head\.weight"):
        load_adapter(tmp_path, llm.model)
    a, b = bad, bad.replace("lora_A", "lora_B")
    for pair in ((torch.zeros(0, 48), torch.zeros(48, 0)), (torch.zeros(9000, 48), torch.zeros(48, 9000))):
        save_file(tensors | {a: pair[0], b: pair[1]}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(CheckpointError, match=r"q_proj"):
            load_adapter(tmp_path, llm.model)
    number = bad.replace("self_attn.q_proj", f"feed_forward.experts.{'9' * 5000}.up_proj")
    save_file(tensors | {number: torch.zeros(3, 48)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_adapter(tmp_path, llm.model)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_adapter(tmp_path, llm.model)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(tmp_path, llm.model)
    with pytest.raises(CheckpointError, match="is no directory"):
        load_adapter(tmp_path / "nothing", llm.model)
    with pytest.raises(Llama4Error, match=r"choose one of peft, peft-0\.18, per-expert"):
        save_adapter(Adapter.create(llm.model, CONFIG), llm.model, tmp_path, layout="peft-1")
