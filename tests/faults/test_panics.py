"""What a tokenizer's file can make the library in Rust do: a panic, which `except Exception` does not catch; and our
own code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama4.errors import Llama4Error
from llama4.text import byte_level
from llama4.text.tokenizer import Tokenizer
from llama4.text.tokenizer_files import byte_alphabet
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


ENDLESS = r"((a|aa)+)(?!a)c|."


@pytest.fixture(autouse=True)
def nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """A panic says so on stderr, beside the error of whoever catches it."""
    yield
    assert "panicked" not in capfd.readouterr().err


def test_a_pattern_that_backtracks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_level, "_PATIENCE", 0.2)
    tokenizer = Tokenizer(write(tmp_path, set_pattern(ENDLESS)))
    assert isinstance(tokenizer.model, byte_level.RankedBytes)
    message = (
        r"tokenizer\.json has a pattern or ids that cannot be used \('\(\(a\|aa.* takes more than 0.2 s.*fetch it again"
    )
    with pytest.raises(Llama4Error, match=message):
        tokenizer.encode("a" * 60)


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """All that a user sees."""
    path = write(tmp_path, set_pattern(ENDLESS))
    action = f"Tokenizer({str(path)!r}).encode('a' * 60)"
    code = f"from llama4 import Tokenizer\ntry: {action}\nexcept ValueError: print('error')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.stderr) == ("error\n", "")


def test_a_pattern_of_other_merges_that_backtracks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(content: dict[str, Any]) -> None:
        set_pattern(ENDLESS)(content)
        content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})

    monkeypatch.setattr(byte_level, "_PATIENCE", 0.2)
    tokenizer = Tokenizer(write(tmp_path, change))
    assert isinstance(tokenizer.model, byte_level.MergedBytes)
    with pytest.raises(Llama4Error, match=r"tokenizer\.json has a pattern or ids that cannot be used"):
        tokenizer.encode("a" * 60)


@pytest.mark.parametrize("splitters", [1, 20])
def test_many_slow_pieces(splitters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is cut in time, and all of them are not."""
    bytes_ = {bytes([byte]): byte for byte in range(256)}
    slow = byte_level.Splitter(r"(a|aa)+!|a+|\d")
    model = byte_level.MergedBytes(bytes_, {}, [slow] * splitters, byte_alphabet())
    assert bytes(model.encode("aa1")) == b"aa1"
    monkeypatch.setattr(byte_level, "_PATIENCE", 0.5)
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"takes more than 0.. s, which is the limit of all patterns for the whole"):
        model.encode(("a" * 24 + "1") * 100)
    assert time.process_time() - begin < 30  # one after the other they would take 50


@pytest.mark.parametrize(
    "text", ["A", "1", "\u0300", "!", "\n", " ", "Aa\u0300", "\x1c", " \n", "\u3000", "\r", "字", "'s"]
)
@pytest.mark.parametrize("pattern", sorted(byte_level._LINEAR))
def test_patterns_that_tiktoken_is_trusted_with(pattern: str, text: str) -> None:
    """A million of one character is more than its stack and its patience hold where it goes back."""
    model = byte_level.RankedBytes("x", {bytes([byte]): byte for byte in range(256)}, pattern)
    assert bytes(model.encode(text * 1_000_000 + "a")) == text.encode() * 1_000_000 + b"a"


@pytest.mark.parametrize(
    "pattern", ["(", "(?<=a+)b(", r"\p{Nothing}", "(" * 3000, "a" * 100_000, "(?R)|a", "(?P<a>(?&a))", r"a\\(?0)|"]
)
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
