"""Quantization that looks at what a model does with texts: GPTQ, layer by layer.

A layer is loaded, the texts go through it, its matrices are quantized by the inputs that they had, and what the
quantized layer makes of the texts is what the next one gets. In memory are one layer, the hidden states of the texts
and, one after the other, the Hessians of experts. The parts of a layer go to a file, from which a run that was
interrupted continues.

Shapes: N tokens, D hidden size, E experts, R routed rows, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.cache.batch import make_batch
from llama4.config import Llama4Config
from llama4.errors import ArgumentError
from llama4.families import family_of
from llama4.families.names import EMBEDDING
from llama4.model.decoder import DecoderLayer
from llama4.model.experts import Experts
from llama4.model.positions import PositionFactors
from llama4.ops.linear import Linear, linear_in_out
from llama4.ops.precision import upcast
from llama4.ops.swiglu import swiglu
from llama4.progress import Bar, track
from llama4.quantization import gptq
from llama4.quantization.gptq import Hessian
from llama4.quantization.int4 import Int4
from llama4.quantization.modules import swap_modules
from llama4.text.tokenizer import Tokenizer
from llama4.weights.load import load
from llama4.weights.quantizing import QuantizingSource
from llama4.weights.safetensors import SafetensorsFiles, stamp_of, write_tensors
from llama4.weights.source import Source, View

MAX_TOKENS = 1 << 17
"""Of the texts; the hidden states of all of them are in memory."""
LENGTH = 1024
"""Of a sequence that the texts are cut into."""
MIN_ROWS = 32
"""Tokens below which an expert is rounded as if nothing were known of its inputs."""
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def read_texts(texts: str, tokenizer: Tokenizer | None, config: Llama4Config) -> list[Tensor]:
    """Texts as sequences of ids, each with BOS where the tokenizer adds it.

    Raises:
        ArgumentError: there is no tokenizer, or less text than a sequence.
    """
    if tokenizer is None:
        raise ArgumentError("calibration takes the model's tokenizer, which does not stand beside its weights")
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    length = min(LENGTH, config.text.max_position_embeddings) - len(bos)
    ids = tokenizer.encode(texts[: 8 * MAX_TOKENS])[:MAX_TOKENS]
    if len(ids) < length:
        raise ArgumentError(
            f"the texts for calibration have {len(ids)} tokens; give at least {length:,}, better {MAX_TOKENS:,}, of "
            "what the model will read"
        )
    return [torch.tensor(bos + ids[at : at + length]) for at in range(0, len(ids), length)]


class CalibratedSource(QuantizingSource):
    """A checkpoint, quantized, of which some matrices have been already: their parts are in files.

    Attributes:
        done: parameter -> the file.
    """

    def __init__(self, source: Source, plan: Mapping[str, Int4]) -> None:
        super().__init__(source, plan)
        self.done: dict[str, Source] = {}

    def _quantized(self, name: str) -> dict[str, Tensor]:
        if name not in self.done:
            return super()._quantized(name)
        format = self.plan[name]
        assert format is not None
        module = name.removesuffix(".weight")
        return {part: self.done[name].read(f"{module}.{part}") for part in format.parts}


@torch.no_grad()
def calibrated(
    source: Source,
    config: Llama4Config,
    plan: Mapping[str, Int4],
    sequences: Sequence[Tensor],
    folder: Path,
    stamp: str,
    *,
    say: Callable[[str], object],
    progress: bool,
) -> CalibratedSource:
    """A checkpoint, quantized by what its layers do with texts. What is not in a layer, the head, is rounded plainly.

    Args:
        source: not quantized.
        plan: the formats of what is quantized.
        sequences: ids, each [T].
        folder: for the parts of each layer.
        stamp: of the files of such a run; those that are there already are used.
        say: called with the number of experts that had too few tokens.

    Raises:
        ArgumentError: a model with layers that no text reaches.
    """
    if config.text.cross_layers:
        raise ArgumentError(
            "texts do not reach layers of cross-attention, which see pictures alone; take --scheme int4"
        )
    with torch.device("meta"):
        layers = list(family_of(config).build(config).language_model.model.layers)
    result = CalibratedSource(source, plan)
    embeddings = source.read(EMBEDDING)
    hidden = [upcast(F.embedding(ids, embeddings)) for ids in sequences]
    dtype = embeddings.dtype  # norms may be in another
    del embeddings
    few = 0
    folder.mkdir(parents=True, exist_ok=True)
    tokens = sum(map(len, sequences))
    with Bar("calibrating", 2 * len(layers) * tokens, "tokens", shown=progress) as bar:
        for i in range(len(layers)):
            layer, prefix = layers.pop(0), f"language_model.model.layers.{i}."
            assert isinstance(layer, DecoderLayer)
            formats = {name.removeprefix(prefix): plan[name] for name in plan if name.startswith(prefix)}
            path = folder / f"layer-{i:05d}.safetensors"
            with bar.step(tokens):
                if not path.is_file() or stamp_of(path) != stamp:
                    load(layer, _below(source, prefix), dtype=dtype)
                    parts, without = _quantize(layer, formats, lambda: _forward(layer, config, hidden))  # noqa: B023
                    few += without
                    write_tensors(path, {prefix + name: part for name, part in parts.items()}, stamp)
            stored = SafetensorsFiles(folder, {path.name: None}, stamp=stamp)
            result.done |= {prefix + name: stored for name in formats}
            with bar.step(tokens):
                swap_modules(layer, formats)
                load(layer, _below(result, prefix), dtype=dtype)
                hidden = _forward(layer, config, hidden)
    if few:
        say(f"{few} experts got fewer than {MIN_ROWS} tokens of the texts, and are rounded as without calibration")
    return result


def _below(source: Source, prefix: str) -> Source:
    """A module's tensors, under the names that they have in it."""
    return View(source, {name.removeprefix(prefix): name for name in source.names() if name.startswith(prefix)}, {})


