"""What a family of models is: everything that differs between Llama 4 and others, for those who read, write and prompt
a model. A new family is one file with a subclass of `Family`, registered in `llama4.families`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from llama4.config import Llama4Config, image_json
from llama4.config.fields import FieldTable
from llama4.errors import Llama4Error
from llama4.families.fusion import EarlyFusion, Fusion
from llama4.families.names import NameTable
from llama4.model.experts import Experts
from llama4.model.multimodal import Llama4Model
from llama4.quantization.plan import PARTS
from llama4.text import prompt
from llama4.text.template_agreement import Compose
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import Vocabulary


class Family(ABC):
    """A family that this library's decoder runs: its configuration is a `Llama4Config`, whatever its files are like."""

    name: ClassVar[str]
    """`Llama4Config.family` of its models."""
    title: ClassVar[str]
    """What people call it."""
    model_types: ClassVar[tuple[str, ...]]
    """`model_type` in its config.json, the first of which is written."""
    presets: ClassVar[Mapping[str, Callable[[], Llama4Config]]] = {}
    """Known models by name."""
    vocabulary: ClassVar[Vocabulary]
    """How its tokenizer.model cuts text, and the special tokens behind its ranks."""
    quantizable: ClassVar[Mapping[str, str]] = PARTS
    """Parts of the model that can be quantized, as patterns of parameter names."""
    fusion: ClassVar[Fusion] = EarlyFusion()
    """How its models take pictures."""
    image_tables: ClassVar[tuple[FieldTable, FieldTable]] = (image_json.PROCESSOR, image_json.IMAGE)
    """What becomes of the fields of processor_config.json, and of its image processor."""
    compose = staticmethod(prompt.compose)
    """The prompt format: messages -> pieces of text and special tokens."""

    def chat_format(self, config: Llama4Config, tokenizer: Tokenizer) -> Compose | None:
        """`compose`, or that of a generation of the family; None where nothing says that a model chats, and how."""
        return self.compose

    @abstractmethod
    def described(self, content: Mapping[str, Any]) -> Iterator[tuple[FieldTable, Mapping[str, Any]]]:
        """The objects in the content of config.json, each with the table that says what becomes of its fields."""

    @abstractmethod
    def read_config(self, directory: Path) -> Llama4Config:
        """The configuration in a directory of Hugging Face's layout.

        Raises:
            ConfigError: a file that is missing or damaged, or a model that cannot be run.
        """

    @abstractmethod
    def write_config(self, config: Llama4Config) -> dict[str, Any]:
        """The content of config.json, from which `read_config` makes the same configuration."""

    def image_files(self, config: Llama4Config) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of preprocessor_config.json and processor_config.json."""
        return config.preprocessor_dict(), config.processor_dict()

    def chat_template(self) -> str | None:
        """`compose` as a Jinja template for transformers and others; None if it is not written as one."""
        return None

    @abstractmethod
    def names(self, config: Llama4Config, keys: Collection[str] | None = None) -> NameTable:
        """The table that a checkpoint with these keys follows, even if some are wrong; without keys, the table by which
        a model is written."""

    def module_names(self, config: Llama4Config) -> NameTable:
        """The table of the modules of transformers' class, which PEFT's adapters name; mostly that of the files."""
        return self.names(config)

    def build(self, config: Llama4Config, experts: type[Experts] | None = None) -> Llama4Model:
        """The model, with parameters on the current device (mostly meta) and without values."""
        return Llama4Model(config) if experts is None else Llama4Model(config, experts)

    def load_tokenizer(self, directory: Path, config: Llama4Config) -> Tokenizer | None:
        """The tokenizer in a model's directory, checked against the model; None if there is none.

        Raises:
            Llama4Error: a tokenizer that is unreadable or of another model.
        """
        try:
            tokenizer = Tokenizer(directory, vocabulary=self.vocabulary)
        except FileNotFoundError:
            return None
        # A tokenizer.model does not say how many special tokens follow its ranks; the size of the embeddings does.
        excess = tokenizer.vocab_size - config.text.num_embeddings
        if 0 < excess < len(tokenizer.added_tokens) and tokenizer.path.suffix == ".model":
            count = len(tokenizer.added_tokens) - excess
            tokenizer = Tokenizer(directory, num_special_tokens=count, vocabulary=self.vocabulary)
        self.check_tokenizer(tokenizer, config)
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer, config: Llama4Config) -> None:
        """See that a tokenizer is the model's.

        Raises:
            Llama4Error: it is of another model; with what disagrees.
        """
        if tokenizer.vocab_size > config.text.num_embeddings:
            raise Llama4Error(
                f"{tokenizer.path} has ids up to {tokenizer.vocab_size - 1}, but the model embeds "
                f"{config.text.num_embeddings}; use the tokenizer that belongs to the model"
            )
        image = self.vocabulary.image
        image_id = tokenizer.special_tokens.get(image or "")
        if config.vision is not None and image_id != config.image_token_index:
            raise Llama4Error(
                f"{image} is {image_id} in {tokenizer.path}, but the model's image_token_index is "
                f"{config.image_token_index}; use the tokenizer that belongs to the model"
            )
