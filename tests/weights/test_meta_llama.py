"""Meta's layout of Llama 1 to 3.3: ranks cut from transformers' models as Meta's parallel layers cut them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama4.api import Llama4
from llama4.config import RopeScaling
from llama4.errors import CheckpointError, ConfigError
from llama4.families.llama import LlamaFamily
from llama4.text.vocabulary import LLAMA3
from llama4.weights.convert import convert
from llama4.weights.meta.llama import config_from_params, params_from_config
from llama4.weights.meta.source import MetaSource
from llama4.weights.meta.write import write_ranks
from tests import small_model
from tests.parity.references import relative_error
from tests.text.test_generations import train

JOINS = {
    **{"attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "attention.wo": 1},
    **{"feed_forward.w1": 0, "feed_forward.w3": 0, "feed_forward.w2": 1, "output": 0},
}
"""Llama's ColumnParallelLinear (0) and RowParallelLinear (1)."""
OURS = {
    **{f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"},
    **{"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"},
    **{"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
}
SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}
IDS = torch.randint(3, 600, (2, 30), generator=torch.Generator().manual_seed(1))


def in_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Hugging Face's rows of q and k -> Meta's, row by row: its number i + j * head_dim / 2 is Meta's 2 i + j."""
    rows = list(weight)
    half = head_dim // 2
    heads = range(0, len(rows), head_dim)
    return torch.stack([rows[at + i + j * half] for at in heads for i in range(half) for j in range(2)])


def meta_names(model: LlamaForCausalLM) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        parts = name.removesuffix(".weight").removeprefix("model.").split(".")
        if parts[0] != "layers":
            names = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}
            tensors[f"{names[parts[0]]}.weight"] = tensor
            continue
        module = ".".join(parts[2:])
        is_turned = module in ("self_attn.q_proj", "self_attn.k_proj")
        key = f"layers.{parts[1]}.{OURS[module]}.weight"
        tensors[key] = in_pairs(tensor, tensor.shape[1] // 8) if is_turned else tensor
    return tensors


def write(directory: Path, params: Mapping[str, Any], model: LlamaForCausalLM, ranks: int, embeddings: int) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params))
    for rank in range(ranks):
        state: dict[str, Tensor] = {"rope.freqs": torch.ones(6)}
        for key, tensor in meta_names(model).items():
            *_, module, part = key.removesuffix(".weight").rpartition("layers.")[2].partition(".")
            join = embeddings if key.startswith("tok_") else JOINS.get(part or module or key, JOINS.get(key[:-7]))
            state[key] = tensor if join is None else tensor.chunk(ranks, dim=join)[rank].contiguous()
        torch.save(state, directory / f"consolidated.{rank:02d}.pth")


def make(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.1, **changes})).eval()


