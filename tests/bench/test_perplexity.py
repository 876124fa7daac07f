"""Perplexity, against arithmetic and against transformers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4.bench import llama_cpp, perplexity
from llama4.bench.__main__ import main
from llama4.errors import Llama4Error
from llama4.weights.convert import convert_to_gguf, quantize
from tests.families import test_llama_api as dense


def test_a_known_distribution() -> None:
    """Who gives the next token a chance of p has the perplexity 1 / p; the first half of a window does not count."""
    ids = torch.randint(8, (2, 10), generator=torch.Generator().manual_seed(0))

    def logits(ids_1T: Tensor) -> Tensor:
        found = torch.full((1, 10, 8), math.log(0.75 / 7))
        found[0, torch.arange(9), ids_1T[0, 1:]] = math.log(0.25)
        found[0, :5] = torch.arange(8.0)
        return found

    assert perplexity.perplexity(logits, list(ids)) == pytest.approx(4)


def test_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command for several formats; transformers gives the same figure, of the dequantized weights."""
    dense.write(tmp_path / "model")
    convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf", "q8_0", progress=False)
    quantize(tmp_path / "model", tmp_path / "int4", "int4", progress=False)
    (tmp_path / "text").write_text("Some words, and others. " * 20)
    models = [str(tmp_path / name) for name in ("model", "a.gguf", "int4")]
    options = ["--text", str(tmp_path / "text"), "--context", "64", "--windows", "3"]
    assert main(["perplexity", *models, *options, "--json"]) == 0
    plain, eight, four = json.loads(capsys.readouterr().out)["rows"]
    assert [round(row["bits"], 2) for row in (plain, eight, four)] == [32, 8.5, 4.25]
    assert plain["tokens"] == 3 * 31 and plain["llama_cpp"] is None
    assert eight["ours"] == pytest.approx(plain["ours"], rel=0.02) and four["ours"] != plain["ours"]
    assert main(["perplexity", models[0], *options, "--transformers"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    _, _, _, ours, theirs, *_ = map(str.strip, line.split("|"))
    assert float(theirs) == pytest.approx(float(ours), rel=1e-4) and float(ours) == pytest.approx(
        plain["ours"], rel=1e-3
    )


def test_a_text_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("ab")
    dense.write(tmp_path / "model")
    assert main(["perplexity", str(tmp_path / "model"), "--text", str(tmp_path / "text")]) == 2
    assert "give a longer text" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--windows", "--context"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_numbers_below_one(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["perplexity", "model", "--text", "text", option, value])
    assert f"{option}: {value!r} is no whole number, 1 or more" in capsys.readouterr().err


PROGRAM = f"""#!{sys.executable}
import sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(given["-m"], "rb").read(4) == b"GGUF"
if given["-c"] == "32":
    sys.exit("no room")
print("Final estimate: PPL = 12.5 +/- 0.1" if given["--chunks"] == "3" else "nan", file=sys.stderr)
"""


def test_beside_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that says what it was asked, in place of its own."""
    dense.write(tmp_path / "model")
    convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf", "q8_0", progress=False)
    (tmp_path / "text").write_text("Some words, and others. " * 20)
    command = ["perplexity", str(tmp_path / "a.gguf"), "--text", str(tmp_path / "text"), "--windows", "3", "--json"]
    command += ["--vs", f"llama.cpp={tmp_path}", "--context"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "64"])
    assert f"there is no llama-perplexity in {tmp_path}" in capsys.readouterr().err
    (tmp_path / "llama-perplexity").write_text(PROGRAM)
    assert main([*command, "64"]) == 1
    assert "llama-perplexity cannot be run" in capsys.readouterr().err
    (tmp_path / "llama-perplexity").chmod(0o755)
    assert main([*command, "64"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["llama_cpp"] == 12.5
    assert main([*command, "32"]) == 1
    assert "llama-perplexity failed with code 1: no room" in capsys.readouterr().err


def test_a_program_that_does_not_end() -> None:
    with pytest.raises(Llama4Error, match="was not done within 0 seconds"):
        llama_cpp.run_program(Path(sys.executable), "-c", "import time; time.sleep(100)", timeout=0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is that of any child")
def test_memory_is_that_of_the_program() -> None:
    """And neither another child's nor this process's, which has torch."""
    code = "import sys, time; kept = b'1' * (int(sys.argv[1]) << 20); time.sleep(0.3)"
    large, small = (
        llama_cpp.run_program(Path(sys.executable), "-c", code, size).peak_bytes / 2**20 for size in ("150", "0")
    )
    assert 150 < large < 200 and 1 < small < 50
