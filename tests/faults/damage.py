"""Damaged files: each kind of file that is read is changed at random, and loading it either works or ends in a
`Llama4Error` or an `OSError` that says where, within two seconds and 300 MB (child.py).

`python -m tests.faults.damage [TRIES] [SEED]` tries many and prints, for every kind, how many were tried and failed.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llama4.api import Llama4
from llama4.text.tokenizer import Tokenizer
from llama4.vision.images import load_image
from llama4.weights.convert import convert, quantize
from tests import small_model
from tests.faults.child import call
from tests.faults.tally import Tally


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**4000, 0.5, -0.5, 1e300, 1e-300),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "1", "\ud800", "\0", "../x", "a" * 100_000),
    *([], {}, [None], [1], ["x"], [[]], {"x": 1}, {"": None}, {"x": {}}, [{}], nested(30), nested(300)),
)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: in the table.
        directory: a model's directory that loads.
        file: which of its files is damaged.
        load: what reads it, given a directory.
        is_json: whether fields are changed, too.
    """

    name: str
    directory: Path
    file: str
    load: Callable[[Path], object]
    is_json: bool = True


def talk(directory: Path) -> None:
    """Load a model, and let it answer."""
    llm = Llama4.from_pretrained(directory, progress=False)
    llm.chat([{"role": "user", "content": "ab <x> 1"}], max_new_tokens=1)


