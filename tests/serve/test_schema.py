"""What /openapi.json says of requests is what is checked: both against jsonschema."""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("starlette")

from llama4.serve.app import ROUTES  # noqa: E402
from llama4.serve.errors import RequestError  # noqa: E402
from llama4.serve.openai_chat import CHAT as CHAT_FIELDS  # noqa: E402
from llama4.serve.openapi import describe  # noqa: E402
from llama4.serve.schema import _SHOWN, _spellings  # noqa: E402
from llama4.serve.settings import Settings  # noqa: E402

PARTS = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "tools": [TOOL],
    "tool_choice": "auto",
    "stop": ["a"],
    "n": 2,
    "temperature": 0.5,
    "seed": 1,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    "structured_outputs": {"choice": ["a", "b"]},
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": ["a", [1, 2]], "logprobs": 1, "max_tokens": 3, "stop": "x"},
    "/tokenize": {"messages": CHAT["messages"], "add_special_tokens": True},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "x"},
        ],
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}},
        "tool_choice": {"type": "function", "name": "f"},
        "tools": [{"type": "function", "name": "f"}],
        "store": True,
    },
    "/v1/messages": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": ""}}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}]},
        ],
        "system": [{"type": "text", "text": "x"}],
        "max_tokens": 5,
        "tool_choice": {"type": "any"},
        "tools": [{"name": "f", "input_schema": {}}],
    },
    "/v1/embeddings": {"input": ["a", [1, 2]], "encoding_format": "base64"},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/apply-template": {"messages": CHAT["messages"], "tools": [TOOL]},
}
VALUES: list[Any] = [None, True, 0, 1, -1, 1.0, 0.5, 10**40, "", "x", "function", "text", [], ["x"], [1], [[]], {}]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that is in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in inside for place in places(each, (*at, key)))]


def mutated(body: Any, rng: random.Random) -> Any:
    """A copy with one value exchanged or taken out."""
    body = copy.deepcopy(body)
    *way, last = rng.choice(places(body)[1:])
    inner = body
    for key in way:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[last]
    else:
        inner[last] = rng.choice(VALUES)
    return body


@pytest.mark.parametrize("path", sorted(BODIES))
def test_what_is_described_is_what_is_checked(path: str) -> None:
    (route,) = (route for route in ROUTES if (route.method, route.path) == ("POST", path))
    assert route.fields is not None
    schema = json.loads(json.dumps(route.fields.to_json()))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    rng, verdicts = random.Random(0), []
    for _ in range(300):
        body = mutated(BODIES[path], rng)
        refusal = None
        try:
            route.fields.read(body)
        except RequestError as error:
            refusal = error
        assert refusal is None or refusal.field, refusal
        assert (refusal is None) == validator.is_valid(body), (body, refusal, list(validator.iter_errors(body)))
        verdicts.append(refusal is None)
    assert 20 < sum(verdicts) < 280, "the test sees nothing"


def test_every_route_is_described() -> None:
    described = describe(ROUTES, Settings("tiny"))
    assert {(path.partition("{")[0], method) for path, each in described["paths"].items() for method in each} == {
        (route.path.partition("{")[0], route.method.lower()) for route in ROUTES
    }
    operations = [each["operationId"] for methods in described["paths"].values() for each in methods.values()]
    assert len(set(operations)) == len(ROUTES) and all(map(str.isidentifier, operations))
    names = set(described["components"]["schemas"])
    assert {route.fields.name for route in ROUTES if route.fields is not None} <= names
    ids = [each["operationId"] for path in described["paths"].values() for each in path.values()]
    assert len(set(ids)) == len(ids)


def rows(heading: str) -> list[str]:
    """The first cell of each row of a table in docs/serving.md, and of the second what is between its bars."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"(?m)^\| (`.*?)\|$", section)


def test_the_page_tells_of_every_field() -> None:
    """Those of chats and completions: what has an effect, none, or is refused."""
    schemas = describe(ROUTES, Settings("tiny"))["components"]["schemas"]
    fields = schemas["ChatRequest"]["properties"] | schemas["CompletionRequest"]["properties"]
    kinds = {"no effect": set[str](), "not supported": set[str](), "": set[str]()}
    for name, schema in fields.items():
        kinds[said if (said := schema.get("description", "")) in kinds else ""].add(name)
    told = [set(re.findall(r"`(\w+)`", row.partition(" | ")[0])) for row in rows("Fields")]
    *effective, ignored, refused, of_others = told
    others = {name for name in fields if name.startswith("guided_")} | (of_others - {"guided_json"})
    inside = {"json", "choice"}  # of structured_outputs
    assert kinds["no effect"] == ignored
    assert kinds["not supported"] == refused | others
    assert kinds[""] - set().union(*effective) == {"prompt", "echo", "add_generation_prompt"}
    assert set().union(*effective) - kinds[""] == inside | {"regex", "grammar"}


def test_the_page_tells_of_every_route() -> None:
    told = {
        "/v1/responses/ID" + path.removeprefix("...") if path.startswith("...") else path
        for row in rows("Routes")
        for path in re.findall(r"[./]/?[\w/.-]+", row.partition(" | ")[0])
    }
    served = {re.sub(r"\{name.*?\}", "NAME", re.sub(r"\{response_id\}", "ID", route.path)) for route in ROUTES}
    assert told == served | {"/openapi.json"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *(("max_token", "max_tokens"), ("maxTokens", "max_tokens"), ("max_tokesn", "max_tokens"), ("topP", "top_p")),
        *(("temprature", "temperature"), ("presense_penalty", "presence_penalty"), ("stop-", "stop")),
    ],
)
def test_a_misspelt_field_is_refused(given: str, meant: str) -> None:
    """It would change the reply unseen."""
    with pytest.raises(RequestError, match=f"{given} is not known; write {meant}") as caught:
        CHAT_FIELDS.read({"messages": [{"role": "user", "content": "a"}], given: 1})
    assert (caught.value.field, caught.value.status) == (given, 400)


def test_fields_of_other_servers_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of vLLM, llama.cpp, SGLang, OpenRouter, Ollama, text-generation-inference and others that come nearest."""
    monkeypatch.setattr("llama4.serve.schema._noticed", set())
    others = (
        "top_a top_n_sigma typical_p min_keep min_length max_length max_new_tokens repeat_penalty n_probs n_predict "
        "prompt_logprobs stop_token_ids chat_template documents models provider reasoning thinking num_ctx options "
        "truncate_prompt_tokens bad_words length_penalty cache_prompt id_slot use_beam_search"
    )
    read = CHAT_FIELDS.read({"messages": [{"role": "user", "content": "a"}], **dict.fromkeys(others.split(), 1)})
    assert read["max_tokens"] is None and read["top_k"] is None


def test_few_of_many_unknown_fields_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compared by as many spellings as it has characters."""
    spellings = Mock(wraps=_spellings)
    monkeypatch.setattr("llama4.serve.schema._spellings", spellings)
    monkeypatch.setattr("llama4.serve.schema._noticed", set())
    body = {"messages": [{"role": "user", "content": "a"}], **{f"{i:09}" * 9: 1 for i in range(100_000)}}
    CHAT_FIELDS.read(body)
    assert spellings.call_count == _SHOWN
