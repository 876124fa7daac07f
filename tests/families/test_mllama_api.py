"""Llama 3.2 Vision through `Llama4`: pictures, prompts, chat, caches, the engine, files."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor, PreTrainedTokenizerFast
from transformers.image_processing_utils import INIT_SERVICE_KWARGS

from llama4.adapters.config import LoraConfig
from llama4.adapters.files import load_adapter, save_adapter
from llama4.adapters.lora import Adapter
from llama4.api import Llama4
from llama4.cli.main import main
from llama4.engine.sampling import Sampler
from llama4.errors import ArgumentError, ContextLengthError, Llama4Error
from llama4.families import mllama_images
from llama4.quantization.weight import QuantizedWeight
from llama4.serve.engine import Engine
from llama4.text.vocabulary import LLAMA3, LLAMA32_VISION, llama3_token_names
from llama4.train import Run, TrainingOptions
from llama4.train.data import Batches, load_dataset
from llama4.train.objectives import batch_loss
from llama4.train.step import learn
from tests.adapters.test_lora import random_adapter
from tests.config.test_fields import missing
from tests.engine.test_adapters import scheduler_of
from tests.engine.test_scheduler import Case, alone
from tests.families import mllama_models as made
from tests.families.mllama_models import FIRST, IMAGE
from tests.parity.references import relative_error
from tests.quantization.test_nf4 import CONFIG, quantized


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write(tmp_path_factory.mktemp("mllama"))


@pytest.fixture
def llm(directory: Path) -> Llama4:
    return Llama4.from_pretrained(directory, progress=False)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


LONG = "What do you see in these pictures? Say it in a few words, and then say it again in other words, please."
"""Enough tokens for the beginning of a prompt to be worth keeping."""


def talk(*pictures: Image.Image, text: str = LONG) -> Any:
    return [
        {
            "role": "user",
            "content": [*({"type": "image", "image": each} for each in pictures), {"type": "text", "text": text}],
        }
    ]


@torch.inference_mode()
def greedy(inputs: Any, count: int) -> list[int]:
    """By transformers, without a cache, with Meta's rule for rows before the first picture."""
    ids = inputs.input_ids
    for _ in range(count):
        chosen = made.theirs(ids, inputs.pixel_values, inputs.image_grids)[0, -1].argmax()
        ids = torch.cat((ids, chosen.view(1, 1)), dim=1)
    return [int(id_) for id_ in ids[0, -count:]]


def ids_of(reply: Any) -> list[int]:
    return [token.id for token in reply.logprobs]


@pytest.mark.parametrize(
    "size", [(28, 28), (20, 9), (57, 30), (28, 113), (200, 31), (90, 90), (300, 100), (1, 40), (56, 57), (84, 28)]
)
def test_pixels(llm: Llama4, size: tuple[int, int]) -> None:
    """Within a rounding of float32, and the same arrangement of tiles."""
    image = picture(*size)
    theirs = MllamaImageProcessor(
        size={"height": 28, "width": 28}, image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28]
    )(image, return_tensors="pt")
    inputs = llm.processor(talk(image))
    assert inputs.pixel_values is not None and inputs.image_grids is not None
    torch.testing.assert_close(inputs.pixel_values, theirs["pixel_values"][0], atol=1e-5, rtol=0)
    rows, cols = inputs.image_grids[0].tolist()
    assert theirs["aspect_ratio_ids"].item() == 1 + made.ARRANGEMENTS.index([rows, cols])


