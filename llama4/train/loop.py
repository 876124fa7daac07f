"""Fine-tuning: from a model and a data file to an adapter, or to a model.

A step follows from the seed, the data and the step before, bit by bit on one machine: a run that was stopped and goes
on ends with the same weights as one that was not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4.adapters.files import save_adapter
from llama4.adapters.lora import Adapter
from llama4.adapters.methods import ALL_WEIGHTS
from llama4.api import Llama4
from llama4.errors import ArgumentError, CheckpointError, Llama4Error
from llama4.files import user_path
from llama4.ops.openmp import passive_waiting
from llama4.progress import Bar
from llama4.quantization.weight import QuantizedWeight
from llama4.train.data import Batches, Dataset, load_dataset
from llama4.train.memory import Estimate, check_memory, estimate
from llama4.train.objectives import Distillation, Objective, Preference, next_token
from llama4.train.optimizer import AdamW, learning_rate_at
from llama4.train.options import QUANTIZATION, TrainingOptions
from llama4.train.output import alone_in, check_output
from llama4.train.report import Facts, Metrics, write_card, write_curve
from llama4.train.state import STATE_FILE, fingerprint, load_state, read_about, save_state
from llama4.train.step import evaluate, learn
from llama4.train.stopping import Stopper, stoppable
from llama4.train.teacher import load_teacher
from llama4.train.trackers import check_trackers, tracking
from llama4.weights import hub
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.memory import return_freed

logger = logging.getLogger(__name__)


class TrainingError(Llama4Error):
    """A run that cannot go on."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        output: the directory of the adapter, or of the model.
        steps: that were taken, of `of`.
        losses: of each step.
        eval_losses: (step, loss) on held-out data.
        values: what the method measures besides, on held-out data at the end, or else in the last step: of "dpo",
            `margin` and `accuracy` among them.
        shares: for each layer with experts, the share of tokens that each expert got.
        facts: what it began with and learnt from.
        stopped_by: SIGINT or SIGTERM; None if all steps were taken.
    """

    output: Path
    steps: int
    of: int
    losses: list[float]
    eval_losses: list[tuple[int, float]]
    shares: dict[str, list[float]]
    values: dict[str, float] = field(default_factory=dict)
    facts: Facts | None = None
    stopped_by: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all steps were taken; else it was stopped, and can be resumed."""
        return self.steps == self.of


