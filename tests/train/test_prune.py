"""Pruned models: what stays is what matters most to the data, computed here by hand; and it is a model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama4.api import Llama4
from llama4.cli.main import main
from llama4.errors import ArgumentError, CheckpointError
from llama4.model.multimodal import Llama4Model
from llama4.train import finetune
from llama4.train.prune import prune
from tests import small_model
from tests.train.test_data import write

LAYERS = "language_model.model.layers."


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("prune") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prune") / "data.jsonl"
    return write(path, *({"text": f"it is {i * 37} and {'abc' * i}"} for i in range(12)))


def inputs_of_layers(directory: Path, data: Path) -> tuple[Llama4, list[torch.Tensor], list[torch.Tensor]]:
    """What went into each layer and into each feed-forward, of all tokens, text by text."""
    llm = Llama4.from_pretrained(directory)
    layers = small_model.layers(llm.model)
    into: list[list[torch.Tensor]] = [[] for _ in layers]
    fed: list[list[torch.Tensor]] = [[] for _ in layers]
    outs: list[torch.Tensor] = []
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, args, i=i: into[i].append(args[0]))
        layer.feed_forward.register_forward_pre_hook(lambda module, args, i=i: fed[i].append(args[0]))
    layers[-1].register_forward_hook(lambda module, args, out: outs.append(out))
    tokenizer = llm.tokenizer
    for line in data.read_text().splitlines():
        text = line.removeprefix('{"text": "').removesuffix('"}')
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.special("<|end_of_text|>")]
        with torch.no_grad():
            llm.model(torch.tensor([ids]))
    return llm, [torch.cat(x) for x in (*into, outs)], [torch.cat(x) for x in fed]


def test_experts_that_stay(directory: Path, data: Path, tmp_path: Path) -> None:
    """One expert at a time, token by token, in float64."""
    pruned = prune(directory, tmp_path / "out", data, experts=3, batch_tokens=100, progress=False)
    llm, _, fed = inputs_of_layers(directory, data)
    assert llm.config.text.moe_layers == tuple(pruned.experts)
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for layer, kept in pruned.experts.items():
        moe = small_model.layers(llm.model)[layer].feed_forward
        x = fed[layer].double()
        logits = x @ moe.router.weight.double().mT
        chosen, scores = logits.argmax(-1), logits.amax(-1).sigmoid()
        saliency = torch.zeros(8, dtype=torch.float64)
        for expert in range(8):
            rows = x[chosen == expert] * scores[chosen == expert, None]
            gate, up = (rows @ moe.experts.gate_up_proj[expert].double()).chunk(2, -1)
            out = (torch.nn.functional.silu(gate) * up) @ moe.experts.down_proj[expert].double()
            saliency[expert] = out.norm(dim=-1).mean() if len(rows) else 0.0
        assert torch.allclose(pruned.usage[layer].saliency_E().double(), saliency, rtol=1e-4, atol=1e-7)
        assert set(kept) == set(saliency.topk(3).indices.tolist())
        for name in ("experts.gate_up_proj", "experts.down_proj", "router.weight"):
            key = f"{LAYERS}{layer}.feed_forward.{name}"
            assert torch.equal(after[key], before[key][list(kept)])
    assert all(torch.equal(after[key], before[key]) for key in before if "expert" not in key and "router" not in key)
    smaller = Llama4.from_pretrained(tmp_path / "out")
    assert smaller.config.text.num_local_experts == 3 and smaller.chat("say 1", max_new_tokens=3).text
    healed = finetune(smaller, data, tmp_path / "h", method="full", steps=8, learning_rate=1e-3, progress=False)
    assert healed.losses[-1] < healed.losses[0]


def test_merged_experts_are_weighed_by_tokens(directory: Path, data: Path, tmp_path: Path) -> None:
    pruned = prune(directory, tmp_path / "out", data, experts=2, merge=True, progress=False)
    llm, _, fed = inputs_of_layers(directory, data)
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    merged = 0
    for layer, kept in pruned.experts.items():
        router_ED = small_model.layers(llm.model)[layer].feed_forward.router.weight.detach()
        logits = fed[layer].double() @ router_ED.double().mT
        rows = logits.argmax(-1).bincount(minlength=8)
        likeness = torch.nn.functional.cosine_similarity(logits.mT[:, None], logits.mT[None], dim=-1)
        groups: dict[int, list[int]] = {expert: [expert] for expert in kept}
        for expert in set(range(8)) - set(kept):
            groups[kept[int(likeness[expert, list(kept)].argmax())]].append(expert)
        key = f"{LAYERS}{layer}.feed_forward.experts.down_proj"
        for place, expert in enumerate(kept):
            share = rows[groups[expert]].double() / rows[groups[expert]].sum()
            wanted = (share[:, None, None] * before[key][groups[expert]].double()).sum(0)
            assert torch.allclose(after[key][place].double(), wanted, rtol=1e-5, atol=1e-8)
            merged += len(groups[expert]) > 1
        router = f"{LAYERS}{layer}.feed_forward.router.weight"
        assert torch.equal(after[router], before[router][list(kept)])
    assert merged


def test_layers_that_stay(directory: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prune", str(directory), str(tmp_path / "out"), "--data", str(data), "--layers", "3", "--experts", "7"]
    assert main(command) == 0
    _, into, _ = inputs_of_layers(directory, data)
    turned = [
        float(1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean())
        for a, b in itertools.pairwise(into)
    ]
    gone = turned.index(min(turned))
    assert f"3 layers, without {gone}, 7 experts a layer" in capsys.readouterr().err
    smaller, text = Llama4.from_pretrained(tmp_path / "out"), small_model.config().text
    kept = [i for i in range(4) if i != gone]
    assert smaller.config.text.no_rope_layers == tuple((text.no_rope_layers or ())[i] for i in kept)
    assert smaller.config.text.layer_types == tuple((text.layer_types or ())[i] for i in kept)
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for new, old in enumerate(kept):
        name = "self_attn.q_proj.weight"
        assert torch.equal(after[f"{LAYERS}{new}.{name}"], before[f"{LAYERS}{old}.{name}"])
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err


def test_what_cannot_be(directory: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for experts in (0, 8):
        with pytest.raises(ArgumentError, match=f"experts is {experts}; this model has 8, of which 1 to 7 may stay"):
            prune(directory, tmp_path / "out", data, experts=experts, progress=False)
    with pytest.raises(ArgumentError, match="layers is 4; of this model 1 to 3 may stay"):
        prune(directory, tmp_path / "out", data, layers=4, progress=False)
    with pytest.raises(ArgumentError, match="say how many experts or layers shall stay"):
        prune(directory, tmp_path / "out", data, progress=False)
    with pytest.raises(ArgumentError, match="merge is of the experts that go; say how many experts"):
        prune(directory, tmp_path / "out", data, layers=1, merge=True, progress=False)
    config = small_model.config()
    dense = Llama4Model(replace(config, text=replace(config.text, num_local_experts=0, moe_layers=())))
    dense.init_weights()
    Llama4(dense, Llama4.from_pretrained(directory).tokenizer).save_pretrained(tmp_path / "dense")
    with pytest.raises(ArgumentError, match="experts is 1; this model has no experts"):
        prune(tmp_path / "dense", tmp_path / "out", data, experts=1, progress=False)
    command = ["prune", str(directory), str(tmp_path / "out"), "--data", str(data), "--layers", "3"]
    assert main([*command, "--batch-tokens", "0"]) == 2
    assert "batch_tokens is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--merge"])
    assert "--merge is of the experts that go: --experts N" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="exists already"):
        prune(directory, directory, data, layers=1, progress=False)
    assert not (tmp_path / "out").exists()
