"""Find a needle in a haystack far longer than any the model was trained on, and see which part of Llama 4 does it.

    python examples/needle.py --out OUT_DIR

A haystack is random words. A needle, hidden in it, is a mark, a key and a value, both words that stand everywhere in
the hay too; a question, at the end, is another mark and a key, and the answer is that key's value. Small models with
one period of Llama 4's layers (three of RoPE in chunks, one of NoPE with a temperature, experts in every second) learn
it on at most 1024 tokens and are asked up to 65536. Besides the whole design, designs that lack one part are trained,
on the same data for as many steps: see `DESIGNS`.

Everything follows from the seed. A run goes on where it was stopped; several runs may share OUT_DIR if each has its own
--designs. OUT_DIR gets per design a checkpoint (.safetensors) and what was measured (.json), and the picture of all
designs measured so far: needle.png. What came out is in docs/long_context.md.

Shapes: B haystacks, T their tokens with the questions, M needles, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from llama4.cache.sequence import SequenceCache
from llama4.config import Llama4Config, TextConfig
from llama4.model.multimodal import Llama4Model
from llama4.ops.norm import rms_normalise

WORDS = 128
MARK, ASK = WORDS, WORDS + 1
NEEDLE = 3
"""Tokens of a needle, and of a question with its answer."""
CHUNK = 128
TRAINED = 1024
"""The longest sequence of the training."""
LENGTHS = tuple(2**n for n in range(9, 17))
DEPTHS = tuple(tenth / 10 for tenth in range(11))
PER_DEPTH = 2
SPREAD = 64
"""Needles of one depth lie at random within so many tokens."""


@dataclass(frozen=True)
class Design:
    """A model to be trained, or (`weights_of`) another's weights under another configuration."""

    title: str
    config: dict[str, Any]
    weights_of: str | None = None


FULL, CHUNKED = ("full_attention",) * 4, ("chunked_attention",) * 4
DESIGNS = {
    "whole": Design("Llama 4's design", {}),
    "no-temperature": Design("no temperature", {"attn_temperature_tuning": False}),
    "late-temperature": Design("temperature, untrained", {}, weights_of="no-temperature"),
    "no-chunks": Design("no chunks", {"layer_types": FULL}),
    "no-nope": Design("no NoPE", {"layer_types": CHUNKED, "no_rope_layers": (1,) * 4}),
    "neither": Design("no chunks, no NoPE", {"layer_types": FULL, "no_rope_layers": (1,) * 4}),
}


def model_config(design: Design) -> Llama4Config:
    text = TextConfig(
        vocab_size=WORDS + 2,
        hidden_size=128,
        intermediate_size=128,
        intermediate_size_mlp=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        use_qk_norm=False,
        rope_theta=10000.0,
        attention_chunk_size=CHUNK,
        floor_scale=CHUNK,
        attn_scale=0.1,
    )
    return Llama4Config(text=replace(text, **design.config), vision=None, dtype="float32")


# -- hay and needles -----------------------------------------------------------------------------------------------


@dataclass
class Haystack:
    """ids [B, T], the last 3 M of them M questions with their answers; where the needles begin, their keys and values
    [B, M], in the order of the questions."""

    ids: Tensor
    starts: Tensor
    keys: Tensor
    values: Tensor

    @property
    def answers_at(self) -> slice:
        """The columns whose next token is an answer."""
        return slice(self.ids.shape[1] - NEEDLE * self.keys.shape[1] + 1, None, NEEDLE)


def hide(starts: Tensor, length: int, generator: torch.Generator) -> Haystack:
    """Random words with needles at `starts` [B, M] and questions for all of them, in random order; `length` tokens."""
    rows, needles = starts.shape
    ids = torch.randint(WORDS, (rows, length), generator=generator)
    keys = torch.rand(rows, WORDS, generator=generator).argsort(1)[:, :needles]
    values = torch.randint(WORDS, (rows, needles), generator=generator)
    shuffled = torch.rand(rows, needles, generator=generator).argsort(1)
    starts = starts.gather(1, shuffled)
    for i, tokens in enumerate((torch.full_like(keys, MARK), keys, values)):
        ids.scatter_(1, starts + i, tokens)
    questions = torch.stack((torch.full_like(keys, ASK), keys, values), dim=2)
    ids[:, length - NEEDLE * needles :] = questions.flatten(1)
    return Haystack(ids, starts, keys, values)


