"""`llama4 bench NAME [options]`, and the same as `python -m llama4.bench NAME [options]`."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module

from llama4.arguments import report
from llama4.progress import starting

BENCHES = {
    "generate": ("generate", "speed and memory of a model, beside other engines and the machine's roofline"),
    "make": ("make", "a model of a known shape with random weights, to measure with"),
    "gguf": ("gguf", "files in GGUF, beside llama.cpp on the same files"),
    "profile": ("profile", "where the time of prefill and decoding goes"),
    "growth": ("context_scaling", "time per token against the length of the context"),
    "moe": ("moe", "the experts' backends over tokens per expert"),
    "images": ("images", "the vision tower, and the preprocessing of a picture"),
    "quantization": ("quantization", "size, memory, speed and accuracy of the quantization schemes"),
    "perplexity": ("perplexity", "how well models foretell a text, beside transformers and llama.cpp"),
    "vqa": ("vqa", "accuracy on questions about fresh drawings"),
    "long": ("long", "one long prompt: time, memory, and the tokens after it"),
    "serve": ("serving.command", "a server under load: tokens a second, many connections, many requests"),
    "finetune": ("finetuning", "a step of training an adapter, beside transformers with PEFT"),
    "parity": ("parity", "logits against transformers, layer by layer"),
    "device": ("device.command", "what only a GPU can show: checks, speed and memory within minutes"),
}
"""Name of a benchmark -> its module, which has `main(arguments) -> exit code`, and what it measures."""


def usage() -> str:
    return "\n".join(f"{name:<14}{about}" for name, (_, about) in BENCHES.items())


def main(arguments: Sequence[str]) -> int:
    """Run one benchmark; returns its exit code. A user's mistake ends in one line on stderr."""
    if not arguments or arguments[0] not in BENCHES:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(f"usage: llama4 bench NAME [options]\n\n{usage()}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name, *options = arguments
    module, _ = BENCHES[name]
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported: its profiler writes to stderr
    try:
        with starting():
            bench = import_module(f"llama4.bench.{module}")
        code: int = bench.main(options)
        return code
    except (ValueError, OSError) as error:
        return report(error, as_json="--json" in options)


if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    runpy.run_module("llama4", run_name="__main__")
