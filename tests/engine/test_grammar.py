"""Replies in a given form, whatever the model would rather say."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import threading
import weakref
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest

pytest.importorskip("llguidance")


from llama4 import Engine, Llama4
from llama4.engine import grammar
from llama4.engine.grammar import Form, Matcher, Vocabulary
from llama4.errors import ArgumentError
from llama4.text.tool_calls import chosen_tools, free_call

llguidance: Any = pytest.importorskip("llguidance")
jsonschema: Any = pytest.importorskip("jsonschema")

QUESTION = "What can you do?"
SCHEMAS = int(os.environ.get("LLAMA4_SCHEMAS", "100"))
"""Replies to random schemas: set it to 10000 for the long run."""
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
COUNT = {
    "type": "function",
    "function": {
        "name": "count",
        "parameters": {
            "type": "object",
            "properties": {"shape": {"enum": ["circle", "square"]}},
            "required": ["shape"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def llm() -> Llama4:
    return Llama4.from_pretrained("tiny", progress=False)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_forms_are_kept(llm: Llama4, temperature: float) -> None:
    sampling: dict[str, Any] = {"temperature": temperature, "seed": 1}
    reply = llm.chat(QUESTION, response_format=PERSON, **sampling)
    assert reply.finish_reason == "stop" and reply.parsed == json.loads(reply.text)
    assert set(reply.parsed) == {"name", "age"} and 0 <= reply.parsed["age"] <= 150 and len(reply.parsed["name"]) <= 8
    reply = llm.chat(QUESTION, regex=r"[0-9]{3}-[a-f]+", max_new_tokens=20, **sampling)
    assert re.fullmatch(r"[0-9]{3}-[a-f]+", reply.text) and reply.parsed is None
    assert llm.chat(QUESTION, choices=["yes", "no", "perhaps (not)"], **sampling).text in ("yes", "no", "perhaps (not)")
    assert re.fullmatch("(ab)+", llm.chat(QUESTION, grammar='start: ("ab")+', max_new_tokens=9, **sampling).text + "")


def test_a_form_that_the_reply_has_anyway_changes_nothing(llm: Llama4) -> None:
    """Nor the log-probabilities: they are the model's own."""
    free = llm.chat(QUESTION)
    held = llm.chat(QUESTION, regex=r"(?s:.*)")
    assert held.text == free.text and held.usage == free.usage
    assert [token.logprob for token in held.logprobs] == pytest.approx(
        [token.logprob for token in free.logprobs], abs=1e-4
    )


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """Of keywords that are held, and of no text without an end: some models write digits for ever."""
    kinds = ["integer", "number", "string", "enum", "const", "pattern", "format", "boolean", "types", "ref"]
    kind = rng.choice(kinds if not depth else [*kinds, *("object", "array", "tuple", "anyOf", "allOf") * 2])
    inner = [random_schema(rng, depth - 1) for _ in range(2)] if depth else []
    few = rng.randrange(3)
    simple: dict[str, dict[str, Any]] = {
        "integer": {"minimum": -few, "maximum": rng.choice((1, 99))} | ({"multipleOf": 3} if few == 1 else {}),
        "number": {"minimum": -0.5, "exclusiveMaximum": rng.choice((0.25, 1000)), "multipleOf": 0.25},
        "string": {"minLength": few, "maxLength": few + rng.choice((0, 4))},
        "boolean": {},
    }
    others: dict[str, dict[str, Any]] = {
        "enum": {"enum": rng.sample(["a", 1, None, "b c", 2.5, ["d"], {"e": True}], 2)},
        "const": {"const": rng.choice(("f", 3, None, {"g": [1]}))},
        "pattern": {"type": "string", "pattern": rng.choice(("^[a-c]{1,3}$", "^(x|yz)[0-9]{2}$"))},
        "format": {"type": "string", "format": rng.choice(("date", "uuid", "ipv4"))},
        "types": {"type": ["boolean", "null", "integer"], "minimum": 0, "maximum": 9},
        "ref": {"$ref": "#/$defs/leaf"},
        "array": {"type": "array", "items": inner and inner[0], "minItems": few, "maxItems": few + rng.randrange(2)},
        "tuple": {"type": "array", "prefixItems": inner, "items": False, "minItems": few},
        "anyOf": {"anyOf": inner},
        "allOf": {"allOf": [{"type": "integer", "minimum": few}, {"maximum": 20}]},
        "object": {
            "type": "object",
            "properties": dict(zip(rng.sample("xyz", 2), inner, strict=False)),
            "additionalProperties": False,
        },
    }
    if kind == "object":
        others[kind]["required"] = rng.sample(sorted(others[kind]["properties"]), few)
        others[kind] |= {"patternProperties": {"^k[0-9]$": {"type": "null"}}, "maxProperties": 3} if few == 2 else {}
    return {"type": kind, **simple[kind]} if kind in simple else others[kind]


