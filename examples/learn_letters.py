"""Teach the embedded model to read one to three capital letters in a picture, by LoRA on its eyes and its experts.

    python examples/learn_letters.py OUT_DIR [--minutes 60]

It has seen shapes, and hardly any text. So it learns letters as it once learnt shapes (examples/train_tiny.py): first
to see, on a direct target, which letter has its middle in each patch of pictures that are full of letters; then to say
what is written. Meanwhile pictures of shapes must look to it as they did, and some of its old questions are asked
again, so that it forgets nothing.

One process per CPU core computes the gradients of its share of the pictures. Every picture follows from the seed and
the step, so a run can be stopped at any time and goes on from the last checkpoint when started again. Progress goes to
the terminal; the adapter, which anything that reads PEFT's takes, to OUT_DIR/adapter.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from llama4 import Llama4
from llama4.adapters.files import save_adapter
from llama4.adapters.lora import Adapter
from llama4.inputs import Processor
from llama4.kernels import threads
from llama4.text.messages import read_messages
from llama4.tiny import shapes_dataset
from llama4.tiny.shapes_dataset import Question, Scene
from llama4.tiny.shapes_dataset.pictures import text_aspect
from llama4.train import LoraConfig
from llama4.train.data import Batch, Example, collate
from llama4.train.loss import IGNORED
from llama4.vision.tiling import Tiles

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LEAST = 16.0
"""Height of the smallest letters, in pixels of a tile."""
TILE, PATCH, MERGED = 112, 14, 2
"""Sides of a tile and of its patches in pixels, and patches that become a token, on each side."""
SIDES = (60, TILE)
"""Of pictures: one tile each."""
TARGETS = ("vision", "projector", "experts")

SEE = 0.3
"""Share of the time in which it learns to see; in the rest it learns to answer."""
COLLAGES, TEXTS, SHAPES, OLD = 24, 24, 4, 4
"""Pictures of a step, of each process: full of letters, or with one text; of shapes that must look as they did; and
conversations of old questions."""
WEIGHTS = {"answers": 1.0, "seen": 1.0, "changed": 3.0}
"""Of the losses."""


class Box(NamedTuple):
    """A letter, and where it is in a picture."""

    letter: str
    left: float
    top: float
    right: float
    bottom: float

    def moved(self, x: float, y: float) -> Box:
        return Box(self.letter, self.left + x, self.top + y, self.right + x, self.bottom + y)

    def times(self, scale: float) -> Box:
        return Box(self.letter, *(scale * edge for edge in self[1:]))


# -- pictures ----------------------------------------------------------------------------------------------------------


def written(rng: random.Random, width: int, height: int, scale: float, most: int = 3) -> Scene | None:
    """A scene of one to `most` letters, which a tile shows `scale` times as large; None if there is no room."""
    model = shapes_dataset.random_scene(rng, num_shapes=0, with_text=True, sides=SIDES)  # for its ground and its ink
    assert model.text is not None
    characters = "".join(rng.choices(LETTERS, k=rng.randint(1, most)))
    text = replace(model.text, characters=characters, font="aileron", stretch=1.0, slant=0.0)
    lowest, highest = LEAST / scale, min(0.85 * height, 0.92 * width / text_aspect(text))
    if highest < lowest:
        return None
    tall = math.exp(rng.uniform(math.log(lowest), math.log(highest)))
    half = tall * text_aspect(text) / 2 + 1, tall / 2 + 1
    centre = rng.uniform(half[0], width - half[0]), rng.uniform(half[1], height - half[1])
    return Scene(width, height, model.ground, text=replace(text, height=tall, centre=centre))


def one_text(rng: random.Random) -> Scene:
    """A picture to be asked about."""
    while True:
        width, height = rng.randint(*SIDES), rng.randint(*SIDES)
        if (scene := written(rng, width, height, TILE / max(width, height))) is not None:
            return scene


def boxes_of(scene: Scene) -> list[Box]:
    """Where each letter of its text is, roughly: a letter is as wide as the text becomes longer by it."""
    text = scene.text
    assert text is not None
    parts = [text.characters[:i] for i in range(1, len(text.characters) + 1)]
    ends = [0.0, *(text.height * text_aspect(replace(text, characters=part)) for part in parts)]
    left, top = text.centre[0] - ends[-1] / 2, text.centre[1] - text.height / 2
    return [
        Box(letter, left + begin, top, left + end, top + text.height)
        for letter, (begin, end) in zip(text.characters, pairwise(ends), strict=True)
    ]


def collage(rng: random.Random) -> tuple[Image.Image, list[Box]]:
    """A picture of up to nine others side by side, to learn many letters from at once."""
    width, height = rng.randint(*SIDES), rng.randint(*SIDES)
    scale = TILE / max(width, height)
    picture, boxes = Image.new("RGB", (width, height)), []
    cols, rows = (rng.randint(1, max(1, int(side * scale / 30))) for side in (width, height))
    xs, ys = ([round(i * side / n) for i in range(n + 1)] for side, n in ((width, cols), (height, rows)))
    for left, right in pairwise(xs):
        for top, bottom in pairwise(ys):
            tries = (written(rng, right - left, bottom - top, scale) for _ in range(3))
            if scene := next(filter(None, tries), None):
                picture.paste(shapes_dataset.draw(scene), (left, top))
                boxes += [box.moved(left, top) for box in boxes_of(scene)]
    return picture, boxes


def patch_labels(boxes: list[Box], scale: float) -> Tensor:
    """For each patch of a tile, row by row, which letter has its middle there, from 1; 0 where no letter is;
    `IGNORED` where a part of one is.

    Args:
        scale: how large the tile shows the picture.
    """
    side = TILE // PATCH
    labels = torch.zeros(side, side, dtype=torch.long)
    of_patches = [box.times(scale / PATCH) for box in boxes]
    for box in of_patches:
        labels[int(box.top) : math.ceil(box.bottom), int(box.left) : math.ceil(box.right)] = IGNORED
    for box in of_patches:
        row, col = (int((begin + end) / 2) for begin, end in ((box.top, box.bottom), (box.left, box.right)))
        labels[min(row, side - 1), min(col, side - 1)] = 1 + LETTERS.index(box.letter)
    return labels.flatten()


# -- questions ---------------------------------------------------------------------------------------------------------

Topic = tuple[list[Scene], list[Question]]
"""Pictures, and questions about them."""


def text_topics(rng: random.Random, count: int) -> list[Topic]:
    """Pictures with a text, and what it says."""
    scenes = [one_text(rng) for _ in range(count)]
    return [([scene], [shapes_dataset.ask(scene, rng, "text")]) for scene in scenes]


def old_topic(rng: random.Random, questions: int = 5) -> Topic:
    """What it could answer before."""
    share, sides = rng.random(), SIDES if rng.random() < 0.7 else (60, 1200)
    if share < 0.05:
        return [], [rng.choice((shapes_dataset.ask_outside, shapes_dataset.ask_without_picture))(rng)]
    if share < 0.15:
        scenes = [shapes_dataset.random_scene(rng, sides=SIDES) for _ in range(2)]
        return scenes, [shapes_dataset.ask_pair(scenes[0], scenes[1], rng) for _ in range(questions)]
    if share < 0.45:  # many alike are rare by themselves
        kind = rng.choice(("count_shape", "count_colour"))
        scene = shapes_dataset.fresh_question(rng, kind, sides=sides)[0][0]
    else:
        scene = shapes_dataset.random_scene(rng, sides=sides)
    no_text = [shapes_dataset.ask(scene, rng, "text")] if rng.random() < 0.15 else []
    return [scene], shapes_dataset.ask_many(scene, rng, questions) + no_text


class Drawing:
    """Pictures as the model gets them.

    Args:
        processor: the model's.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def tiles(self, scene: Scene) -> Tiles:
        return self.processor.tile(shapes_dataset.draw(scene, min(1.0, 4 * TILE / max(scene.width, scene.height))))

    def collages(self, rng: random.Random, count: int) -> tuple[Tensor, Tensor]:
        """Tiles [n, 3, A, A] full of letters, and the labels of their patches [n, P]."""
        made = [collage(rng) for _ in range(count)]
        tiles = [self.processor.tile(picture).pixel_values for picture, _ in made]
        labels = [patch_labels(boxes, TILE / max(picture.size)) for picture, boxes in made]
        return torch.cat(tiles), torch.stack(labels)

    def shapes(self, rng: random.Random, count: int) -> Tensor:
        """Tiles of pictures of shapes."""
        scenes = [shapes_dataset.random_scene(rng, sides=SIDES) for _ in range(count)]
        return torch.cat([self.tiles(scene).pixel_values for scene in scenes])

    def batch(self, topics: list[Topic]) -> Batch:
        """Conversations, of which the answers are learnt."""
        examples, pictures = [], []
        for scenes, questions in topics:
            tiles = [self.tiles(scene) for scene in scenes]
            messages: list[dict[str, Any]] = []
            for question in questions:
                messages.append({"role": "user", "content": [{"type": "text", "text": question.text}]})
                messages.append({"role": "assistant", "content": question.answer})
            messages[0]["content"] = [{"type": "image", "image": None}] * len(scenes) + messages[0]["content"]
            found = self.processor.render(read_messages(messages), tiles, add_generation_prompt=False)
            examples.append(Example(0, tuple(found.ids), tuple(found.is_reply)))
            pictures += tiles
        return collate(examples, *self.processor.fusion.tensors(pictures, self.processor.max_tiles))


