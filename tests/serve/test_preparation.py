"""How prompts are made ready: pictures and forms keep no others waiting, pictures are read once, and routes agree on
what is continued."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("httpx")
pytest.importorskip("starlette")

from llama4 import Llama4
from llama4.engine.grammar import Form
from llama4.serve.settings import Settings
from llama4.vision.images import load_image
from tests.serve.running import QUESTION, Running, until

DATA = base64.b64encode((Path(__file__).parents[2] / "examples" / "shapes.png").read_bytes()).decode()
LINK = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}}
SHOWN = [{"role": "user", "content": [LINK, {"type": "text", "text": "How many?"}]}]
SOURCE = {"type": "base64", "media_type": "image/png", "data": DATA}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": SHOWN, "max_tokens": 1}),
    ("/tokenize", {"messages": SHOWN}),
    (
        "/v1/messages/count_tokens",
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image", "source": SOURCE}]}
                    ],
                },
            ]
        },
    ),
    (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": LINK["image_url"]["url"]}]}  # type: ignore[index]
            ],
            "max_output_tokens": 1,
        },
    ),
]


@pytest.fixture(scope="module")
def running(llm: Llama4) -> Iterator[Running]:
    server = Running(llm, Settings("tiny"), cache_memory="64MiB")
    yield server
    server.close()


def test_pictures_that_do_not_come_keep_no_other_waiting(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more requests than asyncio has threads."""
    begun, has_come = list[Any](), threading.Event()

    def held(*given: Any, **options: Any) -> Any:
        begun.append(given)
        assert has_come.wait(60)
        return load_image(*given, **options)

    monkeypatch.setattr("llama4.inputs.load_image", held)
    with ThreadPoolExecutor(40) as pool:
        slow = [pool.submit(running.client.post, route, json=body) for route, body in ROUTES * 10]
        try:
            until(lambda: len(begun) > 4)
            assert running.ask(messages=QUESTION, max_tokens=1)["choices"]
            kept = running.client.post("/v1/responses", json={"input": "a", "max_output_tokens": 1}).json()
            assert running.client.get(f"/v1/responses/{kept['id']}").json() == kept
            for body in ({"prompt": "a" * 10**5}, {"messages": QUESTION}):
                assert running.client.post("/tokenize", json=body).json()["count"] > 0
            assert not any(each.done() for each in slow)
        finally:
            has_come.set()
        assert {each.result().status_code for each in slow} == {200}


