"""GGUF files with bytes changed at random, above all in their heads: each must load or be refused in words."""

from __future__ import annotations

import random
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama4.errors import Llama4Error
from llama4.gguf import GgufFile
from llama4.text.tokenizer import Tokenizer
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.convert import convert_to_gguf
from tests import small_model
from tests.weights import gguf_files

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


def run(changed: Path, opened: Path, count: int, seed: int = 0) -> int:
    """Try so many changes of a file; -> how many were refused when the model was opened, read whole and its vocabulary
    used."""
    data, rng, refused = changed.read_bytes(), random.Random(seed), 0
    head = min(tensor.offset for tensor in GgufFile.read(changed).tensors.values())
    for _ in range(count):
        changed.write_bytes(mutated(data, head, rng))
        try:
            _, source = open_checkpoint(opened, dtype=torch.float32)
            for name in source.names():
                source.read(name).sum()
            Tokenizer(opened).encode("ab é")
        except (Llama4Error, FileNotFoundError):  # the latter where it has no vocabulary
            refused += 1
    changed.write_bytes(data)
    return refused


def models(root: Path) -> dict[str, tuple[Path, Path]]:
    """What is changed, and what is opened: a file of each kind."""
    paths = {name: root / name for name in ("llama4", "llama", "mmproj", "split")}
    for path in paths.values():
        path.mkdir()
    whole = gguf_files.small(paths["llama4"] / "a.gguf")
    convert_to_gguf(llama(root / "hf"), paths["llama"] / "a.gguf", "q8_0", progress=False)
    gguf_files.small(paths["mmproj"] / "a.gguf")
    gguf_files.small_mmproj(paths["mmproj"] / "mmproj-a.gguf")
    parts = gguf_files.split(whole, paths["split"])
    return {
        "llama4": (whole, whole),
        "llama": (paths["llama"] / "a.gguf", paths["llama"] / "a.gguf"),
        "mmproj": (paths["mmproj"] / "mmproj-a.gguf", paths["mmproj"] / "a.gguf"),
        "split": (parts[1], parts[0]),
    }


def llama(directory: Path) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 1024}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(directory)
    small_model.write_tokenizer(directory / "tokenizer.model")
    return directory


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for kind, files in models(Path(name)).items():
            print(f"{kind}: {run(*files, int(sys.argv[1]))} of {sys.argv[1]} refused, the others loaded")
