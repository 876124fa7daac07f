"""A server of a model and its adapters: the request's `model` chooses."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("httpx")
pytest.importorskip("starlette")

from llama4 import Engine, Llama4
from llama4.adapters.config import LoraConfig
from llama4.adapters.files import save_adapter
from llama4.cli.main import main
from llama4.errors import ArgumentError
from llama4.inputs import Inputs
from llama4.serve.settings import Settings
from tests import small_model
from tests.adapters.test_lora import random_adapter
from tests.serve.running import QUESTION, Running

NAMES = ("base", "one", "org/two")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama4:
    llm = Llama4.from_pretrained(small_model.write(tmp_path_factory.mktemp("model")), progress=False)
    for seed, name in enumerate(NAMES[1:]):
        directory = tmp_path_factory.mktemp("adapter") / "written"
        save_adapter(random_adapter(llm.model, LoraConfig(rank=2 + seed), seed), llm.model, directory)
        llm.adapters.add(name, directory)
    return llm


@pytest.fixture(scope="module")
def running(llm: Llama4) -> Iterator[Running]:
    server = Running(llm, Settings("base"))
    yield server
    server.close()


def with_each(llm: Llama4, ask: Any) -> list[Any]:
    """What the model says alone, with each adapter set."""
    found = []
    for name in NAMES:
        llm.set_adapter(None if name == "base" else name)
        found.append(ask())
    llm.set_adapter(None)
    assert len({str(each) for each in found}) == len(found), "adapters that change nothing test nothing"
    return found


def test_models_are_listed(running: Running) -> None:
    cards = running.client.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("base", None), ("one", "base"), ("org/two", "base")]
    assert running.client.get("/v1/models/org/two").json() == cards[2]
    assert all(card["root"] == "base" and card["max_model_len"] == cards[0]["max_model_len"] for card in cards)


@pytest.mark.parametrize("route", ["chat/completions", "completions", "messages", "responses", "embeddings"])
def test_an_unknown_name_is_refused(running: Running, route: str) -> None:
    field = {"chat/completions": "messages", "messages": "messages", "completions": "prompt"}.get(route, "input")
    body = {field: QUESTION if field == "messages" else "x", "model": "three", "max_tokens": 1}
    answer = running.client.post(f"/v1/{route}", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 404 and error["param"] == "model", error
    assert "'base', 'one', 'org/two'" in error["message"]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}])
def test_chats_beside_each_other(running: Running, sampling: dict[str, Any]) -> None:
    """In every form, each as alone."""
    alone = with_each(running.engine.llm, lambda: running.engine.llm.chat(QUESTION, max_new_tokens=12, **sampling).text)
    seen = sampling if "seed" not in sampling else {}  # Anthropic's form has no seed
    greedy = with_each(running.engine.llm, lambda: running.engine.llm.chat(QUESTION, max_new_tokens=12, **seen).text)

    def ask(route: str, body: dict[str, Any]) -> Any:
        answer = running.client.post(f"/v1/{route}", json={"messages": QUESTION, "max_tokens": 12, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(16) as pool:
        chats = [pool.submit(ask, "chat/completions", {"model": name, **sampling}) for name in NAMES * 2]
        said = [pool.submit(ask, "messages", {"model": name, **seen}) for name in NAMES]
        unnamed = pool.submit(ask, "chat/completions", sampling)
        responses = [
            pool.submit(ask, "responses", {"input": QUESTION, "max_output_tokens": 12, "model": name, **sampling})
            for name in NAMES
        ]
    for name, answer, text in zip(NAMES * 2, (each.result() for each in chats), alone * 2, strict=True):
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == (name, text)
    for name, answer, text in zip(NAMES, (each.result() for each in said), greedy, strict=True):
        assert (answer["model"], answer["content"][0]["text"]) == (name, text)
    for name, answer, text in zip(NAMES, (each.result() for each in responses), alone, strict=True):
        assert (answer["model"], answer["output"][0]["content"][0]["text"]) == (name, text)
    answer = unnamed.result()
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("base", alone[0])


def test_a_stream_names_its_model(running: Running) -> None:
    body = {"messages": QUESTION, "max_tokens": 4, "model": "one", "stream": True}
    lines = running.client.post("/v1/chat/completions", json=body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert {event["model"] for event in events} == {"one"}


def test_completions_and_their_prompts_probabilities(running: Running) -> None:
    """The head, too, is the adapter's for a prompt that is told."""
    llm = running.engine.llm
    for name in NAMES:
        body = {"prompt": "a b c", "echo": True, "logprobs": 1, "max_tokens": 3, "model": name}
        answer = running.client.post("/v1/completions", json=body).json()
        inputs = llm.processor.complete("a b c")
        llm.set_adapter(None if name == "base" else name)
        with torch.inference_mode():
            logits_TV = llm.model(inputs.input_ids)[0].log_softmax(-1)
        text = llm.complete("a b c", max_new_tokens=3).text
        llm.set_adapter(None)
        ids = inputs.input_ids[0, 1:]
        told = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids) + 1]
        assert told == pytest.approx(logits_TV[:-1].gather(1, ids[:, None])[:, 0].tolist(), abs=1e-4)
        assert answer["choices"][0]["text"] == "a b c" + text and answer["model"] == name


