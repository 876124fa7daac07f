"""Options that several commands have. Each is spelled once here, under the name of the argument that it sets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from llama4.cache.formats import QUANTIZED
from llama4.cli.interrupts import answered_soon
from llama4.progress import starting
from llama4.quantization.schemes import ACTIVATIONS, SCHEMES
from llama4.text.chat_formats import CHAT_FORMATS
from llama4.vision.limits import LIMITS

if TYPE_CHECKING:
    from PIL import Image

    from llama4.api import Llama4
    from llama4.options import Options


def json_object(text: str) -> dict[str, Any]:
    """Raises:
    argparse.ArgumentTypeError: it is not a JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.200} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.200} is no JSON object; write it as '{{\"name\": value}}'")
    return value


HUB: dict[str, dict[str, Any]] = {
    "revision": {"help": "branch, tag or commit on the Hub"},
    "subfolder": {"metavar": "FOLDER", "help": "folder of the repository or directory that holds the model"},
}
"""Arguments of `Llama4.from_pretrained`, and of whatever else takes a model's name."""

FROM_PRETRAINED: dict[str, dict[str, Any]] = {
    **HUB,
    "dtype": {"default": "auto", "help": "type of the numbers: bfloat16, float16, float32, float64 (default: auto)"},
    "quantization": {"metavar": "SCHEME", "help": f"quantize while loading: {', '.join(SCHEMES)}"},
    "activations": {
        "default": "auto",
        "choices": ACTIVATIONS,
        "help": "what int4, int8 and GGUF are multiplied with on a CPU: float or int8 (default: auto)",
    },
    "batch_invariant": {
        "action": "store_true",
        "help": "give a request the same bits whatever requests are computed with it (CPU)",
    },
    "device": {"default": "auto", "help": "where to compute: cpu, cuda, cuda:1, ... (default: auto)"},
    "experts": {"default": "auto", "help": "how experts are computed: loop, grouped or megablocks (default: auto)"},
    "experts_device": {"metavar": "DEVICE", "help": "where the weights of experts stay: cpu saves GPU memory"},
    "experts_memory": {"metavar": "SIZE", "help": "GPU memory for copies of experts in use, such as 8GiB"},
    "cache_dtype": {
        "default": "auto",
        "help": f"type of the keys and values of the whole context: {', '.join(QUANTIZED)} (default: auto)",
    },
    "cache_device": {"metavar": "DEVICE", "help": "where keys and values are stored: cpu saves GPU memory"},
    "no_memory_map": {
        "dest": "memory_map",
        "action": "store_false",
        "help": "copy all weights into memory: slower to load, sometimes faster to decode",
    },
    "adapter": {"metavar": "DIR", "help": "an adapter, as `finetune` or PEFT writes it"},
    "rope_scaling": {
        "type": json_object,
        "metavar": "JSON",
        "help": """scale RoPE for longer contexts, such as '{"rope_type": "dynamic", "factor": 4}'""",
    },
    "chat_format": {"metavar": "NAME", "help": f"how prompts are written: {', '.join(CHAT_FORMATS)}"},
    "max_context": {"type": int, "metavar": "N", "help": "most tokens of prompt and reply together"},
}
"""Arguments of `Llama4.from_pretrained` -> the settings of their options for argparse."""

TRAINED = {name: FROM_PRETRAINED[name] for name in (*HUB, "dtype", "device")}
"""Those for a model that is trained, or a teacher."""