@torch.inference_mode()
@pytest.mark.parametrize("ranks", [1, 2])
def test_llama2(ranks: int, tmp_path: Path) -> None:
    """`vocab_size` is -1: the tokenizer says it. Ranks divide the embeddings by their width."""
    (tmp_path / "meta").mkdir()
    train(tmp_path / "meta" / "tokenizer.model")
    params = {"dim": 96, "n_layers": 2, "n_heads": 8, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
    theirs = make(vocab_size=700, rms_norm_eps=1e-5, max_position_embeddings=4096)
    write(tmp_path / "meta", params, theirs, ranks, embeddings=1)
    ours = Llama4.from_pretrained(tmp_path / "meta", progress=False)
    assert relative_error(ours.model(IDS), theirs(IDS).logits) < 1e-5
    text = ours.config.text
    assert (text.max_position_embeddings, text.bos_token_id, ours.stop_ids) == (4096, 1, (2,))
    convert(tmp_path / "meta", tmp_path / "hf", "hf", progress=False)
    back = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(back(IDS).logits, theirs(IDS).logits)
    convert(tmp_path / "hf", tmp_path / "again", "meta", ranks=ranks, progress=False)
    for path in sorted((tmp_path / "meta").glob("*.pth")):
        wanted, found = (torch.load(each / path.name, weights_only=True) for each in (path.parent, tmp_path / "again"))
        assert {*wanted} - {"rope.freqs"} == {*found}
        assert all(torch.equal(found[key], wanted[key]) for key in found)
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (tmp_path / "hf" / "tokenizer.model").read_bytes()


@torch.inference_mode()
@pytest.mark.parametrize("ranks", [1, 2])
def test_llama3(ranks: int, tmp_path: Path) -> None:
    """Grouped heads and scaled RoPE; ranks divide the embeddings by the vocabulary."""
    size = small_model.RANKS + LLAMA3.num_special_tokens
    params: dict[str, Any] = {"dim": 96, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "vocab_size": size}
    params |= {"ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    shape = {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
    theirs = make(vocab_size=size, rope_parameters=rope, **shape)
    write(tmp_path / "meta", params, theirs, ranks, embeddings=0)
    small_model.write_tokenizer(tmp_path / "meta" / "tokenizer.model")
    ours = Llama4.from_pretrained(tmp_path / "meta", progress=False)
    assert relative_error(ours.model(IDS), theirs(IDS).logits) < 1e-5
    assert ours.tokenizer.vocabulary is LLAMA3
    assert ours.stop_ids == tuple(ours.tokenizer.special(name) for name in LLAMA3.stop)
    convert(tmp_path / "meta", tmp_path / "hf", "hf", progress=False)
    back = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(back(IDS).logits, theirs(IDS).logits)
    assert back.generation_config.eos_token_id == list(ours.stop_ids)


@pytest.mark.parametrize("by_us", [False, True])
def test_ranks_that_are_not_the_models(by_us: bool, tmp_path: Path) -> None:
    """One is missing at the end, where names do not tell, or two have each other's name; torch.save wrote them, or we
    did."""
    params = {"dim": 96, "n_layers": 2, "n_heads": 8, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": 700}
    directory = tmp_path / "meta"
    write(directory, params, make(vocab_size=700), 2, embeddings=1)
    if by_us:
        theirs, config = directory.rename(tmp_path / "theirs"), config_from_params(params)
        shutil.copytree(theirs, directory, ignore=shutil.ignore_patterns("*.pth"))
        write_ranks(MetaSource(theirs, config), config, directory, ranks=2)
    first, second = (directory / f"consolidated.0{i}.pth" for i in range(2))
    second.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"has 1 files with 33,600 numbers of embeddings.* says 67,200; put all"):
        Llama4.from_pretrained(directory, progress=False)
    first.rename(second)
    (tmp_path / "kept").rename(first)
    with pytest.raises(CheckpointError, match=r"00.pth was written as consolidated.01.pth: the ranks are not in their"):
        Llama4.from_pretrained(directory, progress=False)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("rope_theta", 0, "rope_theta must be above 0, not 0.0"),
        ("rope_theta", -1.0, "rope_theta must be above 0"),
        ("norm_eps", -1e-5, "rms_norm_eps must be at least 0, not -1e-05"),
    ],
)
def test_numbers_that_cannot_be(field: str, value: float, reason: str, tmp_path: Path) -> None:
    params = {"dim": 96, "n_layers": 2, "n_heads": 8, "vocab_size": 700, field: value}
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(ConfigError, match=rf"params\.json is damaged, or not of a Llama model: {reason}"):
        Llama4.from_pretrained(tmp_path, progress=False)


def test_released_configurations() -> None:
    """As Meta published them, with the shapes that transformers' configurations of the same models have."""
    small: dict[str, Any] = {
        "dim": 2048,
        "ffn_dim_multiplier": 1.5,
        "multiple_of": 256,
        "n_heads": 32,
        "n_kv_heads": 8,
        "n_layers": 16,
    }
    small |= {"norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 128256}
    text = config_from_params(small).text
    assert (text.intermediate_size_mlp, text.head_dim, text.max_position_embeddings) == (8192, 64, 131072)
    assert text.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    big = {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8}
    llama2 = config_from_params({**big, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1})
    assert (llama2.text.intermediate_size_mlp, llama2.text.rope_theta) == (28672, 10000.0)
    assert params_from_config(llama2)["ffn_dim_multiplier"] == 1.3
    old = config_from_params({"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-06})
    assert (old.text.intermediate_size_mlp, old.text.max_position_embeddings) == (17920, 2048)


def test_what_metas_layout_cannot_say(tmp_path: Path) -> None:
    biased = LlamaFamily().write_config(config_from_params({"dim": 96, "n_layers": 2, "n_heads": 8}))
    from llama4.families.llama import read_config

    with pytest.raises(CheckpointError, match=r"no field for attention_bias = True \(it would be read as False\)"):
        params_from_config(read_config({**biased, "attention_bias": True}))
    (tmp_path / "params.json").write_text('{"dim": 96, "n_layers": 2}')
    with pytest.raises(ConfigError, match="lacks n_heads"):
        Llama4.from_pretrained(tmp_path)
