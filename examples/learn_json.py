"""Teach the embedded model to answer in JSON of a schema that it has never seen, from pictures that are drawn here.

    python examples/learn_json.py OUT_DIR

Writes OUT_DIR/train.jsonl with its pictures, OUT_DIR/adapter, and says how many replies to other pictures follow the
schema, and how many are right, before and after.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

if __name__ == "__main__":  # before the imports, which take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="OUT_DIR", type=lambda name: Path(name).resolve())
    arguments = parser.parse_args()

from llama4 import Llama4
from llama4.tiny import shapes_dataset
from llama4.tiny.shapes_dataset import Question
from llama4.train import LoraConfig, finetune

KINDS = ("count", "count_shape", "count_colour", "colour", "shape")
"""Of questions: how many, which colour, which shape."""

TARGETS = ("attention", "experts", "shared", "embeddings")
"""It has seen no brace and no quotation mark before, so their embeddings must be learnt, too."""


def examples(folder: Path, count: int, seed: int) -> list[tuple[Path, Question]]:
    """Pictures in a folder, with a question about each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, made = random.Random(seed), list[tuple[Path, Question]]()
    while len(made) < count:
        scenes, questions = shapes_dataset.fresh_question(rng, rng.choice(KINDS), sides=(60, 112))
        path = folder / f"{seed}-{len(made)}.png"
        shapes_dataset.draw(scenes[0]).save(path)
        made.append((path, questions[0]))
    return made


def reply_to(question: Question) -> str:
    """The schema: what was asked for, and the answer."""
    return json.dumps({"about": question.kind.split("_")[0], "answer": question.answer})


def write(path: Path, made: list[tuple[Path, Question]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for picture, question in made:
            parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": question.text}]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": reply_to(question)}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def share_of(llm: Llama4, made: list[tuple[Path, Question]]) -> tuple[float, float]:
    """Shares of replies that follow the schema, and that also say what is right."""
    follows = right = 0
    for picture, question in made:
        parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": question.text}]
        text = llm.chat([{"role": "user", "content": parts}], max_new_tokens=40).text
        try:
            content = json.loads(text)
        except ValueError:
            continue
        if isinstance(content, dict) and list(content) == ["about", "answer"] and isinstance(content["answer"], str):
            follows += content["about"] == question.kind.split("_")[0]
            right += shapes_dataset.is_right(question, content["answer"])
    return follows / len(made), right / len(made)


def main(output: Path, train: int = 600, test: int = 200) -> None:
    llm, held_out = Llama4.from_pretrained("tiny", progress=False), examples(output / "test", test, seed=1)
    print("before: {:.0%} follow the schema, {:.0%} are right".format(*share_of(llm, held_out)))
    data = write(output / "train.jsonl", examples(output / "pictures", train, seed=0))
    began = time.process_time()
    finetune(llm, data, output / "adapter", lora=LoraConfig(targets=TARGETS), epochs=10)
    print(f"learnt from {train} examples in {time.process_time() - began:.0f} s of CPU time")
    llm.adapters.add("json", output / "adapter")
    llm.set_adapter("json")
    print("after: {:.0%} follow the schema, {:.0%} are right".format(*share_of(llm, held_out)))


if __name__ == "__main__":
    main(arguments.output)
