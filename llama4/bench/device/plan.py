"""The steps, in the order of their worth: if time runs out, the last ones are missing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Cases that run in one process.

    Attributes:
        name: in reports and on the command line.
        function: "module:function", which gets a `Record`.
        about: what it shows.
        seconds: most that it may take, all its processes together.
        case_seconds: most that one of its cases may take.
    """

    name: str
    function: str
    about: str
    seconds: float
    case_seconds: float = 30.0


def _step(name: str, about: str, seconds: float, case_seconds: float = 30.0, function: str = "run") -> Step:
    module = name.partition("-")[0]
    return Step(name, f"llama4.bench.device.{module}:{function}", about, seconds, case_seconds)


PLAN = (
    _step("machine", "Copy bandwidth, GEMM rates, launch latency: what shares are shares of", 45),
    _step("kernels", "Triton kernels, compiled ahead for the steps below", 45, 45),
    _step("checks", "Kernels and expert backends against float64; a small model and tiny against the CPU", 90),
    _step(
        "scout-4", "Scout cut to 4 layers, bfloat16, int4 and fp8, beside transformers", 110, 60, function="four_layers"
    ),
    _step("scout-48", "All of Scout in int4: prompts, decoding, a picture", 120, 60, function="all_layers"),
    _step("vision", "The vision tower over 17 tiles, and the preparation of a picture", 30),
    _step("long", "128k tokens with an fp8 cache, all of Scout in int4", 90, 60),
    _step("offload", "Experts on the host, a quarter of them copied to the card", 45),
    _step("finetune", "A step of LoRA that reaches the experts, over bfloat16 and int4", 45),
    _step("experts", "One layer of experts by every backend and format, beside transformers", 100),
    _step("suite", "The tests that are marked `cuda`", 240, 120),
)