LEAF: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
}
LEAF |= {"additionalProperties": False}


def test_random_schemas_in_one_engine(llm: Llama4) -> None:
    """Each request is held to its own, beside others."""
    rng = random.Random(0)
    schemas, cut = [{**random_schema(rng), "$defs": {"leaf": LEAF}} for _ in range(SCHEMAS)], 0
    with Engine(llm, cache_memory=None) as engine:
        for first in range(0, SCHEMAS, 100):
            some = schemas[first : first + 100]
            streams = [
                engine.stream(QUESTION, response_format={"type": "json_schema", "json_schema": {"schema": schema}},
                              temperature=rng.choice((0.0, 1.0, 3.0)), seed=i, max_new_tokens=200)
                for i, schema in enumerate(some)
            ]  # fmt: skip
            for stream in streams:
                stream.open()
            for stream, schema in zip(streams, some, strict=True):
                list(stream)
                if stream.reply.finish_reason == "length":
                    cut += 1
                    continue
                jsonschema.validate(json.loads(stream.reply.text), schema, jsonschema.Draft202012Validator)
    print(f"{SCHEMAS} replies, {cut} of them cut off")
    assert cut <= SCHEMAS // 100


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"response_format": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"response_format": {"not": {"type": "null"}}}, "not"),
        ({"response_format": {"if": {"type": "null"}}}, "if"),
        ({"response_format": {"type": "string", "pattern": "^(?=a)b"}}, "pattern.*look-ahead"),
        ({"response_format": {"prefixItems": [{"type": "null"}], "additionalItems": False}}, "prefixItems beside"),
        ({"response_format": {"anyOf": [{"prefixItems": [{}], "items": [{}]}]}}, "prefixItems beside"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "schema"),
        ({"regex": "("}, "regex"),
        ({"choices": []}, "choices"),
        ({"choices": 5}, "choices is 5"),
        ({"choices": ["\ud800"]}, "choices"),
        ({"regex": "\ud800"}, "regex"),
        ({"grammar": "\ud800"}, "grammar"),
        ({"chat_template_kwargs": "abc"}, "chat_template_kwargs is 'abc'"),
        ({"chat_template_kwargs": {3: 1}}, "chat_template_kwargs is"),
        ({"grammar": "nothing"}, "grammar"),
        ({"regex": "a", "choices": ["b"]}, "regex and choices"),
        ({"tool_choice": "required"}, "tools"),
        ({"tool_choice": "sometimes", "tools": [COUNT]}, "tool_choice"),
        ({"tool_choice": {"function": {"name": "other"}}, "tools": [COUNT]}, "other"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(llm: Llama4, options: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        llm.chat(QUESTION, **options)


def test_names_and_values_are_no_keywords() -> None:
    odd = {"prefixItems": {"type": "null"}, "additionalItems": {"type": "null"}}
    assert Form.of({"anyOf": [{"type": "object", "properties": odd}, {"enum": [odd]}]}) is not None


def patterns(count: int, join: str) -> dict[str, Any]:
    """Many that one text has to fit."""
    each = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(count)]
    if join == "allOf":
        return {"allOf": each}
    if join == "deep":
        return {"properties": {"a": {"allOf": [{"allOf": each[: count // 2]}, {"allOf": each[count // 2 :]}]}}}
    if join == "objects":
        return {"allOf": [{"type": "object", "properties": {"a": one}, "required": ["a"]} for one in each]}
    chain = {str(i): one | {"$ref": f"#/$defs/{i + 1}"} for i, one in enumerate(each)}
    return {"$defs": chain | {str(count): {"type": "string"}}, "$ref": "#/$defs/0"}


@pytest.mark.parametrize("join", ["allOf", "deep", "objects", "$ref"])
def test_patterns_whose_common_texts_nobody_finds(join: str) -> None:
    """llguidance does not come back from a schema like these."""
    with pytest.raises(ArgumentError, match="joins more than 8 schemas"):
        Form.of(patterns(20, join))
    assert Form.of(patterns(2, join)) is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"regex": "a?" * 20000}, "regex"),
        ({"grammar": 'start: "a"' + " " * 40000}, "grammar"),
        ({"choices": [f"{i:0100}" for i in range(3000)]}, "choices"),
        ({"choices": ["a", "b"] * 40000}, "choices"),
        ({"response_format": {"enum": [f"{i:0100}" for i in range(3000)]}}, "response_format"),
        ({"response_format": {"anyOf": [{"pattern": f"{i}" + "a?" * 5000} for i in range(4)]}}, "response_format"),
        ({"response_format": {"patternProperties": {"a?" * 20000: {}}}}, "response_format"),
    ],
)
def test_forms_that_would_take_long_to_read_are_refused(options: Any, named: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{named} cannot be followed: [0-9,]+ characters"):
        Form.of(**options)


def chain(to: str, count: int = 2500, more: Mapping[str, str] = {}) -> dict[str, Any]:
    """Of schemas, each of which refers to the next one."""
    each = [{"$anchor": f"a{i}", "properties": {"a": {"$ref": to.format(i + 1)}}} for i in range(count)]
    named = {str(i): one for i, one in enumerate([*each, {"$anchor": f"a{count}"}])}
    return {"default" if "default" in to else "$defs": named, "$ref": to.format(0), **more}


@pytest.mark.parametrize("to", ["#/$defs/{}", "#/%24defs/{}", "#a{}", "https://a/b#/$defs/{}", "https://a/b#a{}"])
def test_references_without_end_are_refused(to: str) -> None:
    """llguidance ends the process where many lead from one to the next."""
    more = {"$id": "https://a/b"} if "https" in to else {}
    with pytest.raises(ArgumentError, match=r"more than 1,000 (deep inside one another|have names)"):
        Form.of(chain(to, more=more))
    assert Form.of(chain(to, 100, more)) is not None


def ring(count: int) -> dict[str, Any]:
    """Of schemas, each of which refers to the next one, and the last to the first."""
    each = {f"{i}": {"properties": {"a": {"$ref": f"#/$defs/{(i + 1) % count}"}}} for i in range(count)}
    return {"$defs": each, "$ref": "#/$defs/0"}


def star(count: int) -> dict[str, Any]:
    """Of schemas that refer to nothing, all of which one refers to, as Pydantic writes it."""
    each = {f"D{i}": {"properties": {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}} for i in range(count)}
    return {"type": "object", "properties": {name: {"$ref": f"#/$defs/{name}"} for name in each}, "$defs": each}


def test_many_references_that_do_not_lead_deep_are_followed() -> None:
    assert Form.of(star(400)) is not None and Form.of(ring(300)) is not None
    tools = [{"name": f"f{i}", "parameters": star(3)} for i in range(128)]
    assert Form.of(call=chosen_tools(tools, "required")[1]) is not None


def test_references_that_nothing_follows_may_lead_nowhere() -> None:
    lost = {"$ref": "#/nope"}
    assert Form.of({"type": "object", "example": lost, "$defs": {"x": lost}}) is not None


@pytest.mark.parametrize(
    "wrong", [{"required": None}, {"properties": None}, {"required": [["a"]]}, {"required": 5}, {"properties": [["a"]]}]
)
def test_tools_with_wrong_keywords_are_refused(wrong: Any) -> None:
    parameters = {"properties": {"a": {"type": "integer"}}, "required": ["a"], **wrong}
    with pytest.raises(ArgumentError, match=r"^the schema of a tool cannot be followed"):
        Form.of(call=chosen_tools([{"name": "f", "parameters": parameters}], "required")[1])


def test_the_name_of_a_tools_schema_may_be_a_fragment() -> None:
    """As before 2019."""
    parameters = {"$id": "#person", "properties": {"n": {"const": 1}, "of": {"$ref": "#person"}}}
    form = Form.of(call=chosen_tools([{"name": "f", "parameters": parameters}], "required")[1])
    assert form is not None
    for n in (1, 2):
        text = f'{{"name": "f", "parameters": {{"n": 1, "of": {{"n": {n}}}}}}}'
        assert fits(form, text) == (n == 1)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"response_format": chain("#/default/{}")}, "response_format refers to '#/default/0', which is no schema"),
        ({"grammar": "start: " + "".join(f"a{i}\na{i}: " for i in range(2400)) + '"x"'}, "grammar has 2,401 rules"),
        ({"grammar": f"start: %json {json.dumps(patterns(20, 'allOf'))}"}, "grammar has a %json schema"),
        ({"response_format": {"type": "integer", "multipleOf": 999983}}, "multipleOf 999983"),
        ({"response_format": {"multipleOf": 99.9983}}, "multipleOf 999983"),
        ({"response_format": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}}, "multipleOf 9973 and 9967"),
        ({"response_format": {"multipleOf": 9999, "anyOf": [{"multipleOf": 997}]}}, "multipleOf 9999 and 997"),
        ({"response_format": {"anyOf": [{"multipleOf": 97 - 2 * i} for i in range(6)]}}, "multipleOf 97"),
        ({"response_format": {"properties": {f"{i}": {"multipleOf": 9973 - 2 * i} for i in range(50)}}}, "multipleOf"),
        (
            {
                "response_format": {
                    "properties": {"a": {"multipleOf": 9999}},
                    "patternProperties": {"^a": {"multipleOf": 997}},
                }
            },
            "multipleOf 9999 and 997",
        ),
        (
            {"response_format": {"patternProperties": {f"^k{i}$": {} for i in range(200)}}},
            "200 patternProperties, more",
        ),
        ({"response_format": {"properties": {f"k{i}": {} for i in range(6000)}}}, "6,000 properties, more than 5,000"),
        ({"response_format": {"items": {"properties": {f"k{i}": {} for i in range(1001)}}}}, "1,001 properties of one"),
        ({"response_format": {"multipleOf": 10**400 + 1}}, "response_format is no JSON schema"),
        ({"response_format": {"multipleOf": True}}, "response_format cannot be followed"),
        ({"response_format": {"properties": {"a": {"$ref": "#/nope"}}}}, "response_format refers to '#/nope'"),
        ({"response_format": ring(600)}, "response_format refers to schemas that may stand more than 1,000 deep"),
    ],
)
def test_what_would_take_minutes_or_end_the_process_is_refused(form: Any, named: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{named}|has {named}"):
        Form.of(**form)


def test_an_object_may_leave_out_a_thousand_properties() -> None:
    """Any may come next: llguidance would give up earlier."""
    form = Form.of({"properties": {f"k{i}": {} for i in range(1000)}, "type": "object", "additionalProperties": False})
    assert form is not None
    for text in ('{"k0": 1, "k999": 2}', "{}"):
        assert form.parse(text, is_ended=False) == json.loads(text)


def test_a_form_is_read_where_its_reply_is_prepared(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what may come first: it may take long."""
    read, follower = list[Form](), Form.follower

    def noted(form: Form, tokenizer: Any) -> Any:
        read.append(form)
        return follower(form, tokenizer)

    monkeypatch.setattr(Form, "follower", noted)
    form, is_over = Form.of(regex="a"), threading.Event()
    assert form is not None
    vocabulary = Vocabulary.of(llm.tokenizer, llm.config.text.vocab_size, [0])
    try:
        grammar._thread().submit(is_over.wait, 60)  # in which masks of all replies are computed
        matchers = [Matcher(form, vocabulary) for _ in range(3)]
        assert all(matcher._penalties_V.done() for matcher in matchers)
    finally:
        is_over.set()
    (a,) = llm.tokenizer.encode("a")
    matchers[0].accept(a)
    assert [matcher.allows(a) for matcher in matchers] == [False, True, True] and read == 3 * [form]


def test_a_reply_that_llguidance_gives_up_leaves_others_alone(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same form."""
    monkeypatch.setattr(grammar, "_MAX_JSON_FUEL", 20_000)
    bounded = {"type": "number", "multipleOf": 9973, "minimum": 123456789, "maximum": 987654321}
    form = Form.of({"anyOf": [{"type": "boolean"}, bounded]})
    assert form is not None
    vocabulary = Vocabulary.of(llm.tokenizer, llm.config.text.vocab_size, [0])
    first, second = (Matcher(form, vocabulary) for _ in range(2))
    for matcher, text in ((first, "5"), (second, "true")):
        for id_ in llm.tokenizer.encode(text):
            matcher.accept(id_)
    assert first.problem() is not None and second.problem() is None


def test_small_multiples_are_followed() -> None:
    for each in (10**6, 0.01, 1e-9, 7, 2.5, 9973):
        assert Form.of({"type": "number", "multipleOf": each}) is not None
    assert Form.of({"properties": {str(i): {"multipleOf": 9000 + i} for i in range(9)}}) is not None


@pytest.mark.parametrize(("least", "most"), [(0, 10**6), (123456789, 987654321), (-(10**15), 10**15)])
def test_multiples_between_bounds_are_followed(llm: Llama4, least: int, most: int) -> None:
    """llguidance would give up within the reply."""
    schema = {"type": "number", "multipleOf": 9973, "minimum": least, "maximum": most}
    for seed in range(3):
        said = llm.chat(QUESTION, response_format=schema, temperature=5.0, seed=seed).parsed
        assert least <= said <= most and said % 9973 == 0


def test_many_schemas_that_do_not_meet_are_followed() -> None:
    properties = {f"p{i}": {"type": "string", "pattern": f"a{i}"} for i in range(30)}
    tree = {"allOf": [{"$ref": "#/$defs/tree"}], "$defs": {"tree": {"type": "object", "properties": properties}}}
    tree["$defs"]["tree"]["properties"]["child"] = {"$ref": "#/$defs/tree"}  # type: ignore[index]
    assert Form.of(tree) is not None


def test_tools_that_must_be_called(llm: Llama4) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "count"}}):
        reply = llm.chat(QUESTION, tools=[COUNT], tool_choice=choice, temperature=2.0, seed=3)
        (call,) = reply.tool_calls
        assert call.name == "count" and call.arguments["shape"] in ("circle", "square")
        assert reply.finish_reason == "tool_calls" and reply.text == "" and reply.parsed is None
        both: dict[str, Any] = {"tools": [COUNT], "tool_choice": choice, "temperature": 2.0, "seed": 3}
        assert llm.chat(QUESTION, response_format=PERSON, **both).tool_calls == reply.tool_calls
        with pytest.raises(ArgumentError, match="regex and tool_choice are given"):
            llm.chat(QUESTION, regex="a", **both)
    assert llm.chat(QUESTION, tools=[COUNT], tool_choice="none").text == llm.chat(QUESTION).text


