"""Prompt Guard against transformers' class and arithmetic over windows, on random models."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PreTrainedTokenizerFast

from llama4.cli.main import main
from llama4.errors import ArgumentError, CheckpointError, ConfigError, Llama4Error
from llama4.integrations.prompt_guard import OVERLAP, WINDOW, PromptGuard

WORDS = [f"w{i}" for i in range(50)]


def write(directory: Path, labels: int) -> Path:
    torch.manual_seed(labels)
    sizes: dict[str, Any] = {"vocab_size": 54, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_labels": labels, "initializer_range": 0.5, "relative_attention": True}
    sizes |= {
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "max_relative_positions": -1,
        "type_vocab_size": 0,
    }
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, pad_token_id=0))
    model.eval().save_pretrained(directory)
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around: Any = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=[2, 3], ids=["version 2", "version 1"])
def guard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("guard"), request.param)


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) + 4 for word in text.split()]


@torch.inference_mode()
def scores(directory: Path, windows: list[list[int]]) -> torch.Tensor:
    """Each window alone, between [CLS] and [SEP]."""
    model = DebertaV2ForSequenceClassification.from_pretrained(directory).eval()
    return torch.stack([model(torch.tensor([[1, *ids, 2]])).logits[0].softmax(-1) for ids in windows])


def text_of(count: int) -> str:
    generator = torch.Generator().manual_seed(count)
    return " ".join(WORDS[i] for i in torch.randint(0, 50, (count,), generator=generator).tolist())


@pytest.mark.parametrize("third_party", [False, True])
@pytest.mark.parametrize("count", [5, 510, 1300])
def test_the_largest_score_of_all_windows(guard: Path, count: int, third_party: bool) -> None:
    ids, room = ids_of(text_of(count)), WINDOW - 2
    starts = range(0, max(len(ids) - OVERLAP, 1), room - OVERLAP)
    found = PromptGuard.from_pretrained(guard, progress=False).moderate(text_of(count), third_party=third_party)
    probabilities = scores(guard, [ids[start : start + room] for start in starts])
    attacks = slice(1, None) if third_party else slice(-1, None)
    wanted = float(probabilities[:, attacks].sum(1).max())
    assert found.probability == pytest.approx(wanted, abs=1e-5)
    assert found.safe == (wanted < 0.5) == (found.text == "BENIGN")


def test_the_kind_of_attack(guard: Path) -> None:
    model = PromptGuard.from_pretrained(guard, progress=False)
    (row,) = scores(guard, [ids_of("w1 w2 w3")]).tolist()
    found = model.moderate("w1 w2 w3", threshold=0.0, third_party=True)
    labels = ("BENIGN", "MALICIOUS") if len(row) == 2 else ("BENIGN", "INJECTION", "JAILBREAK")
    assert not found.safe and [each.id for each in found.asked] == list(labels[1:])
    assert found.categories[0].id == labels[max(range(1, len(row)), key=row.__getitem__)] == found.text
    for text, threshold in ((" ", 0.5), ("w1", 2.0)):
        with pytest.raises(ArgumentError):
            model.moderate(text, threshold=threshold)


def test_command(guard: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    probability = PromptGuard.from_pretrained(guard, progress=False).moderate("w1 w2").probability
    capsys.readouterr()
    assert main(["moderate", str(guard), "w1 w2", "--threshold", "0"]) == 3
    assert capsys.readouterr().out.startswith(f"unsafe ({probability:.2f}): ")
    assert main(["moderate", str(guard), "w1 w2", "--threshold", "1", "--third-party", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["safe"]
    assert main(["moderate", str(guard), "w1", "--response", "w2"]) == 2
    assert "--response is for Llama Guard" in capsys.readouterr().err
    assert main(["moderate", str(guard), "w1", "--quantization", "int4", "--device", "cpu"]) == 2
    assert "Prompt Guard is not loaded with --quantization; leave it out" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "llama4.integrations.prompt_guard")
    assert main(["moderate", str(guard), "w1"]) == 1
    assert "pip install 'llama4[prompt-guard]'" in capsys.readouterr().err


def test_what_is_no_prompt_guard(tmp_path: Path) -> None:
    directory = write(tmp_path, 2)
    (directory / "model.safetensors").rename(directory / "other.bin")
    with pytest.raises(CheckpointError):
        PromptGuard.from_pretrained(directory, progress=False)
    (directory / "other.bin").rename(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ConfigError, match="a Prompt Guard is a 'deberta-v2' with 2 or 3"):
        PromptGuard.from_pretrained(directory, progress=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, and the weights have 2"),
        ({"hidden_size": 10**9}, "hidden_size = 1000000000, and the weights have 32"),
        ({"vocab_size": "many"}, "vocab_size = 'many', and the weights have 54"),
        ({"max_position_embeddings": 10**12}, "which may be at most 1048576"),
        ({"num_attention_heads": [4]}, "cannot be loaded"),
        ({"id2label": 5}, "with 0 labels"),
        ({"pos_att_type": {"a": 1}}, "cannot be loaded"),
    ],
)
def test_absurd_sizes(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    directory = write(tmp_path, 2)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(Llama4Error, match=reason):
        PromptGuard.from_pretrained(directory, progress=False)


def test_a_pipe_and_a_large_file(tmp_path: Path) -> None:
    directory = write(tmp_path, 2)
    (directory / "added_tokens.json").write_bytes(b" " * (65 << 20))
    with pytest.raises(CheckpointError, match=r"added_tokens\.json has 65"):
        PromptGuard.from_pretrained(directory, progress=False)
    (directory / "added_tokens.json").unlink()
    os.mkfifo(directory / "added_tokens.json")
    with pytest.raises(CheckpointError, match="is no regular file"):
        PromptGuard.from_pretrained(directory, progress=False)