def scattered(rows: int, needles: int, room: int, generator: torch.Generator) -> Tensor:
    """Where needles begin that lie at random, without touching, in `room` tokens: [rows, needles], ascending."""
    gaps = torch.rand(rows, room - (NEEDLE - 1) * needles, generator=generator).argsort(1)[:, :needles].sort(1).values
    return gaps + (NEEDLE - 1) * torch.arange(needles)


CURRICULUM = ((0.2, 64, 64, 5), (0.3, 65, 128, 4), (0.4, 65, 256, 4), (0.5, 65, 512, 4), (1.0, 65, TRAINED, 4))
"""Up to which share of the steps: the shortest and the longest sequence, and the fewest needles."""


def lesson(step: int, steps: int, tokens: int, seed: int) -> Haystack:
    """What is learnt at a step, about `tokens` tokens: short and dense at first, then every length up to `TRAINED`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    shortest, longest, fewest = next(stage for end, *stage in CURRICULUM if step < end * steps)
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    most = min(length // (2 * NEEDLE), 48)
    needles = int(torch.randint(fewest, most + 1, (), generator=generator))
    rows = max(tokens // length, 1)
    return hide(scattered(rows, needles, length - NEEDLE * needles, generator), length, generator)


# -- learning ------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: a short warm-up, a plateau, a linear descent over the second half."""
    return min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)


