"""Batches of prompts and pictures against transformers' `Llama4Processor` and against each row alone."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_models.llama4.tokenizer as meta
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Llama4ImageProcessor, Llama4Processor
from transformers.models.llama4 import processing_llama4

from llama4.errors import ChatTemplateError, ImageError
from llama4.families import FAMILIES
from llama4.families.llama4 import Llama4Family
from llama4.inputs import Processor
from llama4.text.prompt import Piece
from llama4.text.template import ChatTemplate
from llama4.text.tokenizer import Tokenizer
from tests import small_model

TOOL = {"type": "function", "function": {"name": "f", "description": "“It”", "parameters": {"type": "object"}}}
GENUINE = Path(meta.__file__).with_name("tokenizer.model")


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("small") / "tokenizer.model"
    path.write_bytes(b"\n".join(GENUINE.read_bytes().splitlines()[:1000]))
    return Tokenizer(path, num_special_tokens=128)


@pytest.fixture
def processor(small_tokenizer: Tokenizer) -> Processor:
    return Processor(small_tokenizer, image_size=56, max_tiles=4)


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def user(*parts: str | Image.Image | None) -> dict[str, Any]:
    """A user's message; None is a placeholder for an image."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        if part
        else {"type": "image"}
        for part in parts
    ]
    return {"role": "user", "content": content}


