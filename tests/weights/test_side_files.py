"""What stands beside the weights comes out as it went in, and transformers runs what we save, to the same tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, pipeline

from llama4 import Llama4
from llama4.errors import ConfigError
from llama4.model.multimodal import Llama4Model
from llama4.text.prompt import render
from llama4.text.tokenizer import Tokenizer
from llama4.weights.convert import convert, quantize
from llama4.weights.side_files import SideFiles
from tests import small_model

LICENCE = "Do what is right.\n"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}\r\n{% endfor %}"


def write_rich(directory: Path, *, is_text_only: bool = False) -> Path:
    """A checkpoint with everything that publishers put beside weights, in older spellings too."""
    small_model.write(directory)
    write_tokenizer_files(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["Llama4Variant"], "custom": {"a": [1, None]}, "transformers_version": "4.51.0"}
    for section in (config, config["text_config"], config["vision_config"]):
        section["torch_dtype"] = section.pop("dtype")
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "router_jitter_noise": 0.0, "ours": "é"}
    if is_text_only:
        config = {**text, "architectures": ["Llama4Variant"], "custom": 1}
        weights = load_file(directory / "model.safetensors")
        kept = {key: value for key, value in weights.items() if key.startswith("language_model.")}
        kept = {key.removeprefix("language_model."): value for key, value in kept.items()}
        save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "preprocessor_config.json").unlink()
    else:
        images = json.loads((directory / "preprocessor_config.json").read_text())
        put(directory, "preprocessor_config.json", images | {"resample": 2, "extra": "kept"})
        put(directory, "processor_config.json", {"processor_class": "Llama4Processor", "patch_size": 14, "mine": 1})
    put(directory, "config.json", config)
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [903, 904], "unknown": None}
    put(directory, "generation_config.json", generation)
    tokens = json.loads((directory / "tokenizer_config.json").read_text())
    put(directory, "tokenizer_config.json", tokens | {"model_max_length": 777, "chat_template": "{{ 'older' }}"})
    put(directory, "special_tokens_map.json", {"eos_token": {"content": "<|eot|>", "lstrip": False}})
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/rag.jinja").write_text("{{ 'rag' }}")
    (directory / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    (directory / "README.md").write_text("---\nlicense: other\n---\n# Mine\n")
    (directory / "LICENSE.txt").write_text(LICENCE)
    (directory / "USE_POLICY.md").write_text("Be kind.\n")
    return directory


def write_tokenizer_files(directory: Path) -> None:
    """With flags of tokens that we would not write."""
    Tokenizer(directory, num_special_tokens=small_model.SPECIAL).save(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"][-1] |= {"lstrip": True, "single_word": True}
    put(directory, "tokenizer.json", content)


def put(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(json.dumps(content))


def files(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def differing(before: Path, after: Path) -> set[str]:
    """Files of the first, weights aside, that are not byte by byte in the second."""
    old, new = files(before), files(after)
    return {name for name, content in old.items() if "model-" not in name and new.get(name) != content} - {
        "model.safetensors"
    }


def resave(source: Path, target: Path) -> None:
    Llama4.from_pretrained(source, progress=False).save_pretrained(target)


def via_hf(source: Path, target: Path) -> None:
    convert(source, target, "hf")


@pytest.mark.parametrize("is_text_only", [False, True])
@pytest.mark.parametrize("way", [resave, via_hf])
def test_what_came_in_goes_out(way: Callable[[Path, Path], None], is_text_only: bool, tmp_path: Path) -> None:
    source = write_rich(tmp_path / "source", is_text_only=is_text_only)
    way(source, tmp_path / "target")
    assert differing(source, tmp_path / "target") == set()
    way(tmp_path / "target", tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "target")


@pytest.mark.parametrize("is_text_only", [False, True])
def test_quantizing_adds_its_configuration_and_changes_nothing_else(is_text_only: bool, tmp_path: Path) -> None:
    source = write_rich(tmp_path / "source", is_text_only=is_text_only)
    quantize(source, tmp_path / "target", "int8")
    assert differing(source, tmp_path / "target") == {"config.json", "README.md"}
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "target"))
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before
    quantized = Llama4.from_pretrained(source, quantization="int8", progress=False)
    quantized.save_pretrained(tmp_path / "saved")
    assert differing(tmp_path / "target", tmp_path / "saved") == {"README.md"}, "its title is the directory's name"


def test_what_changed_is_written(tmp_path: Path) -> None:
    source = write_rich(tmp_path / "source")
    llm = Llama4.from_pretrained(source, dtype="bfloat16", progress=False)
    assert llm.generation_config.temperature == 0.6
    llm.generation_config = dataclasses.replace(llm.generation_config, temperature=0.3)
    text = dataclasses.replace(llm.config.text, max_position_embeddings=2048, rope_scaling=None)
    llm.model.config = dataclasses.replace(llm.config, text=text)
    llm.save_pretrained(tmp_path / "target")
    assert differing(source, tmp_path / "target") == {"config.json", "generation_config.json"}
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "target"))
    for section in (before, before["text_config"], before["vision_config"]):
        del section["torch_dtype"]
        section["dtype"] = "bfloat16"
    before["text_config"] |= {"max_position_embeddings": 2048}
    theta = before["text_config"].pop("rope_theta")
    del before["text_config"]["rope_scaling"]
    before["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    assert after == before
    before, after = (json.loads((tmp_path / n / "generation_config.json").read_text()) for n in ("source", "target"))
    assert after == before | {"temperature": 0.3}


def test_by_way_of_metas_layout(tmp_path: Path) -> None:
    """Which has no config.json; all else that came in comes back."""
    source = as_meta_has_it(write_rich(tmp_path / "source"))
    convert(source, tmp_path / "meta", "meta")
    assert not (tmp_path / "meta/config.json").exists()
    assert Llama4.from_pretrained(tmp_path / "meta", progress=False).generation_config.temperature == 0.6
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    assert differing(source, tmp_path / "back") == {"config.json", "tokenizer.json"}


def test_stop_tokens_of_config_json_alone_survive_metas_layout(tmp_path: Path) -> None:
    source = as_meta_has_it(write_rich(tmp_path / "source"))
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [small_model.RANKS + 5]
    put(source, "config.json", config)
    convert(source, tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    for name in ("source", "meta", "back"):
        assert Llama4.from_pretrained(tmp_path / name, progress=False).stop_ids == (small_model.RANKS + 5,)


def as_meta_has_it(directory: Path) -> Path:
    """With 16 tiles and RoPE scaled from 8192 tokens, which are fixed in Meta's code."""
    images, config = (json.loads((directory / n).read_text()) for n in ("preprocessor_config.json", "config.json"))
    put(directory, "preprocessor_config.json", images | {"max_patches": 16})
    config["text_config"]["rope_scaling"]["original_max_position_embeddings"] = 8192
    put(directory, "config.json", config)
    return directory