def test_tools_whose_parameters_have_references(llm: Llama4) -> None:
    """As Pydantic writes them, nested, recursive, to the root, and by the same names for different things."""
    jsonschema = pytest.importorskip("jsonschema")
    city: dict[str, Any] = {
        "type": "object",
        "properties": {"id": {"maximum": 9, "minimum": 0, "type": "integer"}},
        "required": ["id"],
        "additionalProperties": False,
    }
    tree = {"type": "array", "items": {"$ref": "#/definitions/tree"}, "maxItems": 1}
    rest = {"additionalProperties": False, "required": ["at"]}
    parameters: list[dict[str, Any]] = [
        {"properties": {"at": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"$ref": "#/$defs/B"}, "B": city}, **rest},
        {"properties": {"at": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"enum": ["x", "$ref"]}}, **rest},
        {"properties": {"at": {"$ref": "#/definitions/tree"}}, "definitions": {"tree": tree}, **rest},
        {
            "properties": {"at": {"anyOf": [{"$ref": "#"}, {"$ref": ""}, {"const": {"$ref": "#"}}]}},
            "$id": "https://a/b",
            **rest,
        },
    ]
    tools = [{"name": f"f{i}", "parameters": {"type": "object", **each}} for i, each in enumerate(parameters)]
    named: list[Any] = [{"name": tool["name"]} for tool in tools]
    for given, choice in [(tools, "required"), *(([tool], "required") for tool in tools), *((tools, n) for n in named)]:
        for seed in range(4):
            (call,) = llm.chat(
                QUESTION, tools=given, tool_choice=choice, temperature=1.0, seed=seed, max_new_tokens=500
            ).tool_calls
            (tool,) = [tool for tool in given if tool["name"] == call.name]
            jsonschema.validate(call.arguments, tool["parameters"], jsonschema.Draft202012Validator)


