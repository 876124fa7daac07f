"""What one may learn of a prompt while it is read: the mean of its hidden states, or how likely its tokens are.

Shapes: N tokens of a piece, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llama4.engine.sampling import likeliest
from llama4.engine.tokens import Token

ROWS = 64
"""Tokens whose logits are computed at once: those of a whole prompt do not fit into memory."""


class Observer(Protocol):
    """Is told the hidden states of a prompt, piece by piece. Nothing of such a prompt is taken from another's cache."""

    def begin(self) -> None:
        """The prompt is read from its beginning, perhaps again."""

    def read(self, x_ND: Tensor, ids: Sequence[int], begin: int, head: Callable[[Tensor], Tensor]) -> None:
        """A piece was read.

        Args:
            x_ND: what the head is given for tokens [begin, begin + N) of prompt and reply.
            ids: of prompt and reply so far.
            head: hidden states -> logits.
        """


class MeanHidden:
    """The mean of the hidden states behind the last norm, in float32."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._sum_D, self._count = torch.zeros(()), 0

    def read(self, x_ND: Tensor, ids: Sequence[int], begin: int, head: Callable[[Tensor], Tensor]) -> None:
        for x_D in x_ND.float().cpu():  # one by one: the sum does not depend on the pieces
            self._sum_D = self._sum_D + x_D
        self._count += len(x_ND)

    @property
    def mean_D(self) -> Tensor:
        return self._sum_D / self._count


class PromptLogprobs:
    """The log-probability of each token of a prompt after those before it, and of so many likely ones beside it.

    Attributes:
        tokens: all but the first, of which nothing can be said.
    """

    def __init__(self, prompt_length: int, count: int, decode_bytes: Callable[[Sequence[int]], bytes]) -> None:
        self._length, self._count, self._decode = prompt_length, count, decode_bytes
        self.begin()

    def begin(self) -> None:
        self.tokens: list[Token] = []

    @property
    def is_complete(self) -> bool:
        return len(self.tokens) == self._length - 1

    def read(self, x_ND: Tensor, ids: Sequence[int], begin: int, head: Callable[[Tensor], Tensor]) -> None:
        end = min(begin + len(x_ND), self._length - 1)
        for first in range(begin, end, ROWS):
            following = ids[first + 1 : min(first + ROWS, end) + 1]
            logits_NV = head(x_ND[first - begin : first - begin + len(following)]).float()
            own_N = logits_NV.log_softmax(-1).gather(1, torch.tensor(following, device=logits_NV.device)[:, None])[:, 0]
            for id_, value, others in zip(following, own_N.tolist(), likeliest(logits_NV, self._count), strict=True):
                self.tokens.append(Token(id_, self._decode([id_]), value, others))
