"""What a benchmark asks of an inference engine, and how it configures one.

Shapes: B rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class EngineConfig:
    """An engine, and how it runs the model in `directory`; `programs` is where those of an engine are that is not in
    Python."""

    engine: str
    directory: str
    dtype: str
    threads: int
    quantization: str | None = None
    device: str = "cpu"
    memory_map: bool = True
    programs: str | None = None


class Engine(Protocol):
    """One way to run a model. `cache` is whatever the engine keeps of a sequence."""

    def prefill(self, ids_BT: Tensor) -> tuple[Tensor, Any]:
        """Prompts -> logits of their last tokens [B, V], and the cache."""

    def decode(self, ids_B: Tensor, cache: Any) -> Tensor:
        """One more token in every row -> logits of the next, [B, V]."""

    def greedy(self, logits_BV: Tensor) -> list[int]:
        """The most likely token of each row."""

    def decode_greedy(self, ids: list[int], cache: Any) -> list[int]:
        """One more token in every row -> the most likely next ones."""

    def prefill_image(self, picture: Image.Image, question: str) -> tuple[Tensor, tuple[int, int]]:
        """A question about a picture -> logits of the reply's first token [1, V], and the numbers of tokens and tiles
        read."""


def image_message(picture: Image.Image, question: str) -> dict[str, Any]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return {"role": "user", "content": content}
