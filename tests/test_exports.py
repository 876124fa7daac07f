"""What `import llama4` offers, and what it costs."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llama4
from llama4.cli.options import CHAT
from llama4.engine.sampling import SamplingOptions
from llama4.options import Options


def test_every_exported_name_is_there() -> None:
    for name in llama4.__all__:
        assert getattr(llama4, name) is not None
    assert set(llama4.__all__) <= set(dir(llama4))


def test_public_names() -> None:
    """People rely on these; a name that leaves this list breaks their code."""
    assert set(llama4.__all__) == {
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
        "PRESETS",
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
    }


def test_the_version_is_that_of_the_package() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert llama4.__version__ == pyproject["project"]["version"]


def test_the_signature_of_chat() -> None:
    parameters = inspect.signature(llama4.Llama4.chat).parameters
    assert {name: parameter.default for name, parameter in list(parameters.items())[2:]} == {
        "max_new_tokens": 256,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "min_p": None,
        "repetition_penalty": None,
        "seed": None,
        "stop": None,
        "tools": None,
        "continue_final_message": None,
        "chat_template_kwargs": None,
        "response_format": None,
        "regex": None,
        "choices": None,
        "grammar": None,
        "tool_choice": None,
        "presence_penalty": None,
        "frequency_penalty": None,
        "logit_bias": None,
        "min_tokens": None,
        "ignore_eos": False,
        "top_logprobs": 0,
        "n": 1,
    }


def test_options_have_the_same_names_everywhere() -> None:
    chat = set(inspect.signature(llama4.Llama4.chat).parameters) - {"self", "messages"}
    assert set(Options.__annotations__) == chat - {"n"}, "a stream is of one reply"
    forms = {"response_format", "regex", "choices", "grammar", "tool_choice"}
    for_programs = {"tools", "continue_final_message", "logit_bias", "ignore_eos", "top_logprobs", "n"}
    assert set(CHAT) == chat - for_programs - forms
    assert set(SamplingOptions.__annotations__) == {field.name for field in dataclasses.fields(llama4.Sampler)}


def test_errors_are_value_errors() -> None:
    for error in (
        llama4.ChatTemplateError,
        llama4.CheckpointError,
        llama4.ConfigError,
        llama4.ContextLengthError,
        llama4.DiskError,
        llama4.ImageError,
    ):
        assert issubclass(error, ValueError)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Llama5'"):
        llama4.Llama5  # noqa: B018


def test_importing_and_asking_for_help_load_no_torch() -> None:
    code = "import sys, llama4, llama4.cli.main; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