class Run:
    """A model, what of it is trained, and the data: all that `finetune` needs before its first step.

    Attributes:
        options: what was given, with the defaults that follow from model and data.
        llm: the model.
        adapter: what is trained; None where all weights are.
        data, held_out: the data sets.
        batches: of the data.
        steps: of the whole run.
        trained: parameters by name; of those that pictures alone need none, if the data have no pictures.
        idle: what the names of those begin with.
    """

    def __init__(
        self,
        model: str | Path | Llama4,
        data: str | Path,
        eval: str | Path | None,
        options: TrainingOptions,
        progress: bool = True,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        self.options, self.progress = options, progress
        self.base = str(model.side_files.origin or "") if isinstance(model, Llama4) else _name(model, loading)
        self.llm = model if isinstance(model, Llama4) else load_base(model, options.method, progress, **loading or {})
        is_packed = any(isinstance(module, QuantizedWeight) for module in self.llm.model.modules())
        if options.method in ALL_WEIGHTS and is_packed:
            raise ArgumentError("packed weights are not trained; use method 'qlora', or the unquantized model")
        if options.method in ALL_WEIGHTS and self.llm.model.dtype == torch.float16:
            raise ArgumentError(
                "float16 weights are not trained: a step is less than the distance of their numbers; load the model "
                "with dtype='bfloat16' or 'float32'"
            )
        if options.method == "qlora" and not is_packed:
            raise ArgumentError("method 'qlora' is for packed weights; load the model with quantization='int4'")
        self.data = self._dataset(data)
        self.held_out = self._dataset(eval) if eval is not None else None
        for dataset in filter(None, (self.data, self.held_out)):
            _check_kind(dataset, options.method)
            for note in dataset.notes():
                logger.warning(note)
        width = self.llm.config.text.hidden_size
        self.options = options = options.for_data(width, self.data.num_tokens, self.data.longest)
        self.batches = self._batches(self.data, options.seed)
        self.options = options = options.for_batches(len(self.batches.plan(0)))
        self.steps = options.steps or self.batches.steps_of(options.epochs or 1)
        self.adapter: Adapter | None = None
        self.idle = () if self.data.has_pictures else tuple(f"{name}." for name in self.llm.model.picture_modules)
        if options.method in ALL_WEIGHTS:
            named = self.llm.model.named_parameters()
        else:
            self.adapter = Adapter.create(self.llm.model, options.lora, seed=options.seed)
            named = self.adapter.named_parameters()
            modules = enumerate(self.adapter.names)
            self.idle = tuple(f"loras.{i}." for i, name in modules if f"{name}.".startswith(self.idle))
        self.trained = {name: parameter for name, parameter in named if not name.startswith(self.idle)}
        if not self.trained:
            targets = ", ".join(options.lora.targets)
            raise ArgumentError(f"{data} has no pictures, so nothing of {targets} is trained; choose other targets")

    def objective(self) -> Objective:
        """What is made small; a teacher is loaded for it."""
        if self.options.method == "dpo":
            assert self.adapter is not None
            return Preference(self.adapter, self.options.beta, self.options.preference)
        if self.options.teacher is not None:
            teacher = load_teacher(self.options.teacher, self.llm, self.data, self.progress, **self._reading())
            return Distillation(teacher, self.options.soft_weight)
        return next_token

    def memory(self, objective: Objective) -> Estimate:
        """What it takes; inside `attached`."""
        teacher = objective.teacher if isinstance(objective, Distillation) else None
        options = self.options
        return estimate(
            self.llm.model,
            self.trained,
            self.longest_batch,
            options.optimizer_states,
            teacher,
            options.gradient_checkpointing,
        )

    @property
    def facts(self) -> Facts:
        """For the card."""
        return Facts(self.base, self.data.path, self.data.digest, self.options.describe())

    def _batches(self, data: Dataset, seed: int | None) -> Batches:
        assert self.options.batch_tokens is not None
        return Batches(data.examples, self.llm.processor, self.options.batch_tokens, seed, data.rejected)

    def held_out_batches(self) -> Batches | None:
        """Of the held-out data, in the file's order."""
        return None if self.held_out is None else self._batches(self.held_out, None)

    def _dataset(self, path: str | Path) -> Dataset:
        return load_dataset(path, self.llm.processor, progress=self.progress, **self._reading())

    def _reading(self) -> dict[str, Any]:
        """How data are read."""
        window = self.llm.config.text.max_position_embeddings
        return {
            "max_length": min(self.options.max_length, window),
            "learn": self.options.learn,
            "ghost_attention": self.options.ghost_attention,
        }

    @property
    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.trained.values())

    @property
    def longest_batch(self) -> int:
        """Tokens of the largest batch there can be."""
        assert self.options.batch_tokens is not None
        return max(self.data.longest, min(self.options.batch_tokens, self.data.num_tokens))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model computes with what is trained, and keeps what gradients need; afterwards it is as it
        was."""
        model = self.llm.model
        needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        model.checkpoint_activations(self.options.gradient_checkpointing)
        before = self.llm.adapters.active
        self.llm.set_adapter(None)
        if self.adapter is not None:
            self.adapter.train().attach(model)
        try:
            yield
        finally:
            if self.adapter is not None:
                self.adapter.eval().detach()
            model.checkpoint_activations(False)
            for name, parameter in model.named_parameters():
                parameter.grad = None
                parameter.requires_grad_(needed[name])
            self.llm.set_adapter(before)

    def save(self, output: Path) -> None:
        """Write the adapter, or the model."""
        if self.adapter is None:
            self.llm.save_pretrained(output)
        else:
            layout = self.options.adapter_format
            save_adapter(self.adapter, self.llm.model, output, layout=layout, base=self.base)


def _name(model: str | Path, loading: Mapping[str, Any] | None) -> str:
    """Of a model in a subfolder that is here, the subfolder."""
    subfolder = (loading or {}).get("subfolder")
    return str(Path(model, subfolder) if subfolder and Path(model).is_dir() else model)


def _check_kind(data: Dataset, method: str) -> None:
    """Raises:
    ArgumentError: preferences for a method that does not learn from them, or others for the one that does.
    """
    if data.rejected and method != "dpo":
        raise ArgumentError(f"{data.path} holds preferences (chosen, rejected), which method 'dpo' learns from")
    if not data.rejected and method == "dpo":
        raise ArgumentError(f"{data.path} holds no preferences; method 'dpo' needs prompt, chosen and rejected")


def load_base(name: str | Path, method: str, progress: bool = True, **loading: Any) -> Llama4:
    """A model to train on: with "qlora", one whose weights are not packed is packed while it is loaded."""
    if method == "qlora" and loading.get("quantization") is None:
        where = {key: loading[key] for key in ("revision", "subfolder", "token") if key in loading}
        _, source = open_checkpoint(hub.resolve(name, progress=progress, **where))
        loading["quantization"] = None if source.plan else QUANTIZATION
    return Llama4.from_pretrained(name, progress=progress, **loading)


def finetune(
    model: str | Path | Llama4,
    data: str | Path,
    output: str | Path,
    *,
    eval: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    report_to: Sequence[str] = (),
    loading: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """Train an adapter for a model, or the model.

    Args:
        model: a name, as `Llama4.from_pretrained` takes it, or a model. What is trained is not left in it, except with
            method "full".
        data: JSON lines, see `llama4.train.records`.
        output: gets the result (with `eval` the best, else the last), the metrics, a curve and a card; and on the way,
            every `save_every` steps and at Ctrl-C and SIGTERM, the state to resume from.
        eval: held-out data, in the same form.
        resume: go on from the state in `output`, if there is one; with the same data and settings.
        progress: show a bar, where somebody sees it.
        report_to: "tensorboard", "wandb", or both: they get the metrics, too.
        loading: arguments of `Llama4.from_pretrained` for a model that is given by name, such as `subfolder`.
        settings: see `TrainingOptions`.

    Raises:
        Llama4Error: a wrong setting, a wrong line of the data by its number, too little memory, a state of another run,
            an output that holds a model, an adapter or a run that is not resumed, or in which another one is at work;
            or, as `TrainingError`, a loss that is no number, with the lines of its batch.
    """
    options, output = TrainingOptions(**settings), user_path(output)
    report_to = [report_to] if isinstance(report_to, str) else report_to
    check_trackers(report_to)
    check_output(output, resume)
    run = Run(model, data, eval, options, progress, loading)
    with torch.random.fork_rng(), run.attached(), return_freed(), passive_waiting(), stoppable() as stop:
        objective = run.objective()
        check_memory(run.memory(objective), run.llm.model.device)
        torch.manual_seed(options.seed)
        with alone_in(output, resume):
            return _train(run, objective, output, resume, stop, report_to)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What another run was begun with, as a state says it: data, or a setting with its value and that of now."""
    settings = there["settings"] if isinstance(there.get("settings"), dict) else {}
    before, now = {**settings, "steps": there.get("steps")}, {**here["settings"], "steps": here["steps"]}
    changed = [f"{name} ({before.get(name)}, now {value})" for name, value in now.items() if before.get(name) != value]
    if there.get("held_out", here["held_out"]) != here["held_out"]:  # its best is of others
        changed = ["held-out data", *changed]
    if there.get("base_weights", here["base_weights"]) != here["base_weights"]:
        base, other = there.get("base"), here["base"]
        changed = ["base model" if base == other else f"base model ({base}, now {other})", *changed]
    return changed if there.get("data") == here["data"] else ["data", *changed]


