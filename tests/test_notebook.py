"""Progress bars in a real kernel of Jupyter, without ipywidgets: they appear, move, and are whole before they go."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import llama4

nbclient: Any = pytest.importorskip("nbclient")
nbformat: Any = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

CELLS = {
    "loading": """
        import sys
        sys.modules["ipywidgets"] = None  # as where it is missing
        from llama4 import progress
        progress.DELAY = progress.INTERVAL = 0
        from llama4 import Llama4
        llm = Llama4.from_pretrained("tiny", quantization="int8")
    """,
    "reading": "reply = llm.chat('Hi ' * 100, max_new_tokens=3)",
    "writing": "llm.save_pretrained('saved')",
}


def test_bars_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(llama4.__file__).parents[1]), *sys.path]))
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(textwrap.dedent(cell)) for cell in CELLS.values()]
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    for doing, cell in zip(CELLS, notebook.cells, strict=True):
        text = "".join(each.get("text", "") for each in cell.outputs if each.get("name") == "stderr")
        seen = [int(percent) for percent in re.findall(rf"{doing}: +(\d+)%", text)]
        assert len(set(seen)) > 2 and seen == sorted(seen) and seen[-1] == 100, (doing, text)
        assert text.endswith("\r"), "and then it is gone"
