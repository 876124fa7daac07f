"""The ways in which checkpoints in Hugging Face's layout are quantized, by `quant_method` of their configuration."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from llama4.families.names import NameTable
from llama4.quantization.plan import QuantizationPlan
from llama4.weights.source import Source, without

_CACHE_SCALE = re.compile(
    r".*\.self_attn\.([qkv]_(scale|zero_point)|[kv]_proj\.((output|k|v)_(scale|zero_point)|[kv]_bias))"
)


class QuantMethod(ABC):
    """What a package for quantization writes. A new one is a subclass, registered in `huggingface.QUANT_METHODS`."""

    name: ClassVar[str]
    """`quant_method` in the `quantization_config` of config.json."""
    stacks_experts: ClassVar[bool] = True
    """Whether experts that are three Linears each become stacks: all of a layer are in one format."""

    def check(self, content: Mapping[str, Any]) -> None:  # noqa: B027 (some have but one kind)
        """See, before any weights are opened, that a `quantization_config` is of a kind that can be run.

        Raises:
            CheckpointError: it is not; with what the configuration says.
        """

    @abstractmethod
    def open(self, source: Source, content: Mapping[str, Any], dtype: torch.dtype, table: NameTable) -> Source:
        """A checkpoint's tensors, under the model's names, as parts of packed weights; what is stored in a format that
        is not run, dequantized.

        Args:
            dtype: of what is dequantized.
            table: says which matrices have their rows in another order in the files.

        Raises:
            CheckpointError: tensors that are missing, or do not fit together.
        """

    def writes(self, plan: QuantizationPlan) -> bool:
        """Whether `encode` writes what is quantized so."""
        return False

    def encode(
        self, source: Source, content: Mapping[str, Any] | None, table: NameTable
    ) -> tuple[Source, Mapping[str, Any] | None]:
        """The way back: parts of packed weights -> the tensors of a checkpoint, still under the model's names, and its
        `quantization_config`.

        Args:
            content: the `quantization_config` that was read, if the model was loaded quantized.
            table: gives names in the files, which are those in a configuration.
        """
        raise AssertionError(f"{self.name} is read, not written")


def without_cache_scales(source: Source) -> Source:
    """A checkpoint without the scales that were measured for a quantized cache of keys and values."""
    note = (
        "scales for a quantized cache of keys and values are not used: the cache has the model's dtype, or, with "
        "cache_dtype, scales of its own"
    )
    return without(source, _CACHE_SCALE.fullmatch, note)
