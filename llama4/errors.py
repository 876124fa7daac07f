"""The exceptions that users may want to catch.

All of them are `ValueError`s: the caller passed something that cannot work, and the message names the value and the
remedy. What only a bug of this library can cause is an `assert`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class ConfigError(ValueError):
    """A configuration that describes no model this library can run."""


class ContextLengthError(ValueError):
    """A prompt, or a prompt and its reply, that is longer than the context the model takes."""


class ImageError(ValueError):
    """An image that cannot be read; the message names it and says what to do."""


class ChatTemplateError(ValueError):
    """A checkpoint's chat template that cannot be rendered, or refuses the messages."""


class ChatTemplateLimitError(ChatTemplateError):
    """A chat template that would take too long or too much memory, and was stopped."""


class CheckpointError(ValueError):
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
