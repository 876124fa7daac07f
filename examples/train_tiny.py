"""Make the embedded model from nothing: draw pictures, ask about them, learn the answers.

    python examples/train_tiny.py OUT_DIR

One process per CPU core computes the gradients of its share of the pictures (small models gain nothing from threads),
or one process on a GPU. Every picture and question follows from the seed and the step, so a run can be stopped at any
time and goes on where it was when started again. Progress goes to the terminal and to OUT_DIR/log.jsonl; the finished
model, in Hugging Face's layout, to OUT_DIR/model.

How it learns: first to see, on a direct target, which colour and kind of shape covers each patch, and where it is;
then to answer. Many questions about one picture are packed into one conversation, and only the answers count; beside
them, wherever a question names a thing ("the red star", "circles"), the decoder must know in which columns and rows of
the picture such things are. Small pictures of few shapes come first. Matrices are trained with Muon, everything else
with Adam; a load-balancing loss keeps all experts in work.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llama4.config import Llama4Config, tiny
from llama4.kernels import threads
from llama4.model.experts import GroupedExperts, LoopExperts
from llama4.model.moe import Router
from llama4.model.multimodal import Llama4Model
from llama4.ops.norm import rms_normalise
from llama4.text.prompt import render
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import PATTERN
from llama4.tiny import shapes_dataset
from llama4.vision.tiling import best_canvas, fit_within, tile_image

SPECIAL_TOKENS = 128
LONGEST_SIDE = 448
"""Pictures are drawn no larger than this: the model sees at most four tiles of 112 pixels in a row."""


# -- vocabulary ----------------------------------------------------------------------------------------------------


def build_vocabulary(path: Path, size: int, seed: int = 0) -> None:
    """Train a byte-pair vocabulary on questions and answers; write it in tiktoken's format.

    Capitals and digits are never merged with each other: a text in a picture is read letter by letter.
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainable

    from llama4.text.tokenizer_files import byte_alphabet

    alphabet = byte_alphabet()
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    capitals = pre_tokenizers.Split(Regex(r" ?[A-Z0-9](?=[A-Z0-9])|(?<=[A-Z0-9])[A-Z0-9]"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.Sequence([words, capitals, as_bytes])
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(alphabet.values()), show_progress=False)
    frame = ["user\n\n", "assistant\n\n", "system\n\n", "You are a helpful assistant."] * 2000
    trainable.train_from_iterator(chain(frame, shapes_dataset.corpus(random.Random(seed), 20_000)), trainer)
    to_byte = {character: byte for byte, character in alphabet.items()}
    tokens = sorted(trainable.get_vocab().items(), key=lambda item: item[1])
    ranked = [bytes(to_byte[character] for character in token) for token, _ in tokens]
    if len(ranked) != size:
        raise ValueError(f"the corpus gives a vocabulary of {len(ranked)} tokens, not {size}; train on more of it")
    merged = [token for token in ranked if re.search(rb"[A-Z0-9]{2}", token)]
    assert not merged, f"capitals were merged: {merged}"
    lines = (base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(ranked))
    path.write_bytes(b"\n".join(lines) + b"\n")


# -- data ----------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One conversation: ids [T], which of them are to be predicted [T], tiles [n, 3, A, A], per patch [n, P] the
    colour and the kind of shape that covers it (0: ground, -100: unknown), and of m things that questions name the
    last token [m] and the places [m, 2 * BANDS]."""

    ids: Tensor
    is_reply: Tensor
    tiles: Tensor
    colours: Tensor
    kinds: Tensor
    named: Tensor
    places: Tensor


@dataclass
class Lesson:
    """What pictures look like at a point of the curriculum."""

    sides: tuple[int, int]
    most_shapes: int
    questions: int
    text_share: float
    pair_share: float
    caption_share: float = 0.5
    alike_share: float = 0.25


def lesson_at(done: float, rng: random.Random) -> Lesson:
    """Small pictures of few shapes first, then more and more of the whole range; small ones, which cost a fifth of the
    time, never leave. At last captions and texts become rare: they are the most of the loss, and hide the rest. `done`
    is the share of the run behind us."""
    late = {"caption_share": 0.1, "alike_share": 0.35} if done > 0.6 else {}
    if rng.random() > min(0.65, 0.1 + done / 0.3):
        return Lesson((60, 112), min(6, 1 + int(done * 60)), 10, 0.03, 0.03, **late)
    return Lesson((60, 1200), 6, 12, 0.04 if late else 0.12, 0.1, **late)


class Conversations(Dataset[Sample]):
    """Endless, and the same for the same seed: sample i of a step follows from (seed, step, i)."""

    def __init__(self, config: Llama4Config, tokenizer: Tokenizer, seed: int, see_steps: int, steps: int) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.seed, self.see_steps, self.steps = seed, see_steps, steps

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        step, index = place
        rng = random.Random(f"{self.seed}/{step}/{index}")
        if step < self.see_steps:
            sides = (60, 112) if rng.random() < 0.85 else (60, 1200)
            return self.sample([shapes_dataset.random_scene(rng, sides=sides)], [], rng)
        lesson = lesson_at((step - self.see_steps) / (self.steps - self.see_steps), rng)
        return self.sample(*self._topic(rng, lesson), rng)

    def _topic(
        self, rng: random.Random, lesson: Lesson
    ) -> tuple[list[shapes_dataset.Scene], list[shapes_dataset.Question]]:
        def scene() -> shapes_dataset.Scene:
            if lesson.most_shapes == 6 and rng.random() < lesson.alike_share:  # many alike are rare by themselves
                kind = rng.choice(("count_shape", "count_colour"))
                return shapes_dataset.fresh_question(rng, kind, sides=lesson.sides)[0][0]
            with_text = rng.random() < lesson.text_share
            return shapes_dataset.random_scene(
                rng, sides=lesson.sides, with_text=with_text, most_shapes=lesson.most_shapes
            )

        share = rng.random()
        if share < 0.02:
            makers = (shapes_dataset.ask_outside, shapes_dataset.ask_without_picture)
            return [], [rng.choice(makers)(rng) for _ in range(rng.randint(1, 4))]
        if share < 0.02 + lesson.pair_share:
            scenes = [scene(), scene()]
            return scenes, [
                shapes_dataset.ask_pair(scenes[0], scenes[1], rng) for _ in range(lesson.questions * 2 // 3)
            ]
        one = scene()
        questions = shapes_dataset.ask_many(one, rng, lesson.questions)
        if one.shapes and rng.random() < lesson.caption_share:  # last, so that no answer can be copied from it
            questions = [q for q in questions if q.kind != "caption"] + [shapes_dataset.ask(one, rng, "caption")]
        return [one], questions

    def sample(
        self, scenes: list[shapes_dataset.Scene], questions: list[shapes_dataset.Question], rng: random.Random
    ) -> Sample:
        """Turn scenes and questions about them into one conversation."""
        vision = self.config.vision
        assert vision is not None
        tiles, grids, labels = [], [], []
        for scene in scenes:
            picture = shapes_dataset.draw(scene, min(1.0, LONGEST_SIDE / max(scene.width, scene.height)))
            prepared = tile_image(picture, vision.image_size, vision.max_tiles)
            tiles.append(prepared.pixel_values)
            grids.append((prepared.rows, prepared.cols))
            labels.append(patch_labels(scene, picture.size, vision.image_size, vision.patch_size, vision.max_tiles))
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": "You are a helpful assistant."})
        images: list[dict[str, Any]] = [{"type": "image"} for _ in scenes]
        if not questions:
            messages.append({"role": "user", "content": images})
        for i, question in enumerate(questions):
            content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
            if i == 0:
                content = content + images if rng.random() < 0.25 else images + content
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": question.answer})
        rendered = render(
            messages, self.tokenizer, grids=grids, tokens_per_tile=vision.tokens_per_tile, add_generation_prompt=False
        )
        named, places = self._named(scenes[0], questions, rendered.ids) if len(scenes) == 1 else ([], [])
        side = vision.image_size
        empty = torch.zeros(0, vision.num_patches, dtype=torch.long)
        colours, kinds = (torch.cat([pair[k] for pair in labels]) if labels else empty for k in (0, 1))
        return Sample(
            torch.tensor(rendered.ids),
            torch.tensor(rendered.is_reply),
            torch.cat(tiles) if tiles else torch.zeros(0, vision.num_channels, side, side),
            colours,
            kinds,
            torch.tensor(named, dtype=torch.long),
            torch.tensor(places).view(-1, 2 * BANDS),
        )

    def _named(
        self, scene: shapes_dataset.Scene, questions: list[shapes_dataset.Question], ids: list[int]
    ) -> tuple[list[int], list[list[float]]]:
        """Of all things that the questions name once the picture has been seen: the index of the last token in `ids`,
        and `bands`."""
        seen = max(i for i, token in enumerate(ids) if token == self.config.image_token_index)
        named, places, begin = [], [], 0
        for question in questions:
            tokens = self.tokenizer.encode(question.text)
            begin = next(i for i in range(begin, len(ids)) if ids[i : i + len(tokens)] == tokens)
            ends = list(accumulate(len(self.tokenizer.decode_bytes([token])) for token in tokens))
            for end, colour, kind in mentions(question) if begin > seen else ():
                named.append(begin + bisect_left(ends, end))
                places.append(bands(scene, colour, kind))
            begin += len(tokens)
        return named, places


THINGS = {noun: kind for kind in shapes_dataset.KINDS for noun in (kind, shapes_dataset.plural(kind))}
"""Singular and plural of every kind of shape -> the kind."""
NAME = re.compile(
    rf"\b(?:(?P<colour>{'|'.join(shapes_dataset.COLOURS)}) )?(?:(?P<thing>{'|'.join(THINGS)})|(?P<noun>\w+))\b",
    re.IGNORECASE,
)
NOUNS = {noun for name in shapes_dataset.NOUNS for noun in (name, shapes_dataset.plural(name))}
BANDS = 8
"""Columns, and rows, of a picture that the decoder tells apart."""


def mentions(question: shapes_dataset.Question) -> Iterator[tuple[int, str | None, str | None]]:
    """What a question names, in order: where the name ends in its text, and colour and kind if they are said."""
    for match in NAME.finditer(question.text):
        colour, thing, noun = (part and part.lower() for part in match.group("colour", "thing", "noun"))
        if noun in shapes_dataset.COLOURS:
            yield match.end(), noun, None
        elif thing or (noun in NOUNS and (colour or question.kind == "count")):
            yield match.end(), colour, THINGS[thing] if thing else None


def bands(scene: shapes_dataset.Scene, colour: str | None, kind: str | None) -> list[float]:
    """How many shapes of that colour and kind stand in each column, and then in each row; one between two bands
    belongs to both in parts."""
    counts = [0.0] * (2 * BANDS)
    for shape in scene.shapes:
        if colour in (None, shape.colour) and kind in (None, shape.kind):
            for axis, length in enumerate((scene.width, scene.height)):
                at = min(max(shape.centre[axis] / length * BANDS - 0.5, 0.0), BANDS - 1.0)
                lower = min(int(at), BANDS - 2)
                counts[axis * BANDS + lower] += 1 - (at - lower)
                counts[axis * BANDS + lower + 1] += at - lower
    return counts


def patch_labels(
    scene: shapes_dataset.Scene, size: tuple[int, int], tile: int, patch: int, max_tiles: int
) -> tuple[Tensor, Tensor]:
    """Colour and kind of the shape that covers most of each patch, [n, P] each, tile by tile as `tile_image` cuts them.

    0 where the ground does; where a shape covers a part of a patch but less than a fifth, -100: not asked.
    """
    width, height = size
    rows, cols = best_canvas(height, width, tile, max_tiles)
    box = min(max(height, tile), rows * tile), min(max(width, tile), cols * tile)
    fitted_height, fitted_width = fit_within(height, width, *box)
    canvas = torch.zeros(rows * tile, cols * tile, dtype=torch.uint8)
    canvas[:fitted_height, :fitted_width] = torch.from_numpy(
        shapes_dataset.draw_labels(scene, fitted_width, fitted_height)
    )
    maps = canvas.view(rows, tile, cols, tile).transpose(1, 2).reshape(-1, tile, tile)
    if rows * cols > 1:
        maps = torch.cat([maps, torch.from_numpy(shapes_dataset.draw_labels(scene, tile, tile))[None]])
    patches = F.unfold(maps[:, None].float(), patch, stride=patch).long()  # [n, patch^2, P]
    covered = F.one_hot(patches, len(scene.shapes) + 1).sum(1)  # [n, P, shapes + 1]
    most, shape = covered[..., 1:].max(-1) if scene.shapes else (torch.zeros_like(covered[..., 0]),) * 2
    names = list(shapes_dataset.COLOURS), list(shapes_dataset.KINDS)
    tables = (
        torch.tensor([1 + names[0].index(s.colour) for s in scene.shapes] or [0]),
        torch.tensor([1 + names[1].index(s.kind) for s in scene.shapes] or [0]),
    )
    seen = most >= patch * patch / 5
    unclear = ~seen & (most > 0)
    colours, kinds = (table[shape].where(seen, 0).masked_fill(unclear, -100) for table in tables)
    return colours, kinds


@dataclass
class Batch:
    """Samples side by side: ids and masks [B, T] padded on the right, tiles and labels of all rows in order; `named`
    counts tokens without padding."""

    ids: Tensor
    mask: Tensor
    is_reply: Tensor
    tiles: Tensor
    colours: Tensor
    kinds: Tensor
    named: Tensor
    places: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(samples: list[Sample]) -> Batch:
    pad = nn.utils.rnn.pad_sequence
    ids = pad([s.ids for s in samples], batch_first=True)
    mask = pad([torch.ones_like(s.is_reply) for s in samples], batch_first=True)
    is_reply = pad([s.is_reply for s in samples], batch_first=True)
    names = ("tiles", "colours", "kinds", "places")
    tiles, colours, kinds, places = (torch.cat([getattr(s, name) for s in samples]) for name in names)
    begins = accumulate((len(s.ids) for s in samples), initial=0)
    named = torch.cat([begin + s.named for begin, s in zip(begins, samples, strict=False)])
    return Batch(ids, mask, is_reply, tiles, colours, kinds, named, places)


# -- optimiser -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def orthogonalise(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each of a stack [..., m, n], roughly: five Newton-Schulz steps of Muon
    (Jordan 2024)."""
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if g.shape[-2] > g.shape[-1] else x).type_as(g)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and stacks of matrices (torch's takes no stacks, and experts are stacks).

    Updates are scaled to the size of Adam's (0.2 sqrt(max(m, n)), Liu et al. 2025), so both share one learning rate.
    All processes have the same gradients; each orthogonalises its share of them for all.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.rank, self.world = rank, world

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and p.grad.any()]
            updates = []
            for i, p in enumerate(parameters):
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                mine = i % self.world == self.rank
                update = p.grad.lerp(velocity, group["momentum"])
                updates.append(orthogonalise(update) if mine else update.zero_())
            for p, update in zip(parameters, summed(updates, self.world), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5)


