"""The model card, README.md: what the Hub shows of a model and finds it by."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from llama4.config import CONFIG_FILE, Llama4Config
from llama4.units import count_text
from llama4.version import __version__
from llama4.weights.side_files import LICENCE_FILES, MODEL_CARD, SideFiles
from llama4.weights.summary import WeightsSummary

logger = logging.getLogger(__name__)

LIBRARY = "transformers"
"""The Hub knows libraries by a list of its own, which decides on code samples, filters and engines that offer to run a
model. What is written here is in transformers' layout, and transformers loads it."""
_LICENCE = ("license", "license_name", "license_link")

_TEXT = """# {name}

{made_from}Weights: {summary}.

{parameters} parameters, {active} of them for each token; {reads} in, text out.

```python
from llama4 import Llama4
llm = Llama4.from_pretrained("{name}")
print(llm.chat("Why is the sky blue?").text)
```

Written by llama4 {version} in Hugging Face's layout, which transformers reads as well.
"""


def write_card(
    directory: Path, name: str, config: Llama4Config, summary: WeightsSummary, side_files: SideFiles
) -> None:
    """Write the card of a model that is saved, unless the one that came with it is still of it: it is not if the model
    was made from another on the Hub, or if its weights were quantized since.

    Args:
        directory: of the model.
        name, config, summary, side_files: see `model_card`.
    """
    is_same_model = side_files.origin == side_files.recorded_origin
    was_quantized = "quantization_config" in side_files.json(CONFIG_FILE)
    if MODEL_CARD not in side_files or not is_same_model or bool(summary.quantized) != was_quantized:
        (directory / MODEL_CARD).write_text(model_card(name, config, summary, side_files), encoding="utf-8")


def model_card(name: str, config: Llama4Config, summary: WeightsSummary, side_files: SideFiles) -> str:
    """The card of a model that is saved.

    Args:
        name: under which it is loaded.
        config: of the model.
        summary: of the weights that were written.
        side_files: what came with the model, for its origin and its licence.
    """
    source, origin = _metadata(side_files), side_files.origin
    has_images = config.vision is not None
    data: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": "image-text-to-text" if has_images else "text-generation",
        "tags": ["llama4", *sorted({format.split(",")[0] for format in summary.formats})],
    }
    if base := origin.repo_id if origin is not None else source.get("base_model"):
        data |= {"base_model": base, "base_model_relation": "quantized" if summary.quantized else "finetune"}
    made_from = ""
    if origin is not None:
        address = f"https://huggingface.co/{origin.repo_id}/tree/{origin.commit}"
        made_from = f"Made from [{origin.repo_id}]({address}), commit {origin.commit}. "
    data |= {key: source[key] for key in (*_LICENCE, "language") if _is_text(source.get(key))}
    if "license" not in data and (files := side_files.matching(*LICENCE_FILES[:2])):
        data |= {"license": "other", "license_link": min(files)}
    text = _TEXT.format(
        name=name,
        made_from=made_from,
        summary=summary,
        parameters=count_text(config.num_parameters()),
        active=count_text(config.num_active_parameters()),
        reads="images and text" if has_images else "text",
        version=__version__,
    )
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text}"


def _metadata(side_files: SideFiles) -> dict[str, Any]:
    """What the head of the card says that came with a model; {} if there is none that can be read."""
    try:
        text = (side_files.text(MODEL_CARD) or "").removeprefix("\ufeff")
        if not text.startswith("---"):
            return {}
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())  # type: ignore[no-untyped-call]
    except Exception as error:  # it is no UTF-8, or whatever a YAML parser makes of a stranger's file
        logger.warning("the head of %s cannot be read (%s); its licence is not taken over", MODEL_CARD, error)
        return {}


def _is_text(value: object) -> bool:
    """Whether it is a text or several; YAML reads `no`, Norwegian, as false."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