def test_embeddings_are_the_adapter_s(running: Running) -> None:
    llm = running.engine.llm

    def mean() -> list[float]:
        with torch.inference_mode():
            x_ND, _ = llm.model.hidden_states(llm.processor.complete("a b c").input_ids)
        return x_ND.mean(0).tolist()

    for name, wanted in zip(NAMES, with_each(llm, mean), strict=True):
        answer = running.client.post("/v1/embeddings", json={"input": "a b c", "model": name}).json()
        assert answer["model"] == name and answer["data"][0]["embedding"] == pytest.approx(wanted, abs=1e-5)


def test_other_work_is_done_with_the_adapter(running: Running) -> None:
    """As judging messages is."""

    async def active(name: str | None) -> str | None:
        return await running.engine.compute(lambda llm: llm.adapters.active, name)

    assert [asyncio.run(active(name)) for name in ("one", None, "org/two")] == ["one", None, "org/two"]
    with pytest.raises(ArgumentError, match="no adapter 'three'"):
        asyncio.run(active("three"))
    assert running.engine.llm.adapters.active is None


def test_metrics_and_log_name_adapters(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    running.ask(messages=QUESTION, max_tokens=1, model="one")
    assert "asks for adapter one" in caplog.text
    text = running.client.get("/metrics").text
    assert 'vllm:lora_requests_info{max_lora="2",running_lora_adapters="",waiting_lora_adapters=""}' in text


def test_an_engine_in_python(llm: Llama4) -> None:
    alone = with_each(llm, lambda: llm.chat("hello", max_new_tokens=8).text)
    names = [None, *NAMES[1:]]
    with Engine(llm, cache_memory="8MiB") as engine:

        async def all_at_once() -> list[str]:
            chats = (engine.chat("hello", adapter=name, max_new_tokens=8) for name in names)
            return [reply.text for reply in await asyncio.gather(*chats)]

        assert asyncio.run(all_at_once()) == alone
        assert "".join(engine.stream("hello", adapter="one", max_new_tokens=8)) == alone[1]
        assert engine.chat_batch(["hello"], adapter="org/two", max_new_tokens=8)[0].text == alone[2]
        with pytest.raises(ArgumentError, match="no adapter 'three'; those loaded: one, org/two"):
            engine.chat_batch(["hello"], adapter="three")
    llm.set_adapter("one")
    try:
        with Engine(llm, cache_memory="8MiB") as engine:  # what it was set to is what it goes on with
            replies = engine.chat_batch(["hello"], max_new_tokens=8) + engine.chat_batch(
                ["hello"], adapter="org/two", max_new_tokens=8
            )
    finally:
        llm.set_adapter(None)
    assert [reply.text for reply in replies] == alone[1:]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the small model, good and bad."""
    root, model = tmp_path_factory.mktemp("adapters"), small_model.model()
    for name in ("good", "trained", "empty"):
        save_adapter(random_adapter(model, LoraConfig(rank=2)), model, root / name)
    content = json.loads((root / "trained" / "adapter_config.json").read_text())
    content["modules_to_save"] = ["lm_head"]
    (root / "trained" / "adapter_config.json").write_text(json.dumps(content))
    (root / "empty" / "adapter_model.safetensors").unlink()
    (root / "nothing").mkdir()
    return root


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["{root}/good"], "--adapter {root}/good has no name or no directory; write --adapter NAME=DIR"),
        (["=x"], "--adapter =x has no name or no directory; write --adapter NAME=DIR"),
        (["a={root}/good", "a={root}/x"], "the name a twice, for {root}/good and {root}/x; give each"),
        (["tiny={root}/good"], "the adapter 'tiny' has the model's name; give it another, or the model by"),
        (["a={root}/missing"], "{root}/missing is no directory; an adapter is one, with adapter_config.json"),
        (["a={root}/nothing"], "{root}/nothing holds no adapter_config.json"),
        (["a={root}/empty"], "{root}/empty holds no adapter_model.safetensors; write the adapter with PEFT's"),
        (["a={root}/trained"], "adapter_config.json has modules_to_save ['lm_head'], which is not computed; merge it"),
        (["a={root}/good"], "{root}/good does not fit this model: it changes what the model does not have"),
    ],
)
def test_bad_adapters_are_refused_at_the_start(
    directories: Path, given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--adapter={each.format(root=directories)}" for each in given]
    assert main(["serve", "tiny", "--port", "0", *options]) == (1 if told.startswith(("{root}", "adapter")) else 2)
    assert told.format(root=directories) in capsys.readouterr().err


def test_a_template_beside_an_adapter_is_told_of(
    directories: Path, llm: Llama4, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """It has no effect on prompts; where it is the model's own there is nothing to tell."""
    loaded = Llama4.from_pretrained(small_model.write(tmp_path / "model"), progress=False)
    before: Inputs = loaded.processor(QUESTION)
    save_adapter(random_adapter(loaded.model, LoraConfig(rank=2)), loaded.model, tmp_path / "adapter")
    loaded.adapters.add("quiet", tmp_path / "adapter")
    assert "template" not in caplog.text
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    loaded.adapters.add("other", tmp_path / "adapter")
    assert f"{tmp_path}/adapter holds another chat template than the model's; it has no effect" in caplog.text
    assert torch.equal(loaded.processor(QUESTION).input_ids, before.input_ids)
