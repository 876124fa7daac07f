"""Tool calls in replies: those that other parsers read, those that none should, and the same however a reply is cut."""

from __future__ import annotations

import ast
import json
import keyword
import random
import re
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import llama_models.llama4.tokenizer as meta
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_models.llama3.tool_utils import ToolUtils

from llama4.text.messages import read_messages
from llama4.text.prompt import render
from llama4.text.tokenizer import Tokenizer
from llama4.text.tool_calls import MARKS, CallReader, ToolCall, read_call
from llama4.text.tool_calls.literals import as_json, read_value
from tests.drawn import drawn
from tests.text.tool_call_cases import CASES, LLAMA_MODELS, LLAMA_STACK, VLLM_STREAMED, Case, parse_reply

Calls = list[tuple[str, dict[str, Any]]]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(Path(meta.__file__).with_name("tokenizer.model"))


def schemas(names: tuple[str, ...] | None) -> list[dict[str, Any]] | None:
    return None if names is None else [{"name": name} for name in names]


def named(calls: list[ToolCall]) -> Calls:
    return [(call.name, call.arguments) for call in calls]


def read(parts: list[str], reader: CallReader, calls_tools: bool = False) -> tuple[str, Calls]:
    """`\0` and `\1` stand for the special tokens."""
    pieces: list[str | ToolCall] = []
    for each in [each for part in parts for each in re.split("([\0\1])", part)]:
        pieces += reader.mark(MARKS[-ord(each)]) if each in ("\0", "\1") else reader.push(each)
    pieces += reader.finish(calls_tools)
    said = "".join(piece for piece in pieces if isinstance(piece, str))
    return said, named([piece for piece in pieces if isinstance(piece, ToolCall)])


