"""/v1/responses: events, conversations that go on, what is stored and cancelled, and what a killed server has kept."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

from llama4 import Llama4  # noqa: E402
from llama4.errors import ArgumentError  # noqa: E402
from llama4.serve.errors import RequestError  # noqa: E402
from llama4.serve.settings import Settings  # noqa: E402
from llama4.serve.store import Store, Stored  # noqa: E402
from tests.serve.running import Running, until  # noqa: E402

ASKED = "What can you do?"
TOOL = {
    "type": "function",
    "name": "count",
    "parameters": {
        "type": "object",
        "properties": {"shape": {"enum": ["circle"]}},
        "required": ["shape"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def running(llm: Llama4, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    server = Running(llm, Settings("tiny", store=tmp_path_factory.mktemp("store") / "responses.db"))
    yield server
    server.close()


def respond(running: Running, **fields: Any) -> Any:
    answer = running.client.post("/v1/responses", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(response: Any) -> str:
    return "".join(part["text"] for item in response["output"] for part in item.get("content", ()))


def test_a_conversation_goes_on(llm: Llama4, running: Running) -> None:
    """A response that continues another is the chat's answer to the same messages, each time with its instructions."""
    first = respond(running, input=ASKED, instructions="Be brief.")
    second = respond(running, input=[{"role": "user", "content": "And then?"}], previous_response_id=first["id"])
    said = {"role": "assistant", "content": text_of(first)}
    whole = [{"role": "user", "content": ASKED}, said, {"role": "user", "content": "And then?"}]
    chats = [
        running.ask(messages=messages)["choices"][0]["message"]["content"]
        for messages in ([{"role": "system", "content": "Be brief."}, whole[0]], whole)
    ]
    assert [text_of(first), text_of(second)] == chats
    assert first["status"] == second["status"] == "completed" and second["previous_response_id"] == first["id"]
    assert first["usage"]["total_tokens"] == first["usage"]["input_tokens"] + first["usage"]["output_tokens"]
    cut = respond(running, input=ASKED, max_output_tokens=2)
    assert cut["status"] == "incomplete" and cut["incomplete_details"] == {"reason": "max_output_tokens"}


