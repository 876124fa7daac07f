"""What a model is, from its configuration, the headers of its files, and what stands beside them. No weight is read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llama4.analysis import costs
from llama4.cache.formats import QUANTIZED
from llama4.config import Llama4Config
from llama4.errors import ArgumentError, ChatTemplateError, Llama4Error
from llama4.families import PRESETS, family_of
from llama4.inputs import Processor
from llama4.quantization.schemes import SCHEMES
from llama4.text.tokenizer import Tokenizer
from llama4.text.tokenizer_config import TOKENIZER_CONFIG_FILE
from llama4.tiny import EMBEDDED
from llama4.units import bytes_text, count_text
from llama4.weights import checkpoint, hub
from llama4.weights.hub_shards import HubShards
from llama4.weights.ignored import ignored_fields
from llama4.weights.layout import CheckpointLayout
from llama4.weights.safetensors import INDEX_FILE
from llama4.weights.side_files import NO_SIDE_FILES, SIDE_FILES, HubOrigin, SideFiles
from llama4.weights.source import Source
from llama4.weights.summary import summarize
from llama4.weights.unreadable import files_in, why_unreadable


def read_config(
    name: str, revision: str | None = None, token: str | None = None, subfolder: str | None = None
) -> Llama4Config:
    """The configuration of a preset ("scout", "maverick", ...), of a local directory, or of a model on the Hub.

    Raises:
        Llama4Error: no such model, or a configuration that is not of Llama 4.
    """
    if name in PRESETS:
        return PRESETS[name]()
    directory = hub.resolve(
        name, revision=revision, subfolder=subfolder, token=token, select=lambda layout: layout.config_files
    )
    return checkpoint.read_config(directory)


@dataclass(frozen=True)
class Model:
    """What `llama4 info` looks at. Of the weights, nothing but headers is read or fetched.

    Attributes:
        config: of a preset, or of the checkpoint.
        directory: with the small files; None for a preset.
        layout: see `checkpoint.LAYOUTS`; None for a preset.
        weights: their headers; None if they are not on this machine, nor on a Hub that can be reached.
        why_no_weights: in words, if there are weights that cannot be described.
        shards: the files with the weights, if these are on the Hub.
        origin: the repository and the commit, if the model is on the Hub.
    """

    config: Llama4Config
    directory: Path | None = None
    layout: CheckpointLayout | None = None
    weights: Source | None = None
    why_no_weights: str | None = None
    shards: HubShards | None = None
    origin: HubOrigin | None = None

    @cached_property
    def side_files(self) -> SideFiles:
        """What stands beside the weights.

        Raises:
            ConfigError: a config.json that is not JSON.
        """
        return checkpoint.read_side_files(self.directory) if self.directory is not None else NO_SIDE_FILES

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None if it is not in the directory.

        Raises:
            Llama4Error: it is unreadable or of another model.
        """
        return family_of(self.config).load_tokenizer(self.directory, self.config) if self.directory else None


def find(name: str, revision: str | None = None, token: str | None = None, subfolder: str | None = None) -> Model:
    """A preset ("scout", "maverick", ...), a local directory, or a model on the Hub.

    Raises:
        Llama4Error: no such model, one that is not of Llama 4, or weights in a format that this library does not run.
    """
    if name in PRESETS and name not in EMBEDDED:
        return Model(PRESETS[name]())
    directory = hub.resolve(
        name,
        revision=revision,
        subfolder=subfolder,
        token=token,
        select=lambda layout: (*layout.config_files, *SIDE_FILES, INDEX_FILE),
    )
    shards = hub.shards_on_hub(name, directory, subfolder=subfolder, token=token)
    layout = checkpoint.layout_of(directory)
    found = Model(
        layout.read_config(directory), directory, layout, shards=shards, origin=HubOrigin.of_snapshot(directory)
    )
    if shards is None or not (layout.in_shards or layout.weight_files):  # GGUF is here as a whole
        if layout.has_weights(directory):
            config, weights = checkpoint.open_checkpoint(directory)
            return replace(found, config=config, weights=weights)
        return replace(found, why_no_weights=why_unreadable(files_in(directory)))
    if not (files := shards.matching(layout.weight_files)):
        return replace(found, why_no_weights=why_unreadable(shards.sizes))
    if not layout.in_shards:
        why = f"{bytes_text(sum(files.values()))} of weights, described once they are on this machine"
        return replace(found, why_no_weights=why)
    config, weights = checkpoint.open_checkpoint(directory, shards)
    return replace(found, config=config, weights=weights)


