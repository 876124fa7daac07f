"""What stands beside a model's weights, as it came: configurations, chat templates, model card, licence.

They are read once, carried from the source to what is saved, and written back byte by byte but for what changed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llama4.config import CONFIG_FILE, GENERATION_FILE, IMAGE_CONFIG_FILES, GenerationConfig, Llama4Config
from llama4.config.image_json import PROCESSOR_FILE
from llama4.errors import ConfigError
from llama4.reading import MAX_CONFIG_BYTES, parse_json
from llama4.text.tokenizer_config import CONFIG_FILES, TOKENIZER_CONFIG_FILE

logger = logging.getLogger(__name__)

ORIGIN_FIELD = "hub_origin"
"""Of config.json: a `HubOrigin`. Other libraries do not know it, and carry it along."""
MODEL_CARD = "README.md"
TEMPLATE_FILE = "chat_template.jinja"
FURTHER_TEMPLATES = "additional_chat_templates/*.jinja"
_TEMPLATE_JSON = "chat_template.json"
TEMPLATE_FILES = (TEMPLATE_FILE, _TEMPLATE_JSON, FURTHER_TEMPLATES)
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
SIDE_FILES = (
    CONFIG_FILE,
    GENERATION_FILE,
    *IMAGE_CONFIG_FILES,
    *CONFIG_FILES,
    *TEMPLATE_FILES,
    MODEL_CARD,
    *LICENCE_FILES,
)
"""Patterns of the names of what is carried."""


@dataclass(frozen=True)
class HubOrigin:
    """The repository on the Hub that a model came from.

    Attributes:
        repo_id: "organisation/name".
        commit: of what was loaded.
    """

    repo_id: str
    commit: str

    @classmethod
    def of_snapshot(cls, directory: Path) -> HubOrigin | None:
        """That of a directory in the Hub's local cache, `.../models--ORG--NAME/snapshots/COMMIT`; None for others."""
        for snapshot in (directory, *directory.parents):
            repository = snapshot.parent.parent.name
            if snapshot.parent.name == "snapshots" and repository.startswith("models--"):
                return cls(repository.removeprefix("models--").replace("--", "/"), snapshot.name)
        return None


