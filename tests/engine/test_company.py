"""A request gets the tokens that it gets alone in every weight format, by the compiled kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama4.api import Llama4
from llama4.cli.main import main
from llama4.engine.scheduler import Scheduler
from tests.engine.test_scheduler import ARRIVALS, alone, cases, longest, run


@pytest.mark.parametrize("form", ["int8", "int4", "fp8", "q4_0", "bfloat16"])
def test_in_weight_formats_too(tmp_path: Path, form: str) -> None:
    """In the company of five others at most, in a small pool: as alone."""
    name, options = "tiny", {"dtype": form} if form == "bfloat16" else {"quantization": form}
    if form == "q4_0":
        name, options = str(tmp_path / "tiny.gguf"), {}
        assert main(["convert", "tiny", name, "--type", form]) == 0
    llm = Llama4.from_pretrained(name, progress=False, **options)  # type: ignore[arg-type]
    given = cases(llm, ARRIVALS // 2, seed=3)
    least = llm.model.new_cache().num_bytes_of(longest(given))
    scheduler = Scheduler(llm.runner, llm.tokenizer, cache_memory=least, max_batch=6, budget=100)
    run(llm, scheduler, given, seed=2)
    for case in given:
        assert case.ids == alone(llm, case)
