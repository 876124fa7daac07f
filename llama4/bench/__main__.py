"""`python -m llama4.bench NAME [options]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from llama4.bench import parity, quantization, vqa

BENCHES: dict[str, Callable[[Sequence[str]], int]] = {
    "parity": parity.main,
    "quantization": quantization.main,
    "vqa": vqa.main,
}


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in BENCHES:
        print(f"usage: python -m llama4.bench {{{','.join(BENCHES)}}} [options]", file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    return BENCHES[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