CHAT: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"type": int, "default": 256, "metavar": "N", "help": "most tokens of a reply (default: 256)"},
    "temperature": {"type": float, "metavar": "T", "help": "0 is greedy, higher varies (default: the model's)"},
    "top_p": {"type": float, "metavar": "P", "help": "sample from the most likely tokens that sum to P"},
    "top_k": {"type": int, "metavar": "K", "help": "sample from the K most likely tokens"},
    "min_p": {
        "type": float,
        "metavar": "P",
        "help": "sample from tokens at least P times as likely as the best",
    },
    "repetition_penalty": {
        "type": float,
        "metavar": "X",
        "help": "above 1, tokens of prompt and reply become less likely",
    },
    "presence_penalty": {
        "type": float,
        "metavar": "X",
        "help": "above 0, tokens already in the reply become less likely",
    },
    "frequency_penalty": {"type": float, "metavar": "X", "help": "the same, for each time a token is in the reply"},
    "min_tokens": {"type": int, "metavar": "N", "help": "fewest tokens of a reply"},
    "seed": {"type": int, "metavar": "N", "help": "number that makes sampling repeatable"},
    "stop": {"action": "append", "metavar": "TEXT", "help": "end the reply before this text; repeatable"},
    "chat_template_kwargs": {
        "type": json_object,
        "metavar": "JSON",
        "help": """variables of the prompt's format, such as '{"date_string": "1 May 2025"}'""",
    },
}
"""Arguments of `Llama4.chat`, likewise; what is not given is as the model's generation_config.json says."""


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that loads a model and makes it answer."""
    model = add_model_options(parser)
    model.add_argument("--model", default="tiny", help="embedded name, directory, GGUF file or Hub id (default: tiny)")
    model.add_argument(
        "--private-host",
        action="append",
        default=[],
        metavar="HOST",
        help="host on this machine or its network that pictures may be fetched from; repeatable",
    )
    reply = parser.add_argument_group("reply")
    reply.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    _add(reply, CHAT)


def add_model_options(
    parser: argparse.ArgumentParser, given: Mapping[str, dict[str, Any]] = FROM_PRETRAINED
) -> argparse._ArgumentGroup:
    """How a model is loaded, but not its name.

    Args:
        given: the arguments of `Llama4.from_pretrained` that have an option.
    """
    model = parser.add_argument_group("model")
    _add(model, given)
    parser.set_defaults(private_host=[])
    return model


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that takes a model's name."""
    _add(parser, HUB)


def _add(group: argparse._ActionsContainer, table: Mapping[str, dict[str, Any]]) -> None:
    for name, settings in table.items():
        group.add_argument("--" + name.replace("_", "-"), **settings)


def _arguments(options: argparse.Namespace, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is given of a table's; the options of a command may be fewer."""
    names = (settings.get("dest", name) for name, settings in table.items())
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def trained_options(options: argparse.Namespace) -> dict[str, Any]:
    return _arguments(options, TRAINED)


def loading_options_given(options: argparse.Namespace) -> list[str]:
    """Those of `FROM_PRETRAINED` that are not at their defaults, as they are typed."""
    parser = argparse.ArgumentParser(add_help=False)
    _add(parser, FROM_PRETRAINED)
    defaults = parser.parse_args([])
    names = {name: settings.get("dest", name) for name, settings in FROM_PRETRAINED.items()}
    chosen = [name for name, dest in names.items() if getattr(options, dest) != getattr(defaults, dest)]
    return ["--" + name.replace("_", "-") for name in chosen]


def load_model(options: argparse.Namespace) -> Llama4:
    with answered_soon():  # also of commands that answer Ctrl-C themselves afterwards
        with starting():
            from llama4.api import Llama4

        llm = Llama4.from_pretrained(options.model, **_arguments(options, FROM_PRETRAINED))
    if options.private_host:
        llm.processor.image_limits = replace(llm.processor.image_limits, private_hosts=options.private_host)
    return llm


def load_pictures(options: argparse.Namespace, names: Sequence[str]) -> list[Image.Image]:
    """Pictures that a user names, by path or URL.

    Raises:
        ImageError: one cannot be read.
    """
    if not names:
        return []
    from llama4.vision.images import load_image  # and numpy, which --help does not wait for

    limits = replace(LIMITS, private_hosts=options.private_host)
    return [load_image(name, limits) for name in names]


def chat_options(options: argparse.Namespace) -> Options:
    return cast("Options", _arguments(options, CHAT))


def opening(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The conversation before its first question."""
    return [{"role": "system", "content": options.system}] if options.system else []
