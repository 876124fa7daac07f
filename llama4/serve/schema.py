"""Requests in OpenAI's form -> what the engine is asked. Every field that OpenAI or vLLM knows is in one table: read,
without effect, or refused; an unknown one is ignored, once with a line in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from llama4.serve.engine import EngineOptions
from llama4.serve.errors import RequestError

logger = logging.getLogger(__name__)

MAX_CHOICES = 16
MAX_ALTERNATIVES = 20

WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("reasoning_effort", "verbosity", "prediction", "parallel_tool_calls", "priority", "best_of"),
}
"""Fields that are known and change nothing here."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "audio": (),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none",),
    "web_search_options": (),
    "suffix": ("",),
    "min_tokens": (0,),
}
"""Fields that would change the reply in ways that are not there -> values that, like null, change nothing."""


@dataclass(frozen=True)
class Asked:
    """What the requests of chat and of completion have in common.

    Attributes:
        options: for `Engine.stream`.
        choices: how many replies are wanted.
        alternatives: of how many likely tokens their probability is told; None for no probabilities at all.
        stream: whether the reply comes in pieces.
        include_usage: whether these end with how many tokens it took.
    """

    model: str | None
    options: EngineOptions
    choices: int
    alternatives: int | None
    stream: bool
    include_usage: bool


