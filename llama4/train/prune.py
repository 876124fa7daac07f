"""Fewer experts or layers: those that matter least to texts and pictures of yours go. What is left is healed by
`finetune --method full` or `distill`.

Of an expert counts the mean length of what it adds to a token that is routed to it, its score included: |f(g x)|, as
Llama 4 scales the input, in place of g |f(x)| (REAP: Lasby et al. 2025, "REAP the experts"). Of a layer, how far it
turns a token: 1 - the mean cosine of what goes in and what comes out (ShortGPT: Men et al. 2024, equation 1).

Shapes: N packed tokens, R routed rows, D hidden size, E experts, K of them that stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.api import Llama4
from llama4.config import Llama4Config, TextConfig
from llama4.errors import ArgumentError
from llama4.model.experts import Experts
from llama4.model.moe import Router
from llama4.ops.openmp import passive_waiting
from llama4.progress import Bar
from llama4.quantization.weight import QuantizedWeight
from llama4.train.data import Batches, load_dataset
from llama4.train.objectives import hidden_states
from llama4.train.options import TrainingOptions
from llama4.weights.checkpoint import read_config
from llama4.weights.directory import check_free
from llama4.weights.model_source import ModelSource
from llama4.weights.save import save
from llama4.weights.source import Tensors

_LAYERS = "language_model.model.layers."


@dataclass
class Usage:
    """What a layer did with the data.

    Attributes:
        tokens: that went through it.
        cosine: summed over them, of what went in and what came out.
        rows_E: tokens that each expert got; None of a layer without experts.
        added_E: summed over them, the length of what the expert gave.
        logits_EE: summed over all tokens, the products of the router's logits for two experts.
    """

    tokens: int = 0
    cosine: float = 0.0
    rows_E: Tensor | None = None
    added_E: Tensor | None = None
    logits_EE: Tensor | None = None

    @property
    def influence(self) -> float:
        """How far the layer turns a token."""
        return 1 - self.cosine / max(1, self.tokens)

    def saliency_E(self) -> Tensor:
        """The mean length of what each expert gives; 0 where it was never chosen."""
        assert self.rows_E is not None and self.added_E is not None
        return self.added_E / self.rows_E.clamp(min=1)


@dataclass(frozen=True)
class Pruned:
    """What stayed.

    Attributes:
        layers: of the old model, in their order.
        experts: old layer -> its old experts, in their order; none for layers without.
        usage: of every old layer.
    """

    layers: tuple[int, ...]
    experts: Mapping[int, tuple[int, ...]]
    usage: list[Usage] = field(repr=False)


def prune(
    source: str | Path,
    target: str | Path,
    data: str | Path,
    *,
    experts: int | None = None,
    layers: int | None = None,
    merge: bool = False,
    batch_tokens: int = 4096,
    max_length: int = 2048,
    progress: bool = True,
) -> Pruned:
    """Write a smaller model.

    Args:
        source: a directory, not quantized.
        target: appears complete; it must not hold anything yet.
        data: what the model is to keep, JSON lines as `finetune` takes them; every token of them counts.
        experts: how many stay in each layer that has some.
        layers: how many stay.
        merge: an expert that goes is not lost, but added to that which stays and whose router's logits are most like
            its own, weighed by the tokens of both (Li et al. 2024, "Merge, then compress", but for the neurons, which
            are not aligned here).
        batch_tokens, max_length: see `TrainingOptions`.

    Raises:
        Llama4Error: numbers that cannot be, packed weights, wrong data, a target that is in use.
    """
    TrainingOptions(batch_tokens=batch_tokens, max_length=max_length)  # refuses what cannot be
    check_free(target)  # before all the work, and again where nobody comes between
    llm = Llama4.from_pretrained(source, dtype=read_config(Path(source)).dtype or "auto", progress=progress)
    _check(llm, experts, layers, merge)
    usage = measure(llm, data, batch_tokens, max_length, progress)
    chosen = choose(usage, llm.config.text, experts, layers)
    tensors = pruned_tensors(llm, chosen, merge)
    config = pruned_config(llm.config, chosen, experts)
    save(
        tensors,
        config,
        target,
        tokenizer=llm.tokenizer,
        side_files=llm.side_files,
        progress=progress,
        must_be_free=True,
    )
    return chosen


def _check(llm: Llama4, experts: int | None, layers: int | None, merge: bool) -> None:
    text = llm.config.text
    if experts is None and layers is None:
        raise ArgumentError("say how many experts or layers shall stay")
    if merge and experts is None:
        raise ArgumentError("merge is of the experts that go; say how many experts shall stay")
    if experts is not None and not text.moe_layers:
        raise ArgumentError(f"experts is {experts}; this model has no experts; say how many layers shall stay")
    if any(isinstance(module, QuantizedWeight) for module in llm.model.modules()):
        raise ArgumentError("packed weights are not pruned; take the unquantized model")
    if experts is not None and not text.num_experts_per_tok <= experts < text.num_local_experts:
        raise ArgumentError(
            f"experts is {experts}; this model has {text.num_local_experts}, of which {text.num_experts_per_tok} to "
            f"{text.num_local_experts - 1} may stay"
        )
    if layers is not None and not 1 <= layers < text.num_hidden_layers:
        raise ArgumentError(f"layers is {layers}; of this model 1 to {text.num_hidden_layers - 1} may stay")


@passive_waiting()
@torch.no_grad()
def measure(llm: Llama4, data: str | Path, batch_tokens: int, max_length: int, progress: bool = True) -> list[Usage]:
    """What each layer does with the data."""
    window = llm.config.text.max_position_embeddings
    dataset = load_dataset(data, llm.processor, max_length=min(max_length, window), learn="all", progress=progress)
    batches = Batches(dataset.examples, llm.processor, batch_tokens, None, dataset.rejected)
    with (
        watched(llm.model.language_model.model.layers) as usage,
        Bar("calibrating", dataset.num_tokens, "tokens", shown=progress) as bar,
    ):
        for batch in batches:
            hidden_states(llm.model, batch)
            bar.advance(batch.num_tokens)
    return usage


@contextmanager
def watched(layers: nn.ModuleList) -> Iterator[list[Usage]]:
    """Inside, what goes through the layers is added up."""
    usage, hooks = [Usage() for _ in layers], []

    def of_layer(one: Usage, module: nn.Module, inputs: tuple[Any, ...], out_ND: Tensor) -> None:
        one.tokens += len(out_ND)
        one.cosine += float(F.cosine_similarity(inputs[0].float(), out_ND.float(), dim=-1).sum())

    def of_router(one: Usage, router: Router, inputs: tuple[Tensor], output: object) -> None:
        logits_NE = router.logits(inputs[0])
        logits_EE = logits_NE.mT @ logits_NE
        one.logits_EE = logits_EE if one.logits_EE is None else one.logits_EE + logits_EE

    def of_experts(one: Usage, module: nn.Module, inputs: tuple[Tensor, Tensor], out_RD: Tensor) -> None:
        rows_E = inputs[1]
        expert_R = torch.arange(len(rows_E), device=rows_E.device).repeat_interleave(rows_E)
        added_E = torch.zeros(len(rows_E), device=out_RD.device)
        added_E.index_add_(0, expert_R, out_RD.float().norm(dim=-1))
        one.rows_E = rows_E.clone() if one.rows_E is None else one.rows_E + rows_E
        one.added_E = added_E if one.added_E is None else one.added_E + added_E

    for one, layer in zip(usage, layers, strict=True):
        hooks.append(layer.register_forward_hook(lambda *call, one=one: of_layer(one, *call)))
        for module in layer.modules():
            watch = of_router if isinstance(module, Router) else of_experts if isinstance(module, Experts) else None
            if watch is not None:
                hooks.append(module.register_forward_hook(lambda *call, one=one, watch=watch: watch(one, *call)))
    try:
        yield usage
    finally:
        for hook in hooks:
            hook.remove()


def choose(usage: list[Usage], config: TextConfig, experts: int | None, layers: int | None) -> Pruned:
    """Which layers and experts stay."""
    order = sorted(range(len(usage)), key=lambda i: -usage[i].influence)
    kept_layers = tuple(sorted(order[:layers]))
    kept: dict[int, tuple[int, ...]] = {}
    for i in kept_layers:
        if config.uses_experts(i):
            saliency_E = usage[i].saliency_E()
            best = saliency_E.sort(descending=True, stable=True).indices[:experts]
            kept[i] = tuple(sorted(best.tolist()))
    return Pruned(kept_layers, kept, usage)


def pruned_config(config: Llama4Config, pruned: Pruned, experts: int | None) -> Llama4Config:
    text = config.text
    assert text.no_rope_layers is not None and text.layer_types is not None
    places = {old: new for new, old in enumerate(pruned.layers)}
    return replace(
        config,
        text=replace(
            text,
            num_hidden_layers=len(places),
            no_rope_layers=tuple(text.no_rope_layers[i] for i in places),
            layer_types=tuple(text.layer_types[i] for i in places),
            moe_layers=tuple(places[i] for i in text.moe_layers or () if i in places),
            num_local_experts=experts or text.num_local_experts,
        ),
    )


def pruned_tensors(llm: Llama4, pruned: Pruned, merge: bool) -> Tensors:
    """The weights that stay, under their new names."""
    weights = ModelSource(llm.model)
    places = {old: new for new, old in enumerate(pruned.layers)}
    tensors: dict[str, Tensor] = {}
    for name in weights.names():
        tensor = weights.read(name)
        if not name.startswith(_LAYERS):
            tensors[name] = tensor
            continue
        number, _, rest = name.removeprefix(_LAYERS).partition(".")
        layer = int(number)
        if layer not in places:
            continue
        if layer in pruned.experts and rest.startswith(("feed_forward.experts.", "feed_forward.router.")):
            kept = pruned.experts[layer]
            is_merged = merge and not rest.startswith("feed_forward.router.")
            tensor = _merged(tensor, kept, pruned.usage[layer]) if is_merged else tensor[list(kept)]
        tensors[f"{_LAYERS}{places[layer]}.{rest}"] = tensor
    return Tensors(tensors)


def _merged(weight_EIO: Tensor, kept: tuple[int, ...], usage: Usage) -> Tensor:
    """[E, I, O] -> [K, I, O]: each that stays with those that go to it, weighed by their tokens."""
    assert usage.rows_E is not None and usage.logits_EE is not None
    norm_E = usage.logits_EE.diagonal().sqrt().clamp(min=1e-12)
    likeness_EK = (usage.logits_EE / norm_E[:, None] / norm_E)[:, list(kept)]
    home_E = likeness_EK.argmax(-1)
    home_E[list(kept)] = torch.arange(len(kept), device=home_E.device)
    merged_KIO = []
    for place, expert in enumerate(kept):
        group = (home_E == place).nonzero().squeeze(1)
        rows = usage.rows_E[group].float()
        if not rows.any():
            merged_KIO.append(weight_EIO[expert])
            continue
        share = rows / rows.sum()
        merged = sum(s * weight_EIO[i].float() for s, i in zip(share.tolist(), group.tolist(), strict=True))
        assert isinstance(merged, Tensor)
        merged_KIO.append(merged.to(weight_EIO.dtype))
    return torch.stack(merged_KIO)
