"""Replies and the calls in them: what the tests of other parsers ask for, as data.

`source` names whose tests ask for it: vLLM's (`llama4_pythonic`, `pythonic`, `llama3_json`), llama-models' and
llama-stack's (`ToolUtils`), SGLang's (`PythonicDetector`, `Llama32Detector`). Texts are our own. Where ours decides
otherwise, `otherwise` says how, and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama4.text.tool_calls import CallReader, ToolCall, names_of


def parse_reply(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[str, list[ToolCall]]:
    """What a whole reply says, and the tools it calls."""
    reader = CallReader(names_of(tools))
    pieces = [*reader.push(text), *reader.finish()]
    said = "".join(piece for piece in pieces if isinstance(piece, str))
    return said, [piece for piece in pieces if isinstance(piece, ToolCall)]


@dataclass(frozen=True)
class Case:
    source: str
    what: str
    text: str
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    said: str = ""
    tools: tuple[str, ...] | None = None
    """Names of the functions that were given; None if there was no list."""
    otherwise: str = ""


TIDE: tuple[str, dict[str, Any]] = ("get_tide", {"port": "Brest", "unit": "m"})
TIDE_TEXT = "get_tide(port='Brest', unit='m')"
SHIP: tuple[str, dict[str, Any]] = (
    "add_ship",
    {
        "name": "Vega",
        "masts": 3,
        "home": {"port": "Lorient", "berth": "B2"},
        "flag": None,
        "insured": True,
        "crew": ["Ana", "Bo"],
    },
)
SHIP_TEXT = (
    "add_ship(name='Vega', masts=3, home={'port': 'Lorient', 'berth': 'B2'}, flag=None, insured=True, "
    "crew=['Ana', 'Bo'])"
)
NOTHING: tuple[str, dict[str, Any]] = ("get_tide", {})
EMPTY_DICT: tuple[str, dict[str, Any]] = ("sail", {"options": {}})
EMPTY_LIST: tuple[str, dict[str, Any]] = ("sail", {"stops": []})
QUOTES: tuple[str, dict[str, Any]] = ("get_tide", {"port": "L'Orient", "unit": '"fathoms"'})
QUOTES_TEXT = r"get_tide(port='L\'Orient', unit='\"fathoms\"')"

VLLM_STREAMED = [
    Case("vLLM llama4_pythonic", "no call", "Where shall we sail today?", [], "Where shall we sail today?"),
    Case("vLLM llama4_pythonic", "a simple call", f"[{QUOTES_TEXT}]", [QUOTES]),
    Case("vLLM llama4_pythonic", "all types", f"[{SHIP_TEXT}]", [SHIP]),
    Case("vLLM llama4_pythonic", "no arguments", "[get_tide()]", [NOTHING]),
    Case("vLLM llama4_pythonic", "an empty dictionary", "[sail(options={})]", [EMPTY_DICT]),
    Case("vLLM llama4_pythonic", "an empty list", "[sail(stops=[])]", [EMPTY_LIST]),
    Case("vLLM llama4_pythonic", "escaped quotes", f"[{TIDE_TEXT},{QUOTES_TEXT}]", [TIDE, QUOTES]),
    Case("vLLM llama4_pythonic", "two calls without a blank", f"[{TIDE_TEXT},{SHIP_TEXT}]", [TIDE, SHIP]),
    Case("vLLM llama4_pythonic", "between marks", f"<|python_start|>[{TIDE_TEXT}]<|python_end|>", [TIDE]),
    Case("vLLM llama4_pythonic", "two calls, no end mark", f"<|python_start|>[{TIDE_TEXT},{SHIP_TEXT}]", [TIDE, SHIP]),
    Case(
        "vLLM llama4_pythonic",
        "three calls in one step",
        f"<|python_start|>[{TIDE_TEXT}, get_tide(), sail(stops=[])]<|python_end|>",
        [TIDE, NOTHING, EMPTY_LIST],
    ),
    Case("vLLM pythonic", "no call", "Fair winds.", [], "Fair winds."),
    Case("vLLM pythonic", "a simple call", f"[{TIDE_TEXT}]", [TIDE]),
    Case("vLLM pythonic", "all types", f"[{SHIP_TEXT}]", [SHIP]),
    Case("vLLM pythonic", "no arguments", "[get_tide()]", [NOTHING]),
    Case("vLLM pythonic", "an empty dictionary", "[sail(options={})]", [EMPTY_DICT]),
    Case("vLLM pythonic", "an empty list", "[sail(stops=[])]", [EMPTY_LIST]),
    Case("vLLM pythonic", "escaped quotes", f"[{QUOTES_TEXT}]", [QUOTES]),
    Case("vLLM pythonic", "two calls", f"[{TIDE_TEXT}, {SHIP_TEXT}]", [TIDE, SHIP]),
    Case(
        "vLLM pythonic",
        "three calls in two steps",
        f"[{TIDE_TEXT}, get_tide(), sail(stops=[])]",
        [TIDE, NOTHING, EMPTY_LIST],
    ),
]
"""The 20 that vLLM streams, token by token, and in few large steps."""

VLLM = [
    Case(
        "vLLM llama4_pythonic",
        "bytes are not JSON; the call beside is kept",
        f"<|python_start|>[bad(x=b'z'), {TIDE_TEXT}]<|python_end|>",
        [TIDE],
        "[bad(x=b'z')]",
    ),
    Case(
        "vLLM llama4_pythonic",
        "an infinite number is not JSON; the call beside is kept",
        f"<|python_start|>[bad(x=1e999), {TIDE_TEXT}]<|python_end|>",
        [TIDE],
        "[bad(x=1e999)]",
    ),
    Case("vLLM pythonic", "bytes", f"[bad(x=b'z'), {TIDE_TEXT}]", [TIDE], "[bad(x=b'z')]"),
    Case("vLLM pythonic", "an infinite number", f"[bad(x=1e999), {TIDE_TEXT}]", [TIDE], "[bad(x=1e999)]"),
    Case(
        "vLLM pythonic",
        "a broken quote; the call before is kept",
        f"[{TIDE_TEXT}, f(a='x 'y', b='z')]",
        [TIDE],
        "[f(a='x 'y', b='z')]",
    ),
    Case(
        "vLLM pythonic",
        "nothing to be saved",
        "[f(a='x 'y' 'z), g(b='p 'q' 'r)]",
        [],
        "[f(a='x 'y' 'z), g(b='p 'q' 'r)]",
    ),
    Case(
        "vLLM pythonic",
        "a bracket too many",
        "[sail(x=1)])]",
        [("sail", {"x": 1})],
        ")]",
        otherwise="vLLM gives the whole block up; here a call stands for itself",
    ),
    Case(
        "vLLM llama3_json",
        "within text",
        'Found: {"name": "list_ports", "parameters": {}} Shall I go on?',
        [("list_ports", {})],
        "Found:  Shall I go on?",
        otherwise="vLLM drops the text",
    ),
    Case(
        "vLLM llama3_json",
        "with arguments",
        '{"name": "find", "parameters": {"query": "a pier", "limit": 10}}',
        [("find", {"query": "a pier", "limit": 10})],
    ),
    Case("vLLM llama3_json", "no JSON", "Nothing to call here", [], "Nothing to call here"),
    Case(
        "vLLM llama3_json",
        "broken JSON",
        '{"name": "find", "parameters": {broken}',
        [],
        '{"name": "find", "parameters": {broken}',
    ),
    Case(
        "vLLM llama3_json", '"arguments"', '{"name": "find", "arguments": {"query": "x"}}', [("find", {"query": "x"})]
    ),
    *(
        Case(
            "vLLM llama3_json",
            f"several, between them {separator!r}",
            separator.join(
                ['{"name": "find", "parameters": {"query": "x"}}', '{"name": "list_ports", "parameters": {}}']
            ),
            [("find", {"query": "x"}), ("list_ports", {})],
        )
        for separator in ("; ", ";", ";\n", "\n", " ; ")
    ),
    Case(
        "vLLM llama3_json",
        "several within text",
        'Now: {"name": "find", "parameters": {"query": "x"}}; {"name": "find", "parameters": {"query": "y"}} More?',
        [("find", {"query": "x"}), ("find", {"query": "y"})],
        "Now:  More?",
        otherwise="vLLM drops the text",
    ),
    Case(
        "vLLM llama3_json",
        "nested deeply",
        '{"name": "f", "parameters": {"a": {"b": {"c": {"d": {"value": "deep"}}}}}}',
        [("f", {"a": {"b": {"c": {"d": {"value": "deep"}}}}})],
    ),
    Case(
        "vLLM llama3_json",
        "nested deeply, the second",
        '{"name": "f", "parameters": {"v": 1}}; {"name": "g", "parameters": {"a": {"b": {"pool": {"size": 10}}}}}',
        [("f", {"v": 1}), ("g", {"a": {"b": {"pool": {"size": 10}}}})],
    ),
    Case(
        "vLLM llama3_json",
        "brackets in strings",
        '{"name": "f", "parameters": {"q": "a {b} [c]", "in": {"ner": "more {brackets}"}}}',
        [("f", {"q": "a {b} [c]", "in": {"ner": "more {brackets}"}})],
    ),
    Case(
        "vLLM llama3_json",
        "escaped quotes",
        '{"name": "f", "parameters": {"text": "They cried \\"Land {ho}\\""}}',
        [("f", {"text": 'They cried "Land {ho}"'})],
    ),
    Case("vLLM llama3_json", "no name", '{"parameters": {}}', [], '{"parameters": {}}'),
    Case("vLLM llama3_json", "no parameters", '{"name": "f"}', [], '{"name": "f"}'),
    Case(
        "vLLM llama3_json",
        "a brace in the text behind",
        '{"name": "f", "parameters": {"q": "x"}} That was {f}.',
        [("f", {"q": "x"})],
        "That was {f}.",
    ),
    Case(
        "vLLM llama3_json",
        "an object in the text behind",
        '{"name": "f", "parameters": {"q": "x"}} It got {"q": "x"}',
        [("f", {"q": "x"})],
        'It got {"q": "x"}',
    ),
]

LLAMA_MODELS = [
    Case(
        "llama-models", "one call", '[boil(liquid="tea", celsius=True)]', [("boil", {"liquid": "tea", "celsius": True})]
    ),
    Case(
        "llama-models",
        "two calls",
        '[boil(liquid="tea", celsius=True), melt(solid="wax", kelvin=False)]',
        [("boil", {"liquid": "tea", "celsius": True}), ("melt", {"solid": "wax", "kelvin": False})],
    ),
    Case("llama-models", "numbers", "[volume(radius=5.2, height=10)]", [("volume", {"radius": 5.2, "height": 10})]),
    Case(
        "llama-models",
        "mixed types",
        '[work(name="probe", value=42, active=True, ratio=3.14)]',
        [("work", {"name": "probe", "value": 42, "active": True, "ratio": 3.14})],
    ),
    Case("llama-models", "no arguments", "[start()]", [("start", {})]),
    Case(
        "llama-models",
        "blanks and a comma in a string",
        '[read(content="Good day, sailor!", language="en")]',
        [("read", {"content": "Good day, sailor!", "language": "en"})],
    ),
    Case(
        "llama-models",
        "lists and dictionaries",
        '[boil(liquid={"name":"tea", "color":"green"}), convert(value=[100, 101], from_unit="C", to_unit="F")]',
        [
            ("boil", {"liquid": {"name": "tea", "color": "green"}}),
            ("convert", {"value": [100, 101], "from_unit": "C", "to_unit": "F"}),
        ],
    ),
    Case(
        "llama-models",
        "a function in a tag",
        '<function=getTide>{"port":"Brest","date":"2025-04-05"}',
        [("getTide", {"port": "Brest", "date": "2025-04-05"})],
    ),
    Case("llama-models", "an empty list", "[]", [], "[]"),
    Case("llama-models", "a member that is no call", '[boil(liquid="tea"), 42]', [], '[boil(liquid="tea"), 42]'),
    Case("llama-models", "arguments without names", '[boil("tea", True)]', [], '[boil("tea", True)]'),
    Case("llama-models", "a list in a list", '[[boil(liquid="tea")]]', [], '[[boil(liquid="tea")]]'),
    Case("llama-models", "a call in a dictionary", '{"f": boil(liquid="tea")}', [], '{"f": boil(liquid="tea")}'),
    Case("llama-models", "no end", '[boil(liquid="tea", celsius=True', [], '[boil(liquid="tea", celsius=True'),
    Case("llama-models", "no brackets, no list of tools", 'boil(liquid="tea")', [], 'boil(liquid="tea")'),
    Case("llama-models", "a tuple in a list", '[(boil(liquid="tea"),)]', [], '[(boil(liquid="tea"),)]'),
    Case(
        "llama-models",
        "a built-in tool",
        'brave_search.call(query="tides in Brest")',
        [("brave_search", {"query": "tides in Brest"})],
    ),
]

LLAMA_STACK = [
    Case("llama-stack", "one call", '[tide(port="Brest", unit="m")]', [("tide", {"port": "Brest", "unit": "m"})]),
    Case(
        "llama-stack",
        "two calls",
        '[find(query="piers"), now(zone="UTC")]',
        [("find", {"query": "piers"}), ("now", {"zone": "UTC"})],
        otherwise="Meta's parser returns the first alone",
    ),
    Case(
        "llama-stack",
        "types",
        '[study(count=42, on=True, ratio=3.14, name="t", options=None)]',
        [("study", {"count": 42, "on": True, "ratio": 3.14, "name": "t", "options": None})],
    ),
    Case(
        "llama-stack",
        "nested",
        '[f(range={"min": 10, "max": 100}, tags=["new", "old"])]',
        [("f", {"range": {"min": 10, "max": 100}, "tags": ["new", "old"]})],
    ),
    Case("llama-stack", "a hyphen in a name", '[tide-table(port="Brest")]', [("tide-table", {"port": "Brest"})]),
    Case(
        "llama-stack",
        "a hyphen, and single quotes",
        "[add-note(name='log', content='all well on board')]",
        [("add-note", {"name": "log", "content": "all well on board"})],
    ),
    Case(
        "llama-stack", "escaped quotes", '[find(query="a \\"quoted\\" word")]', [("find", {"query": 'a "quoted" word'})]
    ),
    Case(
        "llama-stack",
        "JSON",
        '{"type": "function", "name": "find", "parameters": {"query": "tides"}}',
        [("find", {"query": "tides"})],
    ),
    Case(
        "llama-stack",
        "nested deeply",
        '[ask(config={"filters": {"kinds": ["sail", "motor"], "price": {"min": 10, "max": 500}}, '
        '"sort": {"by": "size", "order": "desc"}})]',
        [
            (
                "ask",
                {
                    "config": {
                        "filters": {"kinds": ["sail", "motor"], "price": {"min": 10, "max": 500}},
                        "sort": {"by": "size", "order": "desc"},
                    }
                },
            )
        ],
    ),
    *(
        Case("llama-stack", "no call", text, [], text)
        for text in (
            "[]",
            'tide(port="Brest")',
            '{tide(port="Brest")}',
            '[tide(port="Brest"]',
            '[tide{port="Brest"}]',
            "just some text",
        )
    ),
]

SGLANG_TOOLS = ("get_tide", "search")
SGLANG = [
    Case("SGLang pythonic", "no brackets", "Plain text.", [], "Plain text.", SGLANG_TOOLS),
    Case("SGLang pythonic", "text before", f"Calling: [{TIDE_TEXT}]", [TIDE], "Calling:", SGLANG_TOOLS),
    Case("SGLang pythonic", "text behind", f"[{TIDE_TEXT}] Here it is:", [TIDE], "Here it is:", SGLANG_TOOLS),
    Case(
        "SGLang pythonic",
        "one after the other",
        f"[{TIDE_TEXT}] and [search(query='inns')]",
        [TIDE, ("search", {"query": "inns"})],
        "and",
        SGLANG_TOOLS,
    ),
    Case("SGLang pythonic", "an opening bracket alone", "Let me try: [", [], "Let me try: [", SGLANG_TOOLS),
    Case(
        "SGLang pythonic",
        "brackets in arguments",
        "[search(query='t', config={'options': [1, 2], 'in': {'k': 'v'}}), get_tide(data=[10, 20])]",
        [("search", {"query": "t", "config": {"options": [1, 2], "in": {"k": "v"}}}), ("get_tide", {"data": [10, 20]})],
        "",
        SGLANG_TOOLS,
    ),
    Case(
        "SGLang pythonic",
        "marks within text",
        f"They ask for the tide. <|python_start|>[{TIDE_TEXT}]<|python_end|> So we look.",
        [TIDE],
        "They ask for the tide.  So we look.",
        SGLANG_TOOLS,
    ),
    Case(
        "SGLang llama32",
        "Llama 3's mark",
        '<|python_tag|>{"name": "get_tide", "arguments": {"port": "Brest", "unit": "m"}}',
        [TIDE],
        "",
        SGLANG_TOOLS,
    ),
    Case(
        "SGLang llama32",
        "text before the mark, several objects",
        'I look. <|python_tag|>{"name": "get_tide", "arguments": {}};{"name": "search", "arguments": {"query": "inn"}}',
        [NOTHING, ("search", {"query": "inn"})],
        "I look.",
        SGLANG_TOOLS,
    ),
    *(
        Case("SGLang llama32", "arguments before the name", text, [("search", {"query": "Brest"})], "", SGLANG_TOOLS)
        for text in (
            '{"arguments": {"query": "Brest"}, "name": "search"}',
            "{'arguments': {'query': 'Brest'}, 'name': 'search'}",
            "<|python_tag|>{'arguments': {'query': 'Brest'}, 'name': 'search'}",
        )
    ),
    *(
        Case("SGLang llama32", "JSON that calls nothing", text, [], text, SGLANG_TOOLS)
        for text in (
            "{}",
            '{"a": 1} is a dict',
            '{"nested": {"name": "search"}, "items": [1, 2]}',
            "{\"text\": \"你好 - 'key': 'value'\"}  behind: 'text'\n",
            "{'text': '你好', 'number': 1} is Python's",
            '{"name": "unknown", "arguments": {"port": "Brest"}}',
        )
    ),
    Case(
        "SGLang llama32",
        "an object before the mark",
        '{"a": 1} <|python_tag|>{"name": "search", "arguments": {"query": "Brest"}}',
        [("search", {"query": "Brest"})],
        '{"a": 1}',
        SGLANG_TOOLS,
    ),
]

CASES = [*VLLM_STREAMED, *VLLM, *LLAMA_MODELS, *LLAMA_STACK, *SGLANG]
