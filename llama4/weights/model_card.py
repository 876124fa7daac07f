"""The model card, README.md: what the Hub shows of a model and finds it by."""

from __future__ import annotations

import logging
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from llama4.config import CONFIG_FILE, Llama4Config
from llama4.units import count_text
from llama4.version import __version__
from llama4.weights.side_files import LICENCE_FILES, MODEL_CARD, ORIGIN_FIELD, SideFiles
from llama4.weights.summary import WeightsSummary

logger = logging.getLogger(__name__)

LIBRARY = "transformers"
"""The Hub knows libraries by a list of its own, which decides on code samples, filters and engines that offer to run a
model. What is written here is in transformers' layout, and transformers loads it."""
_LICENCE = ("license", "license_name", "license_link")

_TEXT = """# {name}

{made_from}{summary}.

{parameters} parameters, {active} of them for each token; {reads} in, text out.

```python
from llama4 import Llama4
llm = Llama4.from_pretrained("{name}")
print(llm.chat("Why is the sky blue?").text)
```

Written by llama4 {version} in Hugging Face's layout, which transformers reads as well.
"""


def keeps_card(side_files: SideFiles, is_quantized: bool) -> bool:
    """Whether the card that came with a model is still of it: not if the model is another's on the Hub, which this one
    is made from, nor if its weights were quantized since."""
    config = side_files.json(CONFIG_FILE)
    record = config.get(ORIGIN_FIELD)
    is_same_model = side_files.origin is None or record == vars(side_files.origin)
    return MODEL_CARD in side_files and is_same_model and is_quantized == ("quantization_config" in config)


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
        made_from = (
            f"Made from [{origin.repo_id}](https://huggingface.co/{origin.repo_id}/tree/{origin.commit}), commit "
        )
        made_from += f"{origin.commit}. "
    data |= {key: source[key] for key in (*_LICENCE, "language") if key in source}
    if "license" not in data and (files := side_files.matching(*LICENCE_FILES[:2])):
        data |= {"license": "other", "license_link": min(files)}
    text = _TEXT.format(
        name=name,
        made_from=made_from,
        summary=f"Weights: {summary}",
        parameters=count_text(config.num_parameters()),
        active=count_text(config.num_active_parameters()),
        reads="images and text" if has_images else "text",
        version=__version__,
    )
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text}"


def _metadata(side_files: SideFiles) -> dict[str, Any]:
    """What the head of the card says that came with a model; {} if there is none that can be read."""
    text = side_files.text(MODEL_CARD) or ""
    if not text.startswith("---"):
        return {}
    try:
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())
    except Exception as error:  # whatever a YAML parser makes of a stranger's file
        logger.warning("the head of %s cannot be read (%s); its licence is not taken over", MODEL_CARD, error)
        return {}
