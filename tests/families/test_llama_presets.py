"""Known dense models: parameters as published, and configurations that come back."""

from __future__ import annotations

import json

import pytest

from llama4.analysis import costs
from llama4.cli.main import main
from llama4.families import PRESETS, family_of
from llama4.families.llama import read_config
from llama4.families.llama_presets import PRESETS as DENSE

PUBLISHED = {
    **{"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192},
    **{"llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800},
    **{"llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "smollm2-135m": 134_515_008},
}
"""As the model cards of their safetensors say."""


@pytest.mark.parametrize("name", DENSE)
def test_presets(name: str) -> None:
    config = PRESETS[name]()
    assert config.num_parameters() == PUBLISHED.get(name, config.num_parameters())
    assert sum(costs.parameter_bytes(config.text, dtype="float16").values()) == 2 * config.num_parameters()
    assert read_config(family_of(config).write_config(config)).text == config.text


def test_info_and_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "llama-2-13b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 13_015_864_320
    assert main(["plan", "llama-3-70b", "--weights", "int4", "--device", "h100"]) == 0
    assert "llama-3-70b" in capsys.readouterr().out
