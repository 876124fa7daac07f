"""What was said, and the pictures of the message to come."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4.cli.chat.answers import Answerer, PartialReply
from llama4.errors import Llama4Error
from llama4.files import replace_text, user_path
from llama4.reading import parse_json, read_bytes
from llama4.text.messages import image_sources, read_messages

if TYPE_CHECKING:
    from llama4.cli.chat.printing import Printer

MAX_FILE = 256 << 20
"""Bytes of a conversation that is loaded: it has its pictures in it."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a pair: JSON may hold it, UTF-8 may not."""
CUT = " (cut at --max-new-tokens or the window)"


class Conversation:
    """Messages in OpenAI's form.

    Attributes:
        system: instructions before all messages; None for none.
        messages: what was said since.
        pictures: parts of the message to come.
        options: of replies, by the names of `Llama4.chat`.
    """

    def __init__(self, answerer: Answerer, system: str | None, options: Mapping[str, Any], printer: Printer) -> None:
        self.answerer, self.system, self.options, self.printer = answerer, system, dict(options), printer
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[dict[str, Any]] = []
        self._retries = 0

    @property
    def opening(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def add_picture(self, name: str) -> int:
        """Read a picture for the next message; returns how many it has now.

        Raises:
            ImageError: there is none.
        """
        self.pictures.append(self._picture(name))
        return len(self.pictures)

    def _picture(self, name: str) -> dict[str, Any]:
        """A part of a message with all of the picture in it, so that it can be sent and saved."""
        from PIL import Image

        from llama4.vision.images import load_image

        image = load_image(name, self.answerer.image_limits)
        path = user_path(name)
        if "://" not in name[:12] and not name.startswith("data:") and path.is_file():
            data = read_bytes(path, self.answerer.image_limits.max_bytes)
            with Image.open(io.BytesIO(data)) as opened:
                kind = Image.MIME.get(opened.format or "", "application/octet-stream")
        else:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data, kind = buffer.getvalue(), "image/png"
        return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}

    def _check_pictures(self, message: dict[str, Any], where: str) -> None:
        for source in image_sources(read_messages([message])):
            if not str(source).startswith("data:"):
                raise Llama4Error(f"{where} names the picture {source!s:.80} without its data; add it with /image")
            from llama4.vision.images import load_image

            try:
                load_image(source, self.answerer.image_limits)
            except Llama4Error as error:
                raise Llama4Error(f"the picture of {where} cannot be used: {error}") from None

    def ask(self, text: str) -> None:
        """Print the reply as it comes. After Ctrl-C the conversation has as much of it as was printed; before anything
        was, the question is not kept, and its pictures are those of the next."""
        content: Any = [*self.pictures, {"type": "text", "text": text}] if self.pictures else text
        self._retries = 0
        if self._answer({"role": "user", "content": content}, self.options):
            self.pictures = []

    def _answer(self, question: dict[str, Any], options: Mapping[str, Any]) -> bool:
        """Whether there is an answer, which is now in the conversation with its question."""
        answer, first = PartialReply(), None
        remark = ""
        try:
            for piece in self.answerer.stream([*self.opening, *self.messages, question], options, answer):
                first = first or time.monotonic()
                self.printer.write(piece)
            if answer.finish_reason == "length":
                remark = CUT
        except KeyboardInterrupt:
            remark = " (stopped)"
        except (ValueError, OSError):
            if answer.text:
                self.printer.end("")
            raise
        took = time.monotonic() - first if first else 0.0
        if answer.text or remark or not answer.tool_calls:
            self.printer.end(remark)
        for call in answer.tool_calls:
            self.printer.line(_as_shown(call))
        if not answer.has_begun:  # Ctrl-C came before the first token
            return False
        self.printer.figures(answer.tokens, took)
        said: dict[str, Any] = {"role": "assistant", "content": answer.text}
        self.messages += [question, {**said, **({"tool_calls": answer.tool_calls} if answer.tool_calls else {})}]
        return True

    def undo(self) -> bool:
        """Take back the last question and what came of it; whether there was one."""
        return self._take_back() is not None

    def retry(self) -> None:
        """Answer the last question again.

        Raises:
            Llama4Error: there is none.
        """
        before = list(self.messages)
        question = self._take_back()
        if question is None:
            raise Llama4Error("there is no question yet")
        self._retries, options = self._retries + 1, self.options
        if (seed := options.get("seed")) is not None:
            options = {**options, "seed": seed + self._retries}  # or it would be the same reply
        is_answered = False
        try:
            is_answered = self._answer(question, options)
        finally:
            if not is_answered:
                self.messages = before

    def _take_back(self) -> dict[str, Any] | None:
        for i in range(len(self.messages) - 1, -1, -1):
            if self.messages[i]["role"] == "user":
                question = self.messages[i]
                del self.messages[i:]
                return question
        return None

    def save(self, path: Path) -> int:
        """Write all messages as JSON; returns how many.

        Raises:
            Llama4Error: the file is there and holds something else.
            OSError: it cannot be written.
        """
        if path.exists():
            try:
                _messages_of(path)
            except ValueError:
                raise Llama4Error(f"{path} is there and is no conversation; choose another name") from None
        messages = [*self.opening, *self.messages]
        content = json.dumps({"model": self.answerer.name, "messages": messages}, ensure_ascii=False, indent=2)
        replace_text(path, SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", content) + "\n")
        return len(messages)

    def load(self, path: Path) -> int:
        """Go on with a conversation of a file, in place of this one; returns how many messages it has.

        Raises:
            Llama4Error: there is none in it.
            OSError: it cannot be read.
        """
        messages = _messages_of(path)
        for i, message in enumerate(messages):
            if SURROGATE.search(json.dumps(message, ensure_ascii=False)):
                raise Llama4Error(f"message {i} of {path} has half of a surrogate pair; remove it")
            self._check_pictures(message, f"message {i} of {path}")
        self.clear()
        self.system = None
        if messages[0]["role"] in ("system", "developer"):
            parts = read_messages(messages[:1])[0].parts
            self.system = "".join(part for part in parts if isinstance(part, str))
            messages = messages[1:]
        self.messages = messages
        return len(messages)


def _messages_of(path: Path) -> list[dict[str, Any]]:
    messages = parse_json(read_bytes(path, MAX_FILE), path).get("messages")
    if not isinstance(messages, list):
        raise Llama4Error(f'{path} has no list of "messages"; it is no conversation')
    read_messages(messages)
    return messages


def _as_shown(call: Mapping[str, Any]) -> str:
    """As one object, also where the arguments are no JSON."""
    function = call["function"]
    shown = {"name": function["name"], "arguments": function["arguments"]}
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return json.dumps({**shown, "arguments": json.loads(function["arguments"])}, ensure_ascii=False)
    return json.dumps(shown, ensure_ascii=False)
