"""What a tokenizer's file can make the library in Rust do: a panic, which `except Exception` does not catch; and our
own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4.errors import Llama4Error
from llama4.text import byte_level
from llama4.text.tokenizer import Tokenizer
from tests import small_model
from tests.faults import kinds


def write(directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    Tokenizer(small_model.write_tokenizer(directory / "tokenizer.model")).save(directory)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content))
    return path


def set_pattern(pattern: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern

    return change


def test_a_pattern_that_backtracks_without_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, set_pattern(r"((a|aa)+)(?!a)c|.")))
    with pytest.raises(Llama4Error, match=r"tokenizer\.json has a pattern or ids that cannot be used"):
        tokenizer.encode("a" * 40)


def test_a_pattern_of_other_merges_that_backtracks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(content: dict[str, Any]) -> None:
        set_pattern(r"((a|aa)+)(?!a)c|.")(content)
        content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})

    monkeypatch.setattr(byte_level, "_PATIENCE", 0.2)
    tokenizer = Tokenizer(write(tmp_path, change))
    assert isinstance(tokenizer.model, byte_level.MergedBytes)
    with pytest.raises(Llama4Error, match=r"tokenizer\.json has a pattern or ids that cannot be used"):
        tokenizer.encode("a" * 60)


@pytest.mark.parametrize("pattern", ["(", "(?<=a+)b(", r"\p{Nothing}"])
def test_what_is_no_pattern(tmp_path: Path, pattern: str) -> None:
    path = write(tmp_path, set_pattern(pattern))
    with pytest.raises(Llama4Error, match=r"tokenizer\.json has a pattern or ids that cannot be used"):
        Tokenizer(path)


@pytest.mark.parametrize("number", [3, -1, 2**32, 2**64, 1.5, [0]])
def test_ids_that_cannot_be(tmp_path: Path, number: object) -> None:
    path = write(tmp_path, lambda content: content["model"]["vocab"].update(a=number))
    with pytest.raises(Llama4Error, match=r"tokenizer\.json.*each once"):
        Tokenizer(path)


@pytest.mark.parametrize("charsmap", [b"\1", bytes(4), b"\4\0\0\0abcdx", b"\x40\0\0\0" + bytes(9), b"\5" + bytes(9)])
def test_a_map_of_characters_that_is_none(charsmap: bytes, tmp_path: Path) -> None:
    (kind,) = kinds.pieces(tmp_path)
    path = kind.directory / kind.file
    path.write_bytes(path.read_bytes() + bytes([3 << 3 | 2, len(charsmap) + 2, 2 << 3 | 2, len(charsmap)]) + charsmap)
    with pytest.raises(Llama4Error, match=r"tokenizer\.model has a map of characters that is none"):
        Tokenizer(path)
