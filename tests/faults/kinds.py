"""Kinds of files that are read: each of a small model that loads, with what reads it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch
from PIL import Image
from safetensors.torch import load, save

from llama4.adapters.config import LoraConfig
from llama4.adapters.files import save_adapter
from llama4.adapters.lora import Adapter
from llama4.api import Llama4
from llama4.cli.chat.conversation import Conversation
from llama4.cli.chat.printing import Printer
from llama4.serve.app import Server, Settings
from llama4.serve.engine import Engine
from llama4.serve.errors import RequestError
from llama4.serve.store import Store, Stored
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import LLAMA3
from llama4.train.data import Batches, load_dataset
from llama4.train.loop import Run, finetune
from llama4.train.optimizer import AdamW
from llama4.train.options import TrainingOptions
from llama4.train.report import METRICS_FILE, Metrics
from llama4.train.state import STATE_FILE, save_state
from llama4.train.teacher import SavedTeacher, save_teacher
from llama4.vision.images import load_image
from llama4.vision.limits import LIMITS
from llama4.weights.convert import convert, quantize
from tests import small_model
from tests.families import mllama_models
from tests.faults import changes
from tests.quantization.test_gptq import Writer, write
from tests.test_moderation import FIXED as GUARD_TEMPLATE
from tests.weights import gguf_files


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: in the table.
        directory: a model's directory that loads.
        file: which of its files is damaged.
        load: what reads it, given a directory.
        change: how it is damaged.
    """

    name: str
    directory: Path
    file: str
    load: Callable[[Path], object]
    change: Callable[[bytes, random.Random], bytes] = changes.of_json


def talk(directory: Path) -> None:
    """Load a model, and let it answer."""
    llm = Llama4.from_pretrained(directory, progress=False)
    llm.chat([{"role": "user", "content": "ab <x> 1"}], max_new_tokens=1)


def complete(directory: Path) -> None:
    """As `talk`, of a model that was not trained to."""
    Llama4.from_pretrained(directory, progress=False).complete("ab <x> 1", max_new_tokens=1)