def _train(
    run: Run,
    objective: Objective,
    output: Path,
    resume: bool,
    stop: Stopper,
    report_to: Sequence[str] = (),
) -> Result:
    """Take the steps that are left, and write what they came to."""
    training = _Training(run, objective, output)
    if resume and (output / STATE_FILE).is_file():
        training.resume()
    with tracking(report_to, output, run.options.describe(), training.step) as trackers:
        metrics = Metrics(output, training.step, trackers)
        training.take_steps(metrics, stop)
        return training.finish(metrics, stop.number)


class _Training:
    """A run on its way.

    Attributes:
        step: how many steps are taken.
        best: the least loss on held-out data.
        loads: for each layer with experts, the tokens that each expert got since the process began.
        values: what the objective reported last.
    """

    def __init__(self, run: Run, objective: Objective, output: Path) -> None:
        self.run, self.objective, self.output = run, objective, output
        options = run.options
        self.optimizer = AdamW(
            run.trained, weight_decay=options.weight_decay, seed=options.seed, states=options.optimizer_states
        )
        self.held_out = run.held_out_batches()
        self.step, self.best = 0, math.inf
        self.loads: dict[str, Tensor] = {}
        self.values: dict[str, float] = {}
        self._about = {
            "data": run.data.digest,
            "held_out": run.held_out.digest if run.held_out is not None else None,
            "settings": options.describe(),
            "steps": run.steps,
            "base": run.base,
            "base_weights": fingerprint(run.llm.model, run.trained),
        }

    def resume(self) -> None:
        """Go on from the state in the output.

        Raises:
            ArgumentError: it is of another run.
            CheckpointError: it is damaged.
        """
        there = read_about(self.output)
        if different := _differences(there, self._about):
            raise ArgumentError(f"{self.output} holds a run with other {', '.join(different)}; resume with the same")
        if there["step"] >= self.run.steps:
            raise CheckpointError(
                f"{self.output / STATE_FILE} says that {there['step']} of {self.run.steps} steps are taken; start anew"
            )
        load_state(self.output, self.optimizer, self.run.idle)
        self.step, self.best = there["step"], there["best"] if there["best"] is not None else math.inf

    def take_steps(self, metrics: Metrics, stop: Stopper) -> None:
        """All that are left, or until `stop` is set; on the way it is evaluated and saved."""
        steps, options = self.run.steps, self.run.options
        eval_every = options.eval_every or max(1, steps // 10)
        save_every = options.save_every or eval_every
        if self.step == 0:
            self._save(metrics)  # first: what is evaluated is written, and must not be there without a state
            self._evaluate(metrics)
        with Bar("training", steps - self.step, "steps", shown=self.run.progress, logged=True) as bar:
            while self.step < steps and not stop.event.is_set():
                self._take_step(metrics, bar)
                if self.step == steps or self.step % eval_every == 0:
                    self._evaluate(metrics)
                if self.step < steps and self.step % save_every == 0:
                    self._save(metrics)
            bar.ends_whole = self.step == steps

    def _take_step(self, metrics: Metrics, bar: Bar) -> None:
        run, options = self.run, self.run.options
        assert options.learning_rate is not None
        began, batch = time.perf_counter(), run.batches[self.step]
        with bar.step(1):
            done = self.step / run.steps
            learnt = learn(run.llm.model, batch, self.objective, done, balance=options.balance, z_loss=options.z_loss)
            norm = self.optimizer.clip(options.clip)
            if not math.isfinite(learnt.loss) or not math.isfinite(norm):
                lines = ", ".join(map(str, batch.lines))
                raise TrainingError(
                    f"at step {self.step + 1} the loss is {learnt.loss} and its gradient {norm}, on lines {lines} "
                    f"of {run.data.path}; look at them, or lower the learning rate of {options.learning_rate:g}"
                )
            warmup = options.warmup_steps(run.steps)
            rate = learning_rate_at(self.step, run.steps, options.learning_rate, options.schedule, warmup)
            self.optimizer.step(rate)
        self.step += 1
        seconds = time.perf_counter() - began
        for name, load_E in learnt.loads.items():
            self.loads[name] = self.loads[name] + load_E if name in self.loads else load_E
        self.values = dict(learnt.values)
        metrics.add(
            step=self.step,
            loss=learnt.loss,
            **learnt.values,
            **({"router_loss": learnt.router_loss} if options.balance or options.z_loss else {}),
            learning_rate=rate,
            gradient_norm=norm,
            tokens=batch.num_tokens,
            seconds=round(seconds, 4),
        )
        bar.describe(f"training, loss {learnt.loss:.3f}, {batch.num_tokens / seconds:.0f} tokens/s")

    def _evaluate(self, metrics: Metrics) -> None:
        """On held-out data, if there are any; the best so far is kept."""
        if self.held_out is None:
            return
        with _evaluating(self.run.adapter), Bar("evaluating", shown=self.run.progress):
            found = evaluate(self.run.llm.model, self.held_out, self.objective)
        if not math.isfinite(found["loss"]):
            raise TrainingError(
                f"after step {self.step} the loss on held-out data is {found['loss']}; look at their lines, or lower "
                f"the learning rate of {self.run.options.learning_rate:g}"
            )
        metrics.add(step=self.step, **{f"eval_{name}": value for name, value in found.items()})
        loss = found.pop("loss")
        self.values = found
        if loss < self.best:
            self.best = loss
            self.run.save(self.output)

    def _save(self, metrics: Metrics) -> None:
        """The state to resume from."""
        metrics.sync()
        best = self.best if self.best < math.inf else None
        save_state(self.output, self.optimizer, self._about | {"step": self.step, "best": best})

    def finish(self, metrics: Metrics, stopped_by: int | None) -> Result:
        """Write what the steps came to, or if some are left, the state to resume from."""
        run, output = self.run, self.output
        shares = {name: (load_E / load_E.sum()).tolist() for name, load_E in self.loads.items()}
        losses, eval_losses = [loss for _, loss in metrics.values("loss")], metrics.values("eval_loss")
        result = Result(output, self.step, run.steps, losses, eval_losses, shares, self.values, run.facts)
        if not result.is_finished:
            self._save(metrics)
            return replace(result, stopped_by=stopped_by)
        if self.held_out is None:
            run.save(output)
        write_card(output, metrics.lines, run.facts)
        write_curve(output, metrics.lines)
        metrics.add(step=self.step, finished=True, expert_shares=shares)
        metrics.sync()
        (output / STATE_FILE).unlink(missing_ok=True)
        return result


@contextmanager
def _evaluating(adapter: Adapter | None) -> Iterator[None]:
    """Inside, nothing is dropped out."""
    if adapter is None:
        yield
        return
    adapter.eval()
    yield
    adapter.train()
