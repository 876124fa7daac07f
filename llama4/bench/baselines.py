"""Others that run the same weights, each at its best setting. Imported when one is asked for."""

from __future__ import annotations

import sys
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llama4.bench.engines import Setting, message
from llama4.model.device import DTYPES
from llama4.weights.checkpoint import read_config

try:
    from transformers import AutoProcessor, Llama4ForCausalLM, Llama4ForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error
except ImportError:
    raise ValueError("transformers is not installed; pip install transformers torchvision") from None


class Transformers:
    """transformers with its fastest attention, logits of the last token alone, and its own cache."""

    def __init__(self, setting: Setting) -> None:
        set_verbosity_error()  # it warns of what every Llama 4 configuration says
        if not sys.stderr.isatty():
            disable_progress_bar()
        text_only = read_config(setting.directory).vision is None
        kind: Any = Llama4ForCausalLM if text_only else Llama4ForConditionalGeneration
        dtype = DTYPES[setting.dtype]
        model = kind.from_pretrained(setting.directory, dtype=dtype, attn_implementation="sdpa")
        self.model = model.eval().to(setting.device)
        self.processor: Any = None if text_only else AutoProcessor.from_pretrained(setting.directory)

    @torch.inference_mode()
    def start(self, ids_BT: Tensor) -> tuple[Tensor, Any]:
        out = self.model(ids_BT.to(self.model.device), use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    @torch.inference_mode()
    def step(self, ids_B: Tensor, memory: Any) -> Tensor:
        ids = ids_B[:, None].to(self.model.device)
        logits: Tensor = self.model(ids, past_key_values=memory, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]

    def choose(self, logits_BV: Tensor) -> list[int]:
        ids: list[int] = logits_BV.argmax(-1).tolist()
        return ids

    def advance(self, ids: list[int], memory: Any) -> list[int]:
        return self.choose(self.step(torch.tensor(ids), memory))

    @torch.inference_mode()
    def look(self, picture: Image.Image, question: str) -> tuple[Tensor, tuple[int, int]]:
        given = self.processor.apply_chat_template(
            [message(picture, question)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        logits: Tensor = self.model(**given, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits, (given["input_ids"].shape[1], len(given["pixel_values"]))
