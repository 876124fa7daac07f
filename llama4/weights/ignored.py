"""Which fields of a checkpoint's configuration files are in no table, and are ignored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from llama4.config import CONFIG_FILE, generation, image_json
from llama4.config.fields import FieldTable
from llama4.families import family_of_type
from llama4.text import tokenizer_config
from llama4.weights.side_files import SideFiles

logger = logging.getLogger(__name__)
_noted: set[str] = set()


def ignored_fields(files: SideFiles) -> dict[str, list[str]]:
    """Place, such as "config.json (text_config)" -> fields there that neither this library nor transformers knows.

    Raises:
        ConfigError: a file that is not JSON.
    """
    found: dict[str, list[str]] = {}
    for table, content in _objects(files):
        if names := [name for name in table.unknown(content) if name not in generation.FIELDS]:
            found.setdefault(table.place, []).extend(names)
    return found


def note_ignored(name: str, files: SideFiles) -> None:
    """Log them, once for each model."""
    for place, names in ignored_fields(files).items():
        note = f"{name}: {place} has {', '.join(names)}, which nothing is known of and which has no effect"
        if note not in _noted:
            _noted.add(note)
            logger.warning(note)


def _objects(files: SideFiles) -> Iterator[tuple[FieldTable, Mapping[str, Any]]]:
    """The objects that have a table."""
    config = files.json(CONFIG_FILE)
    family = family_of_type(config.get("model_type"))
    yield from family.described(config)
    processor, (of_processor, of_images) = files.json(image_json.PROCESSOR_FILE), family.image_tables
    yield of_processor, processor
    yield of_images, processor.get("image_processor") or files.json(image_json.IMAGE_FILE)
    tokens = files.json(tokenizer_config.TOKENIZER_CONFIG_FILE)
    yield tokenizer_config.FIELDS, {name: value for name, value in tokens.items() if not name.endswith("_token")}
    yield generation.FIELDS, files.json(generation.GENERATION_FILE)
