"""transformers' Llama 4 with the weights of a model of ours, and its dense experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llama4.bench.device.record import Skip
from llama4.config import Llama4Config, TextConfig
from llama4.model.multimodal import Llama4Model

try:
    from transformers import Llama4ForCausalLM, Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
    from transformers.utils.logging import set_verbosity_error
except ImportError as error:
    raise Skip(f"transformers cannot be imported: {error}") from None

_PREFIX = "language_model."


def _config(text: TextConfig) -> Any:
    set_verbosity_error()
    content = Llama4Config(text=text, vision=None, image_token_index=-1).to_dict()
    config = Llama4TextConfig(**content)
    config._attn_implementation = "sdpa"
    return config


class Peer:
    """Its model for text, whose parameters are the very tensors of ours."""

    def __init__(self, model: Llama4Model) -> None:
        with torch.device("meta"):
            self._model: Any = nn.Module.to(Llama4ForCausalLM(_config(model.config.text)), model.dtype)
        weights = {name.removeprefix(_PREFIX): value for name, value in model.state_dict().items()}
        self._model.load_state_dict(weights, assign=True)
        for name, buffer in list(self._model.named_buffers()):  # of RoPE; not in a state dict
            assert buffer.device.type == "meta", name
        self._model.model.rotary_emb = type(self._model.model.rotary_emb)(self._model.config).to(model.device)
        self._model.eval()

    def read(self, ids_BT: Tensor) -> tuple[Tensor, Any]:
        """Logits of the last tokens, [B, V], and its cache."""
        out = self._model(ids_BT, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def step(self, ids_B1: Tensor, cache: Any) -> Tensor:
        logits: Tensor = self._model(ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]


def moe_layer(ours: nn.Module, text: TextConfig) -> nn.Module:
    """One of its layers of experts, with the weights of one of ours."""
    with torch.device("meta"):
        layer: nn.Module = Llama4TextMoe(_config(text)).to(torch.bfloat16)
    layer.load_state_dict(ours.state_dict(), assign=True)
    return layer.eval()
