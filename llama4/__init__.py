"""Llama 4: image and text in, text out.

    from llama4 import Llama4
    llm = Llama4.from_pretrained("tiny")
    print(llm.chat("What can you do?"))

Names are imported when they are first used, so that `import llama4` does not import torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llama4.version import __version__

if TYPE_CHECKING:
    from llama4.api import Llama4
    from llama4.config import PRESETS, Llama4Config, TextConfig
    from llama4.config.generation import GenerationConfig
    from llama4.engine.replies import Reply, Stream, TextDelta, ToolCallDelta, Usage
    from llama4.engine.sampling import Sampler
    from llama4.engine.tokens import Token
    from llama4.errors import (
        ArgumentError,
        BusyError,
        ChatTemplateError,
        CheckpointError,
        ConfigError,
        ContextLengthError,
        DiskError,
        ImageError,
        Llama4Error,
    )
    from llama4.inputs import Inputs, Processor
    from llama4.integrations.accelerate import accelerate
    from llama4.model.multimodal import Llama4Model
    from llama4.serve.engine import Engine
    from llama4.text.guard import Category, Moderation
    from llama4.text.tokenizer import Tokenizer
    from llama4.text.tool_calls import ToolCall
    from llama4.vision.config import VisionConfig
    from llama4.vision.images import load_image
    from llama4.vision.limits import ImageLimits

# `llama4.vision` is the folder vision/ at the top of the repository. An installed package has it inside llama4/ (see
# pyproject.toml), a checkout or an editable installation beside llama4/. There submodules are looked up in the folder
# that holds both, too: appended, not put first, so that nothing in it can hide a module of llama4/.
if not os.path.isdir(os.path.join(__path__[0], "vision")):
    __path__.append(os.path.dirname(__path__[0]))

_HOMES = {
    "llama4.api": ("Llama4",),
    "llama4.config": ("PRESETS", "Llama4Config", "TextConfig"),
    "llama4.config.generation": ("GenerationConfig",),
    "llama4.errors": (
        "ArgumentError",
        "BusyError",
        "ChatTemplateError",
        "CheckpointError",
        "ConfigError",
        "ContextLengthError",
        "DiskError",
        "ImageError",
        "Llama4Error",
    ),
    "llama4.engine.tokens": ("Token",),
    "llama4.inputs": ("Inputs", "Processor"),
    "llama4.integrations.accelerate": ("accelerate",),
    "llama4.model.multimodal": ("Llama4Model",),
    "llama4.engine.replies": ("Reply", "Stream", "TextDelta", "ToolCallDelta", "Usage"),
    "llama4.engine.sampling": ("Sampler",),
    "llama4.serve.engine": ("Engine",),
    "llama4.text.guard": ("Category", "Moderation"),
    "llama4.text.tokenizer": ("Tokenizer",),
    "llama4.text.tool_calls": ("ToolCall",),
    "llama4.vision.config": ("VisionConfig",),
    "llama4.vision.images": ("load_image",),
    "llama4.vision.limits": ("ImageLimits",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "PRESETS",
    "ArgumentError",
    "BusyError",
    "Category",
    "ChatTemplateError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DiskError",
    "Engine",
    "GenerationConfig",
    "ImageError",
    "ImageLimits",
    "Inputs",
    "Llama4",
    "Llama4Config",
    "Llama4Error",
    "Llama4Model",
    "Moderation",
    "Processor",
    "Reply",
    "Sampler",
    "Stream",
    "TextConfig",
    "TextDelta",
    "Token",
    "Tokenizer",
    "ToolCall",
    "ToolCallDelta",
    "Usage",
    "VisionConfig",
    "__version__",
    "accelerate",
    "load_image",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