def describe_model(model: Model, context: int | None = None) -> dict[str, Any]:
    """The facts of `llama4 info`, ready for JSON: those of the configuration (see `describe`), of the weights, of where
    the model comes from, and of what stands beside the weights.

    Raises:
        Llama4Error: a context longer than the model takes.
    """
    return {
        **describe(model.config, context),
        "quantization": describe_quantization(model),
        "checkpoint": describe_checkpoint(model),
        "prompts": describe_prompts(model),
        "replies": describe_replies(model),
    }


def describe_quantization(model: Model) -> dict[str, Any] | None:
    """How a quantized model's weights are stored; None if it is not quantized."""
    content = model.config.quantization_config
    summary = summarize(model.weights) if model.weights is not None else None
    if content is None and not (summary and summary.quantized):
        return None
    facts = {name: (content or {}).get(name) for name in ("quant_method", "format")}
    if summary is None:
        return facts
    facts["bytes"] = summary.bytes
    if summary.quantized:
        facts["formats"] = list(summary.formats)
        facts["quantized_parameters"] = summary.quantized
        facts["bits_per_weight"] = summary.bits_per_weight
    return facts


def describe_checkpoint(model: Model) -> dict[str, Any] | None:
    """What is in a model's directory or repository; None for a preset."""
    if model.directory is None or model.layout is None:
        return None
    summary = summarize(model.weights) if model.weights is not None else None
    base = model.side_files.recorded_origin
    return {
        "layout": model.layout.name,
        "weights": None
        if summary is None
        else {"bytes": summary.bytes, "dtypes": list(summary.dtypes), "about": str(summary)},
        "notes": list(model.weights.notes) if model.weights is not None else [],
        "why_no_weights": model.why_no_weights,
        "fetched_bytes": model.shards.fetched if model.shards is not None else 0,
        "repository": vars(model.origin) if model.origin is not None else None,
        "made_from": vars(base) if base is not None else None,
        "ignored_fields": ignored_fields(model.side_files),
    }


def describe_prompts(model: Model) -> dict[str, Any] | None:
    """Who writes the prompts; None for a preset.

    Raises:
        Llama4Error: files that are damaged, or a tokenizer of another model.
    """
    if model.directory is None:
        return None
    templates = model.side_files.chat_templates
    tokenizer, agrees, error = model.tokenizer, None, None
    chats = None if tokenizer is None and model.shards is None else True  # on the Hub the tokenizer is not fetched
    if tokenizer is not None:
        processor = Processor.from_config(tokenizer, model.config, templates)
        chats = processor.chats
    if tokenizer is not None and templates:
        try:
            agrees = processor.template_agrees
            processor.apply_chat_template([{"role": "user", "content": "Hello"}])
        except ChatTemplateError as reason:
            error = str(reason)
    return {
        "templates": list(templates),
        "agrees": agrees,
        "error": error,
        "chats": chats,
        "family": family_of(model.config).title,
    }


def describe_replies(model: Model) -> dict[str, Any] | None:
    """What ends a reply, and how its tokens are chosen where a caller does not say; None for a preset.

    Raises:
        Llama4Error: files that are damaged, or a tokenizer of another model.
    """
    if model.directory is None:
        return None
    said = model.side_files.generation_config
    tokenizer = model.tokenizer
    if tokenizer is not None:
        names: dict[int, Any] = {id_: name for name, id_ in tokenizer.special_tokens.items()}
    else:
        added = model.side_files.json(TOKENIZER_CONFIG_FILE).get("added_tokens_decoder")
        tokens = added.items() if isinstance(added, dict) else ()
        names = {int(id_): token.get("content") for id_, token in tokens if id_.isdecimal() and isinstance(token, dict)}
    configured = said.eos_token_id or model.config.text.eos_token_id
    ids = tokenizer.reply_ends(configured) if tokenizer is not None else configured or ()
    return {
        "stop_tokens": {id_: names.get(id_) for id_ in ids},
        "stop_strings": list(said.stop_strings or ()),
        "do_sample": said.do_sample,
        "sampling": None if said.refused else said.sampling(),
        "refused": said.refused,
        "ignored": said.ignored,
    }


