"""`python -m llama4` is the command `llama4`."""

from __future__ import annotations

import sys

from llama4.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
