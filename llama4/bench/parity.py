"""Compares a checkpoint with transformers, layer by layer: where the two first differ, and by how much.

`llama4 bench parity PATH [--against transformers] [--dtype float32] [--prompt TEXT] [--image FILE] [--json]`

The models run one after the other, so only one at a time is in memory.

Shapes: N tokens, E experts, k experts per token.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama4.api import Llama4
from llama4.arguments import Parser, one_line
from llama4.errors import Llama4Error
from llama4.inputs import Inputs
from llama4.model.device import DTYPES
from llama4.model.moe import Router
from llama4.tiny.shapes_dataset import draw, fresh_question
from llama4.units import dtype_name
from llama4.weights import hub
from llama4.weights.checkpoint import layout_of

TOLERANCES = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 1e-1, "float16": 2e-2}
"""Allowed for a deep model whose sums have another order. transformers' RoPE is float32 even in float64."""

_STAGES = re.compile(
    r"vision_model\.(patch_embedding|layernorm_pre|model\.layers\.\d+(\.self_attn|\.mlp)?|layernorm_post|vision_adapter)"
    r"|multi_modal_projector"
    r"|language_model\.model\.layers\.\d+(\.self_attn|\.feed_forward(\.router|\.shared_expert)?)?"
    r"|language_model\.(model\.norm|lm_head)"
)
_FIRST_LAYER = "language_model.model.layers.0"
_FUSED = "embeddings with image features"

Trace = dict[str, Tensor]
"""Stage -> its output, [rows, width], on the CPU, in the order of computing."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The error of one module's output: the largest difference from the reference over its largest value."""

    name: str
    error: float
    rerouted: float = 0.0
    """Of a router: the share of tokens routed to other experts than the reference's."""


