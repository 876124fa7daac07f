"""`llama4 finetune`: a model and a data file -> an adapter, or a model."""

from __future__ import annotations

import argparse
import re
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4.adapters.methods import ALL_WEIGHTS, METHODS
from llama4.cli.interrupts import exit_code
from llama4.cli.options import TRAINED, add_model_options, trained_options
from llama4.errors import ArgumentError
from llama4.files import real_path
from llama4.progress import starting
from llama4.units import bytes_text, count_text

if TYPE_CHECKING:
    from llama4.train.loop import Run

LORA: dict[str, dict[str, Any]] = {
    "rank": {"type": int, "metavar": "R", "help": "rank of the adapter's matrices (default: 16)"},
    "alpha": {"type": float, "metavar": "A", "help": "alpha of the adapter, whose scale is A / R (default: 32)"},
    "targets": {
        "metavar": "PARTS",
        "help": "parts to adapt, of attention,experts,shared,dense,router,vision,projector,embeddings (default: the "
        "first four); experts:4 gives a part a rank of its own",
    },
    "dropout": {"type": float, "metavar": "P", "help": "dropout of an adapter's inputs, but for experts (default: 0)"},
    "rslora": {"action": "store_true", "default": None, "help": "scale the adapter by A / sqrt(R)"},
}
"""Arguments of `LoraConfig`."""

SETTINGS: dict[str, dict[str, Any]] = {
    "epochs": {
        "type": float,
        "metavar": "N",
        "help": "how often the data are gone through (default: 1; small data up to 10 times)",
    },
    "steps": {"type": int, "metavar": "N", "help": "batches to learn from, in place of --epochs"},
    "batch_tokens": {
        "type": int,
        "metavar": "N",
        "help": "most tokens of a batch (default: 4096; of small data, a sixteenth)",
    },
    "max_length": {"type": int, "metavar": "N", "help": "most tokens of an example; more is cut (default: 2048)"},
    "learn": {"metavar": "WHAT", "help": "assistant, last or all: what counts in the loss (default: assistant)"},
    "ghost_attention": {
        "action": "store_true",
        "default": None,
        "help": "put the system message into every turn, and learn the last reply",
    },
    "beta": {"type": float, "metavar": "X", "help": "for dpo, the cost of moving away from the model (default: 0.1)"},
    "preference": {"metavar": "NAME", "help": "for dpo, the loss: sigmoid or ipo (default: sigmoid)"},
    "teacher": {"metavar": "MODEL", "help": "for distill, a model, or a file that `llama4 teach` wrote"},
    "soft_weight": {
        "type": float,
        "metavar": "X",
        "help": "for distill, weight of the teacher's distribution at first; falls to 0 (default: 1)",
    },
    "learning_rate": {
        "type": float,
        "metavar": "X",
        "help": "peak of the learning rate (default: after the model's width; see docs/finetuning.md)",
    },
    "schedule": {
        "metavar": "NAME",
        "help": "course of the learning rate: cosine, linear or constant (default: cosine)",
    },
    "warmup": {
        "type": float,
        "metavar": "X",
        "help": "share of steps with a rising rate, or from 1 on their number (default: 0.03)",
    },
    "weight_decay": {"type": float, "metavar": "X", "help": "weight decay of matrices (default: 0)"},
    "optimizer_states": {
        "metavar": "NAME",
        "help": "type of AdamW's states: float32, or int8 in a quarter of the memory (default: float32)",
    },
    "clip": {"type": float, "metavar": "X", "help": "largest norm of the gradients; 0 for any (default: 1)"},
    "balance": {"type": float, "metavar": "X", "help": "weight of the routers' balance loss (default: 0)"},
    "z_loss": {"type": float, "metavar": "X", "help": "weight of the routers' z-loss (default: 0)"},
    "eval_every": {"type": int, "metavar": "N", "help": "steps between evaluations (default: a tenth of all)"},
    "save_every": {"type": int, "metavar": "N", "help": "steps between states to resume from (default: the same)"},
    "gradient_checkpointing": {
        "action": "store_true",
        "default": None,
        "help": "take less memory, for a third more time",
    },
    "adapter_format": {
        "metavar": "NAME",
        "help": "form of experts' adapters: peft (default, newest), peft-0.18, per-expert (vLLM takes the last two)",
    },
    "seed": {"type": int, "metavar": "N", "help": "seed of the order of data and of new matrices (default: 0)"},
}
"""Arguments of `TrainingOptions`; what is not given is as there."""