@pytest.mark.parametrize("draft", [None, "http://json-schema.org/draft-07/schema#"])
def test_names_in_the_schemas_of_tools_are_their_own(draft: str | None) -> None:
    """$anchor and $id of one name in two tools, references to the root by its name, and a tool that is a reference."""
    more = {"$schema": draft} if draft is not None else {}

    def parameters(value: int, **schema: Any) -> dict[str, Any]:
        inner = {"type": "object", "properties": {"at": {"const": value}}, "required": ["at"]}
        return {"$defs": {"x": {**inner, "additionalProperties": False, **schema.pop("named", {})}}, **schema, **more}

    for schema in (
        {"$ref": "#/$defs/x"},
        {"$ref": "#here", "named": {"$anchor": "here"}},
        {"$ref": "T0", "named": {"$id": "T0"}},
        {"$id": "R", "$ref": "R#/$defs/x"},
        {"$id": "R", "$ref": "#/$defs/x"},
    ):
        tools = [{"name": f"f{i}", "parameters": parameters(i, **schema)} for i in range(2)]
        form = Form.of(call=chosen_tools(tools, "required")[1])
        assert form is not None
        for i, at in product(range(2), repeat=2):
            assert fits(form, f'{{"name": "f{i}", "parameters": {{"at": {at}}}}}') == (i == at), schema
    absolute = parameters(1, **{"$id": "https://a/b", "$ref": "https://a/b#/$defs/x"})
    assert Form.of(call=chosen_tools([{"name": "f", "parameters": absolute}], "required")[1]) is not None