def describe(config: Llama4Config, context: int | None = None) -> dict[str, Any]:
    """The facts that a configuration gives, ready for JSON; sizes in bytes, lengths in tokens.

    The cache is that of one sequence in bfloat16; `cache_bytes_per_token` is what a token adds once the chunked layers
    are full. With a context there is `cache_at_context`: the bytes of a cache of so many tokens, and the most it had
    while it grew, for each format of the layers that see the whole context.

    Raises:
        Llama4Error: a context longer than the model takes.
    """
    text, vision = config.text, config.vision
    window, total = text.max_position_embeddings, config.num_parameters()
    growing = (i for i in text.self_layers if text.window(i) is None)
    facts: dict[str, Any] = {
        "layers": text.num_hidden_layers,
        "layers_with_experts": len(text.moe_layers or ()),
        "layers_without_rope": len(text.self_layers) - sum(text.no_rope_layers or ()),
        "layers_of_cross_attention": len(text.cross_layers),
        "hidden_size": text.hidden_size,
        "attention_heads": text.num_attention_heads,
        "key_value_heads": text.num_key_value_heads,
        "experts": text.num_local_experts,
        "experts_per_token": text.num_experts_per_tok if text.moe_layers else 0,
        "vocabulary": text.vocab_size,
        "parameters": total,
        "active_parameters": config.num_active_parameters(),
        "bytes": weight_bytes(config),
        "window": window,
        "attention_chunk": text.attention_chunk_size,
        "sliding_window": text.sliding_window,
        "cache_bytes_per_token": sum(costs.key_value_bytes(text, i) for i in growing),
        "cache_bytes_full": costs.cache_bytes(text, window),
        "vision": None,
        "dtype": config.dtype,
        "note": config.note,
    }
    if context is not None:
        if not 1 <= context <= window:
            raise ArgumentError(f"a context of {context:,} tokens; this model takes from 1 to {window:,}, its window")
        names = ("bfloat16", *QUANTIZED)
        facts["cache_at_context"] = {
            "context": context,
            "bytes": {name: costs.cache_bytes(text, context, cache_dtype=name) for name in names},
            "peak_bytes": {name: costs.peak_cache_bytes(text, context, cache_dtype=name) for name in names},
        }
    if vision is not None:
        facts["vision"] = {
            "layers": vision.num_hidden_layers,
            "hidden_size": vision.hidden_size,
            "tile": vision.image_size,
            "max_tiles": vision.max_tiles,
            "tokens_per_tile": vision.tokens_per_tile,
            "picture_cache_bytes": costs.picture_cache_bytes(config),
        }
    return facts


def weight_bytes(config: Llama4Config) -> dict[str, int]:
    """Bytes of all weights in dtypes, and in the schemes that suit the model: as `llama4 quantize` writes them, with
    scales and with what no scheme quantizes, in the model's dtype."""
    sizes = {dtype: costs.weight_bytes(config, dtype=dtype) for dtype in ("float32", "bfloat16")}
    for scheme in ("fp8", "int4"):
        with suppress(Llama4Error):  # its shapes are not for it
            plan = costs.quantization_plan(config.text, scheme)
            sizes[scheme] = costs.weight_bytes(config, plan, config.dtype)
    return sizes


