"""The exceptions that users may want to catch.

`Llama4Error` is all that a call, a file or a picture can cause, whatever is in it; its message names the file, field
and value, and the remedy. What the system refuses (a disk that is full, a file that may not be read) is its own
`OSError`. What only a bug of this library can cause is an `assert`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class Llama4Error(ValueError):
    """An argument, a file or a message that cannot work."""


class ArgumentError(Llama4Error):
    """A value that an argument, or an option of the command line, cannot have; no file is at fault."""


class ConfigError(Llama4Error):
    """A configuration that describes no model this library can run."""


class ContextLengthError(Llama4Error):
    """A prompt, or a prompt and its reply, that is longer than the context the model takes."""


class ImageError(Llama4Error):
    """An image that cannot be read; the message names it and says what to do.

    Attributes:
        place: the number of the message that has it, and of the part in that message; None where no message has it.
    """

    place: tuple[int, int] | None = None


class ChatTemplateError(Llama4Error):
    """A checkpoint's chat template that cannot be rendered, or refuses the messages."""


class ChatTemplateLimitError(ChatTemplateError):
    """A chat template that would take too long or too much memory, and was stopped."""


class BusyError(Llama4Error):
    """An engine whose queue is full, or that is closing: the same request may be taken later."""


class ClosedError(BusyError):
    """An engine that is closing: another may take the request."""


class CheckpointError(Llama4Error):
    """A checkpoint that cannot be loaded as it is: every missing, unexpected and mis-shaped key is listed.

    Attributes:
        missing: keys that the model needs and the checkpoint lacks.
        unexpected: keys that the checkpoint holds and the model has no place for.
        mismatched: `(key, shape in the checkpoint, shape in the model)`.
    """

    def __init__(
        self,
        message: str,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]] = (),
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple((key, tuple(found), tuple(wanted)) for key, found, wanted in mismatched)
        lines = [message]
        lines += [f"  missing: {key}" for key in self.missing]
        lines += [f"  unexpected: {key}" for key in self.unexpected]
        lines += [
            f"  wrong shape: {key} is {list(found)}, wanted {list(wanted)}" for key, found, wanted in self.mismatched
        ]
        super().__init__("\n".join(lines))


class DiskError(CheckpointError, OSError):
    """A checkpoint or a cache that cannot be written, as the disk is full or refuses it: an `OSError` as well.

    Attributes:
        errno, strerror, filename: what the system says.
    """

    def __init__(self, message: str, cause: OSError) -> None:
        super().__init__(message)
        self.errno, self.strerror, self.filename = cause.errno, cause.strerror, cause.filename

    def __str__(self) -> str:
        return str(self.args[0])


def nearest(name: str, known: Iterable[str]) -> str:
    """What was surely meant, as the end of a sentence; "" if nothing is near."""
    words = {text.lstrip("-"): text for text in known}  # the dashes of options would make any two alike
    found = difflib.get_close_matches(name.lstrip("-"), words, n=1)
    return f" (did you mean {words[found[0]]}?)" if found else ""
