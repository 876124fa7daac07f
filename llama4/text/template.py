"""A checkpoint's own chat template: messages -> the pieces of a prompt.

What the template writes is what transformers makes of it, character by character. Which of the special tokens' names
in it are special tokens, and which are a user's text, is found out by rendering twice or three times:

1. as it is: the text of the prompt;
2. with a private-use character for every special token's name that stands in the template's own literals: where that
   gives the same text, those names are the template's;
3. if there are other names in the text: with private-use characters for all characters of the users' strings that
   occur in names. Where that gives the same text, a name without any of them is the template's, too (`'<|' + role +
   '|>'`).

Every other name is text. So it does not matter what a template does to a user's strings: they are never changed in
what counts, and a name that comes from one of them, or is put together from several, or from one and a literal, is
never taken for a special token.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llama4.errors import ChatTemplateError, ChatTemplateLimitError
from llama4.text.messages import Message, ParsedMessage, read_messages
from llama4.text.prompt import Piece, check_continued, special_names
from llama4.text.template_data import as_given, disguised_in, plain, with_end
from llama4.text.tokenizer import Tokenizer
from llama4.text.tool_calls import check_tools

if TYPE_CHECKING:
    from llama4.text.sandbox import CompiledTemplate

logger = logging.getLogger("llama4.text")

MAX_NOTED = 100
"""Variables that are logged as unread: who sends others would fill the log."""
MAX_COMPILED = 8
"""Templates that are kept compiled; which characters mark names in one depends on what messages hold."""
_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """The templates of a checkpoint.

    Args:
        sources: Jinja templates by name: "default", perhaps "tool_use", which is for messages with tools.
        tokenizer: the model's; its special tokens are those that a template can write.
    """

    def __init__(self, sources: Mapping[str, str], tokenizer: Tokenizer) -> None:
        self.sources = dict(sources)
        self.variables = _token_variables(tokenizer)
        self._noted: set[tuple[str, str]] = set()
        self._names = list(tokenizer.special_tokens)
        self._pattern = special_names(tokenizer)
        self._places = {name: i for i, name in enumerate(self._names)}
        self._compiled_templates: dict[tuple[str, int, bool], CompiledTemplate] = {}
        self._forms: dict[str, tuple[bool, bool]] = {}

    def source(self, tools: object = None) -> str:
        """The template for messages with or without tools.

        Raises:
            ChatTemplateError: there are several, and none is "default".
        """
        if tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" in self.sources:
            return self.sources["default"]
        if len(self.sources) == 1:
            return next(iter(self.sources.values()))
        raise ChatTemplateError(
            f"the checkpoint has the chat templates {', '.join(self.sources)}, but no default; name one of them so"
        )

    def compose(
        self,
        messages: Sequence[Message | ParsedMessage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        mark_replies: bool = False,
        **variables: Any,
    ) -> list[Piece]:
        """Messages -> pieces, as `prompt.compose`.

        Args:
            messages, tools, add_generation_prompt, continue_final_message: as there.
            documents: what some templates let the model read.
            mark_replies: find the assistant's messages in the prompt even where the template has no `{% generation %}`.
            variables: further ones that the template may read.

        Raises:
            ChatTemplateError: the template cannot be rendered, or refuses these messages; or it leaves out the message
                to be continued, or where the replies are cannot be told.
            Llama4Error: a message is not well formed.
        """
        parsed = read_messages(messages)
        if tools:
            check_tools(tools)
        if continue_final_message:
            check_continued(parsed)
        source = self.source(tools)
        self._note_unread(source, {"tools": tools, "documents": documents, **variables})
        given = {
            "messages": self._messages(parsed, source),
            "tools": plain(tools) if tools else None,
            "documents": plain(documents),
            **plain(variables),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        written = self._write(source, given, continue_final_message)
        if mark_replies and not _GENERATION.search(source):
            written = written._replace(replies=self._replies(written.text, parsed, source, given))
        return _pieces(written)

    def _note_unread(self, source: str, given: Mapping[str, object]) -> None:
        """Log what was given and this template does not read, once each."""
        for name, value in given.items():
            is_new = value is not None and name not in source and (source, name) not in self._noted
            if is_new and len(self._noted) < MAX_NOTED:
                self._noted.add((source, name))
                logger.warning("the checkpoint's chat template does not read %.80s: the model does not see them", name)

    def named(self, template: str) -> ChatTemplate:
        """One of the templates by its name, or another by its source."""
        changed = copy.copy(self)
        changed.sources = {"default": self.sources.get(template, template)}
        return changed

    def _write(self, source: str, given: dict[str, Any], continued: bool = False) -> _Written:
        """Render, and find out which names are the template's."""
        said = json.dumps(given, ensure_ascii=False)
        marks = _Marks.outside(source + said, len(self._names), "".join(sorted(set("".join(self._names)))))

        def run(given: dict[str, Any], *, marked: bool = False) -> _Written:
            if continued:
                given = {**given, "messages": with_end(given["messages"], marks.end + " ")}
            names = {role: self._marked(name, marks.base) if marked else name for role, name in self.variables.items()}
            text = self._compiled(source, marks, marked).render({**names, **given})
            return self._read(_cut(text, marks.end) if continued else text, marks)

        text, _, replies = run(given)
        try:
            marked = run(given, marked=True)
        except ChatTemplateError:
            marked = None
        own = marked.own if marked is not None and marked.text == text else None
        gaps = _gaps(own or (), len(text))
        others = [match.span() for gap in gaps for match in self._pattern.finditer(text, *gap)]
        if others:
            try:
                disguised = run({name: disguised_in(value, marks.disguise) for name, value in given.items()}).text
            except ChatTemplateError:
                disguised = ""
            if disguised.translate(marks.reveal) == text:
                found = [(a, b) for a, b in others if disguised[a:b] == text[a:b]]
                own = sorted([*(own or ()), *found])
        if own is None:
            if others:
                raise ChatTemplateError(
                    "which special tokens the chat template writes cannot be told from what the messages say; render "
                    "it yourself, and continue the text with complete(text, special_tokens=True)"
                )
            own = []
        return _Written(text, own, replies)

    def _read(self, text: str, marks: _Marks) -> _Written:
        """What was written, with names in the place of their marks."""
        kept: list[str] = []
        own, replies, open_replies = [], [], list[int]()
        length = at = 0
        for match in marks.pattern.finditer(text):
            kept.append(text[at : match.start()])
            length += match.start() - at
            at = match.end()
            index = ord(match.group()) - marks.base
            if index < len(self._names):
                kept.append(self._names[index])
                own.append((length, length + len(kept[-1])))
                length += len(kept[-1])
            elif match.group() == marks.reply[0]:
                open_replies.append(length)
            elif open_replies and (start := open_replies.pop()) < length:
                replies.append((start, length))
        kept.append(text[at:])
        return _Written("".join(kept), own, replies)

    def _marked(self, text: str, base: int) -> str:
        return self._pattern.sub(lambda name: chr(base + self._places[name.group()]), text)

    def _compiled(self, source: str, marks: _Marks, marked: bool) -> CompiledTemplate:
        from llama4.text.sandbox import CompiledTemplate  # with jinja2, which only a checkpoint's own template needs

        key = source, marks.base, marked
        compiled = self._compiled_templates.get(key)
        if compiled is None:
            mark = (lambda text: self._marked(text, marks.base)) if marked else str
            compiled = CompiledTemplate(source, marks.reply, mark)
            if len(self._compiled_templates) < MAX_COMPILED:
                self._compiled_templates[key] = compiled
        return compiled

    def _messages(self, messages: Sequence[ParsedMessage], source: str) -> list[dict[str, Any]]:
        strings, parts = self._content_forms(source)
        return [as_given(message, strings, parts) for message in messages]

    def _content_forms(self, source: str) -> tuple[bool, bool]:
        """Whether a template takes a content that is a string, and whether one of several parts must be parts."""
        if source not in self._forms:

            def says(content: Any) -> str:
                given = {"messages": [{"role": "user", "content": content}], "tools": None, "documents": None}
                try:
                    return self._write(source, given | {"add_generation_prompt": False}).text
                except ChatTemplateLimitError:
                    raise
                except ChatTemplateError:
                    return ""

            string = says("FirstSecond")
            parts = says([{"type": "text", "text": "First"}, {"type": "text", "text": "Second"}])
            reads_string = "FirstSecond" in string
            reads_parts = "First" in parts and "'text'" not in parts and '"text"' not in parts
            self._forms[source] = (reads_string or not reads_parts, reads_parts and parts != string)
        return self._forms[source]

    def _replies(
        self, text: str, messages: Sequence[ParsedMessage], source: str, given: dict[str, Any]
    ) -> list[tuple[int, int]]:
        """Where the assistant's messages are: what each adds to the prompt that asks for it."""
        spans = []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                turns = given["messages"]
                before = self._write(source, {**given, "messages": turns[:i], "add_generation_prompt": True}).text
                after = self._write(source, {**given, "messages": turns[: i + 1], "add_generation_prompt": False}).text
                if not (after.startswith(before) and text.startswith(after)):
                    raise ChatTemplateError(
                        f"what message {i} adds to the prompt cannot be told, as the chat template writes what is "
                        "before it otherwise then; put {% generation %} and {% endgeneration %} around the replies"
                    )
                spans.append((len(before), len(after)))
        return spans