# transformers leaves templates open
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_chat_templates_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    directory = write_rich(tmp_path / "source")
    found = SideFiles.read(directory).chat_templates
    assert found == AutoTokenizer.from_pretrained(directory).chat_template
    assert found == AutoProcessor.from_pretrained(directory).chat_template
    assert found == {"default": TEMPLATE.replace("\r\n", "\n"), "rag": "{{ 'rag' }}"}
    (directory / "additional_chat_templates/rag.jinja").unlink()
    (directory / "chat_template.jinja").unlink()
    assert SideFiles.read(directory).chat_templates == {"default": "{{ 'older' }}"}
    assert AutoTokenizer.from_pretrained(directory).chat_template == "{{ 'older' }}"
    put(directory, "chat_template.json", {"chat_template": "{{ 'json' }}"})
    assert AutoProcessor.from_pretrained(directory).chat_template == "{{ 'json' }}"
    assert SideFiles.read(directory).chat_templates == {"default": "{{ 'json' }}"}
    put(directory, "chat_template.json", {})
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    put(directory, "tokenizer_config.json", {"chat_template": several})
    assert SideFiles.read(directory).chat_templates == {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize("content", ['{"chat_template": 5}', '{"chat_template": {"a": 1}}', "[]", "{", b"\xff"])
def test_damaged_files_are_named(content: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        _ = SideFiles.read(tmp_path).chat_templates


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a “city”, <b>now</b> & then",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED = {"role": "user", "content": "weather in Zürich?"}
ARGUMENTS = {"city": "Zürich", "days": [1, 2.5], "exact": True, "none": None, "in": {"a": "<|eot|>'\"\\"}}
CALLS = [{"id": "1", "type": "function", "function": {"name": name, "arguments": ARGUMENTS}} for name in "fg"]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "  Be brief. \t"}, {"role": "user", "content": " {{ x }} {% y %} '\"\\n <b>&amp; "}],
    [ASKED, {"role": "assistant", "content": ""}, {"role": "user", "content": "x"}],
    [ASKED, {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS}, {"role": "tool", "content": "dry"}],
    [ASKED, {"role": "assistant", "content": None, "tool_calls": CALLS[:1]}, {"role": "tool", "content": {"é": [1]}}],
    [ASKED, {"role": "assistant", "tool_calls": [CALLS[0]["function"]]}, {"role": "ipython", "content": "[1]"}, ASKED],
    [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}],
    [ASKED, {"role": "assistant", "content": "no", "tool_calls": []}, ASKED, {"role": "assistant", "content": "yes"}],
    [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, ASKED],
    [{"role": "assistant", "content": "Hi"}, {"role": "system", "content": "late"}, ASKED, ASKED],
    [
        {"role": "developer", "content": "Brief."},
        ASKED,
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "function", "name": "f", "content": "dry"},
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
    ],
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved from a tokenizer.model, with nothing beside it that transformers reads."""
    directory = tmp_path_factory.mktemp("saved")
    llm = Llama4.from_pretrained(small_model.write(directory / "source"), progress=False)
    llm.save_pretrained(directory / "model")
    return directory / "model"


@pytest.fixture(scope="module")
def theirs(saved: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(saved)


@pytest.mark.parametrize(
    "options",
    [{}, {"tools": [TOOL, TOOL]}, {"tools": [TOOL], "tools_in_user_message": False}],
    ids=["", "user", "system"],
)
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_our_template_is_our_prompt(
    conversation: list[dict[str, Any]], options: dict[str, Any], saved: Path, theirs: Any
) -> None:
    tokenizer = Tokenizer(saved)
    for add_generation_prompt in (False, True):
        options = options | {"add_generation_prompt": add_generation_prompt}
        ours = render(conversation, tokenizer, **options).ids
        assert theirs.apply_chat_template(conversation, tokenize=False, **options) == tokenizer.decode(ours)
        wanted = theirs.apply_chat_template(conversation, return_dict=True, **options)["input_ids"]
        if "<|eot|>" not in json.dumps(conversation):  # a user's, which transformers takes for the token
            assert wanted == ours


def test_a_tokenizer_model_begins_texts_as_metas_json_does(saved: Path, theirs: Any) -> None:
    tokenizer = Tokenizer(saved)
    a, b = tokenizer.encode("one text"), tokenizer.encode("another")
    bos = tokenizer.bos_id
    assert theirs("one text").input_ids == [bos, *a]
    assert theirs("one text", "another").input_ids == [bos, *a, bos, *b]
    assert theirs("one text", add_special_tokens=False).input_ids == a
    assert theirs.model_max_length == small_model.config().text.max_position_embeddings
    assert theirs.decode(theirs("a . b !").input_ids, skip_special_tokens=True) == "a . b !"


def picture() -> Image.Image:
    return Image.effect_noise((60, 40), 90).convert("RGB")


def test_pictures_through_their_processor(saved: Path) -> None:
    processor, llm = AutoProcessor.from_pretrained(saved), Llama4.from_pretrained(saved, progress=False)
    image = {"type": "image", "image": picture()}
    parts = [image, {"type": "text", "text": "and"}, image]
    messages: list[Any] = [{"role": "system", "content": "Look."}, {"role": "user", "content": parts}]
    theirs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    ours = llm.processor(messages)
    assert theirs["input_ids"].tolist() == ours.input_ids.tolist()
    assert ours.pixel_values is not None
    assert torch.allclose(theirs["pixel_values"].float(), ours.pixel_values, atol=2.1 / 127.5)


@pytest.fixture(scope="module")
def from_meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted from Meta's files alone."""
    directory = tmp_path_factory.mktemp("from_meta")
    convert(as_meta_has_it(write_rich(directory / "source")), directory / "meta", "meta")
    for path in (directory / "meta").rglob("*.*"):
        if path.suffix != ".pth" and path.name not in ("params.json", "tokenizer.model"):
            path.unlink()
    convert(directory / "meta", directory / "model", "hf")
    return directory / "model"