def kinds(root: Path) -> Iterator[Kind]:
    """All kinds of files, of models made in a folder."""
    meta, hf, int4, sharded = (root / name for name in ("meta", "hf", "int4", "sharded"))
    llm = Llama4.from_pretrained(small_model.write(root / "source"), progress=False)
    llm.save_pretrained(hf)
    (hf / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|eot|>"}))
    (hf / "added_tokens.json").write_text(json.dumps({"<|eot|>": small_model.RANKS + 8}))
    config = json.loads((hf / "generation_config.json").read_text())
    (hf / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7, **config}))
    _expressible(hf, root / "expressible")
    convert(root / "expressible", meta, "meta", progress=False)
    quantize(hf, int4, "int8", progress=False)
    quantize(hf, sharded, "int8", progress=False, max_shard_bytes=60_000)
    for name in ("config", "generation_config", "preprocessor_config", "processor_config", "tokenizer_config"):
        yield Kind(f"{name}.json", hf, f"{name}.json", talk)
    for name in ("special_tokens_map", "added_tokens", "tokenizer"):
        yield Kind(f"{name}.json", hf, f"{name}.json", talk)
    yield Kind("chat_template.jinja", hf, "chat_template.jinja", talk, is_json=False)
    yield Kind("safetensors", hf, "model.safetensors", talk, is_json=False)
    yield Kind("index of shards", sharded, "model.safetensors.index.json", talk)
    yield Kind("compressed-tensors", int4, "config.json", talk)
    modelopt = root / "modelopt"
    _linked(int4, modelopt)
    content = json.loads((int4 / "config.json").read_text())
    content.pop("quantization_config")
    (modelopt / "config.json").unlink()
    (modelopt / "config.json").write_text(json.dumps(content))
    quantization = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["x"]}}
    (modelopt / "hf_quant_config.json").write_text(json.dumps(quantization))
    yield Kind("hf_quant_config.json", modelopt, "hf_quant_config.json", talk)
    yield Kind("params.json", meta, "params.json", talk)
    yield Kind("consolidated.00.pth", meta, "consolidated.00.pth", talk, is_json=False)
    yield Kind("tokenizer.model", meta, "tokenizer.model", lambda path: Tokenizer(path / "tokenizer.model"), False)
    llm.chat("ab", max_new_tokens=1)
    assert llm.cache is not None
    saved = root / "saved"
    saved.mkdir()
    llm.cache.save(saved / "cache.safetensors")
    yield Kind(
        "prompt cache", saved, "cache.safetensors", lambda path: llm.load_cache(path / "cache.safetensors"), False
    )
    pictures = root / "pictures"
    pictures.mkdir()
    picture = Image.effect_noise((64, 48), 50).convert("RGB")
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO"):
        picture.save(pictures / f"a.{form.lower()}", form)
        yield Kind(f"picture {form}", pictures, f"a.{form.lower()}", _reader(f"a.{form.lower()}"), False)
    message = {"role": "user", "content": [{"type": "text", "text": "ab"}]}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    content = {
        "messages": [
            {"role": "system", "content": "be"},
            message,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": _data_url(picture)}}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}],
    }
    (saved / "messages.json").write_text(json.dumps(content))

    def ask(path: Path) -> None:
        try:
            given = json.loads((path / "messages.json").read_bytes())
            given = {"messages": given["messages"], "tools": given.get("tools")}
        except Exception:  # what users give is no file, but what is in it
            return
        llm.chat(**given, max_new_tokens=1)

    yield Kind("messages and tools", saved, "messages.json", ask)


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.resize((8, 8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _reader(name: str) -> Callable[[Path], object]:
    return lambda path: load_image(path / name)


def _expressible(source: Path, target: Path) -> None:
    """The same model with what Meta's layout can say: RoPE as released, and as many tiles."""
    _linked(source, target)
    for name, change in (("config", "text_config"), ("preprocessor_config", "max_patches")):
        content = json.loads((target / f"{name}.json").read_text())
        if change == "max_patches":
            content[change] = 16
        else:
            content[change]["rope_parameters"]["original_max_position_embeddings"] = 8192
        (target / f"{name}.json").unlink()
        (target / f"{name}.json").write_text(json.dumps(content))


def _linked(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)


def damaged(data: bytes, is_json: bool, dice: random.Random) -> bytes:
    """The content of a file, changed in one or a few places."""
    if is_json and dice.random() < 0.8:
        return _damaged_json(json.loads(data), dice)
    way, at = dice.randrange(5), dice.randrange(len(data) + 1)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + dice.randbytes(dice.randint(1, 30)) + data[at:]
    if way == 2:
        return data[: min(at, 4096)] + data[min(at, 4096) + dice.randint(1, 100) :]
    changed = bytearray(data)
    for _ in range(dice.choice((1, 3, 30))):
        changed[dice.randrange(min(len(data), dice.choice((16, 1024, len(data)))))] = dice.randrange(256)
    return bytes(changed)


def _damaged_json(content: Any, dice: random.Random) -> bytes:
    for _ in range(dice.choice((1, 1, 2))):
        node: Any = content
        parent: Any = None
        key: Any = None
        while isinstance(node, (dict, list)) and node and (parent is None or dice.random() < 0.8):
            parent, key = node, dice.choice(list(node)) if isinstance(node, dict) else dice.randrange(len(node))
            node = parent[key]
        if parent is None:
            break
        if isinstance(parent, dict) and dice.random() < 0.1:
            del parent[key]
        elif dice.random() < 0.05:
            parent[key] = copy.deepcopy(content)
        else:
            parent[key] = copy.deepcopy(dice.choice(HOSTILE))
    sys.set_int_max_str_digits(5000)
    text = json.dumps(content)
    sys.set_int_max_str_digits(4300)
    if dice.random() < 0.1:  # a key that comes twice
        text = text.replace("{", '{"model_type": 1, ', 1)
    return text.encode("utf-8", "surrogatepass")


def attempt(kind: Kind, data: bytes) -> str | None:
    """What is wrong with how a damaged file is read; None if nothing is."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        _linked(kind.directory, directory)
        (directory / kind.file).unlink()
        (directory / kind.file).write_bytes(data)
        ended = call(lambda: _without_threads(lambda: kind.load(directory)))
    if ended.error == "ConfigError" and "configuration" not in ended.message and kind.file not in ended.message:
        return f"the message names no file: {ended.message[:150]}"
    return ended.problem


def _without_threads(action: Callable[[], object]) -> None:
    """Call a function that leaves no thread."""
    threads = threading.active_count()
    try:
        action()
    finally:
        assert threading.active_count() <= threads, "left a thread"


def run(tries: int, seed: int, root: Path, *, only: str = "") -> Tally:
    """Damage every kind of file so many times."""
    tally = Tally()
    for kind in kinds(root):
        if only not in kind.name:
            continue
        data = (kind.directory / kind.file).read_bytes()
        kind.load(kind.directory)
        dice = random.Random(f"{seed} {kind.name}")
        for i in range(tries):
            tally.note(kind.name, attempt(kind, damaged(data, kind.is_json, dice)), str(i))
    return tally


def main(arguments: list[str]) -> int:
    tries, seed = (int(each) for each in [*arguments, *("100", "0")[len(arguments) :]][:2])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        tally = run(tries, seed, Path(root), only="".join(arguments[2:]))
    print(tally)
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
