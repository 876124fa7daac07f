"""Whether a checkpoint's own chat template writes what a family's prompt format does, which then takes its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from llama4.errors import ChatTemplateError, ChatTemplateLimitError
from llama4.text.prompt import Piece
from llama4.text.template import ChatTemplate

Compose = Callable[..., list[Piece]]
"""`prompt.compose`, or that of another family."""


def agrees(template: ChatTemplate, compose: Compose, bos: str) -> bool:
    """Whether both write the same, for conversations of all kinds.

    Raises:
        ChatTemplateLimitError: the template takes too much time or memory.
    """
    try:
        return all(_joined(template.compose(**case)) == _joined(compose(**case, bos=bos)) for case in _cases())
    except ChatTemplateLimitError:
        raise
    except ChatTemplateError:
        return False


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces without replies, neighbouring texts as one."""
    result: list[Piece] = []
    for piece in pieces:
        if result and not piece.special and not result[-1].special:
            result[-1] = replace(result[-1], text=result[-1].text + piece.text)
        elif piece.text:
            result.append(Piece(piece.text, piece.special))
    return result


@cache
def _cases() -> tuple[dict[str, Any], ...]:
    """Conversations of all kinds, with which a template is compared with a family's own format."""
    tool = {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Find “it” in <b>a</b> list",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        },
    }
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": {"word": "Zürich", "n": [1]}}}
    system = {"role": "system", "content": " Be brief. \n"}
    user = {"role": "user", "content": "\n What is it?  "}
    reply = {"role": "assistant", "content": " It is \n\n4. "}
    calls = {"role": "assistant", "content": "I look.", "tool_calls": [call, call]}
    silent = {"role": "assistant", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c1", "name": "look_up", "content": '{"found": "é"}'}
    parts = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": " this, "}, {"type": "text", "text": "that"}],
    }
    last = {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "image"}]}
    conversations = [
        [user],
        [system, user],
        [user, reply, user],
        [system, user, reply, user, reply],
        [user, calls, result, result, reply, user],
        [system, user, silent, result],
        [parts, reply, last],
        [system, last],
        [system, system, user, system, user],
        [user, user],
    ]
    cases = [{"messages": messages} for messages in conversations]
    cases += [{"messages": messages, "add_generation_prompt": False} for messages in conversations[1:4]]
    cases += [{"messages": messages, "tools": [tool, tool]} for messages in conversations]
    cases += [{"messages": [system, user, reply], "continue_final_message": True}]
    return tuple(cases)
