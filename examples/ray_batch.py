"""Answer a data set with Ray Data: every actor has a model of its own, rows go to whichever is free. On a cluster
nothing changes but the number of actors. With two here: pip install "ray[data]", then

python examples/ray_batch.py
"""

from typing import Any

try:
    import ray
    from ray.data import ActorPoolStrategy, from_items
except ModuleNotFoundError:
    raise SystemExit('Ray is not installed: pip install "ray[data]"') from None

from llama4 import Llama4


class Answers:
    """An actor: it loads the model once, and answers rows, several at a time."""

    def __init__(self, model: str) -> None:
        self.llm = Llama4.from_pretrained(model, progress=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        replies = self.llm.chat_batch([str(question) for question in batch["question"]], max_new_tokens=40)
        return {**batch, "answer": [reply.text for reply in replies]}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    rows = from_items([{"number": n, "question": f"What is {n} + 1?"} for n in range(16)])
    actors = ActorPoolStrategy(size=2)
    answered = rows.map_batches(Answers, fn_constructor_args=("tiny",), compute=actors, batch_size=4, num_cpus=1)
    for row in sorted(answered.take_all(), key=lambda row: int(row["number"])):
        print(f"{row['question']} -> {row['answer']}")
    ray.shutdown()
