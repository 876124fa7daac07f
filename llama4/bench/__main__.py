"""`llama4 bench NAME [options]`, and the same as `python -m llama4.bench NAME [options]`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

BENCHES = {
    "generate": "speed and memory of a model, beside other engines and the machine's own limits",
    "profile": "where the time of prefill and decoding goes",
    "growth": "time per token against the length of what came before",
    "moe": "the experts' backends over tokens per expert",
    "images": "the vision tower, and the preparation of a picture",
    "quantization": "what fewer bits cost and keep",
    "vqa": "right answers about fresh drawings",
    "long": "one long prompt: time, memory, and the tokens after it",
    "parity": "logits against transformers, layer by layer",
}
"""Name of a benchmark and what it measures."""
_MODULES = {"growth": "context_scaling"}
"""Those whose module, with its `main`, has another name."""


def usage() -> str:
    return "\n".join(f"{name:<14}{about}" for name, about in BENCHES.items())


def main(arguments: Sequence[str]) -> int:
    """Run one; returns its exit code. What a user can cause ends in one line on stderr."""
    if not arguments or arguments[0] not in BENCHES:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(f"usage: llama4 bench NAME [options]\n\n{usage()}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name, *options = arguments
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler chats on stderr; it asks when torch is imported
    try:
        code: int = import_module(f"llama4.bench.{_MODULES.get(name, name)}").main(options)
        return code
    except (ValueError, OSError) as error:
        if "--json" in options:
            print(json.dumps({"error": str(error), "type": type(error).__name__}))
        print(f"llama4: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