def cut(text: str, generator: random.Random) -> list[str]:
    places = sorted(generator.choices(range(len(text) + 1), k=generator.randint(0, len(text))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


# -- what other parsers' tests ask for -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.source}: {case.what}")
def test_what_other_parsers_read(case: Case) -> None:
    said, calls = parse_reply(case.text, schemas(case.tools))
    assert (said, named(calls)) == (case.said, case.calls)


@pytest.mark.parametrize("case", VLLM_STREAMED, ids=lambda case: f"{case.source}: {case.what}")
def test_what_vllm_streams(case: Case) -> None:
    """Token by token as Meta's tokenizer cuts it, character by character, and in two steps."""
    ids = tokenizer().encode(case.text)
    for parts in (
        [tokenizer().decode([i]) for i in ids],
        list(case.text),
        *([case.text[:i], case.text[i:]] for i in range(len(case.text))),
    ):
        assert read(parts, CallReader()) == (case.said, case.calls)


@pytest.mark.parametrize(
    "case",
    [
        case for case in (*LLAMA_MODELS, *LLAMA_STACK) if "hyphen" not in case.what
    ],  # llama-stack's copy alone reads them
    ids=lambda case: f"{case.source}: {case.what}",
)
def test_the_data_is_what_metas_parser_reads(case: Case) -> None:
    """Of several calls, Meta's returns the first."""
    found = ToolUtils.maybe_extract_custom_tool_call(case.text)
    if found is None and (built_in := ToolUtils.maybe_extract_builtin_tool_call(case.text)):
        found = built_in[0], {"query": built_in[1]}
    assert ([found] if found else []) == case.calls[:1]


CALLS = [
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    (
        '{"type": "function", "name": "f", "parameters": {"a": {"b": [{"c": null}]}}}',
        "",
        [("f", {"a": {"b": [{"c": None}]}})],
    ),
    ('{"name": "f", "arguments": {"a": 1}}', "", [("f", {"a": 1})]),
    ('{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", {"a": 1})]),
    ('{"type": "function", "function": {"name": "f", "arguments": {}}}', "", [("f", {})]),
    ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [("f", {}), ("g", {})]),
    ('[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]', "", [("f", {}), ("g", {})]),
    ('[f(a=1), g(b="x")]', "", [("f", {"a": 1}), ("g", {"b": "x"})]),
    ("[f()]", "", [("f", {})]),
    ("<|python_start|>[f(a=\"[(}\", b='it\\'s')]<|python_end|>", "", [("f", {"a": "[(}", "b": "it's"})]),
    ("[f(a=[1, [2.5, -3]], b={'k': (None, True)})]", "", [("f", {"a": [1, [2.5, -3]], "b": {"k": [None, True]}})]),
    ("[f(a=true, b=null, c=[false])]", "", [("f", {"a": True, "b": None, "c": [False]})]),
    ("[ns.f(\n  a = 1,\n)]", "", [("ns.f", {"a": 1})]),
    ('[f(a="\\d")]', "", [("f", {"a": "\\d"})]),
    ("Don't worry [I know]: [f(a=1)] That's it.", "Don't worry [I know]:  That's it.", [("f", {"a": 1})]),
    ("Sure.<|python_start|>\n[f(a=1)]<|python_end|>", "Sure.", [("f", {"a": 1})]),
    ('<|python_start|>Let me look.<|python_end|>{"name": "f", "parameters": {}}', "Let me look.", [("f", {})]),
    ('```json\n{"name": "f", "parameters": {}}\n```', "", [("f", {})]),
    (
        'für "Zürich": [f(stadt="Zürich", ✓=1)] [g(ä="ö")]',
        'für "Zürich": [f(stadt="Zürich", ✓=1)]',
        [("g", {"ä": "ö"})],
    ),
]


@pytest.mark.parametrize(("text", "said", "calls"), CALLS)
def test_tool_calls_are_found(text: str, said: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    assert parse_reply(text) == (said, [ToolCall(name, arguments) for name, arguments in calls])


NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(-1e9, 1e9) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@drawn(150)
@given(
    st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3),
    st.sampled_from(["", "Let me look. ", "See [1], {x}: "]),
    st.booleans(),
)
def test_any_calls_in_any_form_are_found(calls: list[tuple[str, dict[str, Any]]], prose: str, marked: bool) -> None:
    wanted = [ToolCall(name, arguments) for name, arguments in calls]
    python = ", ".join(f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})" for name, arguments in calls)
    objects = [{"name": name, "parameters": arguments} for name, arguments in calls]
    for form in (f"[{python}]", json.dumps(objects), "; ".join(json.dumps(each) for each in objects)):
        text = f"<|python_start|>{form}<|python_end|>" if marked else form
        assert parse_reply(prose + text) == (prose.strip() if prose else "", wanted), prose + text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Just text.",
        " spaces stay \n",
        "[1, 2, 3]",
        '{"name": "Ada"}',
        '{"name": 5, "parameters": {}}',
        '{"name": "f", "parameters": [1]}',
        '{"name": "f", "parameters": {"a": 1}',
        '{"result": {"name": "f", "parameters": {}}}',
        "[f(1)]",
        "[f(a=b)]",
        "[f(a=g(b=1))]",
        "[f(a=[g(b=1)])]",
        "[f(a=1]",
        "[f(a=1), 5]",
        "[f(**{'a': 1})]",
        "[f(a='x)]",
        "[f(a=__import__('os').system('touch x'))]",
        "[(lambda: 1)()]",
        "[f().g(a=1)]",
        "[f(a=9**9**9)]",
        "[f(a=" + "1" * 10_000 + ")]",
        "[f(a=" + "-" * 90_000 + "1)]",
        "[f(a=" + "[" * 90 + "\0" + "]" * 90 + ")]",
        "[f(" * 30_000,
        '{"a":' * 30_000,
        '[f("' * 30_000,
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse_reply(text) == (text, [])


def test_only_known_functions_count() -> None:
    text = '[get_weather(city="Bern")] [rm(path="/")]'
    assert parse_reply(text, tools=[WEATHER]) == ('[rm(path="/")]', [ToolCall("get_weather", {"city": "Bern"})])
    assert parse_reply(text, tools=[]) == (text, [])


def test_calls_have_different_ids() -> None:
    _, calls = parse_reply("[f(), f()]")
    assert calls[0] == calls[1]
    assert calls[0].id != calls[1].id
    assert re.fullmatch(r"call_[0-9a-f]{24}", calls[0].id)


# -- spellings -------------------------------------------------------------------------------------------------------

SPELLINGS: list[tuple[str, Calls]] = [
    ('[brave-web-search(query="x")]', [("brave-web-search", {"query": "x"})]),
    ('[mcp.files.read-all(path="x")]', [("mcp.files.read-all", {"path": "x"})]),
    ('[f(from="a", class=1, import=[2], user-id=3)]', [("f", {"from": "a", "class": 1, "import": [2], "user-id": 3})]),
    ('[f(text="one\ntwo\r\nthree")]', [("f", {"text": "one\ntwo\r\nthree"})]),
    ('{"name": "f", "parameters": {"text": "one\ntwo\tthree"}}', [("f", {"text": "one\ntwo\tthree"})]),
    ('[f(text=\'\'\'it\'s "so"\'\'\', more="""\n""")]', [("f", {"text": 'it\'s "so"', "more": "\n"})]),
    ("[f(a=r'\\d', b='\\x41\\u00e9\\N{BULLET}', c='a' 'b')]", [("f", {"a": "\\d", "b": "Aé•", "c": "ab"})]),
    ("[f(a=0x1F, b=-1_000, c=.5, d=1e3, e=+2,)]", [("f", {"a": 31, "b": -1000, "c": 0.5, "d": 1000.0, "e": 2})]),
    ("[f(a={1: 'x', None: 2}, b=(1, (2,)), c=())]", [("f", {"a": {"1": "x", "null": 2}, "b": [1, [2]], "c": []})]),
    ('{"name": "f", "parameters": null}', [("f", {})]),
    ('{"type": "function", "name": "f"}', [("f", {})]),
    ('{"name": "f", "arguments": ""}', [("f", {})]),
    ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', [("f", {"a": 1})]),
    (
        "{'name': 'f', 'parameters': {'a': True, 'b': None, 'c': 'it\\'s'}}",
        [("f", {"a": True, "b": None, "c": "it's"})],
    ),
    ('{"name": "f", "parameters": {"a": [1, 2,],},}', [("f", {"a": [1, 2]})]),
    ('<function=f>{"a": 1}</function>', [("f", {"a": 1})]),
    ("<function=my-f>{'a': 1}</function> <function=g></function>", [("my-f", {"a": 1}), ("g", {})]),
    ('brave_search.call(query="a \\"b\\"")', [("brave_search", {"query": 'a "b"'})]),
    ('<|python_start|>wolfram_alpha.call(query="1+1")<|python_end|>', [("wolfram_alpha", {"query": "1+1"})]),
    ('[f(a=1), {"name": "g", "parameters": {}}]', [("f", {"a": 1}), ("g", {})]),
    ("[f(a=1), g(b=2)", [("f", {"a": 1}), ("g", {"b": 2})]),
    ("<|python_start|>[f(a=1)<|python_end|>", [("f", {"a": 1})]),
    ('```json\n[f(a=1)]\n{"name": "g", "parameters": {}}\n```', [("f", {"a": 1}), ("g", {})]),
    ("```\n[f(a=1)]", [("f", {"a": 1})]),
    ('<|python_start|>get_weather(city="Bern")<|python_end|>', [("get_weather", {"city": "Bern"})]),
]


@pytest.mark.parametrize(("text", "calls"), SPELLINGS, ids=lambda value: str(value)[:40])
def test_every_spelling(text: str, calls: Calls) -> None:
    said, found = parse_reply(text)
    assert (said, named(found)) == ("", calls)


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ('get_weather(city="Bern")', "", [("get_weather", {"city": "Bern"})]),
        ('I look:\nget_weather(city="Bern"), get_weather(city="Rom")', "I look:", "Bern Rom"),
        ('```tool_code\nget_weather(city="Bern")\n```', "", "Bern"),
        ('<|python_start|>get_weather(city="Bern")<|python_end|>', "", "Bern"),
        ('get_weather.call(city="Bern")', 'get_weather.call(city="Bern")', ""),
        ('{"name": "get_weather"}', "", [("get_weather", {})]),
        ('[get_weather(city="Bern"), rm(path="/")]', '[rm(path="/")]', "Bern"),
        ('[rm(path="/"), get_weather(city="Bern"), rm()] Done', '[rm(path="/"), rm()] Done', "Bern"),
        ('[{"name": "rm", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "Bern"}}]', None, "Bern"),
        ('[get_weather(city="Bern"), get_weather("Rom")]', '[get_weather("Rom")]', "Bern"),
        ('[get_weather(city="Bern"), get_weather(city=', "[get_weather(city=", "Bern"),
        ('[get_weather(city="Bern"), get_weather(city="Rom"), 5]', "[5]", "Bern Rom"),
        ('Say get_weather(city="Bern") to ask.', None, ""),
        ('get_weather(city="Bern") is what I would call.', None, ""),
        ('x = get_weather(city="Bern")', None, ""),
        ('get_weather(city="Bern").temperature', None, ""),
        ('brave_search.call(query="x")', None, ""),
        ("<|python_start|>import os<|python_end|>", "import os", ""),
    ],
)
def test_calls_of_functions_that_were_given(text: str, said: str | None, calls: Calls | str) -> None:
    wanted = [("get_weather", {"city": city}) for city in calls.split()] if isinstance(calls, str) else calls
    if said is None:
        said = text if not wanted else '[{"name": "rm", "parameters": {}}]'
    found = parse_reply(text, tools=[WEATHER])
    assert (found[0], named(found[1])) == (said, wanted)


