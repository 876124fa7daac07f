"""How replies are chosen and what form they have: the fields that routes share -> options of `Engine.stream`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from llama4.engine.observers import Observer
from llama4.options import Options
from llama4.serve.engine import Engine, EngineStream
from llama4.serve.errors import RequestError
from llama4.serve.schema import (
    ANYTHING,
    FLAG,
    OBJECT,
    STRING,
    TEXT,
    Field,
    Schema,
    any_of,
    array,
    ignored,
    integer,
    number,
    one_of,
    record,
    refused,
)

MAX_CHOICES = 16
MAX_ALTERNATIVES = 20
MAX_LENGTH = 2**31

STOP = any_of(TEXT, array(TEXT, most=64))
BIAS: Schema = {
    "type": "object",
    "propertyNames": {
        "type": "string",
        "pattern": "^[0-9]{1,10}$",
        "description": "a token's id, in the digits 0 to 9",
    },
    "additionalProperties": number(-100, 100),
}
USAGE = record(include_usage=FLAG)

SAMPLING: Mapping[str, Field] = {
    "temperature": Field(number(0, 100), note="0: the most likely token; absent: what the checkpoint says, else 0"),
    "top_p": Field(number(1e-9, 1)),
    "top_k": Field(integer(-1, MAX_LENGTH), note="-1 or 0: all tokens"),
    "min_p": Field(number(0, 1)),
    "repetition_penalty": Field(number(0.01, 100)),
    "seed": Field(integer(-(2**63), 2**64 - 1)),
    "stop": Field(STOP),
    "ignore_eos": Field(FLAG, False),
    "structured_outputs": Field(
        record(json=OBJECT, regex=STRING, choice=array(TEXT, 1), grammar=STRING), note="as vLLM's; one of them"
    ),
    "presence_penalty": Field(number(-2, 2)),
    "frequency_penalty": Field(number(-2, 2)),
    "logit_bias": Field(BIAS, note="ids of tokens -> what is added to their logits"),
    "min_tokens": Field(integer(0, MAX_LENGTH), note="as vLLM's"),
}
"""Of every route that generates in OpenAI's form."""

FORMS_OF_OTHERS: Mapping[str, Field] = {
    name: refused(remedy=f"give {instead}")
    for name, instead in {
        **{f"guided_{kind}": f"structured_outputs.{kind}" for kind in ("json", "regex", "choice", "grammar")},
        "json_schema": "response_format",
        **{"regex": "structured_outputs.regex", "ebnf": "structured_outputs.grammar, in Lark's syntax"},
        **{"grammar": "structured_outputs.grammar, in Lark's syntax"},
    }.items()
}
"""How other servers are asked for a reply of some form: without an answer to that a client would trust any text."""

FORM = any_of(
    record(("type",), type=one_of("text")),
    record(("type",), type=one_of("json_object"), schema=OBJECT),
    record(("type", "json_schema"), type=one_of("json_schema"), json_schema=record(("schema",), schema=OBJECT)),
)
"""OpenAI's `response_format`; a schema beside json_object is as llama.cpp's."""

WITHOUT_EFFECT: Mapping[str, Field] = {
    name: ignored(schema)
    for name, schema in {
        **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), STRING),
        **dict.fromkeys(("service_tier", "reasoning_effort", "verbosity"), STRING),
        **dict.fromkeys(("metadata", "prediction", "best_of", "priority"), ANYTHING),
    }.items()
}
"""Fields that are known and change nothing here."""


def sampling_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `SAMPLING` and `response_format` ask for."""
    options = {name: fields[name] for name in SAMPLING if name != "structured_outputs"}
    if fields["logit_bias"] is not None:
        options["logit_bias"] = {int(id_): value for id_, value in fields["logit_bias"].items()}
    options["seed"] = fields["seed"] % 2**64 if fields["seed"] is not None else None
    options["top_k"] = top_k_of(fields)
    form: dict[str, Any] = {"response_format": _with_schema(fields.get("response_format"))}
    outputs: Mapping[str, Any] = fields["structured_outputs"] or {}
    if (schema := outputs.get("json")) is not None:
        if form["response_format"] is not None:
            raise RequestError("give response_format or structured_outputs.json, not both", field="structured_outputs")
        form["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    form |= {"regex": outputs.get("regex"), "choices": outputs.get("choice"), "grammar": outputs.get("grammar")}
    return {**options, **{name: value for name, value in form.items() if value is not None}}


def top_k_of(fields: Mapping[str, Any]) -> int | None:
    """Clients say -1 or 0 where they mean all tokens."""
    top_k: int | None = fields["top_k"]
    return top_k if top_k is not None and top_k > 0 else None


def _with_schema(form: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A `response_format`; an object of a schema as OpenAI asks for it."""
    if form is None or form["type"] != "json_object" or "schema" not in form:
        return form
    return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}


def form_of(fields: Mapping[str, Any], field: str = "response_format") -> str:
    """The field that asks for JSON: that of vLLM, or the route's own."""
    return "structured_outputs.json" if (fields["structured_outputs"] or {}).get("json") is not None else field


def check_usage(fields: Mapping[str, Any]) -> bool:
    """Whether a stream shall end with how many tokens it took.

    Raises:
        RequestError: that is asked for without a stream.
    """
    if fields["stream_options"] and not fields["stream"]:
        raise RequestError("stream_options is for stream: true", field="stream_options")
    return bool((fields["stream_options"] or {}).get("include_usage"))


def choices_of(
    engine: Engine,
    adapter: str | None,
    prompt: Any,
    count: int,
    options: Mapping[str, Any],
    observer: Observer | None = None,
    *,
    parallel_tool_calls: bool = True,
) -> list[EngineStream]:
    """A stream for each choice; each draws for itself. An observer sees the first read its prompt."""
    given, seed = cast(Options, options), options["seed"]
    if observer is not None:
        first = engine.observe(prompt, observer, adapter=adapter, **given)
    else:
        first = engine.stream(prompt, adapter=adapter, parallel_tool_calls=parallel_tool_calls, **given)
    seeds = [(seed + i) % 2**64 if seed is not None else None for i in range(1, count)]
    return [first, *map(first.with_seed, seeds)]