@pytest.mark.parametrize("kind", ["text", "pictures", "tiny", "meta"])
def test_pipelines_answer_as_we_do(kind: str, saved: Path, from_meta: Path, tmp_path: Path) -> None:
    """Greedily, in float32."""
    saved = from_meta if kind == "meta" else saved
    llm = Llama4.from_pretrained("tiny" if kind == "tiny" else saved, dtype="float32", progress=False)
    if kind == "text":
        model = Llama4Model(dataclasses.replace(llm.config, vision=None)).eval()
        model.language_model.load_state_dict(llm.model.language_model.state_dict())
        llm = Llama4(model, llm.tokenizer)
    llm.save_pretrained(tmp_path / "model")
    text: list[dict[str, Any]] = [{"role": "user", "content": "what is this? tell me."}]
    theirs: Any = pipeline("text-generation", model=str(tmp_path / "model"), dtype=torch.float32)
    told = theirs(text, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]["content"]
    assert told == llm.chat(text, max_new_tokens=16).text != ""
    if kind != "text":
        parts = [{"type": "image", "image": picture()}, {"type": "text", "text": text[0]["content"]}]
        seen: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        theirs = pipeline("image-text-to-text", model=str(tmp_path / "model"), dtype=torch.float32)
        told = theirs(text=seen, max_new_tokens=16, generate_kwargs={"do_sample": False})[0]["generated_text"][-1]
        assert told["content"] == llm.chat(seen, max_new_tokens=16).text != ""


def test_weights_that_were_upcast_are_saved_as_they_came(tmp_path: Path) -> None:
    """Small models compute in float32 on a CPU. Once a number has changed, all of its bits are kept."""
    source = small_model.write(tmp_path / "source")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    llm = Llama4.from_pretrained(source, progress=False)
    assert llm.model.dtype == torch.float32
    llm.save_pretrained(tmp_path / "same")
    saved = load_file(tmp_path / "same" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in saved.items()} == dict.fromkeys(weights, torch.bfloat16)
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())
    assert json.loads((tmp_path / "same" / "config.json").read_text())["dtype"] == "bfloat16"
    with torch.no_grad():
        llm.model.language_model.model.norm.weight[0] += 1e-4
    llm.save_pretrained(tmp_path / "changed")
    changed = load_file(tmp_path / "changed" / "model.safetensors")
    assert {tensor.dtype for tensor in changed.values()} == {torch.float32}
