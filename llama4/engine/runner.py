"""Who computes a step of decoding, one more token in every row of a cache.

`Llama4Model.forward` is the readable way and knows no other. A runner stands above it: `EagerRunner` calls it,
`FusedCpuRunner` computes the same in one call of compiled code, `CudaGraphRunner` by replaying a CUDA graph.
`ModelRunner`, which is `llm.runner`, takes the first that can for each step. Everything that decodes calls a runner:
generation and the benchmarks.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llama4.cache.sequence import SequenceCache
from llama4.engine.cuda_graphs import CudaGraphRunner
from llama4.engine.fused_cpu import FusedCpuRunner, only_our_threads
from llama4.engine.snapshot import UnsupportedError
from llama4.errors import Llama4Error
from llama4.model.multimodal import Llama4Model, check_ids, check_rows
from llama4.ops.sampling import greedy_token

logger = logging.getLogger("llama4.engine")


class Session(Protocol):
    """The next steps of one cache, prepared."""

    @property
    def logits_BV(self) -> Tensor:
        """Logits after the last step, valid until the next."""

    def is_current(self, cache: SequenceCache) -> bool:
        """Whether the next step can be run without asking the runners anew."""

    def run(self, ids: list[int], cache: SequenceCache) -> None:
        """One more token in every row.

        Raises:
            Llama4Error: ids outside the vocabulary, or another number of them than the cache has rows.
        """

    def greedy_token(self) -> tuple[list[int], list[float]]:
        """The index of each row's largest logit, the lowest on ties, and its log_softmax in float32."""


class Runner(Protocol):
    """One way to compute steps of a model."""

    name: str

    @property
    def device(self) -> str | None:
        """The type of device that it is for; None for any."""

    def is_worthwhile(self) -> bool:
        """Whether this way is meant for the model: it has a kernel on its device, and the model is large enough to
        gain."""

    def unsupported_reason(self, cache: SequenceCache) -> str | None:
        """Why the next step of a cache cannot be computed this way; None if it can."""

    def open(self, cache: SequenceCache) -> Session:
        """Prepare the next steps of a cache. There must be no `unsupported_reason`. The session does not keep the cache
        in memory.

        Raises:
            UnsupportedError: that cannot be done, which is an `unsupported_reason` from now on.
        """


class EagerSession:
    """One step by `Llama4Model.forward`. It is never current: the next step may go a faster way."""

    logits_BV: Tensor

    def __init__(self, model: Llama4Model, fused: FusedCpuRunner) -> None:
        self.model, self._fused = model, fused

    def is_current(self, cache: SequenceCache) -> bool:
        return False

    @torch.inference_mode()
    def run(self, ids: list[int], cache: SequenceCache) -> None:
        with only_our_threads(self._fused, cache):
            self.logits_BV = self.model(torch.tensor(ids)[:, None], cache=cache, last_only=True)[:, 0]

    def greedy_token(self) -> tuple[list[int], list[float]]:
        ids_B, logprobs_B = greedy_token(self.logits_BV)
        return ids_B.tolist(), logprobs_B.tolist()


class EagerRunner:
    """Steps by `Llama4Model.forward`: any model, any device."""

    name, device = "eager", None

    def __init__(self, model: Llama4Model, fused: FusedCpuRunner | None = None) -> None:
        self.model = model
        self._fused = fused or FusedCpuRunner(model)

    def is_worthwhile(self) -> bool:
        return True

    def unsupported_reason(self, cache: SequenceCache) -> str | None:
        return None

    def open(self, cache: SequenceCache) -> EagerSession:
        return EagerSession(self.model, self._fused)


class ModelRunner:
    """The fast way to decode: for each step the first of its runners that can compute it.

    Steps compute no gradients. What keeps a model from a faster runner, such as a hook or an adapter, is logged once
    for each reason, as a warning. That a model is too small to gain is no loss, and is only logged at DEBUG.

    Args:
        model: the model; runners see what is changed in it, from one reply to the next.
        runners: the fastest first; the last must support everything.

    Attributes:
        fused: that which knows of the model's modules whether kernels compute them, be it among the runners or not.
    """

    def __init__(self, model: Llama4Model, runners: Sequence[Runner] | None = None) -> None:
        self.model = model
        given = (each for each in runners or () if isinstance(each, FusedCpuRunner))
        self.fused = next(given, None) or FusedCpuRunner(model)
        self.runners = tuple(runners or (self.fused, CudaGraphRunner(model), EagerRunner(model, self.fused)))
        self._sessions: dict[int, tuple[Session, weakref.ref[SequenceCache]]] = {}
        self._logged: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of what was prepared would point into the original's weights. Runners are made of their model.
        return _copied, (self.model, [type(runner) for runner in self.runners])

    @torch.inference_mode()
    def choose(self, cache: SequenceCache) -> Runner:
        """The runner of the next step of a cache."""
        device = self.model.device.type
        for runner in self.runners:
            if runner.device not in (None, device):
                continue
            reason = runner.unsupported_reason(cache)
            if reason is None:
                return runner
            if reason not in self._logged:
                self._logged.add(reason)
                is_invariant = self.model.is_batch_invariant
                level = logging.WARNING if is_invariant or runner.is_worthwhile() else logging.DEBUG
                gain = "faster and alone batch-invariant" if is_invariant else "faster"
                logger.log(level, "decoding without the %s runner, which is %s: %s", runner.name, gain, reason)
        raise AssertionError("the last runner supports everything")

    @torch.inference_mode()
    def step(self, ids_B: Tensor, cache: SequenceCache) -> Tensor:
        """One more token in every row -> logits of the next, [B, V].

        A change of weights or modules between two steps of one cache takes effect after `release(cache)`, or after some
        steps; a new hook takes effect at once.

        Raises:
            Llama4Error: ids that are no integers [B], outside the vocabulary, or another number of them than the cache
                has rows.
        """
        if ids_B.ndim != 1 or ids_B.dtype.is_floating_point:
            raise Llama4Error(
                f"ids must be [B] integers, not {list(ids_B.shape)} {ids_B.dtype}; one token for each row"
            )
        return self.run(ids_B.tolist(), cache).logits_BV.clone()

    def release(self, cache: SequenceCache) -> None:
        """Forget what was prepared for the next steps of a cache, and with it the weights that this keeps in memory."""
        self._sessions.pop(id(cache), None)

    def run(self, ids: list[int], cache: SequenceCache) -> Session:
        """One more token in every row -> the session, with the logits of the next, until the cache's next step."""
        # A line of Python between two steps costs ten times what it seems to: weights have evicted it from the caches.
        found = self._sessions.get(id(cache))
        session = found[0] if found is not None and found[0].is_current(cache) else self._open(ids, cache)
        session.run(ids, cache)
        return session

    @torch.inference_mode()
    def _open(self, ids: list[int], cache: SequenceCache) -> Session:
        check_rows(len(ids), cache)
        check_ids(min(ids), max(ids), self.model.config.text.num_embeddings)
        session, key, sessions = self._session(cache), id(cache), self._sessions
        sessions[key] = session, weakref.ref(cache, lambda _: sessions.pop(key, None))
        return session

    def _session(self, cache: SequenceCache) -> Session:
        try:
            return self.choose(cache).open(cache)
        except UnsupportedError:  # it says so itself from now on
            return self.choose(cache).open(cache)


def _copied(model: Llama4Model, runners: Sequence[Callable[[Llama4Model], Runner]]) -> ModelRunner:
    return ModelRunner(model, [make(model) for make in runners])
