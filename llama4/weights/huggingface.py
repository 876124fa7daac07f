"""Hugging Face's layout: config.json, safetensors, and the tokenizer's and image processor's files."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from llama4.config import CONFIG_FILE, GENERATION_FILE, IMAGE_CONFIG_FILES, Llama4Config
from llama4.config.typed import read_value
from llama4.errors import CheckpointError
from llama4.families import family_of, family_of_type
from llama4.families.names import EMBEDDING, HEAD, VISION
from llama4.quantization.plan import QuantizationPlan
from llama4.reading import read_json
from llama4.text.tokenizer import Tokenizer
from llama4.text.tokenizer_config import TOKENIZER_CONFIG_FILE
from llama4.weights import modelopt
from llama4.weights.awq import Awq
from llama4.weights.bitsandbytes import Bitsandbytes
from llama4.weights.compressed import CompressedTensors
from llama4.weights.directory import write_json
from llama4.weights.experts import stack_experts
from llama4.weights.fbgemm import FbgemmFp8
from llama4.weights.fine_grained_fp8 import FineGrainedFp8
from llama4.weights.gptq import Gptq
from llama4.weights.layout import CheckpointLayout, WriteOptions
from llama4.weights.model_card import write_card
from llama4.weights.mxfp4 import TransformersMxfp4
from llama4.weights.quant_method import QuantMethod
from llama4.weights.safetensors import INDEX_FILE, SHARDS, SINGLE_FILE, Shards, open_safetensors, write_safetensors
from llama4.weights.side_files import (
    ORIGIN_FIELD,
    SIDE_FILES,
    TEMPLATE_FILE,
    SideFiles,
    generation_content,
    updated,
)
from llama4.weights.source import (
    FileNames,
    ModelNames,
    Noted,
    Source,
    View,
    in_file_order,
    in_model_order,
    without,
)
from llama4.weights.summary import summarize
from llama4.weights.unreadable import check_unquantized, unread_method

QUANT_METHODS: dict[str, QuantMethod] = {
    method.name: method
    for method in (
        *(CompressedTensors(), FbgemmFp8(), Bitsandbytes(), modelopt.ModelOpt(), TransformersMxfp4()),
        *(Gptq(), Awq(), FineGrainedFp8()),
    )
}
"""By `quant_method`; the first that writes a model's formats does."""

_BIAS = re.compile(r"language_model\..*\b(self_attn|feed_forward|lm_head)\b.*\.bias")
FLOATS = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
"""Dtypes of weights by their names in configurations."""


class HuggingFaceLayout(CheckpointLayout):
    """What transformers reads and writes, and this library natively."""

    name = "hf"
    title = "Hugging Face's"
    config_files = (CONFIG_FILE, *IMAGE_CONFIG_FILES, GENERATION_FILE, modelopt.CONFIG_FILE)
    side_files = (*config_files, *SIDE_FILES, INDEX_FILE, "tokenizer.json", "tokenizer.model")
    weight_files = (SINGLE_FILE, SHARDS)
    in_shards = True

    def recognises(self, directory: Path) -> bool:
        return (directory / CONFIG_FILE).is_file()

    def read_config(self, directory: Path) -> Llama4Config:
        config = family_of_type(read_json(directory / CONFIG_FILE).get("model_type")).read_config(directory)
        if config.quantization_config is None:
            return dataclasses.replace(config, quantization_config=modelopt.read_config(directory))
        return config

    def open(
        self,
        directory: Path,
        shards: Shards | None = None,
        *,
        dtype: torch.dtype | None = None,
        room: int | None = None,
    ) -> tuple[Llama4Config, Source]:
        config = self.read_config(directory)
        method, content = _method(directory, config), config.quantization_config
        if method is not None and content is not None:
            method.check(content)  # before anything is opened
        files = open_safetensors(directory, shards)
        if method is None:
            check_unquantized(directory, files)
        table = family_of(config).names(config, files.names())
        source = _without_zero_biases(config, ModelNames(files, table))
        if method is not None and content is not None:
            source = method.open(source, content, dtype or FLOATS.get(config.dtype, torch.bfloat16), table)
        if method is None or method.stacks_experts:
            source = stack_experts(source, room)
        if shards is None:
            config, source = _match_head(config, source)
        return _match_vision(config, in_model_order(source, table) if table.transforms else source)

    def write(
        self,
        source: Source,
        config: Llama4Config,
        tokenizer: Tokenizer | None,
        directory: Path,
        options: WriteOptions,
    ) -> None:
        table, content, summary = family_of(config).names(config), None, summarize(source)
        source = in_file_order(source, table) if table.transforms else source
        if source.plan:
            source, content = _writer(source.plan).encode(source, config.quantization_config, table)
        dtype = next(filter(FLOATS.__contains__, summary.dtypes), config.dtype)
        config = dataclasses.replace(config, dtype=dtype, quantization_config=content)
        _write_side_files(config, tokenizer, options.side_files, directory)
        if options.name is not None:
            write_card(directory, options.name, config, summary, options.side_files)
        files = FileNames(source, table)
        write_safetensors(files, directory, options.max_shard_bytes, options.stamp, progress=options.progress)


