"""What generation emits: tokens, and the text that becomes certain with each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


class SupportsDecode(Protocol):
    """What generation asks of a tokenizer."""

    @property
    def special_tokens(self) -> dict[str, int]: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token: its id, its bytes (perhaps part of a character), and the natural logarithm of the probability
    that the model gave it, before temperature and the like; of the most likely tokens, id and the same, where they were
    asked for."""

    id: int
    bytes: bytes
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()

    @property
    def text(self) -> str:
        return self.bytes.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Event:
    """One more token of a row, and the text that has become certain with it: whole characters that cannot be the
    beginning of a stop string. `finish_reason` is set with the row's last token."""

    row: int
    token: Token
    text: str
    finish_reason: FinishReason | None
