"""What a checkpoint says of generation: which tokens end a reply, and how tokens are chosen if a caller does not say.

The file is generation_config.json. Its fields, and what absent ones mean, are those of transformers' GenerationConfig;
every field of that class is in one of the tables here: used, without effect, or refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeGuard

from llama4.config.fields import FieldTable
from llama4.config.hf_json import CONFIG_FILE
from llama4.errors import ArgumentError, ConfigError
from llama4.reading import MAX_INT

GENERATION_FILE = "generation_config.json"

RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value < 1e300, "0 (greedy) or more, such as 0.7"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1 (all tokens)"),
    "top_k": (
        lambda value: is_integer(value) and 1 <= value <= MAX_INT,
        "at least 1; the size of the vocabulary for all",
    ),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 (all tokens) to 1"),
    "repetition_penalty": (lambda value: 0 < value < 1e300, "above 0, such as 1.1; 1 is none"),
}
"""Settings of sampling -> what their values must be, as a test and in words."""

SAMPLED: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0}
"""Settings that count where `do_sample` is true, and what a file means that is silent on one (transformers' values)."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "min_length": (0,),
    "max_time": (),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "watermarking_config": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
}
"""Fields that change what is generated, in ways that are not implemented -> values that, like null, change nothing."""

REFUSED_SAMPLED: Mapping[str, tuple[Any, ...]] = {
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
"""Likewise, where `do_sample` is true; without it they change nothing."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "max_length": "max_new_tokens of the call decides",
    "max_new_tokens": "max_new_tokens of the call decides",
    "num_return_sequences": "n of the call decides",
    **dict.fromkeys(("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty"), "of beam search"),
    **dict.fromkeys(("use_cache", "cache_implementation", "cache_config", "max_cache_len"), "of another cache"),
    **dict.fromkeys(("low_memory", "prefill_chunk_size", "compile_config", "disable_compile"), "of speed and memory"),
    "continuous_batching_config": "of speed and memory",
    **dict.fromkeys(("use_mtp", "is_assistant", "speculation_type", "assistant_early_exit"), "of speculation"),
    **dict.fromkeys(("num_assistant_tokens", "num_assistant_tokens_schedule"), "of speculation"),
    **dict.fromkeys(("assistant_confidence_threshold", "assistant_ensemble_weight"), "of speculation"),
    **dict.fromkeys(("assistant_lookbehind", "target_lookbehind"), "of speculation"),
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size"), "of speculation"),
    "renormalize_logits": "probabilities are normalised anyway",
    "remove_invalid_values": "logits that are no numbers are an error",
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), "of the output"),
    "return_dict_in_generate": "of the output",
    "bos_token_id": "prompts begin with the tokenizer's",
    "pad_token_id": "padding is masked",
    "decoder_start_token_id": "of encoder-decoder models",
    "transformers_version": "metadata",
}
"""Fields that change nothing here -> why. Names that transformers does not know change nothing either."""


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a caller gave a whole number; numpy's are, True is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a caller gave a number; numpy's are, True is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_setting(name: str, value: float) -> None:
    """Raises:
    Llama4Error: a setting of sampling out of its range.
    """
    is_valid, limits = RANGES[name]
    if not is_number(value) or not is_valid(value if is_integer(value) else float(value)):
        raise ArgumentError(f"{name} is {value!r:.80}; it must be {limits}")


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says of generation; None where it is silent.

    Attributes:
        do_sample: whether tokens are drawn where a caller does not say; else the most likely one is taken.
        temperature, top_p, top_k, min_p: how they are drawn, see `Sampler`. Without `do_sample` they have no effect.
        repetition_penalty: see `Sampler`; with and without `do_sample`.
        min_new_tokens: tokens before which none of these ends a reply, where it may be any text.
        eos_token_id: the tokens that end a reply.
        stop_strings: texts that end a reply, where a caller gives none.
        content: all of generation_config.json, as it was read.
        file: what it was read from, for errors.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_new_tokens: int | None = None
    eos_token_id: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] | None = None
    content: Mapping[str, Any] = field(default_factory=dict, repr=False)
    file: str = field(default=GENERATION_FILE, repr=False, compare=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GenerationConfig:
        """From the content of a config.json beside which there is no generation_config.json.

        Raises:
            ConfigError: a field of the wrong kind.
        """
        fields = {**(config.get("text_config") or {}), **{key: v for key, v in config.items() if v is not None}}
        names = [name for name in (*USED, *REFUSED, *REFUSED_SAMPLED) if name in fields]
        return cls.from_dict({name: fields[name] for name in names}, CONFIG_FILE)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], file: str = GENERATION_FILE) -> GenerationConfig:
        """From the content of generation_config.json.

        Raises:
            ConfigError: a field of the wrong kind.
        """
        said = {name: content[name] for name in USED if content.get(name) is not None}
        for name, kind, words in (
            ("eos_token_id", int, "the id of a token, or a list of ids"),
            ("stop_strings", str, "a text, or a list of texts"),
        ):
            value = said.pop(name, [])
            items = value if isinstance(value, list) else [value]
            if any(type(item) is not kind for item in items):
                raise ConfigError(f"{file}: {name} is {value!r}; it must be {words}")
            said[name] = tuple(items) or None
        if not isinstance(said.get("do_sample", False), bool):
            raise ConfigError(f"{file}: do_sample is {said['do_sample']!r}; it must be true or false")
        if type(least := said.get("min_new_tokens", 0)) is not int or least < 0:
            raise ConfigError(f"{file}: min_new_tokens is {least!r}; it must be a number of tokens, 0 or more")
        return cls(**said, content=content, file=file)

    def to_dict(self) -> dict[str, Any]:
        """The content of generation_config.json: what was read, and what has been changed since."""
        read, fields = type(self).from_dict(self.content), {}
        for name in USED:
            value = getattr(self, name)
            if value != getattr(read, name):
                fields[name] = list(value) if isinstance(value, tuple) else value
        return {**self.content, **fields}

    def sampling(self) -> dict[str, Any]:
        """The settings of a `Sampler` where a caller gives none.

        Raises:
            ConfigError: the checkpoint asks for what is not implemented, or has a value out of its range.
        """
        if self.refused:
            raise ConfigError(self.why_refused())
        names = [name for name in RANGES if self.do_sample or name not in SAMPLED]
        said = {name: value for name in names if (value := getattr(self, name)) is not None}
        settings = {**SAMPLED, **said} if self.do_sample else said
        if settings.get("top_k") == 0:  # all tokens
            del settings["top_k"]
        for name, value in settings.items():
            try:
                check_setting(name, value)
            except ValueError as error:
                raise ConfigError(f"{self.file}: {error}") from None
        return settings | ({"min_tokens": self.min_new_tokens} if self.min_new_tokens else {})

    @property
    def refused(self) -> dict[str, Any]:
        """What the checkpoint asks for and is not implemented."""
        table = {**REFUSED, **REFUSED_SAMPLED} if self.do_sample else REFUSED
        asked = {name: self.content.get(name) for name in table}
        return {name: value for name, value in asked.items() if value is not None and value not in table[name]}

    def why_refused(self) -> str:
        asked = ", ".join(f"{name} = {value}" for name, value in self.refused.items())
        return (
            f"{self.file} asks for {asked}, which this library does not do; remove it from the file, or do without: "
            "llm.generation_config = dataclasses.replace(llm.generation_config, content={})"
        )

    @property
    def ignored(self) -> dict[str, Any]:
        """What the checkpoint says and has no effect; ids and metadata are not listed."""
        names = (name for name in self.content if name not in (*USED, *REFUSED, *REFUSED_SAMPLED, *_OF_COURSE))
        return {name: self.content[name] for name in names if not name.startswith("_")}


USED = tuple(f.name for f in dataclasses.fields(GenerationConfig) if f.name not in ("content", "file"))
"""Fields of generation_config.json that have an effect."""

FIELDS = FieldTable(GENERATION_FILE, USED, WITHOUT_EFFECT, fixed={**REFUSED, **REFUSED_SAMPLED})
"""What is fixed is refused when a reply is asked for, see `GenerationConfig.sampling`; logits can be had without."""

_OF_COURSE = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")
