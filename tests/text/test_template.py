"""Checkpoints' own chat templates against transformers' `apply_chat_template`, and users who write special tokens."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import llama_models.llama4.tokenizer as meta
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from llama4.errors import ChatTemplateError
from llama4.text.added_tokens import AddedToken
from llama4.text.prompt import encode
from llama4.text.template import MAX_COMPILED, MAX_NOTED, ChatTemplate
from llama4.text.tokenizer import Tokenizer
from llama4.text.tokenizer_files import to_json

ALL = {path.stem: path.read_text("utf-8") for path in sorted(Path(__file__).with_name("templates").glob("*.jinja"))}
"""Templates of the kinds that models on the Hub have."""
SPECIAL = (
    *("<s>", "</s>", "[INST]", "[/INST]", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>"),
    *(
        "<|im_end|>",
        "<|user|>",
        "<|system|>",
        "<|assistant|>",
        "<|tool|>",
        "<|end|>",
        "<start_of_turn>",
        "<end_of_turn>",
    ),
)
"""Special tokens that they use and Llama 4 has not."""
TEXT = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Added tokens that are not special."""

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look “it” <b>up</b>",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "which"}}},
    },
}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "Zürich", "n": [1, None]}}}
SYSTEM = {"role": "system", "content": " Be brief. \n"}
USER = {"role": "user", "content": "\n What is 2 + 2? 😀 "}
REPLY = {"role": "assistant", "content": " It is\n\n4."}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [USER]},
    {"messages": [USER], "add_generation_prompt": False},
    {"messages": [SYSTEM, USER, REPLY, USER]},
    {"messages": [SYSTEM, USER], "tools": [TOOL, TOOL]},
    {"messages": [USER, REPLY, USER], "tools": [TOOL]},
    {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"is": "é"}'},
            REPLY,
        ]
    },
    {"messages": [USER, {"role": "assistant", "content": "So", "tool_calls": [CALL, CALL]}], "tools": [TOOL]},
    {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, USER, REPLY]},
    {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}]},
    {"messages": [USER, REPLY], "continue_final_message": True},
    {"messages": [SYSTEM, USER, {"role": "assistant", "content": "It is "}], "continue_final_message": True},
    {
        "messages": [USER, {"role": "assistant", "reasoning_content": "2, 2", "content": "4"}],
        "date_string": "1 May 2025",
    },
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 1000 ranks with 200 special tokens of Llama 4, those of the templates, and four that are text."""
    path = tmp_path_factory.mktemp("tokenizer")
    genuine = Path(meta.__file__).with_name("tokenizer.model")
    (path / "tokenizer.model").write_bytes(b"\n".join(genuine.read_bytes().splitlines()[:1000]))
    tokenizer = Tokenizer(path, num_special_tokens=200)
    names = [*SPECIAL, *TEXT]
    added = [
        AddedToken(tokenizer.vocab_size + i, name, special=name in SPECIAL, normalized=False)
        for i, name in enumerate(names)
    ]
    content = to_json(tokenizer.ranks, [*tokenizer.added_tokens, *added], tokenizer.pattern)
    (path / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "tokenizer.model").unlink()
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(directory)


def text_of(template: ChatTemplate, **case: Any) -> str:
    return "".join(piece.text for piece in template.compose(**{"add_generation_prompt": True} | case))


def options(case: dict[str, Any]) -> dict[str, Any]:
    """As transformers wants them."""
    case = {"add_generation_prompt": not case.get("continue_final_message")} | case
    return {"conversation": case.pop("messages"), **case}


@pytest.mark.parametrize("name", ALL)
def test_templates_write_what_they_do_in_transformers(
    name: str, tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast
) -> None:
    template = ChatTemplate({"default": ALL[name]}, tokenizer)
    refused = 0
    for case in CONVERSATIONS:
        try:
            expected = theirs.apply_chat_template(**options(case), chat_template=ALL[name], tokenize=False)
        except Exception:
            refused += 1
            with pytest.raises(ChatTemplateError):
                template.compose(**case)
            continue
        pieces = template.compose(**case)
        assert "".join(piece.text for piece in pieces) == expected
        ids = theirs.apply_chat_template(**options(case), chat_template=ALL[name], tokenize=True, return_dict=False)
        assert encode(pieces, tokenizer).ids == ids
    assert refused <= 7


def everywhere(said: str, role: str = "user") -> dict[str, Any]:
    """A conversation that says this in every field."""
    function = {
        "name": said or "f",
        "description": said,
        "parameters": {"type": "object", "properties": {said: {"type": "string", "description": said, "enum": [said]}}},
    }
    call = {
        "id": said,
        "type": "function",
        "function": {"name": said or "f", "arguments": {said: [said, {"role": said}]}},
    }
    return {
        "messages": [
            {"role": "user", "content": f"x{said}"},
            {"role": "assistant", "content": said, "tool_calls": [call]},
            {"role": "tool", "content": said, "tool_call_id": said, "name": said},
            {"role": "assistant", "content": said, "reasoning_content": said},
            {"role": "user", "content": f"x{said}"},
        ],
        "tools": [{"type": "function", "function": function}],
    }


def special_ids(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    own = set(tokenizer.special_tokens.values())
    return [i for i in ids if i in own]


@pytest.mark.parametrize("name", ALL)
def test_users_text_stays_text_under_every_template(
    name: str, tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast
) -> None:
    template = ChatTemplate({"default": ALL[name]}, tokenizer)
    names = list(tokenizer.special_tokens)
    assert len(names) >= 200
    for said in (
        "".join(names),
        " ".join(names[::-1]),
        "\n".join(names),
        "<|",
        "|>",
        "eot|>",
        "<|eot|",
        "user|>",
        "<s",
    ):
        said = said.replace("<|im_end|>", "") if name == "reasoning" else said  # which that template takes out
        cases = [everywhere(said), {"messages": [SYSTEM | {"content": said}, USER | {"content": f"{said}x{said}"}]}]
        if name not in ("llama4", "llama3.1", "reasoning"):  # no tools
            cases[0]["messages"] = cases[0]["messages"][-1:]
        if name == "gemma":  # no system message
            cases[1]["messages"].pop(0)
        for case in cases:
            harmless = json.loads(json.dumps(case).replace(json.dumps(said)[1:-1], "word"))
            expected = encode(template.compose(**harmless), tokenizer).ids
            ids = encode(template.compose(**case), tokenizer).ids
            assert special_ids(ids, tokenizer) == special_ids(expected, tokenizer)
            text = theirs.apply_chat_template(**options(case), chat_template=ALL[name], tokenize=False)
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("{{ content | lower }}", "<|EOT|>"),
        ("{{ content | replace('-', '') }}", "<|e-ot|>"),
        ("{{ content[0] }}{{ content[1:] }}", "<|eot|>"),
        ("{{ '<|' + content + '|>' }}", "eot"),
        ("{{ '<' ~ content }}", "|eot|>"),
        ("{{ [content, content] | join }}", "ot|><|e"),
        ("{{ content | reverse }}", ">|toe|<"),
        ("{{ content | tojson }}", "<|eot|>"),
        ("{{ '%s' % content }}{{ '{}'.format(content) }}", "<|eot|>"),
        ("{% set ns = namespace(x='<|e') %}{% set ns.x = ns.x + content %}{{ ns.x }}", "ot|>"),
        ("{% macro f(x) %}<|{{ x }}|>{% endmacro %}{{ f(content) }}", "eot"),
        ("{% if '<|eot|>' in content %}{{ content.split('<|eot|>')[0] }}{{ content }}{% endif %}", "a<|eot|>"),
        ("{{ content.split('-') | join('<|eot|>'[:2]) }}", "-eot|>"),
        ("{{ content | tojson(ensure_ascii=True) }}", "<|eot|>"),
        ("{{ {'<|eot|>': content}['<|eot|>'] }}", "<|eot|>"),
    ],
)
def test_what_a_template_does_to_a_text_makes_no_special_token(source: str, content: str, tokenizer: Tokenizer) -> None:
    source = "<|header_start|>" + source.replace("content", "messages[0].content") + "{{ '<|header_end|>' }}"
    pieces = ChatTemplate({"default": source}, tokenizer).compose([{"role": "user", "content": content}])
    assert [piece.text for piece in pieces if piece.special] == ["<|header_start|>", "<|header_end|>"]


def test_private_use_characters_of_a_user_are_no_marks(tokenizer: Tokenizer) -> None:
    template = ChatTemplate({"default": ALL["reasoning"]}, tokenizer)
    marks = "".join(map(chr, range(0xF0000, 0xF0400)))
    pieces = template.compose([{"role": "user", "content": marks}])
    assert [piece.text for piece in pieces if piece.special] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert pieces[1].text == f"user\n{marks}"
    with pytest.raises(ChatTemplateError, match="too many different private-use characters"):
        template.compose([{"role": "user", "content": "".join(map(chr, range(0xF0000, 0x10FFFE, 100)))}])


def test_what_is_given_fills_no_memory(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """Variables that the template does not read are logged, some of them; marks differ by what messages hold."""
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, tokenizer)
    for i in range(MAX_NOTED + 9):
        variables: Any = {f"v{i}" * 99: 1}
        template.compose([{"role": "user", "content": "a"}], **variables)
    assert len(caplog.records) == len(template._noted) == MAX_NOTED
    assert max(len(record.getMessage()) for record in caplog.records) < 200
    base, taken = 0xF0000, ""
    for _ in range(12):
        taken += chr(base)
        assert template.compose([{"role": "user", "content": taken}])[0].text == taken
        base += len(tokenizer.special_tokens) + 3 + len(set("".join(tokenizer.special_tokens)))
    assert 2 < len(template._compiled_templates) <= MAX_COMPILED


def test_tokens_that_a_template_puts_together_are_its_own(tokenizer: Tokenizer) -> None:
    template = ChatTemplate({"default": ALL["phi"]}, tokenizer)
    pieces = template.compose([{"role": "user", "content": "<|user|>user|>"}], add_generation_prompt=False)
    assert [(piece.text, piece.special) for piece in pieces] == [
        ("<|user|>", True),
        ("<|user|>user|>", False),
        ("<|end|>", True),
    ]


REPLY_TWICE = [USER, REPLY, USER, {"role": "assistant", "content": "Yes 😀."}]


def test_replies_are_marked_as_in_transformers(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate({"default": ALL["reasoning"]}, tokenizer)
    expected: Any = theirs.apply_chat_template(
        REPLY_TWICE, chat_template=ALL["reasoning"], return_dict=True, return_assistant_tokens_mask=True
    )
    rendered = encode(template.compose(REPLY_TWICE, add_generation_prompt=False, mark_replies=True), tokenizer)
    assert rendered.ids == expected["input_ids"]
    assert rendered.is_reply == [bool(each) for each in expected["assistant_masks"]]
    assert sum(rendered.is_reply) > 10


@pytest.mark.parametrize("name", ["chatml", "llama4", "mistral"])
def test_replies_are_found_without_marks(name: str, tokenizer: Tokenizer) -> None:
    template = ChatTemplate({"default": ALL[name]}, tokenizer)
    rendered = encode(template.compose(REPLY_TWICE, add_generation_prompt=False, mark_replies=True), tokenizer)
    said = tokenizer.decode(i for i, reply in zip(rendered.ids, rendered.is_reply, strict=True) if reply)
    end = {"chatml": "<|im_end|>\n", "llama4": "<|eot|>", "mistral": "</s>"}[name]
    first = "It is\n\n4." if name == "mistral" else " It is\n\n4."
    assert said == f"{first}{end}Yes 😀.{end}"


def test_a_template_that_changes_what_it_wrote_cannot_be_marked(tokenizer: Tokenizer) -> None:
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate({"default": source}, tokenizer)
    with pytest.raises(ChatTemplateError, match="message 1 adds"):
        template.compose(REPLY_TWICE, mark_replies=True)


def test_contents_come_in_the_form_that_a_template_reads(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    by_parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}/{% endfor %}{% endfor %}"
    for source, content, expected in (
        ("{{ messages[0].content }}", parts, "One.Two."),
        ("{{ messages[0].content }}", "One.", "One."),
        (by_parts, "One.", "One./"),
        (by_parts, parts, "One./Two./"),
        (ALL["llama4"], parts, "One.Two."),
    ):
        text = text_of(ChatTemplate({"default": source}, tokenizer), messages=[{"role": "user", "content": content}])
        assert expected in text and "type" not in text


def test_what_a_message_holds_reaches_the_template(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "x"},
        {
            "role": "user",
            "content": "x",
            "name": "Ada",
            "extra": {"a": [object(), 1.5, None, np.int64(3)], (1, 2): 0},
        },
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "c7"}], "refusal": None},
        {"role": "function", "name": "look_up", "content": {"a": 1}, "tool_call_id": "c7"},
        {"role": "assistant", "content": "y", "tool_calls": [], "reasoning": "z"},
    ]
    seen = json.loads(text_of(ChatTemplate({"default": "{{ messages | tojson }}"}, tokenizer), messages=messages))
    assert seen == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "x", "name": "Ada", "extra": {"a": ["<object>", 1.5, None, 3], "(1, 2)": 0}},
        {"role": "assistant", "tool_calls": [{"id": "c7", **CALL}]},
        {"role": "tool", "name": "look_up", "content": {"a": 1}, "tool_call_id": "c7"},
        {"role": "assistant", "content": "y", "reasoning": "z", "thinking": "z", "reasoning_content": "z"},
    ]
    stringly = CALL | {"function": {"name": "look_up", "arguments": '{"word": "Zürich", "n": [1, null]}'}}
    calls = text_of(
        ChatTemplate({"default": "{{ messages[1].tool_calls | tojson }}"}, tokenizer),
        messages=[USER, {"role": "assistant", "tool_calls": [stringly]}],
    )
    assert json.loads(calls) == [CALL]


def test_what_cannot_be_told_apart_is_an_error(tokenizer: Tokenizer) -> None:
    source = "{{ '<|eot|>'[:2] + 'eot|>' }}{{ messages[0].content.upper() }}"
    with pytest.raises(ChatTemplateError, match=r"cannot be told from what the messages say; .* special_tokens=True"):
        ChatTemplate({"default": source}, tokenizer).compose([{"role": "user", "content": "eot"}])


def test_the_template_for_tools(tokenizer: Tokenizer) -> None:
    named = ChatTemplate({"default": "plain", "tool_use": "with tools"}, tokenizer)
    assert text_of(named, messages=[USER]) == "plain"
    assert text_of(named, messages=[USER], tools=[TOOL]) == "with tools"
    assert text_of(ChatTemplate({"rag": "one"}, tokenizer), messages=[USER]) == "one"
    with pytest.raises(ChatTemplateError, match="rag, cite, but no default"):
        ChatTemplate({"rag": "one", "cite": "two"}, tokenizer).compose([USER])


LARGE = "10000000000"
BOMBS = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "range": f"{{{{ range({LARGE}) | list }}}}",
    "repeated text": f"{{{{ 'a' * {LARGE} }}}}",
    "repeated list": f"{{{{ {LARGE} * [1] }}}}",
    "center": f"{{{{ 'a' | center({LARGE}) }}}}",
    "center of a block": f"{{% filter center({LARGE}) %}}x{{% endfilter %}}",
    "center by map": f"{{{{ ['a', 'b'] | map('center', {LARGE}) | list }}}}",
    "doubled text": "{% set x = 'aaaaaaaaaa' %}" + "{% set x = x + x %}" * 40 + "{{ x }}",
    "doubled by ~": "{% set x = 'aaaaaaaaaa' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "doubled block": "{% set x = 'aaaaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}",
    "doubled list": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}",
    "doubled tuple": "{% set x = (1, 2) %}" + "{% set x = (x, x) %}" * 40 + "{{ x == x }}",
    "doubled dictionary": "{% set x = {} %}" + "{% set x = dict(a=x, b=x) %}" * 40 + "{{ x | tojson }}",
    "nested list": "{% set n = namespace(x=[]) %}{% for i in range(100000) %}{% set n.x = [n.x] %}{% endfor %}",
    "power": f"{{{{ 10 ** {LARGE} }}}}",
    "square": "{% set x = 2 ** 64 %}" + "{% set x = x * x %}" * 40 + "{{ x }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "fan": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "caller": "{% macro g() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call g() %}" * 30
    + "xxxxxxxxxx"
    + "{% endcall %}" * 30,
    "block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "loop in itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "width by %": f"{{{{ '%{LARGE}d' % 1 }}}}",
    "width by %*": f"{{{{ '%*d' % ({LARGE}, 1) }}}}",
    "width by the filter": f"{{{{ '%{LARGE}d' | format(1) }}}}",
    "width by format": f"{{{{ '{{:{LARGE}}}'.format(1) }}}}",
    "width in a width": f"{{{{ '{{:{{w}}}}'.format(1, w={LARGE}) }}}}",
    "replace": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "replace as a filter": "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}",
    "join": "{% set x = 'a' * 1000000 %}{{ range(100000) | join(x) }}",
    "join as a method": "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
    "indent": f"{{{{ 'x\n' | indent({LARGE}) }}}}",
    "batch": f"{{{{ [1] | batch(linecount={LARGE}, fill_with='x') | list }}}}",
    "slice": f"{{{{ [1] | slice({LARGE}) | list }}}}",
    "round": f"{{{{ 1.5 | round({LARGE}, 'ceil') }}}}",
    "tojson": f"{{{{ [[[1]]] | tojson(indent={LARGE}) }}}}",
    "date": f"{{{{ strftime_now('%{LARGE}d') }}}}",
    "output": "{% for i in range(100000) %}{{ 'a' * 10000 }}{% endfor %}",
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long": "x" * 300_000,
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_templates_without_bounds_are_stopped(source: str, tokenizer: Tokenizer) -> None:
    began = time.process_time()
    with pytest.raises(ChatTemplateError, match=r"was stopped|Range too big|at most 262144 are read"):
        ChatTemplate({"default": source}, tokenizer).compose([USER])
    assert time.process_time() - began < 30  # 1 s on an idle core


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "malformed in line 1"),
        ("\n\n{{ 1 | nothing }}", "malformed in line 3: No filter named 'nothing'"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ a.b.c }}", "fails: UndefinedError"),
        ("{{ raise_exception('no systems') }}", "refuses these messages: no systems"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update({}) }}", "unsafe"),
        ("{{ 'a'.zfill(9) }}", "unsafe"),
        ("{{ namespace(__init__=1) }}", "no attribute '__init__'"),
        ("{% include 'x' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
    ],
)
def test_what_a_template_must_not_do(source: str, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate({"default": source}, tokenizer).compose([USER])


def test_a_long_conversation_is_within_the_bounds(tokenizer: Tokenizer) -> None:
    messages = [USER | {"content": "word " * 2000}, REPLY] * 100
    for name in ("llama4", "reasoning"):
        assert len(text_of(ChatTemplate({"default": ALL[name]}, tokenizer), messages=messages)) > 1_000_000