def test_names_that_are_no_names() -> None:
    names = ("3d.view", "a b", "x/y:z")
    text = ", ".join(f"{name}(n={i})" for i, name in enumerate(names))
    calls = [(name, {"n": i}) for i, name in enumerate(names)]
    assert named(parse_reply(f"[{text}]", schemas(names))[1]) == calls
    assert named(parse_reply(text.replace(", ", "\n"), schemas(names))[1]) == calls


CODE = "import math\n\nfor n in range(3):\n    print(math.sqrt(n), [str(n)], {'a': 1})"


def test_code_between_marks() -> None:
    call = ("code_interpreter", {"code": CODE})
    interpreter = schemas(("code_interpreter", "get_weather"))
    for tools in (None, interpreter):
        assert read([f"Now. <|python_start|>\n{CODE}\n<|python_end|> Done."], CallReader()) == ("Now.  Done.", [call])
        said, calls = parse_reply(f"<|python_tag|>{CODE}", tools)
        assert (said, named(calls)) == ("", [call])
        for other in ("Let me look.", "Paris", '{"a": 1}', "[bad(x=1e999)]", "[bad(x=b'z')]", "x = = 1"):
            assert parse_reply(f"<|python_start|>{other}<|python_end|>", tools) == (other, [])
        _, calls = parse_reply(
            f"<|python_start|>{CODE}<|python_end|><|python_start|>[get_weather()]<|python_end|>", tools
        )
        assert named(calls) == [call, ("get_weather", {})]
    said, calls = parse_reply(f"<|python_start|>{CODE}<|python_end|>", [WEATHER])
    assert (said, calls) == (CODE, [])  # nobody to run it