def their_processor(llm: Llama4, directory: Path) -> MllamaProcessor:
    llm.tokenizer.save(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    images = MllamaImageProcessor(size={"height": 28, "width": 28})
    return MllamaProcessor(images, tokenizer)


@pytest.mark.parametrize("text", ["<|image|>A house", "<|image|><|image|>Two", "One <|image|> here", "No picture"])
def test_ids_of_a_base_prompt(llm: Llama4, tmp_path: Path, text: str) -> None:
    """Pictures at the beginning stand before `<|begin_of_text|>`, as transformers' processor puts them."""
    images = [picture(30, 30)] * text.count("<|image|>")
    theirs = their_processor(llm, tmp_path)(images=[images] if images else None, text=[text], add_special_tokens=False)
    assert llm.processor.complete(text, images=images, special_tokens=True).input_ids.tolist() == theirs["input_ids"]


def test_ids_of_a_chat(llm: Llama4) -> None:
    """Llama 3's headers, one `<|image|>` for each picture where it stands among the text."""
    ids = llm.processor(talk(picture(60, 20), picture(9, 9), text="Hi")).input_ids[0].tolist()
    end = [FIRST + 7, *llm.tokenizer.encode("\n\n")]
    assert ids == [
        *(FIRST, FIRST + 6, *llm.tokenizer.encode("user"), *end, IMAGE, IMAGE, *llm.tokenizer.encode("Hi"), FIRST + 9),
        *(FIRST + 6, *llm.tokenizer.encode("assistant"), *end),
    ]


def test_names_of_special_tokens() -> None:
    """Those of Llama 3, but `<|image|>`, which has the first id behind them."""
    names = LLAMA32_VISION.special_token_names(257)
    assert len(set(names)) == 257 and names[256] == "<|image|>"
    assert names[:11] == llama3_token_names()[:11] and LLAMA3.image is None
    assert names[11] == "<|reserved_special_token_2|>"  # 128011 in the published tokenizer.json


def test_chat(llm: Llama4) -> None:
    """A question, the next turn from the cache, a batch with and without pictures, and a stream."""
    first, second = picture(60, 20, 1), picture(30, 100, 2)
    question = talk(first)
    wanted = greedy(llm.processor(question), 4)
    reply = llm.chat(question, max_new_tokens=4)
    assert ids_of(reply) == wanted
    assert llm.cache is not None and len(llm.cache.cache.pictures[0]) == 1
    calls: list[int] = []
    model: Any = llm.model
    encode = model.encode_images

    def counted(pixels: Tensor, grids: Tensor) -> Tensor:
        calls.append(len(pixels))
        encoded: Tensor = encode(pixels, grids)
        return encoded

    model.encode_images = counted
    longer = [*question, {"role": "assistant", "content": "No."}, *talk(second, text="And this?")]
    assert ids_of(llm.chat(longer, max_new_tokens=4)) == greedy(llm.processor(longer), 4)
    assert calls == [1]  # the first picture was in the cache
    other = [*talk(picture(60, 20, 3)), *longer[1:]]
    assert ids_of(llm.chat(other, max_new_tokens=4)) == greedy(llm.processor(other), 4)
    assert calls == [1, 1, 1]  # another picture in the same place is no common beginning; each is encoded by itself
    replies = llm.chat_batch([question, "Hi", longer], max_new_tokens=4)
    assert ids_of(replies[0]) == wanted
    assert ids_of(replies[2]) == greedy(llm.processor(longer), 4)
    assert "".join(llm.stream(question, max_new_tokens=4)) == reply.text


def test_the_token_of_a_picture_is_none_that_is_chosen(llm: Llama4) -> None:
    """It is behind the vocabulary of the head: penalties, biases and grammars know nothing of it."""
    question = talk(picture(60, 20))
    free = ids_of(llm.chat(question, max_new_tokens=4))
    assert ids_of(llm.chat(question, max_new_tokens=4, repetition_penalty=1.0001, presence_penalty=1e-4)) == free
    assert llm.chat(question, choices=["yes", "no"]).text in ("yes", "no")
    with pytest.raises(ArgumentError, match="logit_bias names token 1152"):
        llm.chat(question, logit_bias={IMAGE: 1.0})


def test_saved_caches(llm: Llama4, directory: Path, tmp_path: Path) -> None:
    question = talk(picture(60, 20, 1), picture(30, 30, 2))
    reply = llm.chat(question, max_new_tokens=4)
    assert llm.cache is not None
    llm.cache.save(tmp_path / "cache.safetensors")
    fresh = Llama4.from_pretrained(directory, progress=False)
    fresh.load_cache(tmp_path / "cache.safetensors")
    assert fresh.cache is not None and len(fresh.cache) == len(llm.cache)
    longer = [*question, {"role": "assistant", "content": reply.text}, {"role": "user", "content": "Why?"}]
    wanted = ids_of(llm.chat(longer, max_new_tokens=4))
    fresh.model.encode_images = None  # type: ignore[method-assign,assignment]  # it is not called
    assert ids_of(fresh.chat(longer, max_new_tokens=4)) == wanted


def test_engine(llm: Llama4) -> None:
    """Requests with and without pictures in one model, each as alone, in memory that holds two of them at a time; one
    that it cannot hold is refused."""
    questions = [talk(picture(60, 20, 1)), "Hi", talk(picture(30, 100, 2), picture(9, 9)), talk(picture(90, 90, 4))]
    alone = [ids_of(llm.chat(question, max_new_tokens=4)) for question in questions]
    row = 3 * 2 * 2 * 256 * 32 * 4  # bytes of a block of tokens in three layers
    picture_bytes = 2 * 2 * 2 * 32 * 4 * 5 * 4  # of four tiles of five keys in two layers
    with Engine(llm, cache_memory=2 * (row + 2 * picture_bytes)) as engine:
        replies = engine.chat_batch(questions, max_new_tokens=4)
        assert engine.scheduler.counts.generated_tokens == 16
    assert [ids_of(reply) for reply in replies] == alone
    with Engine(llm, cache_memory=row + picture_bytes) as engine:
        assert ids_of(engine.chat_batch(questions[:1], max_new_tokens=4)[0]) == alone[0]
        with pytest.raises(ContextLengthError, match="send fewer pictures"):
            engine.chat_batch([talk(picture(90, 90), picture(90, 90))], max_new_tokens=4)
        assert ids_of(engine.chat_batch(questions[1:2], max_new_tokens=4)[0]) == alone[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
def test_adapters_are_those_of_peft(llm: Llama4, tmp_path: Path) -> None:
    """Of all that suffixes of names reach: layers of cross-attention, tower and projector, too."""
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model

    ids, (pixels, grids) = torch.randint(0, FIRST, (1, 24)), made.pictures([(1, 2), (2, 2)])
    ids[0, [3, 9]] = IMAGE

    def difference(adapter: Adapter, theirs: Any) -> float:
        adapter.attach(llm.model)
        with torch.no_grad():
            ours = llm.model(ids, pixel_values=pixels, image_grids=grids)
            error = (ours - made.theirs(ids, pixels, grids, theirs)).abs().max().item()
        adapter.detach()
        return error

    targets = ["q_proj", "v_proj", "gate_proj", "fc1", "multi_modal_projector"]
    theirs: Any = get_peft_model(made.fresh(), PeftConfig(r=4, target_modules=targets))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    adapter = load_adapter(tmp_path / "theirs", llm.model)
    assert len(adapter.names) == 2 * 5 + 5 + 6 * 3 + 1
    assert difference(adapter, theirs) < 1e-4
    ours = random_adapter(llm.model, LoraConfig(rank=3, targets=("attention", "dense", "vision", "projector")))
    save_adapter(ours, llm.model, tmp_path / "ours")
    assert difference(ours, PeftModel.from_pretrained(made.fresh(), str(tmp_path / "ours"))) < 1e-4


def test_requests_with_an_adapter_each(llm: Llama4) -> None:
    """Layers of cross-attention get other rows than the others."""
    for seed, name in enumerate("ab"):
        llm.adapters.add(name, random_adapter(llm.model, LoraConfig(rank=3), seed))
    questions = [talk(picture(60, 20, 1)), talk(text="Hi"), talk(picture(30, 100, 2)), talk(text="Hi")]
    pairs = zip(questions, ("a", "b", "b", None), strict=True)
    given = [Case(llm.processor(question), Sampler(), 4, adapter=name) for question, name in pairs]
    scheduler = scheduler_of(llm)
    for case in given:
        scheduler.add(case.request(llm))
    while scheduler.has_work:
        scheduler.step()
    assert [case.ids for case in given] == [alone(llm, case) for case in given]


@torch.inference_mode()
def test_saved_and_read_by_transformers(llm: Llama4, tmp_path: Path) -> None:
    llm.save_pretrained(tmp_path)
    theirs = MllamaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    original = made.reference().state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in theirs.state_dict().items())
    assert Llama4.from_pretrained(tmp_path, progress=False).config == llm.config


@pytest.mark.parametrize(("scheme", "tolerance"), [("int4", 1e-5), ("int8", 1e-5), ("fp8", 0.2)])
@torch.inference_mode()
def test_quantized(llm: Llama4, directory: Path, tmp_path: Path, scheme: str, tolerance: float) -> None:
    """Layers of cross-attention as well; what is written comes back, and transformers computes the same with it, but
    that fp8 rounds some inputs the other way."""
    assert main(["quantize", str(directory), str(tmp_path / "q"), "--scheme", scheme]) == 0
    stored = Llama4.from_pretrained(tmp_path / "q", dtype="float32", progress=False)
    on_load = Llama4.from_pretrained(directory, dtype="float32", quantization=scheme, progress=False)
    packed = {name for name, module in on_load.model.named_modules() if isinstance(module, QuantizedWeight)}
    assert {f"language_model.model.layers.1.cross_attn.{part}_proj" for part in "qkvo"} <= packed
    inputs = llm.processor(talk(picture(60, 20)))
    given = {"pixel_values": inputs.pixel_values, "image_grids": inputs.image_grids}
    got = on_load.model(inputs.input_ids, **given)
    assert torch.equal(stored.model(inputs.input_ids, **given), got)
    theirs = MllamaForConditionalGeneration.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    assert inputs.pixel_values is not None and inputs.image_grids is not None
    wanted = made.theirs(inputs.input_ids, inputs.pixel_values, inputs.image_grids, model=theirs)
    assert relative_error(got, wanted) < tolerance
    assert relative_error(got, llm.model(inputs.input_ids, **given)) > 0.01


@torch.inference_mode()
def test_nf4(directory: Path, tmp_path: Path) -> None:
    """What bitsandbytes makes of the decoder is computed as what it stands for."""
    left = ("embed", "lm_head", "vision_model", "multi_modal_projector")
    written, truth = quantized(load_file(directory / "model.safetensors"), "apart", left=left)
    logits = []
    inputs = None
    for name, tensors, extra in (("nf4", written, {"quantization_config": CONFIG}), ("truth", truth, {})):
        shutil.copytree(directory, tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | extra))
        loaded = Llama4.from_pretrained(tmp_path / name, dtype="float32", progress=False)
        inputs = inputs or loaded.processor(talk(picture(60, 20)))
        given = {"pixel_values": inputs.pixel_values, "image_grids": inputs.image_grids}
        logits.append(loaded.model(inputs.input_ids, **given))
    assert relative_error(*logits) < 1e-5


