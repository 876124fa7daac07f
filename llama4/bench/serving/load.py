"""How many tokens a second a server gives to some clients, and how long each waits for its first.

Each client asks, reads its reply to the end, and asks again, until the requests of a figure are used up. Prompts are
random words of the model's vocabulary, the same for every server; half of them begin with the same words.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama4.api import Llama4
from llama4.bench.report import Spread
from llama4.bench.serving.client import Target, TimedReply
from llama4.config import Llama4Config
from llama4.engine.tokens import Token
from llama4.errors import Llama4Error
from llama4.families import family_of
from llama4.text.tokenizer import Tokenizer
from llama4.weights import hub
from llama4.weights.checkpoint import read_config


@dataclass(frozen=True)
class Workload:
    """What is asked.

    Attributes:
        shortest, longest: tokens of a prompt, before the chat template.
        shared: tokens with which every other prompt begins alike; such a prompt is longer than these.
        new: tokens of a reply, for servers that take `ignore_eos`.
    """

    shortest: int = 64
    longest: int = 512
    shared: int = 256
    new: int = 128


class Prompts:
    """Random prompts of a workload.

    Args:
        model: whose words they are of.
        seed: of what is drawn; prompts of the same seed are the same, those of others share nothing.

    Raises:
        Llama4Error: the model has no tokenizer.
    """

    def __init__(self, model: str, workload: Workload, seed: int) -> None:
        directory = hub.resolve(model)
        config: Llama4Config = read_config(directory)
        tokenizer = family_of(config).load_tokenizer(directory, config)
        if tokenizer is None:
            raise Llama4Error(f"{model} has no tokenizer, so nothing can be asked; put one beside its weights")
        self._tokenizer: Tokenizer = tokenizer
        self._workload = workload
        words = (self._tokenizer.decode([id_]) for id_ in range(config.text.vocab_size))
        self._words = [word for word in words if re.fullmatch(" [a-z]{2,}", word)]
        self._random = random.Random(seed)
        self._prefix = self._text(workload.shared)

    def _text(self, count: int) -> str:
        """So many tokens, or some more where words that stand together are split in other ways."""
        return "".join(self._random.choices(self._words, k=count))

    def message(self, shares: bool) -> list[dict[str, str]]:
        work = self._workload
        least = work.shared + 16 if shares else work.shortest
        count = self._random.randint(min(least, work.longest), work.longest)
        text = self._prefix + self._text(count - work.shared) if shares else self._text(count)
        return [{"role": "user", "content": text.strip()}]

    def bodies(self, count: int) -> list[dict[str, Any]]:
        """Requests; every other one shares the prefix."""
        work = self._workload
        return [
            {
                "messages": self.message(shares=i % 2 == 1 and work.shared > 0),
                "max_tokens": work.new,
                "temperature": 0,
                "ignore_eos": True,
            }
            for i in range(count)
        ]


async def under_load(
    target: Target, bodies: Sequence[dict[str, Any]], clients: int, seconds: float, done: Callable[[], object]
) -> dict[str, Any]:
    """One figure: all requests by so many clients, ready for JSON.

    Args:
        seconds: after which nothing more is asked, and what is not there yet is given up.
        done: is called after each.

    Raises:
        Llama4Error: a request failed.
    """
    answers: list[TimedReply] = []
    left: Iterator[dict[str, Any]] = iter(bodies)
    begun = time.perf_counter()

    async def client() -> None:
        for body in left:
            answers.append(await target.chat(body))
            done()

    try:
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
    except TimeoutError:
        pass
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return figure(answers, clients, len(bodies), begun)


def figure(answers: Sequence[TimedReply], clients: int, asked: int, begun: float) -> dict[str, Any]:
    """What the answers to some requests amount to; of those that were given up nothing counts."""
    if not answers:
        return {"clients": clients, "asked": asked, "answered": 0}
    took = max(answer.last for answer in answers) - begun
    waits = sorted(answer.first - answer.begun for answer in answers)
    between = [(each.last - each.first) / (each.tokens - 1) for each in answers if each.tokens > 1]
    return {
        "clients": clients,
        "asked": asked,
        "answered": len(answers),
        "seconds": took,
        "tokens": sum(answer.tokens for answer in answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "tokens_per_second": sum(answer.tokens for answer in answers) / took,
        "first_token_p50": percentile(waits, 50),
        "first_token_p95": percentile(waits, 95),
        "between_tokens": Spread.of(between).median if between else None,
    }


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The least of some values, in order, that so many percent of them do not pass."""
    return ordered[-(-percent * len(ordered) // 100) - 1]


class StreamTimer:
    """`llm.stream` in a process without a server."""

    def __init__(self, model: str, quantization: str | None) -> None:
        self._llm = Llama4.from_pretrained(model, quantization=quantization, progress=False)

    def stream(self, body: dict[str, Any]) -> tuple[int, float]:
        """The tokens of a reply, and the seconds from the call to the last."""
        begun = time.perf_counter()
        stream = self._llm.stream(body["messages"], max_new_tokens=body["max_tokens"], temperature=0.0)
        for _ in stream:
            pass
        tokens: Sequence[Token] = stream.reply.logprobs
        return len(tokens), time.perf_counter() - begun