OF_METHOD = {"beta": "dpo", "preference": "dpo", "soft_weight": "distill"}
"""Those of them that only one method has."""

READING = {name: SETTINGS[name] for name in ("batch_tokens", "max_length", "learn", "ghost_attention")}
"""Those of them that say how data are read, for commands that do not train."""
READING["batch_tokens"] = SETTINGS["batch_tokens"] | {"help": "most tokens of a batch (default: 4096)"}

DATA = "what to learn: .jsonl, .jsonl.gz, .parquet, or a data set on the Hub, owner/name or owner/name:split"


def add_parser(commands: Any) -> None:
    about = (
        "Train an adapter (or all weights) on JSON lines: messages, prompt and completion, instruction and output, "
        "conversations, or text; dpo on prompt, chosen and rejected. Such as "
        '{"prompt": "Which colour has snow?", "completion": "White."} in a line. '
        "Ctrl-C and SIGTERM save the state; --resume goes on from it, "
        "bit by bit."
    )
    parser = commands.add_parser("finetune", help="train an adapter on your data", description=about)
    parser.add_argument("model", help="embedded name, directory, GGUF file or Hub id")
    parser.add_argument("--data", required=True, metavar="FILE", help=DATA)
    parser.add_argument("--eval", metavar="FILE", help="held-out data; the weights that are best on it are kept")
    parser.add_argument(
        "--output", metavar="DIR", help="directory for the adapter; with full and distill, for the model"
    )
    parser.add_argument("--method", choices=METHODS, default="lora", help="way of training (default: lora)")
    parser.add_argument(
        "--merge", metavar="DIR", help="directory for the model with the adapter in its weights, written, too"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    parser.add_argument(
        "--report-to", nargs="+", default=(), metavar="NAME", help="also send the metrics to tensorboard, wandb"
    )
    parser.add_argument("--dry-run", action="store_true", help="show an example, what is trained, steps and memory")
    add_model_options(parser, TRAINED)
    for title, table in (("adapter", LORA), ("training", SETTINGS)):
        group = parser.add_argument_group(title)
        for name, settings in table.items():
            group.add_argument("--" + name.replace("_", "-"), **settings)
    parser.set_defaults(run=run, parser=parser)


def add_teach_parser(commands: Any) -> None:
    about = (
        "Write what a model says of each token that is learnt of a data file, its likeliest ones with their "
        "probabilities, for `finetune --method distill --teacher FILE`: the teacher is asked once."
    )
    parser = commands.add_parser("teach", help="write a teacher's probabilities", description=about)
    parser.add_argument("model", help="the teacher: embedded name, directory, GGUF file or Hub id")
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="data the student will learn, in a form that finetune reads"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write, .safetensors")
    parser.add_argument(
        "--top", type=int, default=32, metavar="K", help="likeliest tokens to write for each place (default: 32)"
    )
    add_model_options(parser, TRAINED)
    group = parser.add_argument_group("as in finetune")
    for name, settings in READING.items():
        group.add_argument("--" + name.replace("_", "-"), **settings)
    parser.set_defaults(run=run_teach, parser=parser)


def run_teach(options: argparse.Namespace) -> int:
    with starting():
        from llama4.api import Llama4
        from llama4.train import TrainingOptions
        from llama4.train.data import load_dataset
        from llama4.train.teacher import save_teacher

    given = {name: getattr(options, name) for name in READING if getattr(options, name) is not None}
    settings = TrainingOptions(**given)
    llm = Llama4.from_pretrained(options.model, **trained_options(options))
    data = load_dataset(
        options.data,
        llm.processor,
        max_length=min(settings.max_length, llm.config.text.max_position_embeddings),
        learn=settings.learn,
        ghost_attention=settings.ghost_attention,
    )
    tokens = save_teacher(llm, data, options.output, top=options.top, batch_tokens=settings.batch_tokens or 4096)
    print(f"{options.output}: the {options.top} likeliest of {count_text(tokens)} tokens", file=sys.stderr)
    return 0


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `TrainingOptions`."""
    with starting():
        from llama4.train import LoraConfig
    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    lora = {name: getattr(options, name) for name in LORA if getattr(options, name) is not None}
    if "targets" in lora:
        lora |= parse_targets(lora["targets"])
    for name, method in OF_METHOD.items():
        if name in given and options.method != method:
            option = name.replace("_", "-")
            options.parser.error(f"--{option} is of --method {method}; --method {options.method} has none")
    for_adapters = [*lora, *({"adapter_format"} & given.keys())]
    if for_adapters and options.method in ALL_WEIGHTS:
        option = for_adapters[0].replace("_", "-")
        options.parser.error(f"--{option} is for adapters; --method {options.method} has none")
    return given | {"method": options.method, "lora": LoraConfig(**lora)}


def parse_targets(text: str) -> dict[str, Any]:
    """ "attention,experts:4" -> arguments of `LoraConfig`."""
    targets, ranks = [], {}
    for part in text.split(","):
        name, colon, rank = part.strip().partition(":")
        targets.append(name)
        if colon:
            if not rank.isdigit():
                raise ArgumentError(f"--targets {part.strip()!r}: the rank must be a whole number, as in experts:4")
            ranks[name] = int(rank)
    return {"targets": tuple(targets), "ranks": ranks}


def run(options: argparse.Namespace) -> int:
    if options.output is None and not options.dry_run:
        options.parser.error("--output is missing: the directory that gets the adapter")
    if options.merge and options.method in ALL_WEIGHTS:
        options.parser.error(f"--merge is for adapters; --method {options.method} writes a model")
    if options.merge and options.output and real_path(options.merge) == real_path(options.output):
        options.parser.error(f"--merge {options.merge} is --output, which gets the adapter; name another directory")
    settings = settings_of(options)
    with starting():
        from llama4.train import Run, TrainingOptions, finetune
        from llama4.train.merge import write_merged
        from llama4.train.report import read_metrics, write_card, write_curve
        from llama4.weights import hub
        from llama4.weights.directory import check_free

    if options.dry_run:
        training = TrainingOptions(**settings)
        show(Run(options.model, options.data, options.eval, training, loading=trained_options(options)))
        return 0
    if options.merge:
        check_free(options.merge)
    result = finetune(
        options.model,
        options.data,
        options.output,
        eval=options.eval,
        resume=options.resume,
        report_to=options.report_to,
        loading=trained_options(options),
        **settings,
    )
    if result.stopped_by is not None:
        print(
            f"llama4: stopped after {result.steps} of {result.of} steps; --resume goes on from {result.output}",
            file=sys.stderr,
        )
        return exit_code(result.stopped_by)
    held_out = f", held-out {min(loss for _, loss in result.eval_losses):.4f}" if result.eval_losses else ""
    values = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in result.values.items())
    print(f"{result.output}: {result.steps} steps, loss {result.losses[-1]:.4f}{held_out}{values}", file=sys.stderr)
    if options.merge:
        base = hub.resolve(options.model, revision=options.revision, subfolder=options.subfolder)
        write_merged(base, options.output, options.merge)
        assert result.facts is not None
        write_card(Path(options.merge), read_metrics(result.output), result.facts)
        write_curve(Path(options.merge), read_metrics(result.output))
        print(f"{options.merge}: {options.model} with {options.output}", file=sys.stderr)
    return 0


def show(run: Run) -> None:
    """What a run would do: the first example with what is learnt of it in brackets, the share that is trained, the
    steps, and the memory."""
    from llama4.train.memory import available_bytes

    example, text = run.data.examples[0], ""
    for is_learnt, tokens in groupby(zip(example.ids, example.is_learnt, strict=True), itemgetter(1)):
        piece = run.llm.tokenizer.decode([token for token, _ in tokens])
        text += f"⟦{piece}⟧" if is_learnt else piece
    text = re.sub(r"(<\|\w+\|>)\1{3,}", lambda same: f"{same[1]} x {len(same[0]) // len(same[1])} ", text)
    print(f"line {example.line}, {len(example.ids)} tokens, what is learnt in ⟦ ⟧:\n{text}\n")
    total = sum(parameter.numel() for parameter in run.llm.model.parameters())
    share = 100 * run.num_trained / total
    print(f"trained: {count_text(run.num_trained)} parameters, {share:.2g}% of the model's")
    print(f"data: {len(run.data.examples)} examples, {count_text(run.data.num_tokens)} tokens; {run.steps} steps")
    for note in run.data.notes():
        print(note)
    with run.attached():
        needed, free = run.memory(run.objective()), available_bytes(run.llm.model.device)
    print(f"memory: {needed}" + (f"; {bytes_text(free)} are free" if free is not None else ""))