def _without_zero_biases(config: Llama4Config, source: Source) -> Source:
    """AutoGPTQ gives every Linear a bias, of zeros where the model has none."""
    text = config.text
    has_bias = {"self_attn": text.attention_bias, "feed_forward": text.mlp_bias, "lm_head": False}

    def is_nothing(name: str) -> bool:
        match = _BIAS.fullmatch(name)
        return match is not None and not has_bias[match[1]] and not bool(source.read(name).any())

    return without(source, is_nothing, "they are biases of zeros, and the model has none there")


def _match_head(config: Llama4Config, source: Source) -> tuple[Llama4Config, Source]:
    """Configuration and weights of a model that says that its head is its embeddings: as in transformers 5, one of both
    may be missing, and a head with other values is one of its own."""
    names = source.names()
    if not config.text.tie_word_embeddings or HEAD not in names or HEAD in source.plan:  # a packed one is its own
        return config, source
    if EMBEDDING not in names:
        return config, View(source, {EMBEDDING if name == HEAD else name: name for name in names})
    if torch.equal(source.read(HEAD), source.read(EMBEDDING)):
        return config, source
    note = "config.json ties the head to the embeddings, and the weights have a head with other values: it is not tied"
    untied = dataclasses.replace(config.text, tie_word_embeddings=False)
    return dataclasses.replace(config, text=untied), Noted(source, note)


def _match_vision(config: Llama4Config, source: Source) -> tuple[Llama4Config, Source]:
    """Configuration and weights, of which one may be of the decoder alone: then both are."""
    has_vision = any(name.startswith(VISION) for name in source.names())
    if config.vision is None and has_vision:
        note = "they are of a vision tower, and config.json is of the decoder alone"
        return config, without(source, lambda name: name.startswith(VISION), note)
    if config.vision is not None and not has_vision:
        note = "config.json has a vision tower, and the weights have none: the model reads text alone"
        return dataclasses.replace(config, vision=None), Noted(source, note)
    return config, source


def _method(directory: Path, config: Llama4Config) -> QuantMethod | None:
    """What a checkpoint is quantized by; None if it is not."""
    content = config.quantization_config
    if content is None:
        return None
    name = read_value(str | None, content.get("quant_method"), "quant_method", f"{CONFIG_FILE} (quantization_config)")
    if name in QUANT_METHODS:
        return QUANT_METHODS[name]
    raise unread_method(directory, content, QUANT_METHODS)


def _writer(plan: QuantizationPlan) -> QuantMethod:
    found = next((method for method in QUANT_METHODS.values() if method.writes(plan)), None)
    if found is None:
        formats = sorted({format.kind for format in plan.values() if format is not None})
        raise CheckpointError(
            f"no checkpoint has weights in {' and '.join(formats)} together; quantize with one scheme, or make one of "
            "floats first: of GGUF `llama4 convert MODEL other.gguf --type bf16`"
        )
    return found


def _write_side_files(
    config: Llama4Config, tokenizer: Tokenizer | None, side_files: SideFiles, directory: Path
) -> None:
    """What came with the model, byte by byte where its configuration has not changed since; ours where nothing came."""
    family = family_of(config)
    if tokenizer is not None:
        tokenizer.save(directory, config.text.max_position_embeddings)
        template = family.chat_template()
        if template is not None and TOKENIZER_CONFIG_FILE not in side_files and not side_files.chat_templates:
            (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    side_files.write(directory)
    now = _configs(config, side_files)
    before = _configs(family.read_config(directory), side_files) if CONFIG_FILE in side_files else now
    if side_files.origin is not None:
        now[CONFIG_FILE] = now[CONFIG_FILE] | {ORIGIN_FIELD: dataclasses.asdict(side_files.origin)}
    if tokenizer is not None and not config.text.eos_token_id and GENERATION_FILE not in side_files:
        now[GENERATION_FILE]["eos_token_id"] = list(tokenizer.stop_ids)
    for name, content in now.items():
        raw = side_files.json(name)
        changed = updated(raw, before[name], content) if name in side_files and name in before else content
        if changed != raw:
            write_json(directory / name, changed)
    back = family.read_config(directory)
    lost = [
        f"{field} = {value}"
        for here, there in ((config.text, back.text), (config.vision, back.vision))
        for field, value in (vars(here) if here is not None else {}).items()
        if getattr(there, field, None) != value
    ]
    if lost:
        raise CheckpointError(f"{family.title}'s config.json has no form for {', '.join(lost)}; keep the layout")


def _configs(config: Llama4Config, side_files: SideFiles) -> dict[str, dict[str, Any]]:
    """File -> what a configuration makes of it, in the form that the file has in `side_files`."""
    files = {
        CONFIG_FILE: family_of(config).write_config(config),
        GENERATION_FILE: generation_content(config, side_files),
    }
    if config.vision is not None:
        images, processor = IMAGE_CONFIG_FILES
        of_images, of_processor = family_of(config).image_files(config)
        if "image_processor" in side_files.json(processor):
            files[processor] = of_processor | {"image_processor": of_images}
        else:
            files |= {images: of_images, processor: of_processor}
    return files