@dataclass(frozen=True)
class SideFiles:
    """The small files of a model's directory.

    Attributes:
        contents: path in the directory, such as "generation_config.json" -> bytes.
        origin: where the model came from, if that is the Hub.
    """

    contents: Mapping[str, bytes] = field(default_factory=dict)
    origin: HubOrigin | None = None

    @classmethod
    def read(cls, directory: str | Path) -> SideFiles:
        """Those of a directory, in any layout. The origin of a snapshot in the Hub's cache is known by its path, that
        of another directory by its config.json.

        Raises:
            ConfigError: a config.json that is not JSON.
        """
        contents = {}
        for pattern in SIDE_FILES:
            for path in sorted(Path(directory).glob(pattern)):
                if not path.is_file():
                    continue
                if path.stat().st_size > MAX_CONFIG_BYTES:
                    logger.warning("%s is larger than %d MiB, and is not carried along", path, MAX_CONFIG_BYTES >> 20)
                    continue
                contents[path.relative_to(directory).as_posix()] = path.read_bytes()
        files = cls(contents)
        return dataclasses.replace(files, origin=HubOrigin.of_snapshot(Path(directory)) or files.recorded_origin)

    @property
    def recorded_origin(self) -> HubOrigin | None:
        """What config.json says of where the model came from."""
        record = self.json(CONFIG_FILE).get(ORIGIN_FIELD)
        return HubOrigin(str(record.get("repo_id")), str(record.get("commit"))) if isinstance(record, dict) else None

    def __contains__(self, name: str) -> bool:
        return name in self.contents

    def text(self, name: str) -> str | None:
        """A file's text, as `open` reads it; None if there is no such file.

        Raises:
            ConfigError: it is not UTF-8.
        """
        if name not in self.contents:
            return None
        try:
            return io.TextIOWrapper(io.BytesIO(self.contents[name]), encoding="utf-8").read()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name} is not UTF-8 ({error}); fetch the file again") from error

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; {} if there is no such file.

        Raises:
            ConfigError: it is not JSON, or not an object.
        """
        return parse_json(self.contents[name], name) if name in self.contents else {}

    def matching(self, *patterns: str) -> dict[str, bytes]:
        """The files whose names fit one of the patterns."""
        return {name: b for name, b in self.contents.items() if any(fnmatchcase(name, p) for p in patterns)}

    def with_json(self, name: str, content: Mapping[str, Any]) -> SideFiles:
        """The same with another JSON file; its bytes stay if it says the same."""
        if name in self.contents and self.json(name) == content:
            return self
        return self.with_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def with_text(self, name: str, text: str) -> SideFiles:
        """The same with another file of text."""
        return dataclasses.replace(self, contents={**self.contents, name: text.encode("utf-8")})

    def without(self, *names: str) -> SideFiles:
        """The same but for some files."""
        kept = {name: content for name, content in self.contents.items() if name not in names}
        return dataclasses.replace(self, contents=kept)

    def write(self, directory: Path) -> None:
        """Write all of them into a directory."""
        for name, content in self.contents.items():
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    @property
    def generation_config(self) -> GenerationConfig:
        """What the checkpoint says of generation: generation_config.json, or, where that is not there, the same fields
        of config.json, as in transformers.

        Raises:
            ConfigError: a file that is not JSON, or a field of the wrong kind.
        """
        if GENERATION_FILE in self:
            return GenerationConfig.from_dict(self.json(GENERATION_FILE))
        return GenerationConfig.from_config(self.json(CONFIG_FILE))

    @property
    def chat_templates(self) -> dict[str, str]:
        """The checkpoint's own templates by name, "default" and others; where several places have one, the first of
        those in which transformers looks: processor_config.json, chat_template.json, chat_template.jinja with its
        folder of further ones, tokenizer_config.json. One that is blank is none.

        Raises:
            ConfigError: one of them is not what it should be.
        """
        for name in (PROCESSOR_FILE, _TEMPLATE_JSON):
            if found := _templates(name, self.json(name).get("chat_template")):
                return found
        files = {Path(name).stem: name for name in self.matching(FURTHER_TEMPLATES)}
        if TEMPLATE_FILE in self:
            files["default"] = TEMPLATE_FILE
        texts = {name: self.text(path) or "" for name, path in files.items()}
        if found := {name: text for name, text in texts.items() if text.strip()}:
            return found
        return _templates(TOKENIZER_CONFIG_FILE, self.json(TOKENIZER_CONFIG_FILE).get("chat_template"))


def generation_content(config: Llama4Config, side_files: SideFiles) -> dict[str, Any]:
    """The content of a generation_config.json for a model that came without one."""
    text = config.text
    tokens = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": list(text.eos_token_id),
        "pad_token_id": text.pad_token_id,
    }
    said = GenerationConfig.from_config(side_files.json(CONFIG_FILE)).content
    return {**said, **{name: value for name, value in tokens.items() if value not in (None, [])}}


def updated(raw: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a file said, but for what changed.

    Args:
        raw: the content of the file.
        before: what we would have written for what it says.
        now: what we would write today.
    """
    result = dict(raw)
    for name in {**before, **now}:
        if name in before and name in now and before[name] == now[name]:
            continue
        for older in (name, *_OLDER_NAMES.get(name, ())):
            result.pop(older, None)
        if name in _SECTIONS and name in raw and name in now:
            result[name] = updated(raw[name], before.get(name, {}), now[name])
        elif name in now:
            result[name] = now[name]
    return result


_SECTIONS = ("text_config", "vision_config", "image_processor")
_OLDER_NAMES = {"dtype": ("torch_dtype",), "rope_parameters": ("rope_scaling", "rope_theta")}

NO_SIDE_FILES = SideFiles()
"""Of a model that was not read from a directory."""


def _templates(name: str, value: object) -> dict[str, str]:
    """A `chat_template`: a template, templates by name, or a list of {"name": ..., "template": ...}."""
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        value = {each.get("name"): each.get("template") for each in value}
    named = value if isinstance(value, dict) else {} if value is None else {"default": value}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ConfigError(f"chat_template in {name} must be a template, or templates by name, in strings")
    return {str(key): str(text) for key, text in named.items() if str(text).strip()}