# -- arguments that are not JSON -------------------------------------------------------------------------------------

NOT_JSON = ["b'z'", "{1, 2}", "set()", "1j", "2+1j", "...", "{(1, 2): 3}", "{[1]: 3}", "1e999", "-1e999", "NaN", "nan"]
NOT_JSON += ["Infinity", "float('inf')", "x", "f'{x}'", "rb'x'", "1 + 1", "'a' * 9", "[1][0]", "lambda: 1", "'\\ud800'"]
NOT_JSON += ["'\\N{NO SUCH THING}'", "007", "1" * 5000, "[" * 101 + "]" * 101, "*a", "{**a}", "[x for x in y]"]


@pytest.mark.parametrize("value", NOT_JSON, ids=lambda value: value[:20])
def test_arguments_that_are_not_json_stay_text(value: str) -> None:
    """And the call beside them is kept."""
    assert parse_reply(f"[bad(x={value})]") == (f"[bad(x={value})]", [])
    said, calls = parse_reply(f"[bad(x={value}), good(a=1)]")
    if "[" * 101 in value:  # too deep to be sure of anything behind
        assert calls == []
    else:
        assert (said, named(calls)) == (f"[bad(x={value})]", [("good", {"a": 1})])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, '"\\ud800"', "undefined"])
def test_json_that_is_none(value: str) -> None:
    text = f'{{"name": "f", "parameters": {{"x": {value}}}}}'
    assert parse_reply(text) == (text, [])
    assert named(parse_reply(f'{text}; {{"name": "g", "parameters": {{}}}}')[1]) == [("g", {})]