def fits(form: Form, text: str) -> bool:
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), form.grammar, log_level=0)
    data = [*text.encode()]
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


def test_arguments_are_an_object_of_the_properties_there_are(llm: Llama4) -> None:
    """Other models write others without end; a schema that says more than properties may allow them."""
    one = {"properties": {"n": {"const": 1}}}
    for parameters, closed in (
        ({**one, "type": "object"}, True),
        ({**one, "type": ["object", "null"], "$schema": "https://json-schema.org/draft/2020-12/schema"}, True),
        ({"properties": {}}, True),
        ({}, False),
        ({**one, "additionalProperties": True}, False),
        ({**one, "required": ["n"], "minProperties": 2}, False),
        ({**one, "required": ["m"]}, False),
        ({"anyOf": [one, {"properties": {"m": {}}}]}, False),
    ):
        form = Form.of(call=chosen_tools([{"name": "f", "parameters": parameters}], "required")[1])
        assert form is not None
        for arguments, is_one in (('{"n": 1, "m": 2}', not closed), ("[]", False), ("null", False), ('"n"', False)):
            assert fits(form, f'{{"name": "f", "parameters": {arguments}}}') == is_one, (parameters, arguments)
    for wrong in ({"type": "array"}, {"type": ["string", "null"]}, [1], True):
        with pytest.raises(ArgumentError, match=r"^the schema of a tool \('f'\) is of type .*; a call has an object"):
            llm.chat(QUESTION, tools=[{"name": "f", "parameters": wrong}], tool_choice="required")


