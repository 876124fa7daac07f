"""The shape of a whole model: decoder, vision tower, and the tokens that stand for images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama4.config import hf_json, image_json
from llama4.config.text import TextConfig
from llama4.errors import ArgumentError, ConfigError
from llama4.reading import MAX_PARAMETERS
from llama4.vision.config import VisionConfig
from llama4.vision.tiled_config import TiledVisionConfig


@dataclass(frozen=True)
class Llama4Config:
    """A whole model: decoder, vision tower (None for text-only models), and the tokens that stand for images."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    boi_token_index: int = 200080
    eoi_token_index: int = 200081
    image_token_index: int = 200092
    """Id of `<|patch|>`, whose embeddings image features replace."""
    dtype: str = "bfloat16"
    """The dtype that the checkpoint was saved in."""
    quantization_config: Mapping[str, Any] | None = None
    family: str = "llama4"
    """Key of `llama4.families.FAMILIES`."""
    note: str = ""
    """Shown by `llama4 info`; says for instance which numbers of a preset are guessed."""

    def __post_init__(self) -> None:
        if self.text.cross_layers and self.vision is not None and not isinstance(self.vision, TiledVisionConfig):
            raise ConfigError("layers of cross-attention see the pictures of Llama 3.2's vision tower alone")
        if (count := self.num_parameters()) > MAX_PARAMETERS:
            raise ConfigError(
                f"the sizes in the configuration make {count:.1e} parameters, and may make {MAX_PARAMETERS:.0e}; fetch "
                "its file again"
            )

    def num_parameters(self) -> int:
        """All parameters, without allocating any."""
        if self.vision is None:
            return self.text.num_parameters()
        projector = self.vision.projection_parameters(self.text.hidden_size)
        return self.text.num_parameters() + self.vision.num_parameters() + projector

    def num_active_parameters(self) -> int:
        """Parameters that one token of text uses (the "17B" of Scout and Maverick), without the vision tower."""
        return self.text.num_active_parameters()

    def scaled(self, rope_scaling: Mapping[str, Any]) -> Llama4Config:
        """The same with another scaling of RoPE, see `TextConfig.scaled`.

        Raises:
            ArgumentError: a scaling that cannot be.
        """
        try:
            return replace(self, text=self.text.scaled(rope_scaling))
        except ConfigError as error:
            raise ArgumentError(f"rope_scaling: {error}") from None

    @classmethod
    def from_directory(cls, directory: str | Path) -> Llama4Config:
        """Read `config.json` and, for how pictures are prepared, the image processor's files beside it.

        Raises:
            ConfigError: no such file, not JSON, or a configuration that is not of a Llama 4 model.
        """
        return cls(**hf_json.read_directory(Path(directory)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Llama4Config:
        """Build from the content of Hugging Face's `config.json`, of a multimodal or of a text-only model.

        Raises:
            ConfigError: a configuration that is not of a Llama 4 model.
        """
        return cls(**hf_json.read_config(content))

    def to_dict(self) -> dict[str, Any]:
        """The content of Hugging Face's `config.json`, which transformers reads back as the same model."""
        return hf_json.write_config(vars(self))

    def preprocessor_dict(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`, for transformers' Llama4ImageProcessor."""
        assert self.vision is not None
        return image_json.write_image_config(self.vision)

    def processor_dict(self) -> dict[str, Any]:
        """The content of `processor_config.json`, for transformers' Llama4Processor."""
        assert self.vision is not None
        return image_json.write_processor_config(self.vision)