@pytest.mark.parametrize(
    "text", [*(case.text for case in CASES), *(text for text, _ in SPELLINGS)], ids=lambda t: t[:40]
)
def test_whatever_is_returned_can_be_sent_back(text: str) -> None:
    said, calls = parse_reply(text)
    for call in calls:
        assert json.loads(call.to_openai()["function"]["arguments"]) == call.arguments
        json.dumps(call.arguments, allow_nan=False).encode()
    for form in (calls, [call.to_openai() for call in calls]):
        message = {"role": "assistant", "content": said, "tool_calls": form}
        render([{"role": "user", "content": "x"}, message], tokenizer())


@pytest.mark.parametrize("value", [b"x", {1}, float("nan"), float("inf"), 1j, {(1, 2): 3}, "\ud800", object()])
def test_calls_in_a_conversation_have_arguments_that_are_json(value: Any) -> None:
    for call in (ToolCall("f", {"x": value}), {"name": "f", "arguments": {"x": value}}):
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        with pytest.raises(ValueError, match="message 0: the arguments of tool call 'f' are not JSON"):
            read_messages([message])


def test_arguments_in_a_conversation() -> None:
    for arguments, wanted in (("", {}), (" \n", {}), ('{"a": 1}', {"a": 1}), ({"a": (1, 2)}, {"a": [1, 2]})):
        message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": arguments}]}
        assert read_messages([message])[0].tool_calls == (ToolCall("f", wanted),)
    with pytest.raises(ValueError, match="are not JSON"):
        read_call({"name": "f", "arguments": "[" * 100_000})


VALUES_IN_PYTHON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@drawn(300)
@given(VALUES_IN_PYTHON)
def test_values_are_those_of_python(value: Any) -> None:
    text = repr(value)
    assert as_json(read_value(text)[0]) == json.loads(json.dumps(ast.literal_eval(text)))


@drawn(300)
@given(st.text(st.sampled_from("\\nxu0N1a7'\"\n{ } \u20ac"), max_size=10), st.sampled_from(["'", '"', "'''", '"""']))
def test_strings_are_those_of_python(body: str, quote: str) -> None:
    text = f"{quote}{body}{quote}"
    try:
        with warnings.catch_warnings(action="ignore"):
            wanted = ast.literal_eval(text)
        as_json(wanted)
    except (SyntaxError, ValueError):
        return
    if isinstance(wanted, str):
        value, end = read_value(text)
        assert (value, end) == (wanted, len(text))


# -- in parts --------------------------------------------------------------------------------------------------------

