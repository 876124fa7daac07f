"""How often a model answers questions about fresh drawings rightly, for each kind of question.

`llama4 bench vqa [--model tiny] [--pictures N] [--seed S] [--json]`
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama4.arguments import Parser
from llama4.errors import Llama4Error
from llama4.model.moe import Router
from llama4.tiny.shapes_dataset import KINDS_OF_QUESTION, Question, draw, fresh_question, is_right

Messages = list[dict[str, Any]]
Answer = Callable[[list[Messages]], list[str]]


@dataclass(frozen=True, slots=True)
class Row:
    """How many of the questions of one kind were answered rightly, with Wilson's 95% interval for the share."""

    kind: str
    right: int
    asked: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.right / self.asked


def evaluate(
    answer: Answer,
    per_kind: int = 200,
    seed: int = 0,
    *,
    kinds: Sequence[str] = KINDS_OF_QUESTION,
    sides: tuple[int, int] = (60, 1200),
    batch_size: int = 16,
    on_answer: Callable[[Question, str, bool], None] | None = None,
) -> list[Row]:
    """Ask `per_kind` questions of every kind, each about pictures of its own, and count the right answers.

    `answer` turns a batch of conversations into one answer each. `seed` and kind fix the questions, whatever the order
    of kinds or the batch size. `on_answer` sees every question, what was answered, and whether that was right.
    """
    if per_kind < 1 or batch_size < 1:
        raise Llama4Error(f"per_kind and batch_size must be at least 1, got {per_kind} and {batch_size}")
    return [
        _row(kind, list(_judge(answer, exam(kind, per_kind, seed, sides), batch_size, on_answer))) for kind in kinds
    ]


def exam(kind: str, n: int, seed: int, sides: tuple[int, int] = (60, 1200)) -> Iterator[tuple[Messages, Question]]:
    """Conversations that end with a question of this kind, and that question."""
    rng = random.Random(f"exam {seed} {kind}")
    for _ in range(n):
        scenes, questions = fresh_question(rng, kind, sides=sides)
        content: list[dict[str, Any]] = [{"type": "image", "image": draw(scene)} for scene in scenes]
        messages: Messages = []
        for question in questions[:-1]:
            messages.append({"role": "user", "content": [*content, _said(question.text)]})
            messages.append({"role": "assistant", "content": [_said(question.answer)]})
            content = []
        messages.append({"role": "user", "content": [*content, _said(questions[-1].text)]})
        yield messages, questions[-1]


def _said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _judge(
    answer: Answer,
    items: Iterator[tuple[Messages, Question]],
    batch_size: int,
    on_answer: Callable[[Question, str, bool], None] | None,
) -> Iterator[bool]:
    batch: list[tuple[Messages, Question]] = []
    for item in items:
        batch.append(item)
        if len(batch) == batch_size:
            yield from _judge_batch(answer, batch, on_answer)
            batch = []
    if batch:
        yield from _judge_batch(answer, batch, on_answer)


def _judge_batch(
    answer: Answer,
    batch: list[tuple[Messages, Question]],
    on_answer: Callable[[Question, str, bool], None] | None,
) -> Iterator[bool]:
    given = answer([messages for messages, _ in batch])
    for (_, question), said in zip(batch, given, strict=True):
        right = is_right(question, said)
        if on_answer is not None:
            on_answer(question, said, right)
        yield right


def _row(kind: str, verdicts: list[bool]) -> Row:
    return Row(kind, sum(verdicts), len(verdicts), *wilson(sum(verdicts), len(verdicts)))


def wilson(right: int, asked: int, z: float = 1.959964) -> tuple[float, float]:
    """Bounds of the share of successes (E. B. Wilson 1927); z = 1.96 for 95%."""
    share = right / asked
    scale = 1 + z * z / asked
    middle = (share + z * z / (2 * asked)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text."""
    lines = [f"{'kind':<14}{'right':>7}{'asked':>7}{'share':>8}   95% interval"]
    lines += [
        f"{r.kind:<14}{r.right:>7}{r.asked:>7}{r.share:>8.1%}   {r.low:.1%} ... {r.high:.1%}".rstrip() for r in rows
    ]
    return "\n".join(lines)


class ExpertShares:
    """Counts, from the outside, how many tokens every router sends to each of its experts."""

    def __init__(self, model: nn.Module) -> None:
        self._counts: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, Router):
                self._counts[name] = torch.zeros(module.out_features, dtype=torch.long)
                module.register_forward_hook(partial(self._count, name))

    def _count(self, name: str, router: Router, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        self._counts[name] += output[1].flatten().bincount(minlength=router.out_features).cpu()

    def shares(self) -> list[list[float]]:
        """Per layer with experts, the share of tokens that each expert took."""
        return [(counts / counts.sum().clamp(min=1)).tolist() for counts in self._counts.values()]

    def table(self) -> str:
        """The shares as lines of text, in percent."""
        rows = self.shares()
        lines = ["share of tokens, a row per layer with experts, a column per expert:"]
        lines += [f"{i:>5}" + "".join(f"{share:>7.1%}" for share in row) for i, row in enumerate(rows)]
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="llama4 bench vqa", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="embedded name, directory, GGUF file or Hub id (default: tiny)")
    parser.add_argument("--pictures", type=int, default=200, metavar="N", help="questions per kind, each a new picture")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other pictures and questions")
    parser.add_argument("--kinds", nargs="+", default=KINDS_OF_QUESTION, choices=KINDS_OF_QUESTION, metavar="KIND")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong answer to stderr")
    options = parser.parse_args(arguments)
    if options.pictures < 1 or options.batch_size < 1:
        parser.error("--pictures and --batch-size must be at least 1")

    from llama4.api import Llama4

    llm = Llama4.from_pretrained(options.model)
    experts = ExpertShares(llm.model)

    def answer(conversations: list[Messages]) -> list[str]:
        return [reply.text for reply in llm.chat_batch(conversations, max_new_tokens=64, temperature=0)]

    def show(question: Question, said: str, right: bool) -> None:
        if options.show_wrong and not right:
            print(f"{question.kind}: {question.text!r} -> {said!r}, not {question.answer!r}", file=sys.stderr)

    rows = evaluate(
        answer, options.pictures, options.seed, kinds=options.kinds, batch_size=options.batch_size, on_answer=show
    )
    if options.json:
        accuracy = [asdict(row) | {"share": row.share} for row in rows]
        print(json.dumps({"accuracy": accuracy, "experts": experts.shares()}, indent=2))
    else:
        print(table(rows), experts.table(), sep="\n\n")
    return 0