class Learner:
    """A model and its optimisers: Muon for matrices, Adam for the rest."""

    def __init__(self, config: Llama4Config, lr: float, seed: int) -> None:
        self.model, self.lr = Llama4Model(config), lr
        self.model.init_weights(torch.Generator().manual_seed(seed))
        decoder = self.model.language_model.model
        with torch.no_grad():  # what a token is can be read off again: copying a word need not be learnt word by word
            self.model.language_model.lm_head.weight.copy_(decoder.embed_tokens.weight / config.text.hidden_size**0.5)
        self.bound = torch.empty(0)
        decoder.layers[2].register_forward_hook(self._keep)
        tables = ("embed_tokens.weight", "lm_head.weight", "router.weight")
        named = dict(self.model.named_parameters())
        matrices = [name for name, p in named.items() if p.ndim == 2 and not name.endswith(tables)]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon([named.pop(name) for name in matrices], lr, 0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(named.values(), lr, betas=(0.9, 0.98), weight_decay=0.01),
        ]

    def _keep(self, layer: nn.Module, inputs: object, output: Tensor) -> None:
        self.bound = output

    def learn(self, hay: Haystack, share: float) -> tuple[float, float]:
        """One step at that share of the learning rate; -> loss of the answers, and how many were right.

        Only answers count, and, as a direct target for the three layers before the last, that a needle's value knows
        its key.
        """
        logits = self.model(hay.ids)[:, hay.answers_at]
        loss = F.cross_entropy(logits.flatten(0, 1), hay.values.flatten())
        x = self.bound.view(*hay.ids.shape, -1)
        x = x.gather(1, (hay.starts + 2)[..., None].expand(-1, -1, x.shape[-1]))
        guesses = self.model.language_model.lm_head(rms_normalise(x, 1e-5))
        (loss + F.cross_entropy(guesses.flatten(0, 1), hay.keys.flatten())).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.lr * share
            optimiser.step()
            optimiser.zero_grad()
        return loss.item(), (logits.argmax(-1) == hay.values).float().mean().item()

    def save(self, path: Path, step: int) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, optimiser in enumerate(self.optimisers):
            for p, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{i}.{p}.{key}": value for key, value in state.items()}
        save_file(tensors, path.with_suffix(".new"), {"step": str(step)})
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> int:
        """-> steps taken so far."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step = int(file.metadata()["step"])
        self.model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        for i, optimiser in enumerate(self.optimisers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimiser.{i}."):
                    _, _, p, key = name.split(".")
                    state.setdefault(int(p), {})[key] = tensor
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
        return step


def checkpoint(design: str, directory: Path) -> Path:
    return directory / f"{DESIGNS[design].weights_of or design}.safetensors"


def load(design: str, directory: Path) -> Llama4Model:
    """The model of a design, as it was trained."""
    learner = Learner(model_config(DESIGNS[design]), lr=0.0, seed=0)
    learner.load(checkpoint(design, directory))
    return learner.model.eval()


def train(design: str, args: argparse.Namespace) -> Llama4Model:
    """The model of a design, trained as far as it was not yet."""
    learner = Learner(model_config(DESIGNS[design]), args.lr, args.seed)
    path = checkpoint(design, args.out)
    begin = learner.load(path) if path.exists() else 0
    right = 0.0
    with tqdm(total=args.steps, initial=begin, desc=design, unit="step", disable=None) as bar:
        for step in range(begin, args.steps):
            hay = lesson(step, args.steps, args.tokens, args.seed)
            loss, hits = learner.learn(hay, learning_rate(step, args.steps))
            right += 0.05 * (hits - right)
            bar.set_postfix(length=hay.ids.shape[1], loss=f"{loss:.3f}", right=f"{right:.3f}", refresh=False)
            bar.update()
            if (step + 1) % 100 == 0 or step + 1 == args.steps:
                learner.save(path, step + 1)
                with path.with_suffix(".log").open("a") as log:
                    log.write(f"{step + 1} {hay.ids.shape[1]} {loss:.4f} {right:.4f}\n")
    return learner.model.eval()


# -- measuring -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answers(
    model: Llama4Model, length: int, seed: int, new_cache: Callable[[], SequenceCache] | None = None
) -> tuple[Tensor, Haystack, Tensor]:
    """One haystack of `length` tokens with `PER_DEPTH` needles at every depth, and a question for each.

    Args:
        new_cache: makes the cache that remembers the hay; by default the model's own.

    Returns:
        the logarithms of the probabilities of the words after each question, [needles, words]; the hay; and where the
        depths begin.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + length)
    needles = PER_DEPTH * len(DEPTHS)
    room = length - NEEDLE * needles
    spread = min(SPREAD, room // len(DEPTHS))
    begins = torch.tensor([round(depth * (room - spread)) for depth in DEPTHS])
    starts = begins[:, None] + scattered(len(DEPTHS), PER_DEPTH, spread, generator)
    hay = hide(starts.view(1, -1), length, generator)
    cache = new_cache() if new_cache is not None else model.new_cache()
    model(hay.ids[:, :room], cache=cache, last_only=True)
    return model(hay.ids[:, room:], cache=cache)[0, 1::NEEDLE].log_softmax(-1), hay, begins


def ask(
    model: Llama4Model, length: int, seed: int, new_cache: Callable[[], SequenceCache] | None = None
) -> list[dict[str, float]]:
    """What `answers` gives, needle by needle: its depth, whether the likeliest next token was its value (0 or 1), the
    natural logarithm of the probability of that value, and whether a chunk border cuts the needle."""
    logprobs, hay, begins = answers(model, length, seed, new_cache)
    sought = logprobs.gather(1, hay.values[0, :, None])[:, 0]
    hits = logprobs.argmax(-1) == hay.values[0]
    places = hay.starts[0]
    depths = torch.searchsorted(begins, places, right=True) - 1
    cut = places // CHUNK != (places + NEEDLE - 1) // CHUNK
    columns = (depths.tolist(), hits.tolist(), sought.tolist(), cut.tolist())
    names = ("depth", "hit", "logprob", "cut")
    return [{k: float(v) for k, v in zip(names, row, strict=True)} for row in zip(*columns, strict=True)]


def samples(length: int) -> int:
    """Haystacks per length: fewer of the long ones, which cost the most."""
    return min(max(3 * LENGTHS[-1] // length, 3), 24)


Found = dict[str, list[list[dict[str, float]]]]
"""Of every length, per haystack, what `ask` gave."""


def measure(model: Llama4Model, lengths: list[int], path: Path) -> None:
    """Ask at all lengths what was not yet asked; the answers go to `path`, as `Found`."""
    found: Found = json.loads(path.read_text()) if path.exists() else {}
    missing = [(n, seed) for n in lengths for seed in range(len(found.get(str(n), [])), samples(n))]
    with tqdm(total=sum(n for n, _ in missing), desc=path.stem, unit="token", unit_scale=True, disable=None) as bar:
        for length, seed in missing:
            found.setdefault(str(length), []).append(ask(model, length, 1 + seed))
            path.with_suffix(".new").write_text(json.dumps(found))
            os.replace(path.with_suffix(".new"), path)
            bar.update(length)


# -- showing -------------------------------------------------------------------------------------------------------

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 44, 20, 62, 64, 18, 46
SCALE = ((122, 4, 33), (222, 88, 52), (247, 190, 80), (232, 236, 170), (64, 150, 92))
"""Colours of recalls 0, 1/4, ... 1."""
INK, PAPER = (30, 30, 30), (255, 255, 255)


def colour(share: float) -> tuple[int, int, int]:
    low = min(int(share * (len(SCALE) - 1)), len(SCALE) - 2)
    part = share * (len(SCALE) - 1) - low
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(SCALE[low], SCALE[low + 1], strict=True))
    return red, green, blue


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def draw_panel(title: str, found: Found) -> Image.Image:
    """Depth downwards, length to the right; above each column its mean."""
    lengths = sorted(map(int, found))
    size = LEFT + CELL_WIDTH * len(lengths) + RIGHT, TOP + CELL_HEIGHT * len(DEPTHS) + BOTTOM
    panel = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(panel)
    small, large = ImageFont.load_default(12), ImageFont.load_default(17)
    draw.text((LEFT, 8), title, INK, large)
    draw.text((8, TOP - 14), "mean", INK, small, anchor="lm")
    bottom = TOP + CELL_HEIGHT * len(DEPTHS)
    for column, length in enumerate(lengths):
        needles = [needle for haystack in found[str(length)] for needle in haystack]
        x = LEFT + column * CELL_WIDTH
        middle = x + CELL_WIDTH // 2
        draw.text((middle, TOP - 14), f"{mean([n['hit'] for n in needles]):.0%}", INK, small, anchor="mm")
        name = f"{length // 1024}k" if length >= 1024 else str(length)
        draw.text((middle, bottom + 12), name, INK, small, anchor="mm")
        for row in range(len(DEPTHS)):
            share = mean([n["hit"] for n in needles if n["depth"] == row])
            y = TOP + row * CELL_HEIGHT
            draw.rectangle((x, y, x + CELL_WIDTH - 2, y + CELL_HEIGHT - 2), colour(share))
        if length > TRAINED and (column == 0 or lengths[column - 1] <= TRAINED):
            draw.line((x - 1, TOP - 4, x - 1, bottom + 18), INK, 2)
    for row, depth in enumerate(DEPTHS):
        middle = TOP + row * CELL_HEIGHT + CELL_HEIGHT // 2 - 1
        draw.text((LEFT - 8, middle), f"{depth:.0%}", INK, small, anchor="rm")
    draw.text((LEFT, bottom + 32), "tokens; right of the line: longer than any in training", INK, small, anchor="lm")
    return panel


def measured(directory: Path) -> dict[str, Found]:
    """By title, what was measured of each design."""
    paths = {design.title: directory / f"{name}.json" for name, design in DESIGNS.items()}
    return {title: json.loads(path.read_text()) for title, path in paths.items() if path.exists()}


def draw(directory: Path) -> Path:
    """The picture of all designs that were measured, three in a row."""
    panels = [draw_panel(title, found) for title, found in measured(directory).items()]
    width, height = max(p.width for p in panels), max(p.height for p in panels)
    columns = min(3, len(panels))
    picture = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), PAPER)
    for i, panel in enumerate(panels):
        picture.paste(panel, (i % columns * width, i // columns * height))
    path = directory / "needle.png"
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def table(directory: Path) -> str:
    """In Markdown: recall by length; and how many of all needles that a chunk border cuts were found."""
    results = measured(directory)
    lengths = sorted({int(length) for found in results.values() for length in found})
    head = ["design", *map(str, lengths), "cut by a border"]
    rows = [head, ["---"] * len(head)]
    for title, found in results.items():
        columns = {length: [n for haystack in found.get(str(length), []) for n in haystack] for length in lengths}
        shares = [f"{mean([n['hit'] for n in column]):.1%}" if column else "" for column in columns.values()]
        cut = [n["hit"] for column in columns.values() for n in column if n["cut"]]
        rows.append([title, *shares, f"{sum(cut):.0f} of {len(cut)}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints, measurements and picture")
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS), metavar="NAME")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="of the haystacks asked about")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--tokens", type=int, default=2048, help="in each step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for design in args.designs:
            measure(train(design, args), list(args.lengths), args.out / f"{design}.json")
    except KeyboardInterrupt:
        sys.exit(130)
    print(table(args.out))
    print(draw(args.out))


if __name__ == "__main__":
    main()
