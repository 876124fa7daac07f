"""A model and an adapter -> a checkpoint that needs no adapter."""

from __future__ import annotations

from pathlib import Path

from llama4.api import Llama4
from llama4.weights.checkpoint import read_config
from llama4.weights.directory import check_free


def write_merged(source: Path, adapter: str | Path, target: str | Path) -> None:
    """Write a model with an adapter in its weights, in the dtype that they come in, however small the model is.

    Args:
        source: the directory, or GGUF file, of the model.
        adapter: a directory as PEFT writes it.
        target: appears complete; it must not hold anything yet.

    Raises:
        Llama4Error: an adapter of another model, or a target that holds something.
    """
    check_free(target)  # before all the work, and again where nobody comes between
    # on a CPU, where a model larger than a GPU's memory stays in its files but for what is merged
    llm = Llama4.from_pretrained(source, device="cpu", dtype=read_config(source).dtype or "auto", adapter=adapter)
    llm.merge_adapter()
    llm.save_pretrained(target, must_be_free=True)