def test_what_may_call_tools_has_a_form_or_calls_one(llm: Llama4) -> None:
    """As with OpenAI. References in the schema stay its own."""
    tree = {"type": "object", "properties": {"of": {"$ref": "#"}, "n": {"$ref": "#/$defs/n"}}, "required": ["n"]}
    schema = {**tree, "additionalProperties": False, "$defs": {"n": {"enum": [1, 2]}}}
    form = Form.of(schema, instead=free_call([COUNT]))
    assert form is not None
    for text, is_one in (
        ('{"of": {"n": 2}, "n": 1}', True),
        ('{"of": {"n": 3}, "n": 1}', False),
        ('{"name": "count", "parameters": {"shape": [1.5]}}', True),
        ('{"name": "other", "parameters": {}}', False),
        ('{"name": "count"}', False),
    ):
        assert fits(form, text) == is_one, text
    asked: dict[str, Any] = {"tools": [COUNT], "response_format": schema, "temperature": 5.0}
    replies = [llm.chat(QUESTION, **asked, seed=seed) for seed in range(16)]
    assert {bool(reply.tool_calls) for reply in replies if reply.finish_reason != "length"} == {True, False}
    for reply in replies:
        assert reply.finish_reason == "length" or reply.tool_calls or reply.parsed["n"] in (1, 2)


