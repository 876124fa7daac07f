"""Files that would hang a machine, or eat it: each ends in an error within two seconds and 300 MB above what it takes
to import torch and llama4 (child.py).

`python -m tests.faults.limits` tries each by every command that reads it, and prints what was tried and what failed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llama4.analysis.info import describe_model, find
from llama4.api import Llama4
from llama4.cli.main import main as command_line
from llama4.errors import Llama4Error
from llama4.weights import hub
from llama4.weights.convert import convert, quantize
from tests import small_model
from tests.faults.child import call
from tests.faults.tally import Tally
from tests.weights import gguf_files


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
    with zipfile.ZipFile(directory / "consolidated.00.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + bytes(1 << 29))


def expert(index: int) -> Callable[[Path], None]:
    """Weights with one expert more, which has a number of its own."""

    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        key = f"language_model.model.layers.1.feed_forward.experts.{index}.gate_proj.weight"
        save_file(load_file(path) | {key: torch.zeros(1)}, path, metadata={"format": "pt"})

    return change


def gguf(change: Callable[[Path], None], **metadata: Any) -> Callable[[Path], None]:
    """One file in place of the directory's."""

    def changed(directory: Path) -> None:
        for path in directory.iterdir():
            path.unlink()
        gguf_files.small(directory / "a.gguf", **metadata)
        change(directory)

    return changed


def empty_texts(count: int) -> bytes:
    """So many, as a GGUF file has them."""
    return struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)


def counted(at: int) -> Callable[[Path], None]:
    """A GGUF file that says it has a billion of something."""

    def change(directory: Path) -> None:
        data = bytearray((directory / "a.gguf").read_bytes())
        data[at : at + 8] = (10**9).to_bytes(8, "little")
        (directory / "a.gguf").write_bytes(data)

    return change


def split(directory: Path) -> None:
    (directory / "a.gguf").rename(directory / "a-00001-of-99999.gguf")


def nothing(directory: Path) -> None:
    pass


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
    "a billionth expert": (expert(10**9 - 1), "999999999"),
    "a pipe for a GGUF file": (gguf(pipe("a.gguf")), "a.gguf"),
    "a billion keys": (gguf(counted(16)), "a.gguf"),
    "a billion GGUF tensors": (gguf(counted(8)), "a.gguf"),
    "a GGUF file of a large head": (gguf(nothing, x=empty_texts(5_000_000)), "a.gguf"),
    "GGUF's millions of tokens": (
        gguf(nothing, **{"tokenizer.ggml.tokens": [f"{i:x}" for i in range(2_000_000)]}),
        "a.gguf",
    ),
    "GGUF's billion layers": (gguf(nothing, **{"llama4.block_count": 10**9}), "block_count"),
    "GGUF's thousand layers": (gguf(nothing, **{"llama4.block_count": 1000}), "1000"),
    "GGUF's wide heads": (gguf(nothing, **{"llama4.attention.key_length": 2**31 - 2}), ""),
    "a split of many files": (gguf(split), "fetch the others"),
}


def _plan(directory: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as text, contextlib.redirect_stdout(io.StringIO()):
        code = command_line(["plan", str(directory)])
    if code:
        raise Llama4Error(text.getvalue())


def commands(directory: Path, result: Path) -> dict[str, Callable[[], object]]:
    """All that reads a model."""
    return {
        "from_pretrained": lambda: Llama4.from_pretrained(directory, progress=False),
        "info": lambda: describe_model(find(str(directory)), None),
        "plan": lambda: _plan(directory),
        "convert": lambda: convert(hub.resolve(str(directory)), result, "hf", progress=False),
        "quantize": lambda: quantize(hub.resolve(str(directory)), result, "int8", progress=False),
    }


def run(folder: Path) -> Tally:
    """Every case by every command."""
    tally = Tally()
    model = small_model.write(folder / "model")
    for name, (change, message) in CASES.items():
        directory = folder / name
        shutil.copytree(model, directory)
        change(directory)
        for command, action in commands(directory, folder / f"{name}, converted").items():
            ended = call(action)
            problem = ended.problem
            looks_at_less = command in ("info", "plan") and not ended.error
            if problem is None and not looks_at_less and not (ended.error and message in ended.message):
                problem = f"it says {ended.message[:150]!r}"
            tally.note(name, problem, command)
    return tally


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tally = run(Path(folder))
    print(tally)
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