def test_events_join_to_the_response(running: Running) -> None:
    whole = respond(running, input=ASKED)
    with running.client.stream("POST", "/v1/responses", json={"input": ASKED, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    names = [line.removeprefix("event: ") for line in lines[::2]]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    begin, end = ["created", "in_progress", "output_item.added", "content_part.added"], names[-4:]
    assert names[:4] == [f"response.{name}" for name in begin]
    assert end == [
        f"response.{name}" for name in ("output_text.done", "content_part.done", "output_item.done", "completed")
    ]
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert deltas == text_of(events[-1]["response"]) == text_of(whole)
    kept = running.client.get(f"/v1/responses/{events[-1]['response']['id']}").json()
    assert kept == events[-1]["response"]


def test_tools_and_forms(running: Running) -> None:
    response = respond(running, input=ASKED, tools=[TOOL], tool_choice="required")
    (call,) = response["output"]
    assert call["type"] == "function_call" and json.loads(call["arguments"]) == {"shape": "circle"}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "3"}
    after = respond(running, input=[result], tools=[TOOL], previous_response_id=response["id"])
    assert after["usage"]["input_tokens"] > response["usage"]["input_tokens"]
    form = {"type": "json_schema", "name": "x", "schema": TOOL["parameters"]}
    assert json.loads(text_of(respond(running, input=ASKED, text={"format": form}))) == {"shape": "circle"}


def test_each_message_has_the_logprobs_of_its_own_tokens(running: Running) -> None:
    """Beside a call, whole and in events."""
    body = {
        "input": ASKED,
        "tools": [TOOL],
        "top_logprobs": 1,
        "structured_outputs": {"regex": r'Well\. \[count\(shape="circle"\)\] Done\.'},
    }
    with running.client.stream("POST", "/v1/responses", json={**body, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines()]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    whole = respond(running, **body)
    assert [item["type"] for item in whole["output"]] == ["message", "function_call", "message"]
    for index, word in ((0, "Well."), (2, "Done.")):
        (part,) = whole["output"][index]["content"]
        said = "".join(token["token"] for token in part["logprobs"])
        assert part["text"].strip() == word and word in said and "count" not in said
        deltas = [event for event in events if event.get("output_index") == index and "delta" in event]
        told = [token["token"] for event in deltas for token in event["logprobs"]]
        (done,) = [e for e in events if e["type"] == "response.output_text.done" and e["output_index"] == index]
        assert [token["token"] for token in done["logprobs"]] == [token["token"] for token in part["logprobs"]]
        assert told and told == [token["token"] for token in part["logprobs"]][: len(told)]
    body["structured_outputs"] = {"regex": r'Well\. \[count\(shape="circle"\)\]'}
    message, _ = respond(running, **body)["output"]
    assert "count" not in "".join(token["token"] for token in message["content"][0]["logprobs"])


def test_what_is_before_is_no_longer_than_a_request(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is known before it is read."""
    first = respond(running, input="a" * 2000, max_output_tokens=1)
    second = respond(running, input="a" * 2000, max_output_tokens=1, previous_response_id=first["id"])
    store, read = running.server.service.store, list[str]()
    get = store.get

    def noted(identity: str) -> Any:
        read.append(identity)
        return get(identity)

    monkeypatch.setattr(store, "get", noted)
    monkeypatch.setattr(running.server.service, "settings", replace(running.server.settings, max_body=5000))
    answer = running.client.post("/v1/responses", json={"input": "b", "previous_response_id": second["id"]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "previous_response_id") and "begin anew" in error["message"]
    assert first["id"] not in read


def test_what_is_stored(running: Running) -> None:
    client = running.client
    response = respond(running, input=[{"role": "user", "content": "a"}, {"role": "user", "content": ASKED}])
    route = f"/v1/responses/{response['id']}"
    assert client.get(route).json() == response
    newest, oldest = (client.get(f"{route}/input_items?limit=1&order={order}").json() for order in ("desc", "asc"))
    assert newest["data"][0]["content"] == ASKED and oldest["data"][0]["content"] == "a" and newest["has_more"]
    rest = client.get(f"{route}/input_items?after={newest['last_id']}").json()
    assert [item["content"] for item in rest["data"]] == ["a"] and not rest["has_more"]
    assert client.get(f"{route}/input_items?limit=0").json()["error"]["param"] == "limit"
    assert client.get(f"{route}?stream=true").json()["error"]["param"] == "stream"
    assert client.get(f"{route}?stream=false").json() == response
    assert client.post(f"{route}/cancel").status_code == 400  # it was not in the background
    cut = respond(running, input=ASKED, max_output_tokens=3)
    assert (cut["status"], cut["output"][0]["status"]) == ("incomplete", "incomplete")
    assert client.delete(route).json()["deleted"] and client.get(route).status_code == 404
    answer = client.post("/v1/responses", json={"input": ASKED, "previous_response_id": response["id"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "previous_response_id")
    secret = respond(running, input=ASKED, store=False)
    assert client.get(f"/v1/responses/{secret['id']}").status_code == 404


def test_a_stream_that_fails_is_kept(running: Running) -> None:
    """By a grammar that is given up: more texts than a parser of llguidance follows at once."""
    grammar = "start: " + "|".join(f'"a"/./"{chr(0x4E00 + i)}"' for i in range(2100))
    body = {"input": ASKED, "structured_outputs": {"grammar": grammar}, "stream": True}
    with running.client.stream("POST", "/v1/responses", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    response = json.loads(lines[-1].removeprefix("data: "))["response"]
    assert response["status"] == "failed"
    assert running.client.get(f"/v1/responses/{response['id']}").json() == response


def test_a_stream_that_is_left_is_kept(running: Running) -> None:
    """With what had come; a conversation can go on from there. One that is not to be stored is not."""
    client = running.client
    ids = []
    for store in (True, False):
        body = {"input": ASKED, "ignore_eos": True, "stream": True, "store": store}
        with client.stream("POST", "/v1/responses", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
            ids.append(json.loads(next(lines)[6:])["response"]["id"])
            events = [json.loads(next(lines)[6:]) for _ in range(20)]
            deltas = [event["delta"] for event in events if "delta" in event]
            assert len(deltas) > 5
        until(running.is_idle)
    route = f"/v1/responses/{ids[0]}"
    until(lambda: client.get(route).status_code == 200)
    kept = client.get(route).json()
    assert kept["status"] == "cancelled" and text_of(kept).startswith("".join(deltas))
    assert kept["output"][0]["status"] == "incomplete"
    assert client.get(f"{route}/input_items").json()["data"][0]["content"][0]["text"] == ASKED
    after = respond(running, input="Go on.", previous_response_id=ids[0])
    assert after["usage"]["input_tokens"] > len(deltas)
    assert client.delete(route).json()["deleted"] and client.get(route).status_code == 404
    assert client.get(f"/v1/responses/{ids[1]}").status_code == 404


def test_half_a_character_is_refused(running: Running) -> None:
    """A database and an answer hold whole ones; both halves, in JSON's escapes, are one."""
    ways: tuple[Any, ...] = ("\ud83d", [{"role": "user", "content": [{"type": "input_text", "text": "\ude00"}]}])
    for given, field in zip(ways, ("input", "input[0].content[0].text"), strict=True):
        answer = running.client.post("/v1/responses", content=json.dumps({"input": given}))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    whole = json.dumps({"input": ASKED, "metadata": {"a": "\U0001f600"}})
    assert "\U0001f600" in running.client.post("/v1/responses", content=whole).text


def test_a_number_without_end_is_refused(running: Running) -> None:
    """What a response repeats can be sent; Anthropic's errors have their own form."""
    for number in ("1e999", "-1e999", "NaN"):
        body = f'{{"input": "{ASKED}", "max_tokens": 1, "messages": [], "metadata": {{"a": {number}}}}}'
        for route in ("/v1/responses", "/v1/messages"):
            answer = running.client.post(route, content=body)
            assert answer.status_code == 400 and number in answer.json()["error"]["message"]
            assert (answer.json().get("type") == "error") == (route == "/v1/messages")
    assert RequestError("\ud83d", field="\ud83d").to_json()["error"]["param"] == "?"


@pytest.mark.parametrize("has_columns", [True, False])
def test_another_program_s_file(tmp_path: Path, has_columns: bool) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as database:
        columns = "number INTEGER, id TEXT, response TEXT, input TEXT" if has_columns else "name TEXT"
        database.execute(f"CREATE TABLE responses ({columns})")
        if has_columns:
            database.execute("INSERT INTO responses VALUES (1, 'a', 'no JSON', '')")
            database.commit()
    with pytest.raises(ArgumentError, match=r"other.db.*--store"):
        Store(tmp_path / "other.db")


def stored(identity: str, status: str = "completed", text: str = "") -> Stored:
    return Stored({"id": identity, "status": status, "text": text}, [])


def test_the_store_is_ours_alone(tmp_path: Path) -> None:
    """Another program's database stays byte for byte; a second process is refused; damage is told in a line."""
    with closing(sqlite3.connect(tmp_path / "other.db")) as database:
        database.execute("CREATE TABLE notes (text TEXT)")
    (tmp_path / "text.db").write_text("Dear diary")
    for name in ("other.db", "text.db"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ArgumentError, match=r"another program's file; choose another --store"):
            Store(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(ArgumentError, match=r"no regular file"):
        Store(tmp_path)
    path = tmp_path / "ours.db"
    with closing(Store(path)) as store:
        store.put(stored("a", "in_progress"))
        code = "import pathlib, sys; from llama4.serve.store import Store; Store(pathlib.Path(sys.argv[1]))"
        second = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        assert "another server has it; choose another --store" in second.stderr
        got = store.get("a")
        assert got is not None and got.response["status"] == "in_progress"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO responses (id, response, input) VALUES ('b', 'no JSON', '')")
        database.execute("INSERT INTO responses (id, response, input) VALUES ('c', '[]', '[]')")
    with closing(Store(path)) as store:
        got = store.get("a")
        assert got is not None and got.response["status"] == "failed" and got.response["error"]["message"]
        assert store.get("b") is None and store.get("c") is None
    path.write_bytes(path.read_bytes()[:100] + b"x" * 4000)
    with pytest.raises(ArgumentError, match=r"ours.db.*--store"):
        Store(path)


def test_a_store_that_nobody_holds_is_closed() -> None:
    database = Store()._database
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        database.execute("SELECT 1")


def test_memory_holds_the_last_bytes(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of what is asked only what is read."""
    monkeypatch.setattr("llama4.serve.store.MAX_BYTES_IN_MEMORY", 1000)
    with closing(Store()) as store:
        for identity in "abc":
            store.put(stored(identity, text="x" * 400))
        assert [store.get(identity) is not None for identity in "abc"] == [False, True, True]
    part = {"type": "input_text", "text": ASKED}
    items = [{"role": "user", "content": [{**part, "more": "x"}]}, {"type": "reasoning", "encrypted_content": "x"}]
    identity = respond(running, input=items, max_output_tokens=1)["id"]
    kept = running.client.get(f"/v1/responses/{identity}/input_items?order=asc").json()["data"]
    expected = [{"type": "message", "role": "user", "content": [part]}, {"type": "reasoning"}]
    assert [{name: value for name, value in item.items() if name != "id"} for item in kept] == expected


def test_a_full_disk(running: Running) -> None:
    """A response that cannot be stored is refused; one in the background ends, and is known until the server ends."""
    endless = respond(running, input=ASKED, background=True, ignore_eos=True)
    short = respond(running, input=ASKED, background=True, ignore_eos=True, max_output_tokens=50)
    database = running.server.service.store._database
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count={pages}")
    try:
        items = [{"role": "user", "content": ASKED}, *({"type": "reasoning"} for _ in range(2000))]
        for fields in ({}, {"background": True}):
            answer = running.client.post("/v1/responses", json={"input": items, "max_output_tokens": 1, **fields})
            assert answer.status_code == 507 and "full" in answer.json()["error"]["message"]
        trigger = "CREATE TEMP TRIGGER full BEFORE UPDATE ON responses BEGIN SELECT RAISE(FAIL, 'full'); END"
        database.execute(trigger)
        route = f"/v1/responses/{endless['id']}"
        assert running.client.post(f"{route}/cancel").json()["status"] == "cancelled"
        assert running.client.get(route).json()["status"] == "cancelled"
        until(lambda: running.client.get(f"/v1/responses/{short['id']}").json()["status"] != "in_progress")
        until(running.is_idle)
    finally:
        database.execute("DROP TRIGGER IF EXISTS full")
        database.execute("PRAGMA max_page_count=1073741823")


def test_in_the_background(running: Running) -> None:
    response = respond(running, input=ASKED, background=True)
    route = f"/v1/responses/{response['id']}"
    assert response["status"] == "in_progress"
    until(lambda: running.client.get(route).json()["status"] == "completed")
    assert text_of(running.client.get(route).json()) == text_of(respond(running, input=ASKED))
    endless = respond(running, input=ASKED, background=True, ignore_eos=True)
    until(lambda: running.engine.scheduler.running.requests)
    assert running.client.post(f"/v1/responses/{endless['id']}/cancel").json()["status"] == "cancelled"
    until(running.is_idle)
    assert running.client.get(f"/v1/responses/{endless['id']}").json()["status"] == "cancelled"


def test_a_killed_server_has_kept_what_it_answered(tmp_path: Path) -> None:
    """And says of what it was at that it failed."""
    command = [sys.executable, "-m", "llama4", "serve", "tiny", "--port", "0", "--store", str(tmp_path / "store.db")]
    ended: list[Any] = []
    for turn in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
            assert process.stdout is not None
            stuck = threading.Timer(600, process.kill)
            stuck.start()
            url = re.search(r"http://[\d.:]+", process.stdout.readline())
            assert url is not None
            route = f"{url[0]}/v1/responses"
            if turn:
                assert httpx.get(f"{route}/{ended[0]['id']}", timeout=60).json() == ended[0]
                assert httpx.get(f"{route}/{ended[1]['id']}", timeout=60).json()["status"] == "failed"
                body = {"input": "And then?", "previous_response_id": ended[0]["id"]}
                assert httpx.post(route, json=body, timeout=60).json()["status"] == "completed"
            else:
                for fields in ({}, {"background": True, "ignore_eos": True}):
                    ended.append(httpx.post(route, json={"input": ASKED, **fields}, timeout=60).json())
            process.send_signal(signal.SIGKILL)
            stuck.cancel()
