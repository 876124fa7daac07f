"""vLLM's side of `vllm.py`: run as a file by an interpreter that has vLLM, and nothing of this library.

It is given its settings in JSON, answers "ready", and then each line of its input, a task, with the seconds that it
took. What vLLM itself prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from itertools import count
from typing import Any

_names = count()


def main(settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = make_engine(settings)
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        print(json.dumps(seconds(engine, settings["vocabulary"], **json.loads(line))), file=answers)


def make_engine(settings: dict[str, Any]) -> Any:
    from vllm import LLM

    llm = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["length"],
        max_num_seqs=settings["rows"],
        max_num_batched_tokens=settings["tokens"],  # no prompt is read in pieces
        enable_prefix_caching=False,  # prompts are the same each time
        skip_tokenizer_init=True,
    )
    return llm.llm_engine


def seconds(engine: Any, vocabulary: int, rows: int, prompt: int, new: int) -> float:
    """Of prompts of random tokens up to the next one; with `new`, of a step after them, on average."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1 + new, ignore_eos=True, detokenize=False)
    generator = random.Random(0)
    begin = time.perf_counter()
    for _ in range(rows):
        ids = [generator.randrange(vocabulary) for _ in range(prompt)]
        engine.add_request(str(next(_names)), {"prompt_token_ids": ids}, sampling)
    waiting = rows
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if waiting > 0:
            waiting -= sum(len(output.outputs[0].token_ids) == 1 for output in outputs)
            if waiting <= 0:
                read = time.perf_counter()
    end = time.perf_counter()
    return (end - read) / new if new else read - begin


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