class _Written(NamedTuple):
    """A rendered template: its text, where the names that it writes itself are, and where replies are."""

    text: str
    own: list[tuple[int, int]]
    replies: list[tuple[int, int]]


class _Marks(NamedTuple):
    """Private-use characters that occur in nothing that is given: one for each name, two around replies, one for the
    end of the text that is continued, and one for each character of the names."""

    base: int
    names: int
    letters: str

    @classmethod
    def outside(cls, text: str, names: int, letters: str) -> _Marks:
        taken = {ord(character) for character in _PRIVATE.findall(text)}
        size = names + 3 + len(letters)
        for base in range(0xF0000, 0x10FFFE - size, size):
            if taken.isdisjoint(range(base, base + size)):
                return cls(base, names, letters)
        raise ChatTemplateError("the messages hold too many different private-use characters of Unicode; remove some")

    @property
    def reply(self) -> str:
        return chr(self.base + self.names) + chr(self.base + self.names + 1)

    @property
    def end(self) -> str:
        return chr(self.base + self.names + 2)

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{chr(self.base)}-{self.reply[1]}]")

    @property
    def disguise(self) -> dict[int, int]:
        return {ord(letter): self.base + self.names + 3 + i for i, letter in enumerate(self.letters)}

    @property
    def reveal(self) -> dict[int, int]:
        return {mark: letter for letter, mark in self.disguise.items()}


def _token_variables(tokenizer: Tokenizer) -> dict[str, str]:
    """Names of tokens by their role, as templates read them: `bos_token` and others."""
    vocabulary = tokenizer.vocabulary
    usual = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos, "pad_token": vocabulary.pad}
    return {role: name for role, name in usual.items() if name in tokenizer.special_tokens} | dict(
        tokenizer.config.names
    )


def _cut(text: str, end: str) -> str:
    """The text before `end`, without white space at its end if the template trims what `end` and a blank follow."""
    before, found, after = text.rpartition(end)
    if not found:
        raise ChatTemplateError("the chat template leaves out the last message, so it cannot be continued")
    return before if after.startswith(" ") else before.rstrip()


def _gaps(spans: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    at = 0
    for start, end in (*spans, (length, length)):
        if at < start:
            yield at, start
        at = end


def _pieces(written: _Written) -> list[Piece]:
    text, own, replies = written
    names = set(own)
    pieces = []
    for start, end in sorted([*own, *_gaps(own, len(text))]):
        reply = tuple((max(a, start) - start, min(b, end) - start) for a, b in replies if a < end and start < b)
        pieces.append(Piece(text[start:end], (start, end) in names, reply))
    return pieces
