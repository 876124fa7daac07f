"""The memory that a run takes, as the system counts it, against what was said before it started."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from torch import nn

from llama4.adapters.config import LoraConfig
from llama4.api import Llama4
from llama4.bench.process_memory import peak_bytes, reset_peak, resident_bytes
from llama4.model.multimodal import Llama4Model
from llama4.ops.memory import libc
from llama4.quantization.int4 import Int4
from llama4.quantization.modules import QuantizedExperts
from llama4.quantization.nf4 import Nf4
from llama4.quantization.weight import QuantizedWeight
from llama4.text.tokenizer import Tokenizer
from llama4.train import finetune, loop
from llama4.train.memory import Estimate, code_bytes, estimate
from llama4.train.optimizer import RUN, RUN_BYTES, AdamW
from llama4.train.teacher import ModelTeacher
from llama4.weights import memory
from llama4.weights.memory import return_freed
from tests import small_model
from tests.train.test_data import write

D, F, E = 512, 1024, 4
ROOT = Path(__file__).parents[2]


def packed(shape: tuple[int, ...], kind: str) -> QuantizedWeight:
    """With random numbers."""
    if kind == "int4":
        return QuantizedWeight.of(torch.randn(shape) * shape[-1] ** -0.5, Int4())
    *experts, outputs, inputs = shape
    weight = QuantizedWeight(Nf4(stored=(*experts, inputs, outputs) if experts else shape), shape)
    for name, parameter in weight.named_parameters():
        parts = {"weight": lambda p: p.random_(256), "absmax": lambda p: p.fill_(inputs**-0.5)}
        parts.get(name, lambda p: p.copy_(torch.linspace(-1, 1, len(p))))(parameter.data)
    return weight


def model(kind: str, width: int = D) -> Llama4Model:
    config = small_model.config()
    text = replace(config.text, hidden_size=width, intermediate_size=2 * width, num_local_experts=E)
    text = replace(text, num_attention_heads=width // 64, head_dim=64)
    built = Llama4Model(replace(config, text=text, vision=None)).eval()
    built.init_weights()
    if kind == "float32":
        return built
    for layer in small_model.layers(built):
        experts, feed_forward = QuantizedExperts(), layer.feed_forward
        experts.gate_up_proj, experts.down_proj = packed((E, 2 * F, D), kind), packed((E, D, F), kind)
        feed_forward.experts = experts
        for module in (layer.self_attn, feed_forward.shared_expert):
            for name, linear in list(module.named_children()):
                setattr(module, name, packed(tuple(linear.weight.shape), kind))
    return built


def measure(kind: str, directory: Path, steps: int = 2, **options: Any) -> dict[str, int]:
    """What was said without oneDNN's code, and what it was, in bytes beyond the loaded models."""
    torch.manual_seed(0)
    directory.mkdir()
    tokenizer = Tokenizer(small_model.write_tokenizer(directory / "tokenizer.model"))
    is_taught = options.get("method") == "distill"
    llm = Llama4(model(kind, D // 2 if is_taught else D), tokenizer, progress=False)
    data = write(directory / "data.jsonl", *({"text": "the quick brown fox " * 20} for _ in range(6)))
    if is_taught:
        teacher = ModelTeacher(Llama4(model(kind), tokenizer, progress=False))
        setattr(loop, "load_teacher", lambda *args, **options: teacher)  # noqa: B010 (mypy sees no such name there)
    said, base = [0], [0]

    def watched(needed: Estimate, device: torch.device) -> None:
        gc.collect()
        libc().malloc_trim(0)
        said[0], base[0] = needed.to_come, resident_bytes()
        reset_peak()

    setattr(loop, "check_memory", watched)  # noqa: B010
    settings: dict[str, Any] = {"lora": LoraConfig(rank=4), "steps": steps, "batch_tokens": 1 << 20, "progress": False}
    finetune(llm, data, directory / "out", **settings, **options)
    return {"said": said[0] - code_bytes(llm.model, {}), "was": peak_bytes() - base[0]}


def measure_second(kind: str, directory: Path, **options: Any) -> dict[str, int]:
    """The first run reads torch's code from its files, and oneDNN and BLAS make code and buffers: tens of megabytes, as
    many for a model of any size, and different from CPU to CPU."""
    torch.set_num_threads(1)
    setattr(memory, "_MIN_RETURNED_BLOCK", 1 << 16)  # noqa: B010 (tensors are a hundredth of a real model's)
    for steps in (1, 2):
        with return_freed():
            found = measure(kind, directory / str(steps), steps, **options)
    return found


def measure_step() -> dict[str, int]:
    """What one step of AdamW with states in 8 bits takes, of a parameter of two runs."""
    parameter = nn.Parameter(torch.zeros(2 * RUN, dtype=torch.bfloat16))
    optimizer = AdamW({"p": parameter}, states="int8")
    with return_freed():
        for _ in range(2):  # the first writes to states that were not there yet
            parameter.grad = torch.ones_like(parameter)
            reset_peak()
            before = resident_bytes()
            optimizer.step(0.1)
            was = peak_bytes() - before
    return {"said": RUN * RUN_BYTES, "was": was}


FORKS = """
import torch._dynamo  # which checkpointing imports when it is first used
from tests.train.test_memory import *
libc().prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: of a large page all is resident, what is freed of it as well
for call in sys.stdin:
    if os.fork() == 0:
        told = os.dup(1)
        os.dup2(2, 1)
        os.write(told, json.dumps(eval(call)).encode() + b"\\n")
        os._exit(0)
    if os.wait()[1]:
        print("{}", flush=True)
"""


@pytest.fixture(scope="module")
def in_a_child() -> Iterator[Callable[[str], dict[str, int]]]:
    """Tells what a function of this file returns in a process of its own: in this one malloc may hold free memory,
    which counts as resident before it is taken. All are forked from one that has imported what they need."""
    path = os.pathsep.join([*filter(None, sys.path), str(ROOT)])  # last: llama4 is the one that is tested
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=PIPE, stdout=PIPE, text=True, env=environment) as parent:

        def call(function: str) -> dict[str, int]:
            assert parent.stdin is not None and parent.stdout is not None
            print(function, file=parent.stdin, flush=True)
            found: dict[str, int] = json.loads(parent.stdout.readline())
            return found

        yield call


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a part of a process is Linux's")


@on_linux
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nf4", ""),
        ("int4", "gradient_checkpointing=True"),
        ("float32", "gradient_checkpointing=True"),
        ("float32", "method='distill', teacher='teacher'"),
    ],
)
def test_a_run_takes_what_was_said(
    kind: str, options: str, tmp_path: Path, in_a_child: Callable[[str], dict[str, int]]
) -> None:
    """Malloc keeps a part of what is freed between tensors."""
    found = in_a_child(f"measure_second({kind!r}, Path({str(tmp_path)!r}), {options})")
    assert 0.9 * found["said"] < found["was"] < 1.15 * found["said"], found


@on_linux
def test_an_8_bit_step_takes_one_run(in_a_child: Callable[[str], dict[str, int]]) -> None:
    """Whatever the size of the parameter."""
    found = in_a_child("measure_step()")
    assert 0.5 * found["said"] < found["was"] < 1.2 * found["said"], found


@pytest.mark.parametrize("kind", ["float32", "nf4", "int4"])
def test_a_model_is_freed_after_its_run_was_counted(kind: str) -> None:
    """A node of autograd that is given its own output to keep is never freed, nor what it keeps beside."""
    counted = model(kind, 128) if kind == "float32" else model(kind)
    parameters = dict(counted.named_parameters())
    trained = {name: parameters[name] for name in list(parameters) if parameters[name].is_floating_point()}
    estimate(counted, trained, tokens=128)
    gone = [weakref.ref(parameter) for parameter in parameters.values()]
    del counted, parameters, trained
    gc.collect()
    assert not [reference for reference in gone if reference() is not None]
