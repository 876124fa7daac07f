"""What `llama4 info` tells of a checkpoint beside its configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llama4.analysis.info import describe_model, find, table
from llama4.families.llama4 import Llama4Family
from llama4.weights import hub
from llama4.weights.convert import convert_to_gguf, quantize
from tests import small_model
from tests.parity.references import write_mixed
from tests.weights.test_meta import make_reference, params, write_meta

LLAMA4, OWN = Llama4Family(), "by the checkpoint's own chat template"
TEMPLATES = Path(__file__).parents[1] / "text" / "templates"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("model"))


def lines_of(directory: Path) -> dict[str, str]:
    lines = table("it", describe_model(find(str(directory)))).splitlines()
    return {line[2:14].strip(): line[14:] for line in lines}


@pytest.mark.parametrize(
    ("template", "agrees", "line"),
    [
        (None, None, "in Llama 4's format"),
        (
            LLAMA4.chat_template(),
            True,
            OWN + ", which writes what Llama 4's format does",
        ),
        ("chatml.jinja", False, OWN),
    ],
)
def test_who_writes_prompts(
    directory: Path, tmp_path: Path, template: str | None, agrees: bool | None, line: str
) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    if template is not None:
        source = (TEMPLATES / template).read_text() if template.endswith(".jinja") else template
        (tmp_path / "chat_template.jinja").write_text(source)
    facts = describe_model(find(str(tmp_path)))["prompts"]
    assert (facts["agrees"], facts["templates"]) == (agrees, ["default"] if template is not None else [])
    assert lines_of(tmp_path)["prompts"] == line


def test_files_of_each_layout(directory: Path, tmp_path: Path) -> None:
    parameters = sum(parameter.numel() for parameter in small_model.model().parameters())
    assert lines_of(directory)["files"] == f"Hugging Face's layout: float32; {4 * parameters / 2**20:.1f} MiB in all"
    meta = make_reference(False)
    write_meta(tmp_path / "meta", meta, params(False), 1)
    size = 4 * sum(parameter.numel() for parameter in meta.parameters())
    assert lines_of(tmp_path / "meta")["files"] == f"Meta's layout: float32; {size / 2**20:.1f} MiB in all"


def test_weights_in_a_scheme_take_what_quantize_writes(directory: Path, tmp_path: Path) -> None:
    """With scales, and with what no scheme quantizes. A scheme that does not suit the model is left out."""
    sizes = describe_model(find(str(write_mixed(tmp_path / "model"))))["bytes"]
    for scheme in ("fp8", "int4"):
        quantize(tmp_path / "model", tmp_path / scheme, scheme, progress=False)
        assert sizes[scheme] == describe_model(find(str(tmp_path / scheme)))["quantization"]["bytes"]
    assert sizes["float32"] == 2 * sizes["bfloat16"] > 2 * sizes["fp8"] > 2 * sizes["int4"]
    assert "int4" not in describe_model(find(str(directory)))["bytes"]


def test_files_without_a_quantization_config(directory: Path, tmp_path: Path) -> None:
    """GGUF: the types of the tensors say all."""
    convert_to_gguf(directory, tmp_path / "a.gguf", "q8_0", progress=False)
    lines = lines_of(tmp_path / "a.gguf")
    assert "Q8_0, a scale per 32 weights" in lines["files"]
    assert "quantized" not in lines


def test_a_configuration_alone(directory: Path, tmp_path: Path) -> None:
    shutil.copy(directory / "config.json", tmp_path)
    lines = lines_of(tmp_path)
    assert lines["files"] == "Hugging Face's layout: no weights here"
    assert lines["prompts"] == "unknown: there is no tokenizer"


@pytest.mark.parametrize("added", [None, 5, [], {"x": {}}, {"5": "a"}, {"7": {"content": "<|end|>"}}])
def test_names_of_ends_where_there_is_no_tokenizer(added: object, directory: Path, tmp_path: Path) -> None:
    """Whatever tokenizer_config.json holds."""
    content = json.loads((directory / "config.json").read_text())
    content["text_config"]["eos_token_id"] = [7]
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    ends = describe_model(find(str(tmp_path)))["replies"]["stop_tokens"]
    assert ends == {7: "<|end|>" if isinstance(added, dict) and "7" in added else None}


def test_what_a_model_was_made_from(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "config.json").read_text())
    content["hub_origin"] = {"repo_id": "org/base", "commit": "0123abcd"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert lines_of(tmp_path)["made from"] == "org/base at commit 0123abcd"
    assert describe_model(find(str(tmp_path)))["checkpoint"]["made_from"] == content["hub_origin"]


def test_a_gguf_file_has_the_sizes_of_its_source(tmp_path: Path) -> None:
    """Though its vision tower is in float32."""
    convert_to_gguf(hub.resolve("tiny"), tmp_path / "a.gguf", progress=False)
    found, wanted = (describe_model(find(name)) for name in (str(tmp_path / "a.gguf"), "tiny"))
    assert found["bytes"] == wanted["bytes"] and found["dtype"] == wanted["dtype"] == "bfloat16"
    assert lines_of(tmp_path / "a.gguf")["weights"].endswith(" in int4; fp8 and int4 with all else in bfloat16")
