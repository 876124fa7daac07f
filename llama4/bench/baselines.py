"""Other engines that run the same weights, each at its best setting. Imported when one is asked for."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llama4.bench.engine import EngineConfig, image_message
from llama4.errors import Llama4Error
from llama4.model.device import DTYPES
from llama4.weights.checkpoint import read_config

try:
    from transformers import AutoModelForCausalLM, AutoProcessor, Llama4ForCausalLM, Llama4ForConditionalGeneration
    from transformers import __version__ as transformers_version
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error
except ImportError:
    raise Llama4Error("transformers is not installed; pip install transformers==5.23.0 torchvision") from None

FAILURES = (OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError, ImportError)
"""What transformers raises where it cannot load or run a checkpoint."""


def load_transformers(directory: str, dtype: torch.dtype, attention: str) -> Any:
    """transformers' model of a checkpoint, in evaluation mode: `Llama4ForCausalLM` if it has no vision tower, else
    `Llama4ForConditionalGeneration`.

    Raises:
        Llama4Error: transformers cannot load it.
    """
    set_verbosity_error()  # it warns about every Llama 4 configuration
    if not sys.stderr.isatty():
        disable_progress_bar()
    text_only = read_config(directory).vision is None
    kind: Any = Llama4ForCausalLM if text_only else Llama4ForConditionalGeneration
    try:
        model = kind.from_pretrained(directory, dtype=dtype, attn_implementation=attention).eval()
    except FAILURES as error:
        raise transformers_error(directory, error) from error
    if not text_only:
        model.language_model.register_forward_hook(_add_image_outputs)
    return model


def load_dense(path: Path) -> Any:
    """transformers' model of a directory or of a GGUF file, which it dequantizes, in float32.

    Raises:
        Llama4Error: transformers cannot load it.
    """
    is_file = path.is_file()
    place: dict[str, Any] = {"gguf_file": path.name} if is_file else {}
    try:
        return AutoModelForCausalLM.from_pretrained(
            path.parent if is_file else path, dtype=torch.float32, **place
        ).eval()
    except FAILURES as error:
        raise transformers_error(str(path), error) from error


def _add_image_outputs(module: nn.Module, inputs: object, output: Any) -> None:
    """transformers 5.24.0 raises an AttributeError at the end of every forward of a model with a vision tower: it reads
    `image_outputs` of its text model's output, which has no such field."""
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def transformers_error(directory: str, error: Exception) -> Llama4Error:
    """One line for a user, which says what version would work."""
    return Llama4Error(
        f"transformers {transformers_version} cannot run {directory}: {type(error).__name__}: {error}; "
        "transformers 5.23.0 and 5.24.0 are tested"
    )


class TransformersEngine:
    """transformers with its fastest attention, logits of the last token alone, and its own cache."""

    def __init__(self, config: EngineConfig) -> None:
        model = load_transformers(config.directory, DTYPES[config.dtype], "sdpa")
        self.model = model.to(config.device)
        has_vision = isinstance(model, Llama4ForConditionalGeneration)
        self.processor: Any = AutoProcessor.from_pretrained(config.directory) if has_vision else None
        renamed = "cache" in inspect.signature(model.forward).parameters
        self._cache = "cache" if renamed else "past_key_values"  # renamed in 5.24

    @torch.inference_mode()
    def prefill(self, ids_BT: Tensor) -> tuple[Tensor, Any]:
        out = self.model(ids_BT.to(self.model.device), use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out[self._cache]

    @torch.inference_mode()
    def decode(self, ids_B: Tensor, cache: Any) -> Tensor:
        ids = ids_B[:, None].to(self.model.device)
        logits: Tensor = self.model(ids, use_cache=True, logits_to_keep=1, **{self._cache: cache}).logits
        return logits[:, -1]

    def greedy(self, logits_BV: Tensor) -> list[int]:
        ids: list[int] = logits_BV.argmax(-1).tolist()
        return ids

    def decode_greedy(self, ids: list[int], cache: Any) -> list[int]:
        return self.greedy(self.decode(torch.tensor(ids), cache))

    @torch.inference_mode()
    def prefill_image(self, picture: Image.Image, question: str) -> tuple[Tensor, tuple[int, int]]:
        given = self.processor.apply_chat_template(
            [image_message(picture, question)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        logits: Tensor = self.model(**given, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits, (given["input_ids"].shape[1], len(given["pixel_values"]))