def _forward(layer: DecoderLayer, config: Llama4Config, hidden: Sequence[Tensor]) -> list[Tensor]:
    """What a layer makes of the hidden states of sequences, each [T, D]."""
    outputs = []
    for x_TD in track(hidden):
        batch = make_batch(1, len(x_TD), x_TD.device)
        factors = PositionFactors.of_batch(config.text, batch, layer.input_layernorm.weight.dtype)
        outputs.append(layer(x_TD, batch, factors, None))
    return outputs


def _quantize(
    layer: DecoderLayer, formats: Mapping[str, Int4], run: Callable[[], object]
) -> tuple[dict[str, Tensor], int]:
    """The parts of a layer's matrices, and how many experts had too few tokens.

    Args:
        run: lets the texts go through the layer.
    """
    hessians: dict[str, Hessian] = {}
    rows: list[tuple[Tensor, ...]] = []
    """What each expert got of each sequence."""
    handles = []
    for path, module in layer.named_modules():
        if isinstance(module, Experts):
            handles.append(
                module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].split(inputs[1].tolist())))
            )
        elif isinstance(module, Linear) and f"{path}.weight" in formats and _input_of(path) == path:
            hessian = hessians[path] = Hessian(module.in_features)
            handles.append(module.register_forward_pre_hook(lambda _, inputs, h=hessian: h.add(inputs[0])))
    parts: dict[str, Tensor] = {}
    few = 0

    def look() -> None:
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()

    def quantize() -> None:
        nonlocal few
        for name in track(tuple(formats)):
            path, format = name.removesuffix(".weight"), formats[name]
            module = layer.get_submodule(path.rpartition(".")[0])
            if isinstance(module, Experts):
                if path.endswith("gate_up_proj"):
                    values, few = _quantize_experts(module, rows, format)
                    parts.update({f"{path.rpartition('.')[0]}.{part}": value for part, value in values.items()})
            else:
                matrix = gptq.quantize(layer.get_parameter(name), hessians[_input_of(path)], format)
                parts.update({f"{path}.{part}": value for part, value in matrix.items()})

    for half in track((look, quantize)):
        half()
    return parts, few


def _input_of(path: str) -> str:
    """The first of the modules that have the same input."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.{_SAME_INPUT.get(name, name)}"


def _quantize_experts(
    experts: Experts, rows: Sequence[tuple[Tensor, ...]], format: Int4
) -> tuple[dict[str, Tensor], int]:
    """Each by the tokens that were routed to it: parts of the stacks, and how many had too few."""
    done: list[dict[str, Tensor]] = []
    few = 0
    for e in track(range(len(experts.gate_up_proj))):
        x_RD = torch.cat([of_each[e] for of_each in rows])
        gate_up_DF, down_FD = experts.gate_up_proj[e], experts.down_proj[e]
        matrices = {"gate_up_proj": gate_up_DF.mT.contiguous(), "down_proj": down_FD.mT.contiguous()}
        if len(x_RD) < MIN_ROWS:
            few += 1
            quantized = {name: format.quantize(matrix) for name, matrix in matrices.items()}
        else:
            hidden_RF = swiglu(*linear_in_out(x_RD, gate_up_DF).chunk(2, dim=-1))
            quantized = {}
            for (name, matrix), inputs in zip(matrices.items(), (x_RD, hidden_RF), strict=True):
                hessian = Hessian(inputs.shape[1])
                hessian.add(inputs)
                quantized[name] = gptq.quantize(matrix, hessian, format)
        done.append({f"{name}.{part}": value for name, own in quantized.items() for part, value in own.items()})
    return {name: torch.stack([own[name] for own in done]) for name in done[0]}, few
