"""Prompt formats by name: what `chat_format` of `Llama4.from_pretrained` may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from llama4.errors import ArgumentError, Llama4Error
from llama4.text.messages import ImagePart, Message, ParsedMessage, read_messages
from llama4.text.prompt import Marks, Piece, check_continued, compose
from llama4.text.template_agreement import Compose

LLAMA3 = Marks(
    ("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>", "<|eom_id|>", "<|eot_id|>", code="<|python_tag|>"
)
_EOS = "</s>"


def compose_llama2(
    messages: Sequence[Message | ParsedMessage],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    bos: str = "<s>",
) -> list[Piece]:
    """Messages -> the pieces of Llama 2's prompt: each question with its answer between `<s>` and `</s>`, the question
    in [INST] and [/INST], and before the first one the system message in <<SYS>> and <</SYS>>.

    Source: `chat_completion` in llama/generation.py of Meta's Llama 2.

    Raises:
        Llama4Error: roles that do not alternate, pictures or tools, of which the format knows nothing.
    """
    parsed = read_messages(messages)
    if tools or any(message.tool_calls or message.role == "ipython" for message in parsed):
        raise Llama4Error("Llama 2's format has no tools; use a model that has them, such as Llama 3.1")
    if continue_final_message:
        check_continued(parsed)
    texts = [(message.role, _text(message)) for message in parsed]
    if texts[0][0] == "system" and len(texts) > 1:
        (_, system), (role, first), *rest = texts
        texts = [(role, f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}"), *rest]
    if any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(texts)):
        raise Llama4Error(
            "Llama 2's format takes a system message, if any, and then user and assistant in turn, the user first; "
            f"these are {', '.join(message.role for message in parsed)}"
        )
    pieces: list[Piece] = []
    for i in range(0, len(texts), 2):
        text, spans = f"[INST] {texts[i][1].strip()} [/INST]", list[tuple[int, int]]()
        is_answered, is_last = i + 1 < len(texts), i + 2 >= len(texts)
        if is_answered:
            answer = texts[i + 1][1].strip()
            begin = len(text) + 1
            spans.append((begin, begin + len(answer)))
            text += f" {answer}" if is_last and continue_final_message else f" {answer} "
        pieces += [Piece(bos, special=True), Piece(text, reply=tuple(spans))]
        if is_answered and not (is_last and continue_final_message):
            pieces.append(Piece(_EOS, special=True, reply=((0, len(_EOS)),)))
    return pieces


def _text(message: ParsedMessage) -> str:
    if any(isinstance(part, ImagePart) for part in message.parts):
        raise Llama4Error("Llama 2's format has no pictures; use a model that sees, such as Llama 4")
    return "".join(part for part in message.parts if isinstance(part, str))


CHAT_FORMATS: Mapping[str, Compose] = {
    "llama4": compose,
    "llama3": partial(compose, marks=LLAMA3),
    "llama2": compose_llama2,
}


def chat_format(name: str) -> Compose:
    """Raises:
    ArgumentError: there is no such format.
    """
    if name not in CHAT_FORMATS:
        raise ArgumentError(f"chat_format={name!r} is not known; choose one of {', '.join(CHAT_FORMATS)}")
    return CHAT_FORMATS[name]
