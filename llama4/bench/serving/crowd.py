"""Many connections at once, and many requests after each other: whether each gets its own right answer, and whether the
server holds afterwards what it held before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llama4.api import Llama4
from llama4.bench.serving.client import Connection, Target
from llama4.bench.serving.process import Held, rest
from llama4.errors import Llama4Error

MAX_TOKENS = 16
SLOW_TOKENS = 32
PIECES = 20
"""In which a slow client sends its request."""
DISTINCT = 40
"""Requests that endurance repeats."""


@dataclass(frozen=True)
class Visitor:
    """What one of many clients does.

    Attributes:
        number: of it; its question and its seed follow from that, so that no two have the same answer.
        manner: "plain", "slow to send", "slow to read", or "leaves" after connecting, asking, or the first event.
    """

    number: int
    manner: str

    MANNERS = (
        *("plain", "slow to send", "plain", "leaves after asking", "plain", "slow to read"),
        *("plain", "leaves within the request", "plain", "slow to read", "plain", "leaves after an event"),
    )

    @classmethod
    def of(cls, number: int) -> Visitor:
        return cls(number, cls.MANNERS[number % len(cls.MANNERS)])

    @property
    def stays(self) -> bool:
        return not self.manner.startswith("leaves")

    @property
    def question(self) -> str:
        return f"What is {self.number} + {self.number % 7}?"

    @property
    def max_tokens(self) -> int:
        return SLOW_TOKENS if self.manner == "slow to read" else MAX_TOKENS

    def body(self) -> dict[str, Any]:
        """So hot that replies are noise, of which every seed has its own."""
        body = {
            "messages": [{"role": "user", "content": self.question}],
            "max_tokens": self.max_tokens,
            "temperature": 5,
            "seed": self.number,
        }
        return body | ({"logprobs": True, "top_logprobs": 20} if self.manner == "slow to read" else {})

    def expected(self, llm: Llama4) -> str:
        """What the library replies, alone."""
        return llm.chat(self.question, max_new_tokens=self.max_tokens, temperature=5.0, seed=self.number).text

    async def visit(self, connection: Connection) -> str | None:
        """Ask at an open connection; -> the reply, None of who left."""
        request = connection.target.chat_request(self.body())
        try:
            if self.manner == "slow to send":
                size = -(-len(request) // PIECES)
                for at in range(0, len(request), size):
                    await connection.send(request[at : at + size])
                    await asyncio.sleep(0.05)
            else:
                await connection.send(request[: len(request) // 2] if "within" in self.manner else request)
            if self.manner == "leaves after an event":
                await connection.check_status()
                async for _ in connection.events():
                    break
            if not self.stays:
                return None
            return (await connection.read_chat(pause=0.05 if self.manner == "slow to read" else 0.0)).text
        finally:
            connection.close()


async def crowd(
    target: Target, pid: int, count: int, done: Callable[[], object]
) -> tuple[dict[str, Any], dict[int, str]]:
    """So many connections that are all open before the first asks.

    Returns:
        What was seen, ready for JSON, and the replies of those who stayed, by number.
    """
    await target.chat(Visitor(count, "plain").body())  # what is made at the first request is there
    await rest(target)
    before = Held.of(pid)
    visitors = [Visitor.of(number) for number in range(count)]
    slow = 2**10  # bytes that a slow reader takes ahead
    connections = await asyncio.gather(
        *(target.connect(slow if each.manner == "slow to read" else 2**16) for each in visitors)
    )
    during = Held.of(pid)
    begun = time.perf_counter()
    failures: list[str] = []

    async def visit(visitor: Visitor, connection: Connection) -> str | None:
        try:
            return await visitor.visit(connection)
        except (Llama4Error, OSError, asyncio.IncompleteReadError) as error:
            failures.append(f"{visitor.manner}: {type(error).__name__}: {error}")
            return None
        finally:
            done()

    replies = await asyncio.gather(*map(visit, visitors, connections))
    seconds = time.perf_counter() - begun
    left = await rest(target)
    stayed = {each.number: reply for each, reply in zip(visitors, replies, strict=True) if reply is not None}
    report = {
        "connections": count,
        "open_at_once": (during.files or 0) - (before.files or 0),
        "slow": sum(visitor.manner.startswith("slow") for visitor in visitors),
        "left": sum(not visitor.stays for visitor in visitors),
        "stayed": sum(visitor.stays for visitor in visitors),
        "answered": len(stayed),
        "failures": failures[:20],
        "seconds": seconds,
        "still_to_do": left,
        "before": asdict(before),
        "after": asdict(Held.of(pid)),
    }
    return report, stayed


def judge(report: Mapping[str, Any], replies: Mapping[int, str], expected: Mapping[int, str]) -> dict[str, Any]:
    """Whose reply is right: `right`, `mixed` if it is another's, `wrong` otherwise."""
    owners = {text: number for number, text in expected.items()}
    wrong = {number: text for number, text in replies.items() if text != expected[number]}
    mixed = sum(owners.get(text, number) != number for number, text in wrong.items())
    counts = {"right": len(replies) - len(wrong), "mixed": mixed, "wrong": len(wrong) - mixed}
    return {**report, **counts, "distinct_replies": len(owners)}


async def endurance(
    target: Target, pid: int, count: int, clients: int, expected: Mapping[int, str], done: Callable[[], object]
) -> dict[str, Any]:
    """So many requests, one after the other by some clients; memory is looked at twenty times. Every twelfth client
    that comes leaves within its reply."""
    await asyncio.gather(*(target.chat(Visitor(number, "plain").body()) for number in range(min(DISTINCT, 8))))
    await rest(target)
    before, begun = Held.of(pid), time.perf_counter()
    memory: list[int | None] = []
    right = wrong = left = 0
    numbers = iter(range(count))

    async def client() -> None:
        nonlocal right, wrong, left
        for number in numbers:
            visitor = Visitor(number % DISTINCT, "plain" if number % 12 else "leaves after an event")
            reply = await visitor.visit(await target.connect())
            if reply is None:
                left += 1
            elif reply == expected[visitor.number]:
                right += 1
            else:
                wrong += 1
            if (number + 1) % max(count // 20, 1) == 0:
                memory.append(Held.of(pid).memory)
            done()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    seconds = time.perf_counter() - begun
    still = await rest(target)
    return {
        "requests": count,
        "clients": clients,
        "seconds": seconds,
        "right": right,
        "wrong": wrong,
        "left": left,
        "memory": memory,
        "still_to_do": still,
        "before": asdict(before),
        "after": asdict(Held.of(pid)),
    }


def distinct() -> list[Visitor]:
    """Those whose requests endurance repeats."""
    return [Visitor(number, "plain") for number in range(DISTINCT)]