def test_pictures_that_are_fetched_keep_no_other_waiting(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more requests than threads read pictures."""
    begun, has_come = list[Any](), threading.Event()

    def held(source: Any, *limits: Any) -> Any:
        if isinstance(source, str) and source.startswith("http"):
            begun.append(source)
            assert has_come.wait(60)
            source = LINK["image_url"]["url"]  # type: ignore[index]
        return load_image(source, *limits)

    monkeypatch.setattr("llama4.inputs.load_image", held)
    far = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://far/away.png"}}]}]
    with ThreadPoolExecutor(40) as pool:
        body = {"messages": far, "max_tokens": 1}
        slow = [pool.submit(running.client.post, "/v1/chat/completions", json=body) for _ in range(40)]
        try:
            until(lambda: len(begun) > 4)
            assert running.ask(messages=SHOWN, max_tokens=1)["choices"]
            assert not any(each.done() for each in slow)
        finally:
            has_come.set()
        assert {each.result().status_code for each in slow} == {200}


def test_forms_that_take_long_to_read_keep_only_forms_waiting(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more requests than there are threads."""
    begun, may_go_on, read = list[Any](), threading.Event(), Form.of

    def held(response_format: Any, regex: str | None, *given: Any) -> Form | None:
        if regex is not None:
            begun.append(regex)
            assert may_go_on.wait(60)
        return read(response_format, regex, *given)

    monkeypatch.setattr(Form, "of", held)
    body = {"messages": QUESTION, "max_tokens": 1, "structured_outputs": {"regex": "a"}}
    with ThreadPoolExecutor(40) as pool:
        slow = [pool.submit(running.client.post, "/v1/chat/completions", json=body) for _ in range(40)]
        try:
            until(lambda: begun)
            for messages in (QUESTION, SHOWN):
                free: dict[str, Any] = {"response_format": {"type": "text"}, "tool_choice": "auto"}
                assert running.ask(messages=messages, max_tokens=1, **free)["choices"]
            assert not any(each.done() for each in slow)
        finally:
            may_go_on.set()
        assert {each.result().status_code for each in slow} == {200}


def test_pictures_that_take_more_memory_than_may_be_are_not_all_read(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes are a tile: 2 MB of pictures of one pixel would be 20 GB of Llama 4's tiles."""
    processor, read = running.engine.llm.processor, list[Any]()
    assert processor.image_limits.max_prepared == 2**30
    tile = processor(SHOWN).pixel_values[0].nbytes  # type: ignore[index]
    monkeypatch.setattr(processor, "image_limits", replace(processor.image_limits, max_prepared=20 * tile))

    def noted(*given: Any) -> Any:
        read.append(given)
        return load_image(*given)

    monkeypatch.setattr("llama4.inputs.load_image", noted)
    point = io.BytesIO()
    Image.new("RGB", (1, 1)).save(point, "PNG")
    url = f"data:;base64,{base64.b64encode(point.getvalue()).decode()}"
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}] * 500}]}
    for route in ("/v1/chat/completions", "/tokenize"):
        answer = running.client.post(route, json=body)
        assert answer.status_code == 400 and "more than" in answer.text, answer.text
        assert answer.json()["error"]["param"] == "messages[0].content[20]"
    assert len(read) == 42


def test_choices_read_their_prompt_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are those of their seeds alone."""
    read = list[Any]()

    def noted(*given: Any, **options: Any) -> Any:
        read.append(given)
        return load_image(*given, **options)

    monkeypatch.setattr("llama4.inputs.load_image", noted)
    body = {"messages": SHOWN, "temperature": 5.0, "max_tokens": 8}
    choices = running.ask(**body, n=4, seed=5)["choices"]
    assert len(read) == 1
    alone = [running.ask(**body, seed=5 + i)["choices"][0]["message"] for i in range(4)]
    assert [choice["message"] for choice in choices] == alone
    unseeded = running.ask(**body, n=4)["choices"]
    assert len({choice["message"]["content"] for choice in unseeded}) > 1


@pytest.mark.parametrize("said", [None, False, True])
def test_routes_agree_on_what_is_continued(llm: Llama4, running: Running, said: bool | None) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "I can"}]
    body = {"messages": messages, "continue_final_message": said}
    expected = llm.processor(messages, continue_final_message=said).input_ids[0].tolist()
    assert running.client.post("/tokenize", json=body).json()["tokens"] == expected
    prompt = running.client.post("/apply-template", json=body).json()["prompt"]
    assert llm.processor.complete(prompt, special_tokens=True).input_ids[0].tolist() == expected
    assert prompt.endswith("I can") == (said is not False)
    assert running.ask(**body, max_tokens=1)["usage"]["prompt_tokens"] == len(expected)
    finished = running.client.post("/apply-template", json={"messages": QUESTION, "continue_final_message": said})
    assert finished.json()["prompt"].endswith(QUESTION[0]["content"]) == (said is True)


@pytest.mark.parametrize("said", [None, True])
def test_the_last_message_may_be_continued_without_a_header(running: Running, said: bool | None) -> None:
    """As vLLM's clients ask for it."""
    messages = [*QUESTION, {"role": "assistant", "content": "I can"}]
    plain = {"messages": messages, "continue_final_message": said, "max_tokens": 3, "temperature": 0}
    assert running.ask(**plain, add_generation_prompt=False)["choices"] == running.ask(**plain)["choices"]
    for body in ({"messages": QUESTION}, {"messages": messages, "continue_final_message": False}):
        answer = running.client.post("/v1/chat/completions", json={**body, "add_generation_prompt": False})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "add_generation_prompt"