FRAGMENTS = [
    "[",
    "{",
    "(",
    ")",
    "]",
    "}",
    "f",
    "g",
    "f(",
    "get_weather(",
    "a=1",
    "a=",
    '"',
    "'",
    "x",
    ",",
    ";",
    "\\",
    "`",
]
FRAGMENTS += ["<", "<|py", "[[", "é", "get_", "weather", '{"', "{'type'", '"name"', ":", "b'z'", "1e999", "4,", "text"]
FRAGMENTS += [
    "<|python_start|>",
    "<|python_end|>",
    "<function=f>",
    "</function>",
    "'''",
    '"""',
    "[f()]",
    "\n",
    " ",
    "\t",
]
FRAGMENTS += ["[f(a=1), ", 'g(b="x")]', '{"name": "f", "parameters": {}}', "```json\n", "\n```", "x = 1\n", "print(1)"]
FRAGMENTS += ['brave_search.call(query="q")', '[{"name": "g", "arguments": {"a": "]"}}]', 'get_weather(city="x")']
FRAGMENTS += ["\0", "\1"]
TOOLS = [None, (), ("f", "get_weather"), ("code_interpreter", "brave_search", "f")]


@drawn(400)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.sampled_from(TOOLS),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_reply_is_read_alike_however_it_is_cut(
    text: str, tools: tuple[str, ...] | None, certain: bool, calls_tools: bool, generator: random.Random
) -> None:
    def reader() -> CallReader:
        return CallReader(None if tools is None else frozenset(tools), certain=certain)

    whole = read([text], reader(), calls_tools)
    assert read(list(text), reader(), calls_tools) == whole
    assert read(cut(text, generator), reader(), calls_tools) == whole
    if not whole[1] and not certain:
        assert whole[0] == re.sub("[\0\1]", "", text) or "\0" in text or "\1" in text
    if certain and not set(text) & {"\0", "\1"}:
        said, calls = parse_reply(text, schemas(tools))
        assert (said, named(calls)) == whole


@pytest.mark.parametrize(
    ("text", "certain", "held"),
    [
        ("Hello the", True, ""),
        ("See [1", True, ""),
        ("I know [I know", True, ""),
        ("a < b", True, ""),
        ("{x", True, ""),
        ("Set {1, 2", True, ""),
        ("[see(x", True, "[see(x"),
        ("Look: [get_wea", True, " [get_wea"),
        ("Look: [get_weather(city=", True, " [get_weather(city="),
        ('Look:\n{"na', True, '\n{"na'),
        ('{"answer": 4', True, '{"answer": 4'),  # "name" may come
        ('{"answer": 4', False, ""),
        ('{"name": 4', False, '{"name": 4'),
        ('{"nam', False, '{"nam'),
        ('{"nan', False, ""),
        ("text <|python_st", True, " <|python_st"),
        ("<function", True, "<function"),
        ("get_wea", True, "get_wea"),
        ("get_west", True, ""),
        ("I get_wea", True, ""),
        ("get_wea", False, ""),
        ("Then brave_sea", False, " brave_sea"),
        ("``", True, "``"),
        ("[get_weather()] Fine", True, ""),
        ("[get_weather()", False, "[get_weather()"),
        ("[get_weather()] ", False, "[get_weather()] "),
        ("[get_weather()] Fine", False, ""),
        ("[get_weather(), 5", True, ""),
        ("[f(x)], no", True, ""),
    ],
)
def test_only_what_may_begin_a_call_is_held_back(text: str, certain: bool, held: str) -> None:
    for parts in ([text], list(text)):
        reader = CallReader(frozenset({"get_weather"}) if certain else None, certain=certain)
        pieces = [piece for part in parts for piece in reader.push(part)]
        said = "".join(piece for piece in pieces if isinstance(piece, str))
        if any(isinstance(piece, ToolCall) for piece in pieces):
            assert said == "Fine"
        else:
            assert said == text.removesuffix(held)
            assert said + held == text