def summed(tensors: list[Tensor], world: int) -> list[Tensor]:
    """The sum of each tensor over all processes, in one message."""
    if world == 1:
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    return [sums.view_as(t) for sums, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def learning_rate(step: int, see_steps: int, steps: int) -> float:
    """Share of the peak: a short warm-up, a plateau, and a linear descent over the last half of learning to answer."""
    return min(1.0, (step + 1) / 100, (steps - step) / (0.5 * (steps - see_steps)))


class Float32Attention(TorchFunctionMode):
    """Attention in float32 under autocast: over so few tokens, the CPU's bfloat16 kernels take three times as long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        wide: list[Any] = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        with torch.autocast("cpu", enabled=False):
            return func(*wide, **kwargs)


# -- the run -------------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """The model with what only training needs: heads for the direct target, and the load-balancing loss."""

    def __init__(self, config: Llama4Config, on_gpu: bool) -> None:
        super().__init__()
        assert config.vision is not None
        self.model = Llama4Model(config, GroupedExperts if on_gpu else LoopExperts)
        width, self.merged = config.text.hidden_size, round(1 / config.vision.pixel_shuffle_ratio)
        self.colour_head = nn.Linear(width, self.merged**2 * (1 + len(shapes_dataset.COLOURS)))
        self.kind_head = nn.Linear(width, self.merged**2 * (1 + len(shapes_dataset.KINDS)))
        self.where_head = nn.Linear(width, config.vision.tokens_per_tile)
        self.places_head = nn.Linear(width, 2 * BANDS)
        self.midway: Tensor | None = None
        self.balance: list[Tensor] = []
        self.loads: list[Tensor] = []
        for router in self.routers():
            router.register_forward_hook(self._watch)
        self.model.language_model.model.layers[MIDWAY].register_forward_hook(self._keep)

    def routers(self) -> list[Router]:
        return [module for module in self.model.modules() if isinstance(module, Router)]

    def _watch(self, router: Router, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        """Switch Transformer's balance loss: E * sum over experts of (share of tokens) * (mean probability)."""
        counts = torch.bincount(output[1].flatten(), minlength=router.out_features)
        share = counts / counts.sum()
        probability = F.linear(inputs[0].float(), router.weight.float()).softmax(-1).mean(0)
        self.balance.append(router.out_features * (share * probability).sum())
        self.loads.append(share.detach())

    def _keep(self, layer: nn.Module, inputs: object, output: Tensor) -> None:
        self.midway = output

    def _patch_loss(self, guesses: Tensor, labels_nP: Tensor) -> Tensor:
        """Each image token names what covers the patches that it was merged from, row by row. Ground, which most
        patches show, counts little."""
        side = round(labels_nP.shape[1] ** 0.5)
        squares = F.unfold(labels_nP.view(-1, 1, side, side).float(), self.merged, stride=self.merged).mT.long()
        guesses = guesses.float().view(squares.numel(), -1)
        weight = guesses.new_ones(guesses.shape[1])
        weight[0] = 0.1
        return F.cross_entropy(guesses, squares.flatten(), weight)

    def see(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Image features [n * Q, D], and how well they tell what each patch shows."""
        features = self.model.encode_images(batch.tiles)
        colours = self._patch_loss(self.colour_head(features), batch.colours)
        kinds = self._patch_loss(self.kind_head(features), batch.kinds)
        tokens = torch.arange(self.where_head.out_features, device=features.device).repeat(len(batch.tiles))
        where = F.cross_entropy(self.where_head(features).float(), tokens)
        return features, {"colours": colours, "kinds": kinds, "where": where}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.balance, self.loads = [], []
        features, losses = self.see(batch)
        wanted = batch.is_reply[:, 1:]
        if not wanted.any():
            return losses
        logits = self.model(batch.ids, attention_mask=batch.mask, image_features=features)
        answers = F.cross_entropy(logits[:, :-1][wanted].float(), batch.ids[:, 1:][wanted])
        assert self.midway is not None  # [tokens without padding, width]
        guesses = self.places_head(rms_normalise(self.midway[batch.named], 1e-5)).float()
        places = (guesses - batch.places).square().sum(1).mean() if len(guesses) else answers.new_zeros(())
        return losses | {"answers": answers, "places": places, "balance": torch.stack(self.balance).mean()}


WEIGHTS = {"answers": 1.0, "places": 0.5, "kinds": 0.5, "colours": 0.2, "where": 0.1, "balance": 0.01}
MIDWAY = 3
"""The decoder layer after which a name must have found its things: the one without RoPE, two before the last."""


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """The mean over all processes; None (an expert that got no token) counts as zero."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    for parameter, total in zip(parameters, summed(gradients, world), strict=True):
        parameter.grad = total / world


def split_parameters(learner: Learner) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What Muon trains, the matrices inside the network, and the rest: tables, heads, routers, norms and biases."""
    tables = ("embed_tokens.weight", "lm_head.weight", "router.weight", "head.weight", "positional_embedding_vlm")
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in learner.named_parameters():
        inside = parameter.ndim >= 2 and not name.endswith(tables)
        (matrices if inside else others).append(parameter)
    return matrices, others


@torch.no_grad()
def examine(learner: Learner, data: Conversations, per_kind: int, seed: int, device: torch.device) -> dict[str, float]:
    """Share of fresh questions, one to a conversation, whose answer would be written to the letter by greedy
    decoding."""
    learner.eval()
    rng, shares = random.Random(f"examine/{seed}"), {}
    for kind in shapes_dataset.KINDS_OF_QUESTION:
        right = 0
        samples = []
        for _ in range(per_kind):
            scenes, questions = shapes_dataset.fresh_question(rng, kind)
            samples.append(data.sample(scenes, questions, rng))
        batch = collate(samples).to(device)
        features = learner.model.encode_images(batch.tiles) if len(batch.tiles) else None
        logits = learner.model(batch.ids, attention_mask=batch.mask, image_features=features)
        hit = logits[:, :-1].argmax(-1) == batch.ids[:, 1:]
        wrong = (~hit & batch.is_reply[:, 1:]).any(1)
        right = int((~wrong).sum())
        shares[kind] = right / per_kind
    learner.train()
    return shares


def train(rank: int, world: int, args: argparse.Namespace) -> None:
    """One process of the run; process 0 writes."""
    on_gpu = args.device == "cuda"
    device = torch.device(args.device)
    if not on_gpu:
        torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{args.out}/rendezvous", rank=rank, world_size=world)
    config = tiny()
    tokenizer = Tokenizer(args.out / "tokenizer.model", num_special_tokens=SPECIAL_TOKENS)
    assert tokenizer.vocab_size == config.text.vocab_size and tokenizer.special("<|patch|>") == config.image_token_index
    torch.manual_seed(args.seed)
    learner = Learner(config, on_gpu).to(device)
    learner.model.init_weights()
    matrices, others = split_parameters(learner)
    optimisers = [
        Muon(matrices, args.lr, weight_decay=0.02, rank=rank, world=world),
        torch.optim.AdamW(others, args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    begin, checkpoint = 0, args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        begin = state["step"]
        learner.load_state_dict(state["learner"])
        for optimiser, content in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(content)
    data = Conversations(config, tokenizer, args.seed, args.see_steps, args.steps)

    def indices() -> Iterator[list[tuple[int, int]]]:
        for step in range(begin, args.steps):
            batch = args.see_batch if step < args.see_steps else args.batch
            yield [(step, index) for index in range(rank, batch, world)]

    workers = args.workers if args.workers is not None else (min(8, os.cpu_count() or 1) if on_gpu else 0)
    loader = DataLoader(data, batch_sampler=indices(), collate_fn=collate, num_workers=workers)
    bar = tqdm(total=args.steps, initial=begin, disable=None if rank == 0 else True, unit="step")
    log = (args.out / "log.jsonl").open("a") if rank == 0 else None
    sums: dict[str, float] = {}
    began, seen = time.monotonic(), 0
    for step, batch in zip(range(begin, args.steps), loader, strict=True):
        with torch.autocast(args.device, torch.bfloat16), nullcontext() if on_gpu else Float32Attention():
            losses = learner(batch.to(device))
        torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum().backward()
        average_gradients(list(learner.parameters()), world)
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = args.lr * learning_rate(step, args.see_steps, args.steps)
            optimiser.step()
        learner.zero_grad(set_to_none=True)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        seen += 1
        if rank == 0 and (step + 1) % 20 == 0:
            entry: dict[str, Any] = {"step": step + 1, "seconds": round(time.monotonic() - began, 1)}
            entry |= {name: round(total / seen, 4) for name, total in sums.items()}
            if learner.loads:
                entry["least_load"] = round(min(float(load.min()) for load in learner.loads), 4)
            sums, seen = {}, 0
            if (step + 1) % args.examine_every == 0:
                entry["right"] = {
                    k: round(v, 3) for k, v in examine(learner, data, args.per_kind, step, device).items()
                }
            assert log is not None
            log.write(json.dumps(entry) + "\n")
            log.flush()
            bar.set_postfix({name: entry[name] for name in losses})
        if rank == 0 and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            state = {
                "step": step + 1,
                "learner": learner.state_dict(),
                "optimisers": [o.state_dict() for o in optimisers],
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
        bar.update()
    bar.close()
    if world > 1:
        dist.destroy_process_group()


def finish(args: argparse.Namespace) -> None:
    """Write the model in Hugging Face's layout, in bfloat16."""
    from llama4.weights.save import save

    learner = Learner(tiny(), on_gpu=False)
    learner.load_state_dict(torch.load(args.out / "checkpoint.pt", weights_only=True, map_location="cpu")["learner"])
    model = learner.model.bfloat16()
    tokenizer = Tokenizer(args.out / "tokenizer.model", num_special_tokens=SPECIAL_TOKENS)
    save(model, model.config, args.out / "model", tokenizer=tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the vocabulary, the checkpoint, the log and the model")
    parser.add_argument("--see-steps", type=int, default=500, help="steps of learning to see")
    parser.add_argument("--see-batch", type=int, default=64, help="pictures in each of them, over all processes")
    parser.add_argument("--steps", type=int, default=4200, help="steps in all; the others are of learning to answer")
    parser.add_argument("--batch", type=int, default=24, help="conversations in each of them, over all processes")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=None, help="on a CPU; default: one per core")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes that draw; default: none on a CPU, 8 for a GPU"
    )
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--examine-every", type=int, default=200)
    parser.add_argument("--per-kind", type=int, default=24, help="questions per kind in an examination")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.model").exists():
        build_vocabulary(args.out / "tokenizer.model", tiny().text.vocab_size - SPECIAL_TOKENS)
    world = 1 if args.device == "cuda" else args.processes or threads.limit()
    if args.batch % world or args.see_batch % world:
        parser.error(
            f"--batch {args.batch} and --see-batch {args.see_batch} must be multiples of the {world} processes"
        )
    (args.out / "rendezvous").unlink(missing_ok=True)
    try:
        if world == 1:
            train(0, 1, args)
        else:
            spawn(train, (world, args), nprocs=world)
    except KeyboardInterrupt:
        sys.exit(130)
    finish(args)


if __name__ == "__main__":
    main()
