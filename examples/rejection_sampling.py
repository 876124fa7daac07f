"""Rejection sampling: several replies to each question, a score for each, and the best of them to learn from.

    python examples/rejection_sampling.py OUT_DIR

Writes OUT_DIR/best.jsonl and OUT_DIR/adapter.
"""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("output", metavar="OUT_DIR", type=Path)
output = parser.parse_args().output  # before the imports, which take seconds

from llama4 import Llama4
from llama4.train import finetune

QUESTIONS = ["What is the colour of the sky?", "How many legs has a cat?", "What is red?", "Who are you?"]
REPLIES = 4


def score(question: str, reply: str) -> float:
    """What is wanted: whatever can be computed of a reply, or a reward model's logit. Here, replies that are short."""
    return -len(reply)


output.mkdir(parents=True, exist_ok=True)
llm = Llama4.from_pretrained("tiny", progress=False)
with open(output / "best.jsonl", "w", encoding="utf-8") as file:
    for question in QUESTIONS:
        # The embedded model is sure of itself: at lower temperatures its replies are all the same.
        first = llm.chat(question, n=REPLIES, temperature=3.0, seed=0, max_new_tokens=24)
        replies = [reply.text for reply in (first, *first.others) if reply.text.strip()]
        best = max(replies, key=lambda reply: score(question, reply), default=None)
        if best is not None:
            file.write(json.dumps({"prompt": question, "completion": best}) + "\n")

result = finetune(llm, output / "best.jsonl", output / "adapter", steps=20, progress=False)
llm.adapters.add("shorter", output / "adapter")
llm.set_adapter("shorter")
print(f"loss {result.losses[0]:.2f} -> {result.losses[-1]:.2f};", llm.chat(QUESTIONS[0], max_new_tokens=24).text)