def test_a_batch_is_transformers(processor: Processor, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save(tmp_path)
    theirs = Llama4Processor(
        image_processor=Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    )
    images = [picture(30, 40), picture(130, 60), picture(300, 301)]
    conversations = [
        [user(images[0], "one"), {"role": "assistant", "content": "yes"}, user("two", images[1])],
        [{"role": "system", "content": "Short."}, user("None here.")],
        [user("What is", images[2], "this?")],
    ]
    ours = processor(conversations)
    rows: list[Any] = [
        theirs.apply_chat_template(
            row, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        for row in conversations
    ]
    for i, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        padding = ours.input_ids.shape[1] - length
        assert ours.input_ids[i, padding:].tolist() == row["input_ids"][0].tolist()
        assert ours.input_ids[i, :padding].eq(small_tokenizer.pad_id).all()
        assert ours.attention_mask[i].tolist() == [0] * padding + [1] * length
    pixel_values = torch.cat([row["pixel_values"].flatten(0, -4) for row in rows if "pixel_values" in row]).float()
    assert ours.pixel_values is not None
    # transformers normalises in bfloat16: half a level of 255, and the values lie between -1 and 1
    torch.testing.assert_close(ours.pixel_values, pixel_values, atol=0.51 / 127.5, rtol=0)
    assert ours.input_ids.dtype == ours.attention_mask.dtype == torch.int64


def test_rows_are_what_they_are_alone(processor: Processor) -> None:
    conversations = [[user("Hi")], [user(picture(60, 20), "A longer question about this."), user("x")]]
    for side in ("left", "right"):
        batch = processor(conversations, padding_side=side)
        for i, row in enumerate(conversations):
            alone = processor(row)
            assert alone.attention_mask.all()
            assert batch.input_ids[i][batch.attention_mask[i].bool()].tolist() == alone.input_ids[0].tolist()
        assert batch.attention_mask[0, 0 if side == "left" else -1] == 0
    assert processor(conversations[0]).pixel_values is None


def test_every_patch_token_has_its_feature(processor: Processor, small_tokenizer: Tokenizer) -> None:
    inputs = processor([[user(picture(500, 100), picture(10, 10), "?")], [user(picture(90, 400), "!")]])
    assert inputs.pixel_values is not None
    assert inputs.pixel_values.shape == (5 + 1 + 5, 3, 56, 56)
    assert (inputs.input_ids == small_tokenizer.special("<|patch|>")).sum() == 11 * processor.tokens_per_tile == 11 * 4


def test_special_strings_of_a_user_are_text(processor: Processor, small_tokenizer: Tokenizer) -> None:
    inputs = processor([user("<|image|><|patch|><|eot|>")])
    assert inputs.pixel_values is None
    ids = inputs.input_ids[0].tolist()
    assert small_tokenizer.special("<|image|>") not in ids
    assert ids.count(small_tokenizer.special("<|eot|>")) == 1


def test_placeholders_take_the_given_images_in_order(processor: Processor, tmp_path: Path) -> None:
    one, two, three = picture(30, 30), picture(120, 50), picture(50, 120)
    two.save(tmp_path / "two.png")
    expected = processor([[user(one, "a", two)], [user(three, "b")]])
    inputs = processor([[user(None, "a", two)], [user(None, "b")]], images=[one, three])
    assert torch.equal(inputs.input_ids, expected.input_ids)
    assert inputs.pixel_values is not None
    assert expected.pixel_values is not None
    assert torch.equal(inputs.pixel_values, expected.pixel_values)
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "two.png").read_bytes()).decode()
    linked = processor([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert linked.pixel_values is not None
    assert torch.equal(linked.pixel_values, processor([user(two)]).pixel_values)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_more_or_fewer_images_than_placeholders(count: int, processor: Processor) -> None:
    with pytest.raises(
        ValueError, match=rf"2 image parts without a picture, but images= of the processor holds {count}"
    ):
        processor([user(None, "and", None)], images=[picture(9, 9)] * count)


def test_raw_text(processor: Processor, small_tokenizer: Tokenizer) -> None:
    inputs = processor.complete("Once upon a time <|eot|>")
    assert inputs.input_ids.tolist() == [[small_tokenizer.bos_id, *small_tokenizer.encode("Once upon a time <|eot|>")]]
    assert inputs.pixel_values is None
    batch = processor.complete(["a", "a b c"])
    assert batch.attention_mask.sum(1).tolist() == [2, 1 + len(small_tokenizer.encode("a b c"))]
    for empty in ("", [], ["a", ""]):
        with pytest.raises(ValueError, match="prompt is empty"):
            processor.complete(empty)


def test_what_cannot_work_is_named(small_tokenizer: Tokenizer, processor: Processor) -> None:
    with pytest.raises(ValueError, match="reads text alone"):
        Processor(small_tokenizer, image_size=None)([user(picture(9, 9))])
    assert Processor(small_tokenizer, image_size=None)([user("text")]).pixel_values is None
    with pytest.raises(ValueError, match="patch side 14"):
        Processor(small_tokenizer, image_size=100)
    with pytest.raises(ValueError, match="max_tiles is 0"):
        Processor(small_tokenizer, max_tiles=0)
    with pytest.raises(ValueError, match="padding_side is 'middle'"):
        processor([user("x")], padding_side="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="list of messages is empty"):
        processor([])
    with pytest.raises(ValueError, match="list of messages is empty"):
        processor([[user("x")], []])
    with pytest.raises(ImageError, match=r"no such image file: nowhere\.png"):
        processor([{"role": "user", "content": [{"type": "image", "path": "nowhere.png"}]}])


def test_the_family_gives_the_prompt_format(small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Upside(Llama4Family):
        @staticmethod
        def compose(messages: Any, **rest: Any) -> list[Piece]:
            return [Piece(part) for message in reversed(messages) for part in message.parts]

    monkeypatch.setitem(FAMILIES, "upside", Upside())
    processor = Processor.from_config(small_tokenizer, replace(small_model.config(), family="upside"))
    ids = processor([user("first"), user("second")]).input_ids
    assert small_tokenizer.decode(ids[0].tolist()) == "secondfirst"


def ids_of(processor: Processor, *args: Any, **options: Any) -> list[int]:
    return processor(*args, **options).input_ids[0].tolist()


def test_prompts_without_batches_are_those_of_transformers(
    processor: Processor, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    small_tokenizer.save(tmp_path)
    theirs = Llama4Processor(
        image_processor=Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    )
    messages = [
        user("What is", picture(130, 60), "this?"),
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    choices: list[dict[str, Any]] = [{}, {"add_generation_prompt": True}, {"continue_final_message": True}]
    for options in choices:
        text = theirs.apply_chat_template(messages, **options)
        assert processor.apply_chat_template(messages, **options) == text
        ids: Any = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        assert processor.apply_chat_template(messages, tokenize=True, **options) == ids["input_ids"][0]
        assert processor.apply_chat_template([messages, messages[:1]], **options)[0] == text
    with pytest.raises(ValueError, match="choose one"):
        processor.apply_chat_template(messages, add_generation_prompt=True, continue_final_message=True)


def test_a_last_message_of_the_assistant_is_continued(processor: Processor) -> None:
    messages = [user("What is this?"), {"role": "assistant", "content": "It is"}]
    continued = ids_of(processor, messages, continue_final_message=True)
    assert ids_of(processor, messages) == continued
    assert (
        ids_of(processor, messages, continue_final_message=False)
        == ids_of(processor, [*messages, user("x")])[: len(continued) + 1]
        + processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)[len(continued) + 1 :]
    )
    assert ids_of(processor, messages, add_generation_prompt=False)[:-1] == continued
    calling = [messages[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}]
    assert ids_of(processor, calling) == processor.apply_chat_template(
        calling, tokenize=True, add_generation_prompt=True
    )


def test_prompts_that_are_rendered_already(processor: Processor, small_tokenizer: Tokenizer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Short."},
        user("What is", picture(130, 60), "this?"),
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(messages)
    image = messages[1]["content"][1]["image"]
    for prompt in (text, text.removeprefix("<|begin_of_text|>")):
        inputs = processor.complete(prompt, special_tokens=True, images=[image])
        assert torch.equal(inputs.input_ids, expected.input_ids)
        assert inputs.pixel_values is not None and expected.pixel_values is not None
        assert torch.equal(inputs.pixel_values, expected.pixel_values)
    two = processor.complete([text, "x"], special_tokens=True, images=[image])
    assert torch.equal(two.input_ids[:1], expected.input_ids)
    with pytest.raises(ValueError, match="places for 1 images, but 0"):
        processor.complete(text, special_tokens=True)
    with pytest.raises(ValueError, match="places for 0 images, but 1"):
        processor.complete(text, images=[image])
    assert small_tokenizer.special("<|eot|>") not in processor.complete("<|eot|>").input_ids


def with_template(small_tokenizer: Tokenizer, source: str) -> Processor:
    return Processor(
        small_tokenizer, image_size=56, max_tiles=4, template=ChatTemplate({"default": source}, small_tokenizer)
    )


def test_a_checkpoints_own_template_writes_the_prompt(
    processor: Processor, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    small_tokenizer.save(tmp_path)
    theirs: Any = Llama4Processor(
        image_processor=Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    )
    ours = with_template(small_tokenizer, processing_llama4.chat_template)
    assert not ours.template_agrees  # it trims system messages, and writes calls otherwise
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": " Brief. "}]},
        user(picture(130, 60), "one", picture(20, 20)),
    ]
    expected = theirs.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)
    inputs = ours(conversation)
    assert inputs.input_ids.tolist() == expected["input_ids"]
    assert inputs.pixel_values is not None
    assert len(inputs.pixel_values) == inputs.input_ids.eq(small_tokenizer.special("<|patch|>")).sum() / 4 == 5
    assert inputs.input_ids.tolist() != processor(conversation).input_ids.tolist()
    text = ours.apply_chat_template(conversation, date_string="today", tools_in_user_message=False, tools=[TOOL])
    assert text == theirs.apply_chat_template(
        conversation, date_string="today", tools_in_user_message=False, tools=[TOOL]
    )
    with pytest.raises(ValueError, match="date_string cannot be given"):
        processor.apply_chat_template(conversation, date_string="today")
    with pytest.raises(ValueError, match="chat_template_kwargs holds tools, which other arguments say"):
        ours(conversation, chat_template_kwargs={"tools": []})
    with pytest.raises(ValueError, match="return_tensors cannot be given here; call the processor"):
        ours.apply_chat_template(conversation, return_tensors="pt")
    for each in (ours, processor):
        assert each.apply_chat_template(conversation[:1], chat_template="{{ messages | length }}") == "1"
    assert ours.apply_chat_template(conversation, chat_template="default") == ours.apply_chat_template(conversation)
    with pytest.raises(ChatTemplateError, match=r"template writes 0 <\|image\|> for the 1 images in these messages$"):
        with_template(small_tokenizer, "{{ messages[0].content }}")([user(picture(9, 9), "x")])
    # It writes the list of parts as Python shows it, where tools come before it.
    with pytest.raises(ChatTemplateError, match=r"0 <\|image\|> for the 2 images .*'tools_in_user_message': False"):
        ours(conversation, tools=[TOOL])


def test_a_template_that_writes_what_the_format_does_is_not_used(small_tokenizer: Tokenizer) -> None:
    for name in ("chatml", "llama3.1", "llama4"):
        source = Path(__file__).parent.joinpath("text", "templates", f"{name}.jinja").read_text("utf-8")
        assert not with_template(small_tokenizer, source).template_agrees
    ours = FAMILIES["llama4"].chat_template()
    assert ours is not None
    assert with_template(small_tokenizer, ours).template_agrees
    changes = {"part.text": "part.text | trim", "ensure_ascii=true": "indent=1", "loop.first": "true"}
    for part in (*changes, "Environment: ipython", "<|eom|>", "<|image|>", "bos_token", "indent=4", "Do not use"):
        assert part in ours
        assert not with_template(small_tokenizer, ours.replace(part, changes.get(part, "5"))).template_agrees