@pytest.mark.parametrize("options", [{}, {"tools": [COUNT], "tool_choice": "none"}])
def test_what_has_a_form_is_no_call(llm: Llama4, options: Any) -> None:
    """Nor is it held back until it could be none, nor does the token that ends calls make it one."""
    said = {"name": "count", "parameters": {"shape": "circle"}}
    asked = {"response_format": {"const": said}, "logit_bias": {llm.tokenizer.special("<|eom|>"): 100.0}, **options}
    reply = llm.chat(QUESTION, **asked)
    assert (reply.tool_calls, reply.parsed, reply.finish_reason) == ([], said, "stop")
    assert len(list(llm.stream(QUESTION, **asked))) > 1


@pytest.mark.parametrize("name", ["ignore_eos", "continue_final_message"])
def test_flags_are_true_or_false(llm: Llama4, name: str) -> None:
    for value in ("no", 1, 0):
        options: Any = {name: value}
        with pytest.raises(ArgumentError, match=f"^{name} is {value!r}; it must be True or False"):
            llm.chat(QUESTION, **options)


def test_a_pydantic_class(llm: Llama4) -> None:
    pydantic = pytest.importorskip("pydantic")
    shape = pydantic.create_model("Shape", __config__={"extra": "forbid"}, sides=(int, pydantic.Field(ge=3, le=9)))
    reply = llm.chat(QUESTION, response_format=shape)
    assert isinstance(reply.parsed, shape) and 3 <= reply.parsed.sides <= 9
    assert llm.chat(QUESTION, response_format=shape, max_new_tokens=1).parsed is None


def test_a_reply_that_is_cut_off_is_not_parsed(llm: Llama4) -> None:
    """A limit or a stop string leaves a number that could go on; what could not is whole."""
    number: dict[str, Any] = {"type": "integer", "minimum": 100}
    whole = llm.chat(QUESTION, response_format=number)
    assert whole.finish_reason == "stop" and whole.parsed == int(whole.text) >= 100
    for options in ({"max_new_tokens": 2}, {"max_new_tokens": len(whole.text)}, {"stop": whole.text[-1]}):
        cut = llm.chat(QUESTION, response_format=number, **options)
        assert cut.text and whole.text.startswith(cut.text) and cut.parsed is None, options
    for full in ({"enum": [42]}, PERSON):
        whole = llm.chat(QUESTION, response_format=full)
        limited = llm.chat(QUESTION, response_format=full, max_new_tokens=whole.usage.completion_tokens - 1)
        assert limited.finish_reason == "length" and limited.parsed == whole.parsed == json.loads(whole.text)


def test_what_is_no_json_is_not_followed_again(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes a second for some forms, in the event loop of a server; of what may be whole it is done once."""
    followed = list[str]()
    is_full = Form._is_full

    def noted(form: Form, text: str) -> bool:
        followed.append(text)
        return is_full(form, text)

    monkeypatch.setattr(Form, "_is_full", noted)
    assert llm.chat(QUESTION, response_format=PERSON, max_new_tokens=3).parsed is None and not followed
    stream = llm.stream(QUESTION, response_format={"type": "integer", "minimum": 100}, max_new_tokens=2)
    list(stream)
    assert [stream.reply.parsed, stream.reply.parsed] == [None, None] and len(followed) == 1


def test_a_grammar_that_is_given_up_fails_its_own_reply_alone(llm: Llama4) -> None:
    """2100 texts that all go on: more than a parser of llguidance follows at once."""
    grammar = "start: " + "|".join(f'"a"/./"{chr(0x4E00 + i)}"' for i in range(2100))
    free = llm.chat(QUESTION)
    with Engine(llm, cache_memory=None) as engine:
        beside, failing = engine.stream(QUESTION), engine.stream(QUESTION, grammar=grammar)
        for stream in (beside, failing):
            stream.open()
        with pytest.raises(ArgumentError, match="cannot be followed") as error:
            list(failing)
        assert "".join(beside) == free.text
    assert "max is 2000" in str(error.value) and "state" not in str(error.value) and len(str(error.value)) < 400


def test_a_vocabulary_lives_no_longer_than_its_tokenizer() -> None:
    llm = Llama4.from_pretrained("tiny", progress=False)
    llm.chat(QUESTION, regex="a+", max_new_tokens=2)
    vocabulary = Vocabulary.of(llm.tokenizer, llm.config.text.vocab_size, llm.stop_ids)
    gone = weakref.ref(llm.tokenizer), weakref.ref(vocabulary)
    del llm, vocabulary
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_reply_of_many_levels_is_no_json_that_can_be_read() -> None:
    assert Form("", is_json=True).parse("[" * 10**6 + "]" * 10**6) is None