def table(name: str, facts: dict[str, Any]) -> str:
    """The facts as lines of text."""
    lines = {
        "layers": f"{facts['layers']}, {facts['layers_with_experts']} with experts, "
        f"{facts['layers_without_rope']} without RoPE"
        + (f", {crossing} of cross-attention" if (crossing := facts["layers_of_cross_attention"]) else ""),
        "width": f"{facts['hidden_size']}, {facts['attention_heads']} query and {facts['key_value_heads']} key heads",
        "experts": f"{facts['experts']}, {facts['experts_per_token']} per token, and a shared one"
        if facts["experts_per_token"]
        else "none",
        "vocabulary": f"{facts['vocabulary']:,}",
        "parameters": f"{facts['parameters']:,} ({count_text(facts['parameters'])})",
        "active": f"{facts['active_parameters']:,} ({count_text(facts['active_parameters'])}) per token",
        "weights": weights_line(facts["bytes"], facts["dtype"]),
        "window": f"{facts['window']:,} tokens"
        + (f", in chunks of {facts['attention_chunk']:,} on layers with RoPE" if facts["attention_chunk"] else "")
        + (f", of which a token sees {facts['sliding_window']:,}" if facts["sliding_window"] else ""),
        "cache": f"{bytes_text(facts['cache_bytes_per_token'])} per token, {bytes_text(facts['cache_bytes_full'])} at "
        "the full window, in bfloat16",
    }
    if cached := facts.get("cache_at_context"):
        sizes = (f"{bytes_text(size)} in {name}" for name, size in cached["bytes"].items())
        lines["at context"] = f"{cached['context']:,} tokens take {', '.join(sizes)}"
        if cached["peak_bytes"] != cached["bytes"]:
            lines["at context"] += f"; on the way at most {bytes_text(cached['peak_bytes']['bfloat16'])} in bfloat16"
    if vision := facts["vision"]:
        lines["vision"] = (
            f"{vision['layers']} layers, width {vision['hidden_size']}, up to {vision['max_tiles']} tiles of "
            f"{vision['tile']} pixels"
        )
        if cached := vision["picture_cache_bytes"]:
            lines["vision"] += f"; a picture is one token, and takes up to {bytes_text(cached)} in the cache"
        else:
            lines["vision"] += f" and a global one, {vision['tokens_per_tile']} tokens each"
    else:
        lines["vision"] = "none"
    stored = facts.get("quantization") or {}
    if said := [stored[name] for name in ("quant_method", "format") if stored.get(name)]:
        lines["quantized"] = ", ".join(said)
    if files := facts.get("checkpoint"):
        lines |= checkpoint_lines(files)
    if prompts := facts.get("prompts"):
        lines["prompts"] = prompts_line(prompts)
    if replies := facts.get("replies"):
        lines |= replies_lines(replies)
    if facts["note"]:
        lines["note"] = facts["note"]
    return "\n".join([name, *(f"  {key:<12}{value}" for key, value in lines.items())])


def weights_line(sizes: dict[str, int], dtype: str) -> str:
    """What `weight_bytes` says, as a line of the table: schemes leave some weights as they are."""
    line = ", ".join(f"{bytes_text(size)} in {name}" for name, size in sizes.items())
    schemes = [name for name in sizes if name in SCHEMES]
    return f"{line}; {' and '.join(schemes)} with all else in {dtype}" if schemes else line


def checkpoint_lines(files: dict[str, Any]) -> dict[str, str]:
    """What `describe_checkpoint` says, as lines of the table."""
    lines = {"files": f"{checkpoint.LAYOUTS[files['layout']].title} layout: "}
    if files["weights"] is not None:
        lines["files"] += files["weights"]["about"]
    else:
        lines["files"] += files["why_no_weights"] or "no weights here"
    if files["notes"]:
        lines["loading"] = "; ".join(files["notes"])
    if files["fetched_bytes"]:
        lines["files"] += f"; headers alone were fetched, {bytes_text(files['fetched_bytes'])}"
    if repository := files["repository"]:
        lines["on the Hub"] = f"{repository['repo_id']} at commit {repository['commit']}"
    if base := files["made_from"]:
        lines["made from"] = f"{base['repo_id']} at commit {base['commit']}"
    if ignored := files["ignored_fields"]:
        lines["ignored"] = "; ".join(f"{', '.join(names)} in {place}" for place, names in ignored.items())
    return lines


def prompts_line(prompts: dict[str, Any]) -> str:
    """What `describe_prompts` says, as a line of the table."""
    if not prompts["templates"]:
        if prompts["chats"] is None:
            return "unknown: there is no tokenizer"
        return (
            f"in {prompts['family']}'s format" if prompts["chats"] else "none that is known: complete() and --raw alone"
        )
    line = "by the checkpoint's own chat template"
    if prompts["templates"] != ["default"]:
        line += f" ({', '.join(prompts['templates'])})"
    if prompts["agrees"]:
        line += f", which writes what {prompts['family']}'s format does"
    return f"{line}; {prompts['error']}" if prompts["error"] else line


def replies_lines(replies: dict[str, Any]) -> dict[str, str]:
    """What `describe_replies` says, as lines of the table."""
    stops = [f"{id_} {name}" if name else str(id_) for id_, name in replies["stop_tokens"].items()]
    sampling = [
        "drawn" if replies["do_sample"] else "greedy",
        *(f"{name} {value}" for name, value in (replies["sampling"] or {}).items()),
        *(f"{name} {value} (refused when it is asked)" for name, value in replies["refused"].items()),
        *(f"{name} {value} (no effect)" for name, value in replies["ignored"].items()),
    ]
    ends = ", ".join([*stops, *map(repr, replies["stop_strings"])]) or "the limit"
    return {"ends at": ends, "sampling": ", ".join(sampling)}
