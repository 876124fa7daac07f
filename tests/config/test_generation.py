"""generation_config.json against transformers' `GenerationConfig`: its fields, what it reads from where, and what it
does with fields that are let through."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig as Theirs
from transformers import Llama4ForConditionalGeneration
from transformers.generation.configuration_utils import GenerationMode

from llama4.config import GenerationConfig
from llama4.config.generation import RANGES, REFUSED, REFUSED_SAMPLED, SAMPLED, USED, WITHOUT_EFFECT
from llama4.errors import ConfigError
from llama4.weights.side_files import SideFiles
from tests import small_model

FIELDS = {name for name in vars(Theirs()) if not name.startswith("_")}
TABLES = (set(USED), set(REFUSED), set(REFUSED_SAMPLED), set(WITHOUT_EFFECT))
OUT_OF_RANGE = {"temperature": -1, "top_p": 1.5, "top_k": -3, "min_p": 2, "repetition_penalty": 0}
VALUES: dict[str, Any] = {  # that transformers accepts, and that are not the default
    "num_beams": 4, "min_length": 3, "max_time": 0.5, "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[5]], "sequence_bias": [[[5], 1.0]],
    "suppress_tokens": [5], "begin_suppress_tokens": [5], "forced_bos_token_id": 5, "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": [3, 1.1], "guidance_scale": 2.0, "token_healing": True, "penalty_alpha": 0.6,
    "watermarking_config": {"greenlist_ratio": 0.5}, "dola_layers": "high", "constraints": [1],
    "force_words_ids": [[5]],
    "top_h": 0.4, "typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "max_length": 50, "max_new_tokens": 3,
    "num_return_sequences": 1, "early_stopping": True, "length_penalty": 2.0, "num_beam_groups": 2,
    "diversity_penalty": 1.0, "use_cache": False, "cache_implementation": "dynamic", "cache_config": {},
    "max_cache_len": 100, "low_memory": True, "prefill_chunk_size": 16, "disable_compile": True,
    "renormalize_logits": True, "bos_token_id": 5, "pad_token_id": 5, "decoder_start_token_id": 5,
    "transformers_version": "4.51.0", "num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.2, "assistant_ensemble_weight": 0.5, "assistant_lookbehind": 5,
    "target_lookbehind": 5, "max_matching_ngram_size": 3, "is_assistant": True, "remove_invalid_values": True,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    return Llama4ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def resolved(reference: Any, **fields: Any) -> Any:
    """What `generate` works with where a checkpoint's file has these fields."""
    reference.generation_config = Theirs(**fields)
    config, _ = reference._prepare_generation_config(None)
    reference._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
    return config


def test_every_field_is_used_without_effect_or_refused() -> None:
    assert set.union(*TABLES) == FIELDS
    assert sum(map(len, TABLES)) == len(FIELDS)  # each once


def with_tokens(content: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in content.items() if not key.endswith("_token_id")} | ids


@pytest.mark.parametrize(
    ("file", "model", "text"),
    [
        (None, {}, {}),
        (None, {}, {"eos_token_id": 5}),
        (None, {}, {"eos_token_id": [5, 7]}),
        (None, {"eos_token_id": 6}, {"eos_token_id": [5, 7]}),
        (None, {"eos_token_id": None}, {"eos_token_id": [5, 7]}),
        (None, {"do_sample": True, "temperature": 0.5, "top_p": 0.8}, {"eos_token_id": 3, "temperature": 0.9}),
        (None, {}, {"do_sample": True, "repetition_penalty": 1.3}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 6, "do_sample": True}, {"eos_token_id": 5, "top_p": 0.2}),
        ({"eos_token_id": 3, "do_sample": True}, {}, {}),
        ({"eos_token_id": 3, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0}, {}, {}),
        ({"eos_token_id": 3, "do_sample": True, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}, {}, {}),
        ({"eos_token_id": 3, "temperature": 0.6, "top_p": 0.9, "top_k": 9, "repetition_penalty": 1.2}, {}, {}),
        ({"eos_token_id": 3, "do_sample": False, "temperature": None, "top_k": 9}, {}, {}),
    ],
)
def test_what_is_read_from_where(
    reference: Any, tmp_path: Path, file: dict[str, Any] | None, model: dict[str, Any], text: dict[str, Any]
) -> None:
    content = small_model.config().to_dict()
    content = with_tokens(content, model) | {"text_config": with_tokens(content["text_config"], text)}
    (tmp_path / "config.json").write_text(json.dumps(content))
    if file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    reference.adjust_generation_fn(None, False, False, str(tmp_path), None, False, None, True, None, "main", "", False)
    theirs, _ = reference._prepare_generation_config(None)
    ours = SideFiles.read(tmp_path).generation_config
    eos = theirs.eos_token_id
    assert ours.eos_token_id == (eos if eos is None else (eos,) if isinstance(eos, int) else tuple(eos))
    penalty = {"repetition_penalty": theirs.repetition_penalty}
    drawn = {"temperature": theirs.temperature, "top_p": theirs.top_p, "min_p": theirs.min_p or 0}
    drawn |= {"top_k": theirs.top_k} if theirs.top_k else {}
    assert {"repetition_penalty": 1.0} | ours.sampling() == penalty | (drawn if theirs.do_sample else {})


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_SAMPLED])
def test_what_is_refused(name: str, sampled: bool) -> None:
    base = {"do_sample": sampled, "temperature": 0.7, "eos_token_id": 3}
    expected = GenerationConfig.from_dict(base).sampling()
    for neutral in (None, *{**REFUSED, **REFUSED_SAMPLED}[name]):
        assert GenerationConfig.from_dict({**base, name: neutral}).sampling() == expected
    read = GenerationConfig.from_dict({**base, name: VALUES[name]})
    if sampled or name in REFUSED:
        with pytest.raises(ConfigError, match=rf"generation_config\.json asks for {name} = .* remove it"):
            read.sampling()
        assert replace(read, content={}).sampling() == expected
    else:
        assert read.sampling() == expected