def kinds(root: Path) -> Iterator[Kind]:
    """All kinds of files, of models made in a folder."""
    meta, hf, int4, sharded = (root / name for name in ("meta", "hf", "int4", "sharded"))
    llm = Llama4.from_pretrained(small_model.write(root / "source"), progress=False)
    llm.save_pretrained(hf)
    (hf / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|eot|>"}))
    (hf / "added_tokens.json").write_text(json.dumps({"<|eot|>": small_model.RANKS + 8}))
    config = json.loads((hf / "generation_config.json").read_text())
    (hf / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7, **config}))
    _expressible(hf, root / "expressible")
    convert(root / "expressible", meta, "meta", progress=False)
    quantize(hf, int4, "int8", progress=False)
    quantize(hf, sharded, "int8", progress=False, max_shard_bytes=60_000)
    for name in ("config", "generation_config", "preprocessor_config", "processor_config", "tokenizer_config"):
        yield Kind(f"{name}.json", hf, f"{name}.json", talk)
    for name in ("special_tokens_map", "added_tokens", "tokenizer"):
        yield Kind(f"{name}.json", hf, f"{name}.json", talk)
    yield Kind("chat_template.jinja", hf, "chat_template.jinja", talk, changes.of_bytes)
    yield Kind("safetensors", hf, "model.safetensors", talk, changes.of_safetensors)
    yield Kind("index of shards", sharded, "model.safetensors.index.json", talk)
    yield Kind("compressed-tensors", int4, "config.json", talk)
    modelopt = root / "modelopt"
    linked(int4, modelopt)
    content = json.loads((int4 / "config.json").read_text())
    content.pop("quantization_config")
    (modelopt / "config.json").unlink()
    (modelopt / "config.json").write_text(json.dumps(content))
    quantization = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["x"]}}
    (modelopt / "hf_quant_config.json").write_text(json.dumps(quantization))
    yield Kind("hf_quant_config.json", modelopt, "hf_quant_config.json", talk)
    yield Kind("params.json", meta, "params.json", talk)
    yield Kind("consolidated.00.pth", meta, "consolidated.00.pth", talk, changes.of_bytes)
    yield Kind(
        "tokenizer.model", meta, "tokenizer.model", lambda path: Tokenizer(path / "tokenizer.model"), changes.of_bytes
    )
    llm.chat("ab", max_new_tokens=1)
    assert llm.cache is not None
    saved = root / "saved"
    saved.mkdir()
    llm.cache.save(saved / "cache.safetensors")
    yield Kind(
        "prompt cache",
        saved,
        "cache.safetensors",
        lambda path: llm.load_cache(path / "cache.safetensors"),
        changes.of_safetensors,
    )
    pictures = root / "pictures"
    pictures.mkdir()
    picture = Image.effect_noise((64, 48), 50).convert("RGB")
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO"):
        picture.save(pictures / f"a.{form.lower()}", form)
        yield Kind(f"picture {form}", pictures, f"a.{form.lower()}", _reader(f"a.{form.lower()}"), changes.of_bytes)
    message = {"role": "user", "content": [{"type": "text", "text": "ab"}]}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    content = {
        "messages": [
            {"role": "system", "content": "be"},
            message,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": _data_url(picture)}}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}],
    }
    (saved / "messages.json").write_text(json.dumps(content))

    def ask(path: Path) -> None:
        try:
            given = json.loads((path / "messages.json").read_bytes())
            given = {"messages": given["messages"], "tools": given.get("tools")}
        except Exception:  # what users give is no file, but what is in it
            return
        llm.chat(**given, max_new_tokens=1)

    yield Kind("messages and tools", saved, "messages.json", ask)
    yield from requests(Llama4.from_pretrained(hf, max_context=64, progress=False), saved)
    yield from dense(root)
    yield from gguf(root)
    yield from quantized(root / "source", root)
    yield from adapters(llm, root)
    yield from training(llm, root)
    yield from pictures_between(root)
    yield from responses(root)
    yield from guards(llm, root)
    yield saved_chat(root, picture)


def requests(llm: Llama4, directory: Path) -> Iterator[Kind]:
    """What a client sends to the server: the answer is never an error of ours."""
    question = {"role": "user", "content": "ab <x> 1"}
    asked = {"temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 1, "logprobs": True, "top_logprobs": 2}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [question], "max_tokens": 2, "tools": [tool], "tool_choice": "auto"},
        "/v1/completions": {"prompt": ["ab", [1, 2]], "max_tokens": 2, "echo": True},
        "/tokenize": {"messages": [question]},
        "/detokenize": {"tokens": [1, 2]},
    }
    bodies["/v1/chat/completions"] |= asked | {"response_format": form, "logit_bias": {"5": 1.0}}

    async def post(path: str, body: bytes) -> None:
        engine = Engine(llm, cache_memory="8MiB")
        try:
            transport = httpx.ASGITransport(Server(engine, Settings("x")).app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                answer = await client.post(path, content=body, timeout=60)
            assert answer.status_code < 500, answer.text
            assert answer.status_code == 200 or answer.json()["error"], answer.text
        finally:
            engine.close()

    for path, body in bodies.items():
        file = f"{path.replace('/', '_')}.json"
        (directory / file).write_text(json.dumps(body))

        def ask(folder: Path, path: str = path, file: str = file) -> None:
            asyncio.run(post(path, (folder / file).read_bytes()))

        yield Kind(f"POST {path}", directory, file, ask)


def dense(root: Path) -> Iterator[Kind]:
    """Meta's files of Llama 3, and of Llama 2."""
    yield from _dense(root / "llama3", small_model.RANKS + LLAMA3.num_special_tokens)
    (kind,) = pieces(root)
    yield kind
    yield from _dense(root / "llama2", 300, kind.directory / kind.file)


def _dense(directory: Path, size: int, pieces: Path | None = None) -> Iterator[Kind]:
    D, F = 48, 128
    directory.mkdir()
    params: dict[str, float | bool] = {
        "dim": D,
        "n_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": size,
        "multiple_of": 32,
    }
    params |= {"ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}
    if pieces is not None:
        params = {name: value for name, value in params.items() if "rope" not in name}
    (directory / "params.json").write_text(json.dumps(params))
    shapes = {"attention.wq": (D, D), "attention.wk": (D // 2, D), "attention.wv": (D // 2, D), "attention.wo": (D, D)}
    shapes |= {"feed_forward.w1": (F, D), "feed_forward.w2": (D, F), "feed_forward.w3": (F, D)}
    names = {f"layers.0.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    names |= {f"layers.0.{name}.weight": torch.ones(D) for name in ("attention_norm", "ffn_norm")}
    names |= {"norm.weight": torch.ones(D)} | {f"{n}.weight": torch.ones(size, D) for n in ("tok_embeddings", "output")}
    torch.save(names, directory / "consolidated.00.pth")
    if pieces is None:
        small_model.write_tokenizer(directory / "tokenizer.model")
    else:
        shutil.copy(pieces, directory / "tokenizer.model")
    family = "Llama 3" if pieces is None else "Llama 2"
    for file, change in (("params.json", changes.of_json), ("consolidated.00.pth", changes.of_bytes)):
        yield Kind(f"{family}, {file}", directory, file, complete, change)


def pictures_between(root: Path) -> Iterator[Kind]:
    """A model whose layers of cross-attention see pictures."""
    directory = root / "mllama"
    mllama_models.write(directory)
    for name in ("config", "preprocessor_config"):
        yield Kind(f"mllama, {name}.json", directory, f"{name}.json", complete)


def responses(root: Path) -> Iterator[Kind]:
    """What a server has stored."""
    directory = root / "store"
    directory.mkdir()
    stored = [Stored({"id": f"r{i}", "status": "completed", "text": "x" * 900}, [{"a": i}]) for i in range(20)]
    with closing(Store(directory / "store")) as store:
        for each in stored:
            store.put(each)

    def use(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, suppress(RequestError):  # the file is a link
            store = Store(Path(shutil.copy(path / "store", folder)))
            try:
                for each in stored:
                    found = store.get(each.response["id"])
                    assert found is None or found.response["id"] == each.response["id"]
                store.put(stored[0])
                store.delete(stored[1].response["id"])
            finally:
                store.close()

    yield Kind("store of responses", directory, "store", use, changes.of_bytes)


def guards(llm: Llama4, root: Path) -> Iterator[Kind]:
    """Their templates."""
    directory = root / "guard"
    llm.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(GUARD_TEMPLATE)
    yield Kind(
        "Guard's template",
        directory,
        "chat_template.jinja",
        lambda path: Llama4.from_pretrained(path, progress=False).moderate("ab", excluded=["S1"]),
        changes.of_bytes,
    )


def saved_chat(root: Path, picture: Image.Image) -> Kind:
    """What `/load` reads."""
    directory = root / "chats"
    directory.mkdir()
    image = {"type": "image_url", "image_url": {"url": _data_url(picture)}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": [{"type": "text", "text": "be"}]},
        {"role": "user", "content": [image, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": {"a": 1}},
        {"role": "assistant", "content": "it is"},
    ]
    (directory / "talk.json").write_text(json.dumps({"model": "x", "messages": messages}))

    def use(path: Path) -> None:
        answerer: Any = SimpleNamespace(name="x", image_limits=LIMITS)
        conversation = Conversation(answerer, None, {}, Printer())
        conversation.load(path / "talk.json")
        json.dumps([*conversation.opening, *conversation.messages])
        conversation.undo()
        with tempfile.TemporaryDirectory() as folder:
            conversation.save(Path(folder) / "talk.json")

    return Kind("saved chat", directory, "talk.json", use)


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.resize((8, 8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _reader(name: str) -> Callable[[Path], object]:
    return lambda path: load_image(path / name)


def _expressible(source: Path, target: Path) -> None:
    """The same model with what Meta's layout can say: RoPE as released, and as many tiles."""
    linked(source, target)
    for name, change in (("config", "text_config"), ("preprocessor_config", "max_patches")):
        content = json.loads((target / f"{name}.json").read_text())
        if change == "max_patches":
            content[change] = 16
        else:
            content[change]["rope_parameters"]["original_max_position_embeddings"] = 8192
        (target / f"{name}.json").unlink()
        (target / f"{name}.json").write_text(json.dumps(content))


def linked(source: Path, target: Path) -> None:
    """A directory with the same files."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)


def gguf(root: Path) -> Iterator[Kind]:
    """A model in one file, and the vision tower beside it."""
    directory = root / "gguf"
    directory.mkdir()
    gguf_files.small(directory / "a.gguf")
    gguf_files.small_mmproj(directory / "mmproj-a.gguf")
    for name in ("a.gguf", "mmproj-a.gguf"):
        yield Kind(name.replace("a.gguf", "gguf"), directory, name, lambda path: talk(path / "a.gguf"), changes.of_gguf)


def quantized(source: Path, root: Path) -> Iterator[Kind]:
    """Checkpoints of packages that quantize."""
    for writer in (Writer(group=-1), Writer("awq", symmetric=False, group=-1)):
        directory = root / writer.method
        write(source, directory, writer)
        name = writer.method.upper()
        yield Kind(f"{name}, config.json", directory, "config.json", talk)
        yield Kind(f"{name}, safetensors", directory, "model.safetensors", talk, changes.of_safetensors)


def adapters(llm: Llama4, root: Path) -> Iterator[Kind]:
    """An adapter of all layouts' kinds of names."""
    for layout in ("peft", "per-expert"):
        directory = root / f"adapter, {layout}"
        targets = ("attention", "experts", "shared", "router", "embeddings")
        config = LoraConfig(rank=2, alpha=3.0, ranks={"experts": 1}, targets=targets)
        save_adapter(Adapter.create(llm.model, config), llm.model, directory, layout=layout)

        def use(path: Path) -> None:
            llm.adapters.add("it", path)
            llm.set_adapter("it")
            llm.chat("ab", max_new_tokens=1)
            llm.set_adapter(None)

        yield Kind(f"adapter_config, {layout}", directory, "adapter_config.json", use)
        yield Kind(f"adapter, {layout}", directory, "adapter_model.safetensors", use, changes.of_safetensors)


def training(llm: Llama4, root: Path) -> Iterator[Kind]:
    """What is learnt, and what a run left to go on from."""
    directory, text = root / "training", {"type": "text", "text": "b"}
    directory.mkdir()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    answer = {"role": "assistant", "content": "it is"}
    Image.new("RGB", (8, 8)).save(directory / "a.png")
    lines: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": [text, {"type": "image", "image": "a.png"}]}, answer],
            "tools": [tool],
        },
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "be"},
        {"prompt": "a", "completion": "b", "tools": "[]"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"text": "abc"},
    ]
    (directory / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = directory / "data.jsonl"
    yield Kind(
        "training data",
        directory,
        data.name,
        lambda path: load_dataset(path / data.name, llm.processor, max_length=99, progress=False),
        changes.of_lines,
    )
    taught = load_dataset(data, llm.processor, max_length=99, progress=False)
    save_teacher(llm, taught, directory / "teacher.safetensors", top=2)
    batch = Batches(taught.examples, llm.processor, 4096)[0]

    def ask(path: Path) -> None:
        losses = SavedTeacher(path / "teacher.safetensors", taught, llm.config.text.vocab_size).divergences(batch)
        losses(torch.zeros(batch.num_learnt, llm.config.text.vocab_size), slice(None))

    yield Kind("a teacher's probabilities", directory, "teacher.safetensors", ask, changes.of_safetensors)
    options = TrainingOptions(steps=2, lora=LoraConfig(rank=1))

    def resume(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:  # the files are links
            output = shutil.copytree(path, Path(folder) / "output")
            finetune(llm, data, output, resume=True, progress=False, steps=2, lora=LoraConfig(rank=1))

    run = Run(llm, data, None, options, progress=False)
    about = {"data": run.data.digest, "settings": run.options.describe(), "steps": 2, "step": 1, "best": None}
    save_state(directory, AdamW(run.trained), about)
    Metrics(directory).add(step=1, loss=1.0, tokens=3)
    yield Kind("training.state", directory, STATE_FILE, resume, changes.of_safetensors)
    yield Kind("training.state's values", directory, STATE_FILE, resume, _of_about)
    yield Kind("metrics.jsonl", directory, METRICS_FILE, resume, changes.of_lines)


def _of_about(data: bytes, dice: random.Random) -> bytes:
    """What a state says of its run."""
    tensors = load(data)
    about = changes.of_json(tensors["about"].numpy().tobytes(), dice)
    return save(tensors | {"about": torch.frombuffer(bytearray(about or b" "), dtype=torch.uint8)})


def pieces(root: Path) -> Iterator[Kind]:
    """A vocabulary of Llama 1 and 2."""

    def field(number: int, content: bytes) -> bytes:
        size = len(content)
        return (
            bytes([number << 3 | 2]) + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + content
        )

    def piece(text: str, kind: int, score: float = 0.0) -> bytes:
        return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind]))

    directory = root / "sentencepiece"
    directory.mkdir()
    letters = [*"▁ab", "ab", "▁ab", "<X>"]
    all_pieces = [piece("<unk>", 2), piece("<s>", 3), piece("</s>", 3)]
    all_pieces += [piece(f"<0x{byte:02X}>", 6) for byte in range(256)]
    all_pieces += [piece(text, 4 if text == "<X>" else 1, -i) for i, text in enumerate(letters)]
    trie = struct.pack("<I", 64) + bytes(64) + b"x\0"  # nothing is replaced
    path = directory / "tokenizer.model"
    path.write_bytes(b"".join(all_pieces) + field(2, bytes([3 << 3, 2])) + field(3, field(2, trie)))
    yield Kind(
        "sentencepiece",
        directory,
        path.name,
        lambda path: Tokenizer(path / "tokenizer.model").encode("ab <X> é\0"),
        changes.of_bytes,
    )