def test_learning_from_pictures(llm: Llama4, tmp_path: Path) -> None:
    """The loss of a line with pictures is that of transformers' logits; activations that are computed again give the
    same gradients."""
    for i, image in enumerate((picture(60, 20), picture(30, 30))):
        image.save(tmp_path / f"{i}.png")
    parts = [{"type": "image", "image": str(tmp_path / f"{i}.png")} for i in range(2)]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Two pictures."}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    dataset = load_dataset(tmp_path / "data.jsonl", llm.processor, max_length=64)
    (batch,) = Batches(dataset.examples, llm.processor, 64)
    assert batch.pixel_values is not None and batch.image_grids is not None
    with torch.no_grad():
        logits = made.theirs(batch.input_ids, batch.pixel_values, batch.image_grids)
    wanted = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="sum")
    gradients = []
    for recomputed in (False, True):
        llm.model.zero_grad()
        llm.model.checkpoint_activations(recomputed)
        loss = batch_loss(llm.model, batch)
        torch.testing.assert_close(loss.detach(), wanted)
        loss.backward()
        gradients.append([parameter.grad for parameter in llm.model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_what_texts_train_is_what_has_a_gradient(llm: Llama4, tmp_path: Path) -> None:
    """Neither tower nor layers of cross-attention."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": LONG}), encoding="utf-8")
    run = Run(llm, data, None, TrainingOptions(method="full", steps=1), progress=False)
    with run.attached():
        learn(llm.model, run.batches[0])
        reached = {name for name, parameter in llm.model.named_parameters() if parameter.grad is not None}
    assert run.trained.keys() == reached and not [name for name in reached if ".layers.1." in name]
    llm.model.requires_grad_(True)
    learn(llm.model, run.batches[0])
    assert reached == {name for name, parameter in llm.model.named_parameters() if parameter.grad is not None}


def test_a_long_example_is_cut_behind_its_pictures(llm: Llama4, tmp_path: Path) -> None:
    picture(60, 30).save(tmp_path / "a.png")
    record = {"image": "a.png", "prompt": "<image>What is it?", "completion": "A picture. " * 20}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    dataset = load_dataset(tmp_path / "data.jsonl", llm.processor, max_length=64)
    assert dataset.cut == 1 and len(dataset.examples[0].ids) == 64 and dataset.examples[0].num_learnt
    before = {"prompt": "What is it?" * 20 + "<image>"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record | before) + "\n" + json.dumps(record) + "\n")
    assert load_dataset(tmp_path / "data.jsonl", llm.processor, max_length=64).dropped == (1,)


def test_image_fields_of_transformers_are_in_a_table() -> None:
    images = {
        *MllamaImageProcessor.valid_kwargs.__annotations__,
        *MllamaImageProcessor().to_dict(),
        *INIT_SERVICE_KWARGS,
    }
    assert not missing(mllama_images.IMAGE, images)
    parameters = {*inspect.signature(MllamaProcessor.__init__).parameters, "auto_map", "processor_class"}
    assert not missing(mllama_images.PROCESSOR, parameters - {"self", "kwargs"})


def test_info_and_plan(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    assert main(["info", "llama-3.2-11b-vision"]) == 0
    shown = capsys.readouterr().out
    assert "10,670,220,835" in shown and "8 of cross-attention" in shown
    assert "up to 200 MiB in the cache" in shown
    assert main(["info", str(directory)]) == 0
    assert main(["plan", "llama-3.2-11b-vision"]) == 0


@pytest.mark.parametrize("target", ["model.gguf", "meta"])
def test_layouts_without_a_place_for_it_are_refused(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    to = ["--to", "meta"] if target == "meta" else []
    assert main(["convert", str(directory), str(tmp_path / target), *to]) == 1
    assert "convert to Hugging Face's layout" in capsys.readouterr().err
    assert not (tmp_path / target).exists()


def test_texts_alone_calibrate_no_layer_of_cross_attention(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("Some words of a text. " * 200)
    options = ["--scheme", "gptq", "--calibration", str(tmp_path / "texts.txt")]
    assert main(["quantize", str(directory), str(tmp_path / "q"), *options]) != 0
    assert "take --scheme int4" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_a_template_writes_the_ids_that_transformers_writes(directory: Path, tmp_path: Path) -> None:
    """Published models have theirs in chat_template.json."""
    template = (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\nHm: {% endif %}"
    )
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    llm = Llama4.from_pretrained(tmp_path / "model", progress=False)
    images, question = [picture(60, 20), picture(9, 9)], talk(*[picture(60, 20), picture(9, 9)], text="Which?")
    theirs = their_processor(llm, tmp_path)
    bare: Any = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]}
    ]
    text = theirs.apply_chat_template(bare, chat_template=template, add_generation_prompt=True)
    wanted = theirs(images=[images], text=[text], add_special_tokens=False)
    assert llm.processor(question).input_ids.tolist() == wanted["input_ids"]


def test_files_without_pictures_read_text(directory: Path, tmp_path: Path) -> None:
    """Weights without a tower are a model of text, whose layers of cross-attention do nothing."""
    shutil.copytree(directory, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("language_model.")}
    save_file(text, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    llm = Llama4.from_pretrained(tmp_path / "model", progress=False)
    whole = Llama4.from_pretrained(directory, progress=False)
    assert ids_of(llm.chat("Hi", max_new_tokens=4)) == ids_of(whole.chat("Hi", max_new_tokens=4))
    with pytest.raises(Llama4Error, match="this model reads text alone"):
        llm.chat(talk(picture(9, 9)))
