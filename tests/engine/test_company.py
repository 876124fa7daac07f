"""A request gets the tokens that it gets alone in every weight format, by the compiled kernels; LLAMA4_ARRIVALS=500 for
the long run."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llama4.adapters.by_row import RowAdapters
from llama4.adapters.config import LoraConfig
from llama4.api import Llama4
from llama4.cli.main import main
from llama4.engine.sampling import Sampler
from llama4.engine.scheduler import Scheduler
from tests.adapters.test_lora import random_adapter
from tests.engine.test_scheduler import ARRIVALS, WORDS, Case, alone, cases, longest, run


def long_cases(llm: Llama4, count: int) -> list[Case]:
    """Prompts of some blocks, most of which begin alike."""
    rng = random.Random(5)
    beginnings = [" ".join(rng.choices(WORDS, k=rng.randrange(150, 300))) for _ in range(2)]
    texts = [f"{rng.choice(beginnings)} {' '.join(rng.choices(WORDS, k=rng.randrange(1, 60)))}" for _ in range(count)]
    samplers = [Sampler(), Sampler(temperature=1.0, seed=3)]
    inputs = [llm.processor([{"role": "user", "content": text}]) for text in texts]
    return [Case(each, rng.choice(samplers), rng.choice((1, 8, 30)), llm.stop_ids) for each in inputs]


def loaded(form: str, directory: Path) -> Llama4:
    """The embedded model in a dtype or a weight format."""
    name, options = "tiny", dict[str, str]()
    if form in ("float32", "bfloat16"):
        options = {"dtype": form}
    elif form == "q4_0":
        name = str(directory / "tiny.gguf")
        assert main(["convert", "tiny", name, "--type", form]) == 0
    elif form == "nf4":
        pytest.importorskip("bitsandbytes")
        from tests.quantization.test_nf4 import CONFIG, quantized  # which imports it

        name = str(directory)
        Llama4.from_pretrained("tiny", progress=False).save_pretrained(directory)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
        (weights,) = directory.glob("*.safetensors")
        save_file(quantized(load_file(weights), "apart")[0], weights, metadata={"format": "pt"})
    else:
        options = {"quantization": form}
    return Llama4.from_pretrained(name, progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4", "fp8", "nf4", "q4_0"])
def test_in_weight_formats_too(tmp_path: Path, form: str) -> None:
    """In the company of five others at most: short ones with pictures, and long ones in a small pool."""
    llm = loaded(form, tmp_path)
    differ = []
    for given in (cases(llm, ARRIVALS // 2, seed=3), long_cases(llm, ARRIVALS // 4)):
        memory = 3 * llm.model.new_cache().num_bytes_of(longest(given))
        scheduler = Scheduler(llm.runner, llm.tokenizer, cache_memory=memory, max_batch=6)
        gone = run(llm, scheduler, given, seed=2, cancelled=0.02)
        for i, case in enumerate(given):
            expected = alone(llm, case)
            if case.ids != (expected[: len(case.ids)] if i in gone else expected):
                differ.append(i)
        print(form, len(given), scheduler.counts, len(gone), "cancelled", len(differ), "differ")
    assert scheduler.counts.prefix_hits
    assert not differ


@pytest.mark.parametrize("form", ["int4", "int8", "fp8", "nf4"])
def test_with_adapters(form: str, tmp_path: Path) -> None:
    """Two and none, in one batch."""
    llm = loaded(form, tmp_path)
    for seed, name in enumerate(("a", "b")):
        llm.adapters.add(name, random_adapter(llm.model, LoraConfig(rank=4), seed))
    given = [replace(case, adapter=(None, "a", "b")[i % 3], length=8) for i, case in enumerate(cases(llm, 9, seed=2))]
    scheduler = Scheduler(llm.runner, llm.tokenizer, adapters=RowAdapters(llm.model, llm.adapters))
    run(llm, scheduler, given, seed=2)
    assert [case.ids for case in given] == [alone(llm, case) for case in given]
