"""What building a model costs."""

from __future__ import annotations

import subprocess
import sys

BUILD = """
import sys, torch
from llama4.config import PRESETS
from llama4.model.multimodal import Llama4Model
before = set(sys.modules)
with torch.device("meta"):
    Llama4Model(PRESETS["scout"]())
print({"torch._dynamo", "sympy"} & (sys.modules.keys() - before))
"""


def test_torchs_compiler_is_not_imported() -> None:
    """Nor what it is built on: either takes a second or more, and the first answer waits for it."""
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