# -- learning ----------------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """An adapter, and what only training needs: a head that reads from an image token what its patches show."""

    def __init__(self, llm: Llama4, rank: int) -> None:
        super().__init__()
        self.llm, self.drawing = llm, Drawing(llm.processor)
        llm.model.requires_grad_(False)
        self.adapter = Adapter.create(llm.model, LoraConfig(rank=rank, alpha=2 * rank, targets=TARGETS))
        self.adapter.attach(llm.model)
        self.head = nn.Linear(llm.config.text.hidden_size, MERGED**2 * (1 + len(LETTERS)))

    def seen(self, features: Tensor, labels_nP: Tensor) -> Tensor:
        """How well image tokens [n * Q, D] tell the letters of the patches that each was merged from. Ground, which
        most patches show, counts little."""
        side = TILE // PATCH
        squares = F.unfold(labels_nP.view(-1, 1, side, side).float(), MERGED, stride=MERGED).mT.long()
        guesses, weight = self.head(features).view(squares.numel(), -1), torch.ones(1 + len(LETTERS))
        weight[0] = 0.1
        return F.cross_entropy(guesses, squares.flatten(), weight, ignore_index=IGNORED)

    def changed(self, tiles: Tensor) -> Tensor:
        """How far image tokens are from what they were, as a share of their size."""
        model = self.llm.model
        with torch.no_grad(), self.adapter.detached(model):
            before = model.encode_images(tiles)
        return F.mse_loss(model.encode_images(tiles), before) / before.square().mean()

    def see(self, rng: random.Random) -> dict[str, Tensor]:
        """The losses of a step in which it learns to see."""
        tiles, labels = self.drawing.collages(rng, COLLAGES)
        features = self.llm.model.encode_images(tiles)
        return {"seen": self.seen(features, labels), "changed": self.changed(self.drawing.shapes(rng, SHAPES))}

    def read(self, rng: random.Random) -> dict[str, Tensor]:
        """The losses of a step in which it learns to answer."""
        topics = text_topics(rng, TEXTS)
        batch = self.drawing.batch([*topics, *(old_topic(rng) for _ in range(OLD))])
        assert batch.pixel_values is not None
        features = self.llm.model.encode_images(batch.pixel_values)
        logits = self.llm.model(batch.input_ids, attention_mask=batch.attention_mask, image_features=features)
        answers = F.cross_entropy(logits[batch.is_learnt], batch.labels[batch.is_learnt])
        scenes = [scene for [scene], _ in topics]
        labels = torch.stack([patch_labels(boxes_of(s), TILE / max(s.width, s.height)) for s in scenes])
        seen = self.seen(features[: len(topics) * len(features) // len(batch.pixel_values)], labels)
        return {"answers": answers, "seen": seen, "changed": self.changed(self.drawing.shapes(rng, SHAPES))}

    @torch.no_grad()
    def right(self, topics: list[Topic]) -> list[bool]:
        """Whether each answer would be written to the letter."""
        batch = self.drawing.batch(topics)
        logits = self.llm.model(batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values)
        return ((logits.argmax(-1) == batch.labels) | ~batch.is_learnt).all(1).tolist()


def rate_at(done: float) -> float:
    """Share of the learning rate: up at first; less in the second part, in which the experts learn, too; down at the
    end."""
    if done < SEE:
        return min(1.0, done / 0.01 + 0.02)
    return 0.4 * min(1.0, (done - SEE) / 0.01 + 0.02, (1 - done) / 0.3 + 0.01)


def exam(count: int) -> tuple[dict[str, list[Topic]], list[Topic]]:
    """Held-out pictures: with texts, by their length; and of every other kind of question."""
    rng = random.Random("held out")
    texts = text_topics(rng, count)
    lengths = {str(n): [topic for topic in texts if len(topic[1][0].answer) == n] for n in (1, 2, 3)}
    kinds = [kind for kind in shapes_dataset.KINDS_OF_QUESTION if kind != "text"]
    old = [shapes_dataset.fresh_question(rng, kind) for kind in kinds for _ in range(count // 12)]
    return lengths, old


def examine(learner: Learner, lengths: dict[str, list[Topic]], old: list[Topic]) -> str:
    """Shares that are right, in words."""
    right = {
        name: [r for i in range(0, len(ts), 32) for r in learner.right(ts[i : i + 32])] for name, ts in lengths.items()
    }
    every = [r for rights in right.values() for r in rights]
    parts = ", ".join(f"{sum(rights) / len(rights):.0%} of {name}" for name, rights in right.items())
    others = [r for i in range(0, len(old), 16) for r in learner.right(old[i : i + 16])]
    return f"letters {sum(every) / len(every):.1%} ({parts}), other questions {sum(others) / len(others):.1%}"


def train(process: int, processes: int, args: argparse.Namespace) -> None:
    """One process of the run; process 0 writes."""
    if processes > 1:
        torch.set_num_threads(1)
        rendezvous = f"file://{args.out}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=process, world_size=processes)
    torch.manual_seed(args.seed)
    llm = Llama4.from_pretrained("tiny", dtype="float32", progress=False)
    learner = Learner(llm, args.rank)
    parameters = list(learner.parameters())
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    step, seconds, checkpoint = 0, 0.0, args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step, seconds = state["step"], state["seconds"]
        learner.load_state_dict(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
    questions = exam(args.exam)
    if process == 0 and not step:
        print(
            f"{learner.adapter.num_parameters()} numbers are learnt; at first: {examine(learner, *questions)}",
            flush=True,
        )
    budget = args.minutes * 60 * processes
    sums: dict[str, float] = {}
    began, said, count = time.process_time(), seconds, 0
    while (done := seconds / budget) < 1:
        rng = random.Random(f"{args.seed}/{step}/{process}")
        losses = learner.see(rng) if done < SEE else learner.read(rng)
        torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum().backward()
        seconds += share_gradients(parameters, time.process_time() - began, processes)
        began = time.process_time()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = args.learning_rate * rate_at(done)
        optimizer.step()
        optimizer.zero_grad()
        step, count = step + 1, count + 1
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.item()
        if process == 0 and (seconds >= budget or seconds > said + 120 * processes):
            means = ", ".join(f"{name} {total / count:.3f}" for name, total in sums.items())
            result = examine(learner, *questions)
            print(f"{seconds:.0f} CPU seconds, step {step}: {means}; {result}", flush=True)
            said, sums, count = seconds, {}, 0
            save_adapter(learner.adapter, llm.model, args.out / "adapter", base="tiny")
            state = {
                "step": step,
                "seconds": seconds,
                "learner": learner.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
            began = time.process_time()  # the exam is not learning
    if processes > 1:
        dist.destroy_process_group()


def share_gradients(parameters: list[nn.Parameter], seconds: float, processes: int) -> float:
    """Make every gradient the mean over all processes, in one message; -> the sum of their seconds."""
    if processes == 1:
        return seconds
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    message = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor([seconds])])
    dist.all_reduce(message)
    for parameter, mean in zip(
        parameters, (message[:-1] / processes).split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = mean.view_as(parameter)
    return message[-1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the checkpoint and the adapter")
    parser.add_argument("--minutes", type=float, default=60, help="CPU time of each process")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exam", type=int, default=240, help="held-out pictures with a text")
    parser.add_argument("--processes", type=int, default=threads.limit())
    args = parser.parse_args()
    if not args.minutes > 0 or args.exam < 12 or args.processes < 1:
        parser.error("--minutes is above 0, --exam at least 12, --processes at least 1")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rendezvous").unlink(missing_ok=True)
    try:
        if args.processes == 1:
            train(0, 1, args)
        else:
            spawn(train, (args.processes, args), nprocs=args.processes)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
