"""FP8 as transformers with FBGEMM, and Meta, write it: experts stacked, in x out, scales per output beside them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.quantization.schemes import Format
from llama4.weights.names import MULTIMODAL, Names
from llama4.weights.source import Source

METHOD = "fbgemm_fp8"
_TURNED = (".experts.gate_up_proj.weight", ".experts.gate_up_proj.weight_scale", ".experts.down_proj.weight")
"""Packed in the model the other way round. (The scales of down_proj are [E, D, 1] in the file, too.)"""


class FbgemmSource:
    """Such a checkpoint under the model's names. What has a scale is quantised; several scales per output are for as
    many groups of inputs. FBGEMM's upper bound for the scales of inputs, which clips large ones, is not applied.

    Raises:
        CheckpointError: weights with a scale that are not e4m3.
    """

    names: Names = MULTIMODAL

    def __init__(self, source: Source) -> None:
        self._source = source
        self._keys: dict[str, str] = {}
        self.plan: dict[str, Format] = {}
        named = {source.names.to_model(key) or key: key for key in source.keys()}  # noqa: SIM118 (a Source is no dict)
        wrong = list[str]()
        for name, key in named.items():
            weight = name.removesuffix("_scale")
            if weight != name and weight in named:
                scale = f"{weight.removesuffix('.weight')}.weight_scale"
                self._keys[scale] = key
                groups, inputs = self.shape(scale)[-1], source.shape(named[weight])[1]
                self.plan[weight] = Format("fp8", inputs // groups if groups > 1 else None)
            elif f"{name}_scale" in named:
                self._keys[f"{name.removesuffix('.weight')}.weight"] = key
                if source.dtype(key) != torch.float8_e4m3fn:
                    wrong.append(f"{key} ({source.dtype(key)})")
            else:
                self._keys[name] = key
        if wrong:
            raise CheckpointError(
                "weights that have scales must be float8_e4m3fn; fetch the checkpoint again", unexpected=wrong
            )

    def keys(self) -> Iterable[str]:
        return self._keys.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        shape = self._source.shape(self._keys[key])
        return (shape[0], shape[2], shape[1]) if key.endswith(_TURNED) else shape

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(self._keys[key])

    def tensor(self, key: str) -> Tensor:
        tensor = self._source.tensor(self._keys[key])
        return tensor.mT.contiguous() if key.endswith(_TURNED) else tensor
