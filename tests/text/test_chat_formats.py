"""Prompts of Llama 2 and 3, and infilling, against Meta's code and what Meta's papers and code say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llama_models.datatypes import RawMessage, StopReason, ToolCall
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

from llama4.analysis.info import describe_model, find
from llama4.errors import ArgumentError, Llama4Error
from llama4.families import llama
from llama4.inputs import Processor
from llama4.text.chat_formats import chat_format, compose_llama2
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import INFILLING
from tests.text.test_generations import train

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is it? "},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "[INST] Really? </s> <|eot_id|>"},
]
SIZES = {"vocab_size": 128512, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
CONFIG = {**SIZES, "num_attention_heads": 1, "eos_token_id": 128009}


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    from llama_models import llama3

    return Tokenizer(Path(next(iter(llama3.__path__))) / "tokenizer.model")


def raw(message: dict[str, Any]) -> RawMessage:
    """In Meta's form; calls of tools end a message for which more comes."""
    calls = [
        ToolCall(call_id="c", tool_name=call["function"]["name"], arguments=call["function"]["arguments"])
        for call in message.get("tool_calls", ())
    ]
    reason = {"stop_reason": StopReason.end_of_message} if calls else {}
    return RawMessage(role=message["role"], content=message.get("content", ""), tool_calls=calls, **reason)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


@pytest.mark.parametrize(
    "talk",
    [
        TALK[1:2],
        TALK,
        [*TALK, call("look_up", word="Zug"), {"role": "tool", "content": '{"found": 1}'}],
        [*TALK, call("brave_search", query="weather"), {"role": "tool", "content": "rain"}],
        [*TALK, call("wolfram_alpha", query="2 + 2")],
    ],
    ids=["one", "several", "json", "python-tag", "ends-with-a-call"],
)
def test_llama3_as_meta_writes_it(talk: list[dict[str, Any]], llama3: Tokenizer) -> None:
    processor = Processor.from_config(llama3, llama.read_config(CONFIG))
    ours = processor(talk, continue_final_message=False).input_ids[0].tolist()
    theirs = ChatFormat(MetaTokenizer.get_instance()).encode_dialog_prompt([raw(message) for message in talk]).tokens
    tag = llama3.special("<|python_tag|>")  # Meta's code leaves it to the message's text
    assert [i for i in ours if i != tag] == theirs
    assert (tag in ours) == any("brave" in str(message) or "wolfram" in str(message) for message in talk)


def test_llama2_as_meta_writes_it(tmp_path: Path) -> None:
    """Meta: encode("[INST] question [/INST] answer ") with both ends, then the last question with its beginning."""
    theirs = train(tmp_path / "tokenizer.model")
    ours = Tokenizer(tmp_path / "tokenizer.model")
    config = llama.read_config({**CONFIG, "vocab_size": 700, "eos_token_id": 2})
    processor = Processor.from_config(ours, config, chat_format="llama2")
    turns = (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n What is it? [/INST] It is 4. ",
        "[INST] [INST] Really? </s> <|eot_id|> [/INST]",
    )
    wanted = [1, *theirs.encode(turns[0]), 2, 1, *theirs.encode(turns[1])]
    assert processor(TALK).input_ids[0].tolist() == wanted
    rendered = processor.render(TALK[:3], add_generation_prompt=False)
    assert ours.decode([i for i, is_reply in zip(*vars(rendered).values(), strict=True) if is_reply]) == "It is 4.</s>"
    assert "".join(piece.text for piece in compose_llama2(TALK[:3], continue_final_message=True)).endswith("It is 4.")


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([TALK[1], TALK[3]], "user and assistant in turn, the user first; these are user, user"),
        ([TALK[1], call("f", x=1)], "has no tools"),
        ([{"role": "user", "content": [{"type": "image", "path": "x"}]}], "has no pictures"),
    ],
)
def test_llama2_refuses_what_it_cannot_write(talk: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(Llama4Error, match=message):
        compose_llama2(talk)


def test_a_base_model_names_complete(llama3: Tokenizer) -> None:
    """Llama 3's base models have the tokens of the instructed ones, and end with another."""
    base = replace(llama.read_config({**CONFIG, "eos_token_id": 128001}))
    with pytest.raises(
        Llama4Error,
        match=r"no chat template, .* complete\(text\) or .*--raw.*: chat_format='llama4'",
    ):
        Processor.from_config(llama3, base)(TALK)
    assert Processor.from_config(llama3, base).complete("Once").input_ids.tolist()[0][0] == llama3.bos_id
    named = Processor.from_config(llama3, base, chat_format="llama3")(TALK).input_ids
    assert named.equal(Processor.from_config(llama3, llama.read_config(CONFIG))(TALK).input_ids)
    with pytest.raises(ArgumentError, match="'llama5' is not known; choose one of llama4, llama3, llama2"):
        chat_format("llama5")


def test_infilling_as_meta_writes_it(tmp_path: Path) -> None:
    """`<PRE> prefix <SUF>suffix <MID>`, the suffix without a blank before it: Meta encodes a character more and drops
    it again."""
    theirs = train(tmp_path / "tokenizer.model", user_defined_symbols=[*INFILLING, "☺"])
    processor = Processor.from_config(Tokenizer(tmp_path / "tokenizer.model"), llama.read_config(CONFIG))
    before, after, middle, _ = (theirs.piece_to_id(name) for name in INFILLING)
    prefix, suffix = "def f(x):\n    return ", "\n\nprint(f(2))"
    wanted = [1, before, *theirs.encode(prefix), after, *theirs.encode("☺" + suffix)[2:], middle]
    assert processor.infill(prefix, suffix).input_ids.tolist() == [wanted]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIG}))
    replies = describe_model(find(str(tmp_path)))["replies"]
    assert replies["stop_tokens"] == {128009: None, theirs.piece_to_id(INFILLING.end): INFILLING.end}
    train(tmp_path / "tokenizer.model")
    with pytest.raises(Llama4Error, match="has no tokens for infilling"):
        Processor.from_config(Tokenizer(tmp_path / "tokenizer.model"), llama.read_config(CONFIG)).infill("a", "b")
