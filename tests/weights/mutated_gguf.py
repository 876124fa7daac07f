"""GGUF files with bytes changed at random, above all in their heads: each must load or be refused in words."""

from __future__ import annotations

import random
import struct
import sys
import tempfile
from pathlib import Path

import torch

from llama4.errors import Llama4Error
from llama4.gguf import GgufFile
from llama4.text.tokenizer import Tokenizer
from llama4.weights.checkpoint import open_checkpoint

NUMBERS = (0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutated(data: bytes, head: int, rng: random.Random) -> bytes:
    """Some bytes of the head changed, or a number in it, or a part of it gone or doubled, or the file cut short."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(head) if rng.random() < 0.7 else rng.randrange(min(head, 1200))
        way = rng.randrange(6)
        if way < 2:
            changed[at] = rng.randrange(256)
        elif way == 2:
            changed[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif way == 3:
            changed[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        elif way == 4:
            del changed[at : at + rng.randrange(1, 64)]
        else:
            changed[at:at] = changed[at : at + rng.randrange(1, 64)]
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.1 else changed)


def run(path: Path, folder: Path, count: int, seed: int = 0) -> int:
    """Try so many; -> how many of them were refused."""
    data, rng, refused = path.read_bytes(), random.Random(seed), 0
    head = min(tensor.offset for tensor in GgufFile.read(path).tensors.values())
    for _ in range(count):
        file = folder / "mutated.gguf"
        file.write_bytes(mutated(data, head, rng))
        try:
            _, source = open_checkpoint(file, dtype=torch.float32)
            for name in source.names():
                source.read(name).sum()
            Tokenizer(file).encode("ab é")
        except (Llama4Error, FileNotFoundError):  # the latter where it has no vocabulary
            refused += 1
    return refused


if __name__ == "__main__":
    from tests.weights import gguf_files

    with tempfile.TemporaryDirectory() as name:
        print(run(gguf_files.small(Path(name) / "a.gguf"), Path(name), int(sys.argv[1])), "of", sys.argv[1], "refused")
