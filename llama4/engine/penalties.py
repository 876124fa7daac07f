"""Penalties and biases of a reply, as the compiled kernel that draws takes them: of the tokens that have some alone."""

from __future__ import annotations

import ctypes
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence

from llama4.kernels import abi


class RowPenalties:
    """What is done to a row's logits before its next token is drawn, kept up to date token by token.

    Args:
        repetition, presence, frequency, biases: as in a `Sampler`.
        prompt, reply: the tokens so far. Those of the prompt that are outside the vocabulary are never drawn.
        forbidden: tokens that are not drawn as long as the reply has fewer than `min_tokens`.
    """

    def __init__(
        self,
        repetition: float,
        presence: float,
        frequency: float,
        biases: Sequence[tuple[int, float]],
        *,
        prompt: Sequence[int],
        reply: Sequence[int],
        vocab_size: int,
        forbidden: Sequence[int],
        min_tokens: int,
    ) -> None:
        counts = dict.fromkeys((id_ for id_ in prompt if id_ < vocab_size), 0) if repetition != 1 else {}
        self._set_seen({**counts, **Counter(reply)})
        self._left = min_tokens - len(reply)
        biased = [*biases, *((id_, -float("inf")) for id_ in forbidden)]
        self._biased, self._biases = array("q", [id_ for id_, _ in biased]), array("d", [bias for _, bias in biased])
        self._num_biases = len(biases)
        self._fields = abi.Penalties(repetition=repetition, presence=presence, frequency=frequency)

    def _set_seen(self, counts: Mapping[int, int]) -> None:
        self._seen, self._counts = array("q", counts), array("q", counts.values())
        self._place = {id_: place for place, id_ in enumerate(counts)}

    def accept(self, id_: int) -> None:
        """A token that was chosen."""
        self._left -= 1
        if (place := self._place.setdefault(id_, len(self._seen))) < len(self._seen):
            self._counts[place] += 1
        else:
            self._seen.append(id_)
            self._counts.append(1)

    def address(self) -> int:
        """Of `abi.Penalties`, valid until a token is accepted."""
        fields = self._fields
        fields.seen, fields.num_seen = self._seen.buffer_info()
        fields.counts, _ = self._counts.buffer_info()
        fields.biased, count = self._biased.buffer_info()
        fields.biases, _ = self._biases.buffer_info()
        fields.num_biased = count if self._left > 0 else self._num_biases
        return ctypes.addressof(fields)
