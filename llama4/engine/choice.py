"""The next token of each of several requests, from the logits of all.

Shapes: B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llama4.engine.request import Delivery, Request
from llama4.engine.sampling import Sampler, likeliest
from llama4.engine.tokens import SupportsDecode, Token
from llama4.ops.sampling import applies_penalties, draw_token


def next_tokens(
    requests: Sequence[Request],
    logits_BV: Tensor,
    tokenizer: SupportsDecode,
    greedy: tuple[list[int], list[float]] | None = None,
) -> list[Delivery]:
    """The next token of each request, or why there is none.

    Args:
        greedy: the most likely tokens and their log-probabilities, if they are known.
    """
    chosen: list[Delivery] = []
    for row, (request, found) in enumerate(zip(requests, _sample(requests, logits_BV, greedy), strict=True)):
        if isinstance(found, Exception):
            chosen.append(found)
            continue
        id_, logprob = found
        count = request.alternatives
        others = likeliest(logits_BV[row : row + 1], count)[0] if count else ()
        chosen.append(Token(id_, tokenizer.decode_bytes([id_]), logprob, others))
    return chosen


def _sample(
    requests: Sequence[Request], logits_BV: Tensor, greedy: tuple[list[int], list[float]] | None
) -> list[tuple[int, float] | Exception]:
    """The next token of each request, and its log-probability; or why its form allows none. Requests that choose alike
    are computed together."""
    chosen: list[tuple[int, float] | Exception] = [(0, 0.0)] * len(requests)
    drawn: list[int] = []
    penalises = applies_penalties(logits_BV)
    groups: dict[tuple[Sampler, bool], list[int]] = {}
    for row, request in enumerate(requests):
        matcher = request.state.matcher
        if matcher is None and (request.sampler.draws_from_logits or (penalises and not request.sampler.takes_largest)):
            drawn.append(row)
        elif matcher is not None and (problem := matcher.problem()) is not None:
            chosen[row] = problem
        else:
            groups.setdefault(request.choice, []).append(row)
    if drawn:
        V = logits_BV.shape[1]
        draws = [requests[row].sampler.penalised_draw(row, requests[row].state, V) for row in drawn]
        for row, found in zip(drawn, draw_token(logits_BV, draws), strict=True):
            chosen[row] = found
            requests[row].state.accept(found[0])
    for (sampler, _), rows in groups.items():
        if sampler.takes_largest and greedy is not None:
            candidates, rows = rows, []
            for row in candidates:
                if requests[row].state.allows(greedy[0][row]):
                    chosen[row] = greedy[0][row], greedy[1][row]
                    requests[row].state.accept(greedy[0][row])
                else:
                    rows.append(row)
        if rows:
            own_BV = logits_BV[rows] if len(rows) < len(requests) else logits_BV
            ids_B, logprobs_B = sampler(own_BV, [requests[row].state for row in rows])
            for row, id_, logprob in zip(rows, ids_B.tolist(), logprobs_B.tolist(), strict=True):
                chosen[row] = id_, logprob
    return chosen
