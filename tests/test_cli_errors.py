"""What a user gets wrong on the command line: one line, exit code 2 for usage and 1 for a file or a server."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path

import pytest

from llama4.arguments import PrintableFormatter, one_line
from llama4.cli.main import main
from llama4.errors import ArgumentError, DiskError
from llama4.files import replace_text, user_path

TRAIN = "finetune tiny --output {0}/new --data {0}/data.jsonl"
USAGE = {
    f"{TRAIN} --lora-rank 3": "--lora-rank is not known",
    f"{TRAIN} --batch-size 3": "--batch-size is not known (did you mean --batch-tokens?)",
    f"{TRAIN} --method lroa": "'lroa' is not known (did you mean lora?)",
    f"{TRAIN} --method full --adapter-format peft": "--adapter-format is for adapters; --method full has none",
    f"{TRAIN} --merge {{0}}/new/": "/new/ is --output, which gets the adapter; name another directory",
    f"{TRAIN} --rank 0": "rank is 0; it must be a whole number",
    f"{TRAIN} --learning-rate nan": "learning_rate is nan; it must be at least 0",
    f"{TRAIN} --epochs 1e9": "epochs is 1000000000.0; it must be at most 1000",
    f"{TRAIN} --steps {10**400}": "it must be at most 2147483647",
    f"{TRAIN} --seed {10**29}": "seed is 100000000000000000000000000000; it must be between 0 and",
    "merge tiny {0} {0}/new --shard-size 3": "--shard-size is not known",
    "quantize tiny {0}/new --scheme int4 --shard-gb inf": "--shard-gb is inf; it must be more than 0, and",
    "serve tiny --hots x": "--hots is not known (did you mean --host?)",
    "serve tiny --port 99999": "--port is 99999; it must be from 0 (any that is free) to 65535",
    "serve tiny --port 0 --queue 0": "--queue is 0; it must be at least 1",
    "serve tiny --port 0 --max-batch 0": "--max-batch is 0; it must be at least 1",
    "serve tiny --port 0 --allow-host http://x/y": "'http://x/y' is no host",
    "serve tiny --media-directory {0}/nowhere": "nowhere is no directory",
    "moderate tiny hi --treshold 1": "--treshold is not known (did you mean --threshold?)",
    "moderate hello": "MODEL comes first, then TEXT or --file FILE; 'hello' was taken as MODEL",
    "moderate tiny hi --model x": "--model is not known;",
    "moderate tiny hi --threshold 7": "threshold is 7.0; it must be between 0 and 1",
    "convert tiny {0}/new --to gguf": "makes of {0}/new a file; let it end in .gguf",
    "convert tiny {0}/new.gguf --to ggfu": "choose one of hf, meta, gguf",
    "convert tiny {0}/new": "--to is missing, one of hf, meta, gguf; only a DST that ends in .gguf says it by itself",
    "convert tiny {0}/new.gguf --to hf": "makes of {0}/new.gguf a directory; let it not end in .gguf",
    "convert tiny {0}/new --to hf --type q4_0": "--type is of --to gguf; --to hf has none, leave it out",
    "convert tiny {0}/new --to meta --for llama.cpp": "--for is of --to gguf; --to meta has none",
    "convert tiny {0}/new.gguf --ranks 4": "--ranks is of --to meta; --to gguf has none",
    "convert tiny {0}/new --to hf --ranks 1": "--ranks is of --to meta",
    "info --system --context 1K": "--context is of a model; --system shows this machine, leave one out",
    "plan scout --finetune full --rank 4": "--rank is of an adapter; --finetune full has none",
    "generate --raw --chat-format llama3 hi": "--raw continues a text; leave out --chat-format, which is of a chat",
    "bench mkae": "'mkae' is not known (did you mean make?)",
    "bench make smal {0}/new": "'smal' is not known (did you mean small?)",
    "bench serve tiny --seconds -1": "--seconds is -1; it must be above 0",
    "bench serve tiny --shared -5": "--shared is from 0",
    "bench growth tiny --context ten": "argument --context: 'ten' is not a number of tokens",
    "bench generate tiny --patience -1": "--patience: '-1' is no whole number, 0 or more",
    "bench gguf a.gguf --vs nope": "'nope' is not known",
    "bench perplexity tiny --text {0}/data.jsonl --context 0": "--context: '0' is no whole number, 1 or more",
    "chat --sever x": "--sever is not known (did you mean --server?)",
    "chat --server nowhere": "--server nowhere is no address",
    "chat --max-new-tokens 0": "max_new_tokens is 0; it must be a whole number, 1 or more",
    "chat --temperature -1": "temperature is -1.0; it must be 0 (greedy) or more",
    "generate --cache-dtype nope hi": "cache_dtype='nope' is not known",
    """generate --rope-scaling '{{"rope_type": "nope"}}' hi""": "rope_scaling: rope_type 'nope' is not known",
    "generate --private-host http://x hi": "'http://x' is no host",
}
FAILURES = {
    "finetune tiny --output {0}/new --data {0}/not.jsonl": "not.jsonl, line 1: it is not JSON",
    "finetune tiny --output {0}/new --data {0}/nowhere": "nowhere cannot be read",
    "merge tiny {0}/nowhere {0}/new": "nowhere is no directory",
    "serve {0} --port 0": "{0}",
    "serve tiny --port 0 --ssl-certfile {0}/not.jsonl --ssl-keyfile {0}/not.jsonl": "no certificate and its key",
    "moderate tiny --file {0}/nowhere": "nowhere",
    "convert {0} {0}/new.gguf --to gguf": "{0}",
    "bench make small {0}": "{0} exists already",
    "bench gguf {0}/not.jsonl": "not.jsonl cannot be loaded",
    "bench perplexity tiny --text {0}/nowhere": "nowhere",
    "chat --server http://127.0.0.1:1": "http://127.0.0.1:1/v1 does not answer",
}


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [*((c, 2, m) for c, m in USAGE.items()), *((c, 1, m) for c, m in FAILURES.items())],
    ids=[*USAGE, *FAILURES],
)
def test_errors(command: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "not.jsonl").write_text("{\n")
    try:
        found = main(shlex.split(command.format(tmp_path)))
    except SystemExit as left:  # argparse
        found = int(left.code or 0)
    said = capsys.readouterr().err
    assert found == code, said
    assert message.format(tmp_path) in said
    lines = [line for line in said.splitlines() if not line.startswith("llama4: loading ")]
    assert len(lines) == 1 and said.endswith("\n")
    assert not (tmp_path / "new").exists()


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="~nobody-here/x cannot be found"):
        user_path("~nobody-here/x")
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match=re.escape(f"could not write {loop}")):
        replace_text(loop, "x")
    assert loop.is_symlink()
    for name, reason in (("a\0b", "it has a NUL"), ("a\ud800", "it has half of a surrogate pair")):
        with pytest.raises(ArgumentError, match=f"is no name of a file: {reason}"):
            user_path(name)


def test_what_cannot_be_written_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its path is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    for path in ("nowhere/x", "../nowhere/x", "link", tmp_path / "nowhere" / "x", "x" * 250, "x" * 256):
        with pytest.raises(DiskError, match=r"could not write .*; free space or choose another place"):
            replace_text(Path(path), "x")


def test_an_option_of_json_of_many_levels(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--rope-scaling", "[" * 10_000, "hi"])
    said = capsys.readouterr().err
    assert "is not JSON" in said and len(said) < 1000


def test_an_error_is_one_short_line_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever names and files hold."""
    (data := tmp_path / "a\x1b[2J\n\u202e.jsonl").write_text("{")
    assert main(["finetune", "tiny", "--output", str(tmp_path / "new"), "--data", str(data)]) == 1
    said = capsys.readouterr().err
    assert "a\ufffd[2J; \ufffd.jsonl, line 1: it is not JSON" in said and "\x1b" not in said and said.count("\n") == 1
    line = one_line(ArgumentError("begin " + "x" * 10**6 + " end"))
    assert len(line) < 5000 and line.startswith("begin") and line.endswith("end")


def test_what_is_logged_writes_to_no_terminal() -> None:
    """Such as names of a checkpoint's fields, where nobody has set up logging."""
    with pytest.raises(SystemExit):
        main(["--version"])
    last = logging.lastResort
    assert last is not None and isinstance(last.formatter, PrintableFormatter)
    record = logging.LogRecord("llama4", logging.WARNING, "", 0, "the field %s\n", ("\x9b2J\x1b]0;x\x07",), None)
    assert last.formatter.format(record) == "the field \ufffd2J\ufffd]0;x\ufffd\n"
