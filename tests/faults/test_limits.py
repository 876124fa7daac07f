"""Files that would hang a machine, or eat it: each ends in an error within two seconds and 300 MB above the imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import small_model

SECONDS, BYTES = 2.0, 300 << 20
"""What an error may cost, of the processor's time and of memory."""

CHILD = """
    import contextlib, io, resource, sys, time
    import torch, llama4
    from llama4.analysis.info import describe_model, find
    from llama4.api import Llama4
    from llama4.cli.main import main
    from llama4.errors import Llama4Error
    from llama4.weights.convert import convert, quantize
    from llama4.weights.load import load
    torch.set_num_threads(1)
    def plan(directory):
        with contextlib.redirect_stderr(io.StringIO()) as text, contextlib.redirect_stdout(io.StringIO()):
            code = main(["plan", directory])
        if code:
            raise Llama4Error(text.getvalue())
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for name in sys.argv[1:]:
        directory = name + "/model"
        ways = {
            "from_pretrained": lambda: Llama4.from_pretrained(directory, progress=False),
            "info": lambda: describe_model(find(directory), None),
            "plan": lambda: plan(directory),
            "convert": lambda: convert(directory, name + "/converted", "hf", progress=False),
            "quantize": lambda: quantize(directory, name + "/int8", "int8", progress=False),
        }
        for command, way in ways.items():
            before, begin = peak(), time.process_time()
            try:
                way()
            except (Llama4Error, OSError) as error:
                message = str(error).replace("\\n", " ")
            else:
                message = "no error"
            print(command, time.process_time() - begin, peak() - before, message[:1000], sep="\\t")
"""


def config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        content = json.loads(path.read_text())
        for name, value in changes.items():
            section, _, field = name.rpartition("__")
            (content[section] if section else content)[field] = value
        path.write_text(json.dumps(content))

    return change


def sparse(name: str, size: int, begin: bytes = b"") -> Callable[[Path], None]:
    """A file of many zeros that takes no room on the disk."""

    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        with (directory / name).open("wb") as file:
            file.write(begin)
            file.truncate(size)

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).write_text(text)

    return change


def meta(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """In Meta's layout, of which nothing but params.json is whole."""

    def changed(directory: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (directory / name).unlink()
        moe = {"num_experts": 8}
        params = {"dim": 48, "n_layers": 4, "n_heads": 4, "vocab_size": 1024, "ffn_exp": 4.0, "moe_args": moe}
        (directory / "params.json").write_text(json.dumps(params))
        change(directory)

    return changed


def bomb(directory: Path) -> None:
    with zipfile.ZipFile(directory / "consolidated.00.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + bytes(1 << 29))


def layers(count: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "params.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "n_layers": count}))

    return change


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a billion layers": (config(text_config__num_hidden_layers=10**9), "num_hidden_layers"),
    "a thousand layers": (
        config(text_config__num_hidden_layers=1000, text_config__no_rope_layers=None, text_config__layer_types=None),
        "1000",
    ),
    "a billion layers that see": (config(vision_config__num_hidden_layers=10**9), "num_hidden_layers"),
    "a billion experts": (config(text_config__num_local_experts=10**9), "num_local_experts"),
    "a billion pixels": (config(vision_config__image_size=28 * 10**8), "image_size"),
    "a billion tokens": (config(text_config__vocab_size=2 * 10**9), "embed_tokens"),
    "a wide model": (config(text_config__hidden_size=2 * 10**9), ""),
    "a billion tiles": (written("preprocessor_config.json", '{"max_patches": 1000000000}'), "max_patches"),
    "a large config.json": (sparse("config.json", 1 << 33, b"{"), "config.json"),
    "a large tokenizer.json": (sparse("tokenizer.json", 1 << 33, b"{"), "tokenizer.json"),
    "empty lists": (written("tokenizer.json", '{"x": [' + "[]," * 10_000_000 + "[]]}"), "tokenizer.json"),
    "deep JSON": (written("config.json", '{"x":' * 10_000 + "1" + "}" * 10_000), "config.json"),
    "a long number": (written("config.json", f'{{"x": {"1" * 1_000_000}}}'), "config.json"),
    "a large header": (sparse("model.safetensors", 1 << 33, (1 << 31).to_bytes(8, "little")), "model.safetensors"),
    "a pipe for weights": (pipe("model.safetensors"), "model.safetensors"),
    "a pipe for config.json": (pipe("config.json"), "config.json"),
    "a zip bomb": (meta(bomb), "consolidated.00.pth"),
    "a pipe for a .pth": (meta(pipe("consolidated.00.pth")), "consolidated.00.pth"),
    "Meta's billion layers": (meta(layers(10**9)), "n_layers"),
}


def test_absurd_files_cost_little(tmp_path: Path) -> None:
    """One process meets them all, each with its own share of time and memory."""
    for name, (change, _) in CASES.items():
        change(small_model.write(tmp_path / name / "model"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CHILD), *(tmp_path / name for name in CASES)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 5 * len(CASES)
    for i, (name, (_, message)) in enumerate(CASES.items()):
        for command, seconds, size, said in lines[5 * i : 5 * i + 5]:
            is_fine = command in ("info", "plan") and said == "no error"  # it looks at less
            assert is_fine or (message in said and said != "no error"), (name, command, said)
            assert float(seconds) < SECONDS, (name, command, seconds)
            assert int(size) < BYTES, (name, command, size)