@drawn(100)
@given(st.text(st.sampled_from("acd .!?\n0["), max_size=20))
def test_plain_text_comes_at_once(text: str) -> None:
    reader = CallReader(None, certain=False)
    said = ""
    for i, character in enumerate(text):
        said += "".join(str(piece) for piece in reader.push(character))
        assert said == re.sub(r"\s*(?:(?<!\[)\[\s*(?:[acd][acd.0]*\s*)?)?\Z", "", text[: i + 1])


def test_calls_come_before_the_list_ends() -> None:
    reader = CallReader()
    assert reader.push("[f(a=1") == []
    assert reader.push("), ") == []  # 5 may come, and no list of calls it would be
    first = reader.push("g(")
    assert named([piece for piece in first if isinstance(piece, ToolCall)]) == [("f", {"a": 1})]
    assert reader.push("b=2)") == []
    assert named([piece for piece in reader.push("]") if isinstance(piece, ToolCall)]) == [("g", {"b": 2})]


def test_without_tools_calls_count_after_a_mark_or_at_the_very_end() -> None:
    text = 'Now.\n[f(a=1)]; {"name": "g", "parameters": {}}'
    calls = [("f", {"a": 1}), ("g", {})]

    def uncertain() -> CallReader:
        return CallReader(None, certain=False)

    assert read([text], uncertain(), calls_tools=False) == (text, [])
    assert read([text], uncertain(), calls_tools=True) == ("Now.", calls)
    assert read([text + "\n"], uncertain(), calls_tools=True) == ("Now.", calls)
    assert read([f"```\n{text[5:]}\n```"], uncertain(), calls_tools=True) == ("", calls)
    assert read([text + " That's it."], uncertain(), calls_tools=True) == (text + " That's it.", [])
    assert read(["<|python_start|>[f()]"], uncertain(), calls_tools=False) == ("<|python_start|>[f()]", [])
    reader = uncertain()
    pieces = [*reader.push("See [f(a=1)]. "), *reader.mark("<|python_start|>"), *reader.push("[g()]")]
    pieces += [*reader.mark("<|python_end|>"), *reader.push(" Done.")]
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == "See [f(a=1)].  Done."
    assert named([piece for piece in pieces if isinstance(piece, ToolCall)]) == [("g", {})]


@pytest.mark.parametrize(
    "text",
    [
        "[f(" * 20_000,
        '{"a":' * 20_000,
        "[f(a='" * 20_000,
        "[f(a=1) " * 10_000,
        "[f(a=[g(b=1}" * 10_000,
        "[f(a=don't) " * 10_000,
        "<function=f>{" * 10_000,
        '[{"name": "f", "parameters": [' * 10_000,
        "```json\n" * 10_000,
        " \n" * 60_000,
        "[" + " " * 120_000,
        "[" + "a" * 120_000,
        '[f(a="' + "\\n" * 60_000,
        "[f(a=" + "[" * 100_000,
        "[f(a=" + "-" * 100_000 + "1)]",
        '{"name": "f", "parameters": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001,
        "<|python_start|>" + "(" * 20_000,
        "<|python_start|>" + "-" * 20_000 + "1",
        "<|python_start|>" + "x = 1\n" * 20_000,
    ],
    ids=lambda text: text[:40],
)
def test_hostile_replies_take_no_long(text: str) -> None:
    """In time that grows as the text does, whole and in parts of 16 characters."""
    begin = time.process_time()
    whole = read([text], CallReader())
    assert read([text[i : i + 16] for i in range(0, len(text), 16)], CallReader()) == whole
    assert len(whole[1]) <= 1
    assert time.process_time() - begin < 20  # seconds; each takes well below one


def test_arguments_in_a_string_of_many_levels() -> None:
    """Such a text is no call; Python's reader of JSON ends after a thousand."""
    arguments = "[" * 5000 + "]" * 5000
    text = json.dumps({"type": "function", "function": {"name": "f", "arguments": arguments}})
    assert parse_reply(text) == (text, [])