class Body:
    """The fields of a request; each is taken once, and what is left is not known."""

    def __init__(self, fields: object) -> None:
        if not isinstance(fields, dict):
            raise RequestError("the body must be a JSON object")
        self._left: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}

    def take(self, name: str, is_valid: Callable[[Any], bool], wanted: str, default: Any = None) -> Any:
        """The value of a field, `default` if it is null or absent.

        Raises:
            RequestError: a value that it cannot have.
        """
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not is_valid(value):
            raise RequestError(f"{name} is {value!r:.80}; it must be {wanted}", field=name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return cast(bool, self.take(name, lambda value: isinstance(value, bool), "true or false", default))

    def text(self, name: str, default: str | None = None) -> str | None:
        return cast("str | None", self.take(name, lambda value: isinstance(value, str), "a string", default))

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> int | None:
        def is_valid(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

        return cast("int | None", self.take(name, is_valid, f"an integer from {least} to {most}", default))

    def number(self, name: str, least: float, most: float) -> float | None:
        def is_valid(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most

        return cast("float | None", self.take(name, is_valid, f"a number from {least} to {most}"))

    def end(self) -> None:
        """What nobody took.

        Raises:
            RequestError: a field that would change the reply and is not there.
        """
        for name, value in self._left.items():
            if name in REFUSED and value not in REFUSED[name]:
                raise RequestError(f"{name} is not supported; leave it out", field=name, code="unsupported_parameter")
            if name not in REFUSED and name not in WITHOUT_EFFECT and name not in _noticed:
                _noticed.add(name)
                logger.warning("requests have the field %.80r, which is not known, and is ignored", name)


_noticed: set[str] = set()


def read_common(body: Body, window: int, *, is_chat: bool) -> Asked:
    """Raises:
    RequestError: a field with a value that it cannot have.
    """
    options: dict[str, Any] = {
        "temperature": body.number("temperature", 0, 100),
        "top_p": body.number("top_p", 1e-9, 1),
        "min_p": body.number("min_p", 0, 1),
        "repetition_penalty": body.number("repetition_penalty", 0.01, 100),
        "seed": body.integer("seed", -(2**63), 2**64),
        "ignore_eos": body.flag("ignore_eos"),
    }
    if options["seed"] is not None:
        options["seed"] %= 2**64
    top_k = body.integer("top_k", -1, 2**31)
    options["top_k"] = top_k if top_k is not None and top_k > 0 else None
    names = ("max_completion_tokens", "max_tokens") if is_chat else ("max_tokens",)
    lengths = [body.integer(name, 1, 2**31) for name in names]
    given = [length for length in lengths if length is not None]
    options["max_new_tokens"] = given[0] if given else window if is_chat else 16

    def are_stops(value: Any) -> bool:
        texts = [value] if isinstance(value, str) else value
        return isinstance(texts, list) and len(texts) <= 64 and all(isinstance(text, str) and text for text in texts)

    options["stop"] = body.take("stop", are_stops, "a string that is not empty, or a list of up to 64", None)
    if is_chat:
        wanted, alternatives = body.flag("logprobs"), body.integer("top_logprobs", 0, MAX_ALTERNATIVES)
        if alternatives and not wanted:
            raise RequestError("top_logprobs is for logprobs: true", field="top_logprobs")
        shown = (alternatives or 0) if wanted else None
    else:
        shown = body.integer("logprobs", 0, MAX_ALTERNATIVES)
    options["top_logprobs"] = shown or 0
    stream = body.flag("stream")
    options |= _form(body)
    usage = body.take("stream_options", lambda value: isinstance(value, dict), "an object", {})
    if usage and not stream:
        raise RequestError("stream_options is for stream: true", field="stream_options")
    if not isinstance(include := usage.get("include_usage", False), bool):
        raise RequestError("stream_options.include_usage must be true or false", field="stream_options")
    return Asked(
        model=body.text("model"),
        options=cast(EngineOptions, options),
        choices=body.integer("n", 1, MAX_CHOICES, 1) or 1,
        alternatives=shown,
        stream=stream,
        include_usage=include,
    )


def _form(body: Body) -> dict[str, Any]:
    """What the reply must be: OpenAI's `response_format`, or vLLM's `structured_outputs`."""

    def is_object(value: Any) -> bool:
        return isinstance(value, dict)

    form: dict[str, Any] = {}
    wanted = body.take("response_format", is_object, "an object")
    if wanted is not None:
        if wanted.get("type") not in ("text", "json_object", "json_schema"):
            message = "response_format.type must be text, json_object or json_schema"
            raise RequestError(message, field="response_format")
        form["response_format"] = wanted
    inner = Body(body.take("structured_outputs", is_object, "an object", {}))
    schema = inner.take("json", is_object, "a JSON schema")
    if schema is not None:
        form["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    form["regex"], form["grammar"] = inner.text("regex"), inner.text("grammar")
    form["choices"] = inner.take("choice", lambda value: isinstance(value, list), "a list of texts")
    inner.end()
    return {name: value for name, value in form.items() if value is not None}


def read_chat(body: Body, media_directory: Path | None) -> tuple[list[Any], dict[str, Any]]:
    """Messages, and the options that only a chat has.

    Raises:
        RequestError: as `read_common`.
    """
    messages = body.take("messages", lambda value: isinstance(value, list), "a list of messages")
    if not messages:
        raise RequestError("messages is empty or missing; give at least one", field="messages")
    tools = body.take("tools", _are_tools, 'a list of {"type": "function", "function": {...}}', [])
    choices = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    choice = body.take("tool_choice", lambda value: isinstance(value, (str, dict)), choices)
    options: dict[str, Any] = {"tools": tools or None, "tool_choice": choice}
    kwargs = body.take("chat_template_kwargs", lambda value: isinstance(value, dict), "an object")
    options["chat_template_kwargs"] = kwargs
    if not body.flag("add_generation_prompt", True):
        raise RequestError("add_generation_prompt cannot be false", field="add_generation_prompt")
    options["continue_final_message"] = body.flag("continue_final_message") or None
    return [_with_media(message, media_directory) for message in messages], options


def _are_tools(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(tool, dict) and tool.get("type") == "function" and isinstance(tool.get("function"), dict)
        for tool in value
    )


def _with_media(message: Any, directory: Path | None) -> Any:
    """Pictures that a message names by `file://` are read, if they are in the media directory.

    Raises:
        RequestError: one is elsewhere, or the message has sound or a file.
    """
    if not isinstance(message, dict) or not isinstance(content := message.get("content"), list):
        return message
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_audio", "audio_url", "video_url", "file"):
            raise RequestError(
                f"parts of type {kind!r} are not supported; this model reads text and images", "messages"
            )
        link = part.get("image_url") if kind == "image_url" else None
        url = link.get("url") if isinstance(link, dict) else link
        if isinstance(url, str) and url.startswith("file://"):
            part = {"type": "image", "image": _read_media(url.removeprefix("file://"), directory)}
        parts.append(part)
    return {**message, "content": parts}


def _read_media(name: str, directory: Path | None) -> bytes:
    if directory is None:
        raise RequestError("file:// pictures are not read here; send the data, as a data: URL", field="messages")
    path = (directory / name.lstrip("/")).resolve()
    if not path.is_relative_to(directory.resolve()) and (path := Path(name).resolve()).is_relative_to(directory):
        path = Path(name).resolve()
    if not path.is_relative_to(directory.resolve()) or not path.is_file():
        raise RequestError(f"file://{name:.200} is no file in the media directory", field="messages")
    return path.read_bytes()
