"""`PromptGuard`: Meta's classifiers of attacks on a model, by transformers' own class (the extra `prompt-guard`).

Llama Prompt Guard 2 (86M and 22M) tells malicious texts from benign ones; Prompt Guard 1 (86M) knows injections (an
instruction inside of data) and jailbreaks. What they compute is in their model cards
(github.com/meta-llama/PurpleLlama); the scores are those of Meta's `inference.py` (llama-cookbook).

Shapes: W windows, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DebertaV2ForSequenceClassification

from llama4.config import CONFIG_FILE
from llama4.config.generation import is_number
from llama4.errors import ArgumentError, CheckpointError, ConfigError, Llama4Error
from llama4.model.device import resolve_device
from llama4.reading import MAX_TOKENIZER_BYTES, check_regular, check_size, read_json
from llama4.text.guard import Category, Moderation
from llama4.weights import hub
from llama4.weights.safetensors import open_safetensors

MODEL_TYPE = "deberta-v2"
WINDOW, OVERLAP = 512, 64
"""Tokens that the models read at once, and those that two windows of a longer text have in common."""
_BATCH = 16
_LAYER = "deberta.encoder.layer."
_PLACES = {
    "vocab_size": ("deberta.embeddings.word_embeddings.weight", 0),
    "hidden_size": ("deberta.embeddings.word_embeddings.weight", 1),
    "intermediate_size": (f"{_LAYER}0.intermediate.dense.weight", 0),
}
"""Sizes of config.json -> where the weights have them: a tensor, and which of its sizes."""
_MAX_POSITIONS = 1 << 20
_LABELS = {2: ("BENIGN", "MALICIOUS"), 3: ("BENIGN", "INJECTION", "JAILBREAK")}
"""By their number: version 2, and version 1."""


class PromptGuard:
    """A classifier of attacks; make one with `from_pretrained`."""

    def __init__(self, model: DebertaV2ForSequenceClassification, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.labels = _LABELS[model.config.num_labels or 2]

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        device: str | torch.device = "auto",
        progress: bool = True,
    ) -> PromptGuard:
        """Load a model; arguments are those of `Llama4.from_pretrained`. No code that comes with it is run, and weights
        are read from safetensors alone.

        Raises:
            Llama4Error: no such model, or its subclasses `ConfigError` for one that is no Prompt Guard and
                `CheckpointError` for files that are at fault.
        """
        directory = hub.resolve(name, revision=revision, subfolder=subfolder, token=token, progress=progress)
        content = read_json(directory / CONFIG_FILE)
        kind, names = content.get("model_type"), content.get("id2label") or ["", ""]
        labels = len(names) if isinstance(names, (dict, list)) else 0
        if kind != MODEL_TYPE or labels not in _LABELS:
            raise ConfigError(
                f"{directory / CONFIG_FILE} is of a {kind!r:.80} with {labels} labels; a Prompt Guard is a "
                f"{MODEL_TYPE!r} with 2 or 3, such as meta-llama/Llama-Prompt-Guard-2-86M"
            )
        if not any(directory.glob("*.safetensors")):
            raise CheckpointError(f"{directory} has no weights in safetensors, the one format that is read")
        _check_sizes(directory, content)
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = DebertaV2ForSequenceClassification.from_pretrained(
                directory, use_safetensors=True, dtype=torch.float32, **local
            )
            tokenizer = AutoTokenizer.from_pretrained(directory, **local)
        except Exception as error:  # of transformers, for fields of other types than its own
            raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
        return cls(model.eval().to(resolve_device(device)), tokenizer)

    @torch.inference_mode()
    def moderate(self, text: str, *, threshold: float = 0.5, third_party: bool = False) -> Moderation:
        """Whether a text attacks the model that it is given to.

        A longer text is read in windows of 512 tokens, each of which begins with the last 64 of the one before; the
        probability is the largest of theirs.

        Args:
            threshold: probability from which a text is unsafe.
            third_party: whether it comes from elsewhere than the user, such as a web page or a tool: then any
                instruction in it counts, by version 1 (the sum of its injection and jailbreak). Version 2 has one
                score for both.

        Raises:
            ArgumentError: an empty text, or a threshold that cannot be.
        """
        if not text.strip():
            raise ArgumentError("the text is empty; give what is to be judged")
        if not is_number(threshold) or not 0 <= threshold <= 1:
            raise ArgumentError(f"threshold is {threshold!r:.80}; it must be between 0 and 1")
        attacks = list(range(1 if third_party else len(self.labels) - 1, len(self.labels)))
        scores_WL = self._scores(text)
        sums_W = scores_WL[:, attacks].sum(dim=1)
        worst = int(sums_W.argmax())
        probability = float(sums_W[worst])
        asked = tuple(Category(self.labels[i], self.labels[i].title()) for i in attacks)
        if probability < threshold:
            return Moderation(True, probability, (), self.labels[0], asked)
        found = asked[int(scores_WL[worst, attacks].argmax())]
        return Moderation(False, probability, (found,), found.id, asked)

    def _scores(self, text: str) -> torch.Tensor:
        """The probability of each label in each window, [W, L]."""
        inputs = self.tokenizer(
            text,
            truncation=True,
            max_length=WINDOW,
            stride=OVERLAP,
            return_overflowing_tokens=True,
            padding=True,
            return_tensors="pt",
        )
        fields = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        parts = zip(*(fields[name].split(_BATCH) for name in fields), strict=True)
        logits = [self.model(**dict(zip(fields, part, strict=True))).logits for part in parts]
        return torch.cat(logits).softmax(dim=-1)


def _check_sizes(directory: Path, content: Mapping[str, Any]) -> None:
    """Before transformers builds what config.json asks for.

    Raises:
        CheckpointError: the weights are of other sizes, or a file is none, or larger than its kind is.
    """
    try:
        for path in directory.iterdir():
            if path.suffix in (".json", ".safetensors"):
                check_regular(path)
            if path.suffix == ".json":
                check_size(path, path.stat().st_size, MAX_TOKENIZER_BYTES)
        files = open_safetensors(directory)
    except Llama4Error as error:
        raise CheckpointError(str(error)) from None
    names = files.names()
    there = {field: files.spec(name).shape[axis : axis + 1] for field, (name, axis) in _PLACES.items() if name in names}
    there["num_hidden_layers"] = (len({name.split(".")[3] for name in names if name.startswith(_LAYER)}),)
    for field, size in there.items():
        if [content.get(field)] != list(size):
            raise CheckpointError(
                f"{directory / CONFIG_FILE} has {field} = {content.get(field)!r:.80}, and the weights have "
                f"{', '.join(map(str, size))}; fetch both again"
            )
    positions = content.get("max_position_embeddings", WINDOW)
    if not isinstance(positions, int) or not 0 < positions <= _MAX_POSITIONS:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} has max_position_embeddings = {positions!r:.80}, which may be at most "
            f"{_MAX_POSITIONS}; fetch it again"
        )