def test_the_file_that_asks_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_beams": 4, "hidden_size": 48}))
    read = SideFiles.read(tmp_path).generation_config
    assert read.content == {"num_beams": 4}
    with pytest.raises(ConfigError, match=r"^config\.json asks for num_beams = 4"):
        read.sampling()


@pytest.mark.parametrize("sampled", [False, True])
def test_transformers_does_nothing_with_what_is_let_through(reference: Any, sampled: bool) -> None:
    """Values that count as no request, and fields without effect: no processor of logits, no other way to decode."""
    neutral = {name: values[0] for name, values in {**REFUSED, **REFUSED_SAMPLED}.items() if values and values[0] != []}
    base = {"do_sample": sampled, "temperature": 1.0, "top_k": 0, "eos_token_id": 3}
    names = {"renormalize_logits", "remove_invalid_values"}  # a processor each: neither changes what is chosen
    for fields in (neutral, *({name: VALUES[name]} for name in WITHOUT_EFFECT if name in VALUES and name not in names)):
        config = resolved(reference, **base, **fields)
        processors = reference._get_logits_processor(config, 5, torch.ones(1, 5, dtype=torch.long), device="cpu")
        assert not processors, fields
        assert config.get_generation_mode() == (GenerationMode.SAMPLE if sampled else GenerationMode.GREEDY_SEARCH)


@pytest.mark.parametrize("name", RANGES)
def test_values_out_of_range_name_the_file(name: str) -> None:
    read = GenerationConfig.from_dict({"do_sample": True, name: OUT_OF_RANGE[name]})
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} is {OUT_OF_RANGE[name]}; it must be"):
        read.sampling()
    if name in SAMPLED:
        assert GenerationConfig.from_dict({name: OUT_OF_RANGE[name]}).sampling() == {}  # nothing is drawn


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": "<|eot|>"}, "eos_token_id is '<|eot|>'; it must be the id of a token"),
        ({"eos_token_id": [1, None]}, r"eos_token_id is \[1, None\]; it must be"),
        ({"eos_token_id": True}, "eos_token_id is True; it must be"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; it must be true or false"),
        ({"min_new_tokens": 2.5}, "min_new_tokens is 2.5; it must be a number of tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1; it must be"),
        ({"stop_strings": [3]}, r"stop_strings is \[3\]; it must be a text, or a list of texts"),
    ],
)
def test_fields_of_the_wrong_kind(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {message.replace('|', chr(92) + '|')}"):
        _ = SideFiles.read(tmp_path).generation_config


def test_what_was_read_is_written_but_for_what_changed() -> None:
    content = {"eos_token_id": 3, "do_sample": True, "top_p": 0.9, "max_new_tokens": 7, "chat_format": "x"}
    read = GenerationConfig.from_dict(content)
    assert read.to_dict() == content
    changed = replace(read, top_p=None, temperature=0.3, eos_token_id=(3, 4))
    assert changed.to_dict() == {**content, "top_p": None, "temperature": 0.3, "eos_token_id": [3, 4]}
    assert GenerationConfig.from_dict(changed.to_dict()).sampling() == changed.sampling()
    assert GenerationConfig(temperature=0.5, do_sample=True).to_dict() == {"do_sample": True, "temperature": 0.5}