def trace(model: nn.Module, run: Callable[[], object], prefix: str = "") -> Trace:
    """Run, and record the output of every module whose name (after `prefix`) is a stage; a router's as scores [N, E],
    zero where an expert was not chosen."""
    outputs: Trace = {}

    def record(name: str, module: nn.Module, arguments: object, output: Any) -> None:
        if isinstance(module, Router):
            scores_Nk, experts_Nk = output
            output = scores_Nk.new_zeros(len(scores_Nk), module.out_features).scatter(1, experts_Nk, scores_Nk)
        tensor = output[0] if isinstance(output, tuple) else output
        outputs[name] = tensor.detach().flatten(0, -2).cpu().clone()  # transformers adds to some of them in place

    def record_input(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        hidden = arguments[0] if arguments else named["hidden_states"]
        outputs[_FUSED] = hidden.detach().flatten(0, -2).cpu().clone()

    with ExitStack() as hooks, torch.inference_mode():
        for name, module in model.named_modules():
            if _STAGES.fullmatch(prefix + name):
                hooks.enter_context(module.register_forward_hook(partial(record, prefix + name)))
            if prefix + name == _FIRST_LAYER:
                hooks.enter_context(module.register_forward_pre_hook(record_input, with_kwargs=True))
        run()
    return outputs


def compare(ours: Trace, reference: Trace) -> list[Stage]:
    """One `Stage` for each that ours has, in the order of computing.

    Raises:
        Llama4Error: the reference lacks a stage, or it has another shape there.
    """
    stages = []
    for name, output in ours.items():
        expected = reference.get(name)
        if expected is None or expected.shape != output.shape:
            shape = None if expected is None else list(expected.shape)
            raise Llama4Error(
                f"{name} gives {list(output.shape)} here and {shape} in the reference; the models are different"
            )
        output, expected = output.double(), expected.double()
        error = ((output - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        rerouted = 0.0
        if name.endswith(".router"):
            rerouted = ((output > 0) != (expected > 0)).any(-1).double().mean().item()
        stages.append(Stage(name, error, rerouted))
    return stages


def first_difference(stages: Sequence[Stage], tolerance: float) -> Stage | None:
    """The first stage beyond the tolerance, a NaN included."""
    return next((stage for stage in stages if not stage.error <= tolerance), None)


def trace_transformers(directory: str, inputs: Inputs, dtype: torch.dtype, text_only: bool) -> Trace:
    """The same inputs through transformers' model of the same directory.

    Raises:
        Llama4Error: transformers is not installed, or cannot run this checkpoint.
    """
    from llama4.bench.baselines import FAILURES, load_transformers, transformers_error

    model = load_transformers(directory, dtype, "eager")
    pixels = {} if inputs.pixel_values is None else {"pixel_values": inputs.pixel_values.to(dtype)}
    prefix = "language_model." if text_only else ""
    try:
        return trace(model, lambda: model(inputs.input_ids, use_cache=False, **pixels), prefix)
    except FAILURES as error:
        raise transformers_error(directory, error) from error


def table(stages: Sequence[Stage], tolerance: float) -> str:
    """The stages as lines of text, and the verdict below."""
    width = max(len(stage.name) for stage in stages)
    lines = [f"{'stage':<{width}}   error"]
    for stage in stages:
        note = f"   {stage.rerouted:.1%} of tokens routed to other experts" if stage.rerouted else ""
        lines.append(f"{stage.name:<{width}}   {stage.error:.1e}{note}")
    first = first_difference(stages, tolerance)
    verdict = (
        f"equal within {tolerance:.0e} of the largest value at every stage"
        if first is None
        else f"first differs at {first.name}, by {first.error:.1e} of its largest value (tolerance {tolerance:.0e})"
    )
    return "\n".join([*lines, "", verdict])


def trace_ours(llm: Llama4, inputs: Inputs) -> Trace:
    return trace(llm.model, lambda: llm.model(inputs.input_ids, pixel_values=inputs.pixel_values))


def _inputs(llm: Llama4, prompt: str, images: Sequence[str]) -> Inputs:
    """A question, about the given pictures or a drawn one."""
    pictures: Sequence[object] = images
    if llm.config.vision is not None and not images:
        scenes, _ = fresh_question(random.Random(0), "caption")
        pictures = [draw(scene) for scene in scenes]
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": prompt}]
    return llm.processor([{"role": "user", "content": content}])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if every stage agrees, 1 if one does not."""
    parser = Parser(prog="llama4 bench parity", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PATH", help="embedded name, directory, GGUF file or Hub id")
    parser.add_argument("--against", default="transformers", choices=["transformers"], help="the reference")
    parser.add_argument(
        "--dtype", type=dtype_name, default="float32", choices=sorted(DTYPES), help="of both models (default: float32)"
    )
    parser.add_argument("--experts", default="auto", help="our backend: loop, grouped or auto (default: auto)")
    parser.add_argument("--prompt", default="Describe the picture.", metavar="TEXT")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable (default: a drawing)")
    parser.add_argument("--tolerance", type=float, metavar="E", help="largest error that counts as equal")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    tolerance = TOLERANCES[options.dtype] if options.tolerance is None else options.tolerance
    try:
        directory = hub.resolve(options.model)
        if layout_of(directory).name == "meta":
            raise Llama4Error(
                f"{options.model} is in Meta's layout, which transformers does not read; convert it first, bit by bit: "
                f"`llama4 convert {options.model} DST --to hf`"
            )
        llm = Llama4.from_pretrained(directory, device="cpu", dtype=options.dtype, experts=options.experts)
        inputs, text_only = _inputs(llm, options.prompt, options.image), llm.config.vision is None
        ours = trace_ours(llm, inputs)
        del llm
        stages = compare(ours, trace_transformers(str(directory), inputs, DTYPES[options.dtype], text_only))
    except ValueError as error:
        print(f"llama4: error: {one_line(error)}", file=sys.stderr)
        return 2
    first = first_difference(stages, tolerance)
    if options.json:
        content = {"stages": [asdict(stage) for stage in stages], "first": asdict(first) if first else None}
        print(json.dumps(content, indent=2))
    else:
        print(table(stages, tolerance))
    return 0 if first is None else 1
