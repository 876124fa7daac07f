"""Fields of configuration files that nobody knows: they are ignored, kept, and told of."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from llama4 import Llama4
from llama4.cli.main import main
from llama4.weights.ignored import ignored_fields
from llama4.weights.side_files import SideFiles
from tests import small_model


def change(path: Path, *place: str, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    inner = content
    for name in place:
        inner = inner.setdefault(name, {})
    inner |= fields
    path.write_text(json.dumps(content))


def test_unknown_fields_are_told_of_once_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = small_model.write(tmp_path / "model")
    assert ignored_fields(SideFiles.read(directory)) == {}
    change(directory / "config.json", my_note="x", _private=1, use_cache=True)
    change(directory / "config.json", "text_config", sliding_window=7, temperature=0.7)
    change(directory / "config.json", "text_config", "rope_parameters", wavelength=7)
    change(directory / "config.json", "vision_config", vision_feature_layer=-1, window_size=3)
    change(directory / "preprocessor_config.json", max_pixels=7)
    change(directory / "processor_config.json", video_token="<v>")
    change(directory / "tokenizer_config.json", sql_token="<SQL>", use_sql=True)
    change(directory / "generation_config.json", do_sample=False, magic=1, _from_model_config=True)
    expected = {
        "config.json": ["my_note"],
        "config.json (text_config)": ["sliding_window"],
        "config.json (rope_parameters)": ["wavelength"],
        "config.json (vision_config)": ["window_size"],
        "processor_config.json": ["video_token"],
        "preprocessor_config.json": ["max_pixels"],
        "tokenizer_config.json": ["use_sql"],
        "generation_config.json": ["magic"],
    }
    assert ignored_fields(SideFiles.read(directory)) == expected
    with caplog.at_level(logging.WARNING):
        llm = Llama4.from_pretrained(directory)
        Llama4.from_pretrained(directory)
    told = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert len(told) == len(expected) and any("config.json (text_config) has sliding_window" in note for note in told)
    llm.save_pretrained(tmp_path / "saved")
    assert ignored_fields(SideFiles.read(tmp_path / "saved")).keys() >= {
        "preprocessor_config.json",
        "tokenizer_config.json",
    }
    main(["info", str(directory)])
    assert "magic in generation_config.json" in capsys.readouterr().out
