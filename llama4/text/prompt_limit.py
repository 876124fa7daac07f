"""How long a prompt may be, for those who read texts: what surely is too long is not read to its end."""

from __future__ import annotations

from dataclasses import dataclass

from llama4.errors import ContextLengthError


@dataclass(frozen=True)
class PromptLimit:
    """How many tokens a prompt may have.

    Attributes:
        most: so many.
        reason: what does not hold more, and what to do, as the end of an error's message.
    """

    most: int
    reason: str

    def check(self, tokens: int, *, at_least: bool = False) -> None:
        """
        Args:
            tokens: those of a prompt.
            at_least: it may have more.

        Raises:
            ContextLengthError: there are more than a prompt may have.
        """
        if tokens > self.most:
            raise ContextLengthError(f"the prompt has {'at least ' * at_least}{tokens} tokens, but {self.reason}")

    @classmethod
    def of_window(cls, window: int, max_context: int | None = None) -> PromptLimit:
        """That of a model's window, in which the reply's first token needs a place, too; or of `max_context`, where
        that is less."""
        held = window if max_context is None else min(window, max_context)
        remedy = f", or raise max_context={max_context}" if held == max_context else ""
        return cls(held - 1, f"the window holds {held}, reply included; shorten the prompt{remedy}")
