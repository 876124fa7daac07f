"""How files are damaged: their bytes, the values in them, and what their headers say."""

from __future__ import annotations

import copy
import json
import random
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

from llama4.gguf import GgufFile
from tests.weights import gguf_files


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


def of_bytes(data: bytes, dice: random.Random) -> bytes:
    """A file cut short, or with bytes more, fewer or changed."""
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


def of_json(data: bytes, dice: random.Random) -> bytes:
    """Mostly values in it."""
    return _json(json.loads(data), dice) if dice.random() < 0.8 else of_bytes(data, dice)


def of_lines(data: bytes, dice: random.Random) -> bytes:
    """Of JSON lines, one of them."""
    lines = data.splitlines(keepends=True)
    at = dice.randrange(len(lines))
    return b"".join((*lines[:at], of_json(lines[at], dice) + b"\n", *lines[at + 1 :]))


def _json(content: Any, dice: random.Random) -> bytes:
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


_ALIKE = (("F64", "I64"), ("F32", "I32"), ("F16", "BF16", "I16"), ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"))
"""dtypes of safetensors that take the same bytes."""


def of_safetensors(data: bytes, dice: random.Random) -> bytes:
    """Mostly what the header says of one or two tensors: their names, dtypes and shapes, so that the file stays one."""
    if dice.random() < 0.4:
        return of_bytes(data, dice)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for _ in range(dice.choice((1, 1, 2))):
        key = dice.choice([name for name in header if name != "__metadata__"])
        tensor, shape = header[key], header[key]["shape"]
        way = dice.randrange(4)
        if way == 0:
            names = [
                key + "x",
                "",
                "9" * 5000,
                "x.experts." + "9" * 5000 + ".up_proj.lora_A.weight",
                dice.choice([*header]),
            ]
            other = dice.choice(names)
            header[key], header[other] = header.get(other), tensor
            header = {name: value for name, value in header.items() if value is not None}
        elif way == 1:
            tensor["dtype"] = dice.choice(next((some for some in _ALIKE if tensor["dtype"] in some), ("U8",)))
        else:
            count = 1
            for length in shape:
                count *= length
            tensor["shape"] = dice.choice(
                ([count], shape[::-1], [*shape, 1], [1, *shape], [count, 1], [1, 1, 1, count])
            )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


_GGUF = (
    *(struct.pack("<II", 4, n) for n in (0, 1, 2**32 - 1)),
    *(struct.pack("<Iq", 11, n) for n in (-1, -(2**63))),
    *(struct.pack("<IQ", 10, n) for n in (2**31, 2**64 - 1)),
    *(struct.pack("<If", 6, x) for x in (float("nan"), float("inf"), -1.0, 1e-40)),
    *(struct.pack("<Id", 12, x) for x in (1e300, float("-inf"))),
    *(struct.pack("<I?", 7, flag) for flag in (False, True)),
    *(struct.pack("<I", 8) + gguf_files.text(text) for text in ("", "x", "\0", "a" * 100_000)),
    *(struct.pack("<IIQ", 9, 5, len(some)) + struct.pack(f"<{len(some)}i", *some) for some in ([], [-1], [1] * 4)),
    *(
        struct.pack("<IIQ", 9, 6, len(some)) + struct.pack(f"<{len(some)}f", *some)
        for some in ([float("nan")] * 4, [0.5])
    ),
    *(struct.pack("<IIQ", 9, 6, 1024) + struct.pack("<1024f", *[x] * 1024) for x in (float("nan"), float("inf"), 0.0)),
    struct.pack("<IIQ", 9, 7, 4) + bytes(4),
    struct.pack("<IIQ", 9, 8, 0),
    struct.pack("<IIQ", 9, 8, 2) + gguf_files.text("x") + gguf_files.text("x"),
    struct.pack("<IIQ", 9, 8, 1024) + gguf_files.text("") * 1024,
)
"""Values with their types."""


def of_gguf(data: bytes, dice: random.Random) -> bytes:
    """Mostly a value of a key, or what is said of a tensor."""
    if dice.random() < 0.3:
        return of_bytes(data, dice)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        path.write_bytes(data)
        file = GgufFile.read(path)
        metadata: dict[str, Any] = dict(file.metadata)
        tensors = {
            name: (tensor.type.name, tensor.shape, data[tensor.offset : tensor.offset + tensor.nbytes])
            for name, tensor in file.tensors.items()
        }
        for _ in range(dice.choice((1, 1, 2))):
            if dice.random() < 0.7:
                key = dice.choice([*metadata, "tokenizer.chat_template", "llama4.rope.scaling.type", "split.count"])
                metadata[key] = dice.choice(_GGUF)
                if dice.random() < 0.1:
                    del metadata[key]
                continue
            name = dice.choice([*tensors])
            kind, shape, content = tensors.pop(name)
            way = dice.randrange(5)
            if way == 0:
                name = dice.choice((name + "x", "blk.9.attn_q.weight", "blk.99999999999.x", "v.blk.0.x", "\0"))
            elif way == 1:
                shape = dice.choice((shape[::-1], (*shape, 1), (1, *shape), (0, *shape[1:]), (len(content) // 4,)))
            elif way == 2:
                kind = dice.choice([each for each in gguf_files.TYPES if shape[-1] % 32 == 0] or ["F16"])
            elif way == 3:
                content = dice.randbytes(len(content))
            if way != 4:
                tensors[name] = kind, shape, content
        return gguf_files.write(path, metadata, tensors).read_bytes()
