"""What can be said of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

from llama4.adapters.config import LoraConfig
from llama4.adapters.files import LAYOUTS
from llama4.adapters.methods import ALL_WEIGHTS, METHODS
from llama4.errors import ArgumentError
from llama4.reading import MAX_INT
from llama4.train.data import LEARN
from llama4.train.objectives import PREFERENCE_LOSSES
from llama4.train.optimizer import SCHEDULES, STATES

QUANTIZATION = "int4"
"""Of a base that is not packed yet, with `qlora`."""
MAX_SEED = 2**63 - 1
"""Of torch's generators."""
MAX_EPOCHS = 1000
"""Each is laid out before the first step, to know how many steps there are; `steps` knows no such limit."""
RATE, RATE_WIDTH, RATE_POWER = 5e-4, 2000, 0.78
"""An adapter learns best at about RATE * (RATE_WIDTH / hidden size)^RATE_POWER, whatever its rank, and all weights at a
tenth of it (Schulman et al. 2025, "LoRA Without Regret", and the fit in its cookbook)."""
RATE_SHARES = {"lora": 1.0, "qlora": 1.0, "full": 0.1, "dpo": 0.25, "distill": 0.1}
"""Method -> its share of that; preferences need less than texts."""
MOST_BATCH_TOKENS, LEAST_BATCHES, LEAST_STEPS, MOST_EPOCHS = 4096, 16, 100, 10
"""Of data of any size are made at least so many batches, gone through as often as gives so many steps, if that is not
more than so often: with forty lines in one batch, a single step would learn nothing."""


@dataclass(frozen=True)
class TrainingOptions:
    """Of `finetune`, and under the same names of `llama4 finetune`.

    Attributes:
        method: "lora" trains an adapter; "qlora" one on packed weights; "full" all weights, those of the vision tower
            if the data have pictures; "dpo" an adapter on preferences; "distill" all weights, from a teacher.
        lora: of those that train an adapter.
        epochs: how often the data are gone through; by default once, and small data up to ten times; or
        steps: how many batches are learnt from.
        batch_tokens: most tokens of a batch; by default 4096, and of small data a sixteenth of them.
        max_length: most tokens of an example.
        learn: "assistant", "last" or "all".
        ghost_attention: the system message in every turn, the last reply learnt.
        beta: of "dpo", how much moving away from the model without the adapter costs.
        preference: of "dpo", its loss, "sigmoid" or "ipo".
        teacher: of "distill", a model's name or directory, or a file that `llama4 teach` wrote.
        soft_weight: of "distill", the weight of the teacher's distribution at first; it falls to 0 in a line.
        learning_rate: its peak; by default after the model's width, see `RATE`.
        schedule: "cosine", "linear" or "constant".
        warmup: share of the steps in which the learning rate rises, or from 1 on, their number.
        weight_decay: of matrices.
        optimizer_states: "float32", or "int8", which takes a quarter of the memory.
        clip: most that the norm of the gradients may be; 0 for any.
        balance: weight of the routers' balance loss.
        z_loss: weight of the routers' z-loss.
        eval_every: steps between evaluations; by default a tenth of all. The best is kept.
        save_every: steps between states to resume from; by default as `eval_every`.
        gradient_checkpointing: compute activations again in the backward pass, for memory.
        adapter_format: of stacked experts, see `llama4.adapters.files`.
        seed: of the order of the data, of new matrices, of dropout.

    Raises:
        ArgumentError: a value that cannot be.
    """

    method: str = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    epochs: float | None = None
    steps: int | None = None
    batch_tokens: int | None = None
    max_length: int = 2048
    learn: str = "assistant"
    ghost_attention: bool = False
    beta: float = 0.1
    preference: str = "sigmoid"
    teacher: str | None = None
    soft_weight: float = 1.0
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    optimizer_states: str = "float32"
    clip: float = 1.0
    balance: float = 0.0
    z_loss: float = 0.0
    eval_every: int | None = None
    save_every: int | None = None
    gradient_checkpointing: bool = False
    adapter_format: str = "peft"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"method": METHODS, "schedule": tuple(SCHEDULES), "learn": LEARN, "adapter_format": LAYOUTS}
        choices |= {"preference": tuple(PREFERENCE_LOSSES), "optimizer_states": tuple(STATES)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if self.epochs is not None and self.steps is not None:
            raise ArgumentError("epochs and steps both say how long to train; give one of them")
        least = {"epochs": 0, "steps": 1, "batch_tokens": 2, "max_length": 2, "eval_every": 1, "save_every": 1}
        least |= dict.fromkeys(("learning_rate", "warmup", "weight_decay", "clip", "balance", "z_loss", "beta"), 0)
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value < math.inf:
                raise ArgumentError(f"{name} is {value}; it must be at least {lowest}")
        most = {"epochs": MAX_EPOCHS, **dict.fromkeys(("steps", "batch_tokens", "max_length"), MAX_INT)}
        most |= dict.fromkeys(("eval_every", "save_every"), MAX_INT)
        for name, highest in most.items():
            value = getattr(self, name)
            if value is not None and value > highest:
                raise ArgumentError(f"{name} is {value!s:.40}; it must be at most {highest}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ArgumentError(f"seed is {self.seed!s:.40}; it must be between 0 and {MAX_SEED}")
        if not 0 <= self.soft_weight <= 1:
            raise ArgumentError(f"soft_weight is {self.soft_weight}; it must be between 0 and 1")
        if (self.method == "distill") != (self.teacher is not None):
            raise ArgumentError("a teacher and method 'distill' go together; give both, or neither")
        for name in ("epochs", "beta"):
            if getattr(self, name) == 0:
                raise ArgumentError(f"{name} is 0; it must be more")

    def for_data(self, hidden_size: int, num_tokens: int, longest: int) -> TrainingOptions:
        """The same with the defaults that follow from the model's width and the tokens of the data."""
        share, smallest = RATE_SHARES[self.method], max(longest, num_tokens // LEAST_BATCHES)
        rate = float(f"{share * RATE * (RATE_WIDTH / hidden_size) ** RATE_POWER:.1e}")
        return replace(
            self,
            learning_rate=self.learning_rate if self.learning_rate is not None else rate,
            batch_tokens=self.batch_tokens or min(MOST_BATCH_TOKENS, smallest),
        )

    def for_batches(self, batches: int) -> TrainingOptions:
        """The same with the default number of epochs of so many batches."""
        if self.epochs is not None or self.steps is not None:
            return self
        return replace(self, epochs=min(MOST_EPOCHS, math.ceil(LEAST_STEPS / batches)))

    def warmup_steps(self, steps: int) -> int:
        return round(self.warmup) if self.warmup >= 1 else round(self.warmup * steps)

    def describe(self) -> dict[str, object]:
        """As JSON, for files."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lora"}
        if self.method not in ALL_WEIGHTS:
            content["lora"] = {f.name: getattr(self.lora, f.name) for f in fields(self.lora)}
            content["lora"] |= {"targets": list(self.lora.targets), "ranks": dict(self.lora.ranks)}
        return content
