"""`llama4 serve` through clients that others wrote: `pip install 'llama4[clients]'`, and for JavaScript `npm install
openai` in the directory that LLAMA4_NODE_MODULES names. Each test is skipped without its client."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from llama4 import Llama4  # noqa: E402
from llama4.serve.app import Settings  # noqa: E402
from tests.serve.running import QUESTION, Running, until  # noqa: E402

PICTURE = base64.b64encode((Path(__file__).parents[2] / "examples" / "shapes.png").read_bytes()).decode()
TOOL: dict[str, Any] = {
    "name": "count",
    "description": "Counts what is in a picture.",
    "parameters": {
        "type": "object",
        "properties": {"kind": {"type": "string", "enum": ["circle", "square"]}},
        "required": ["kind"],
        "additionalProperties": False,
    },
}
FUNCTION = {"type": "function", "function": TOOL}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Llama4:
    return Llama4.from_pretrained("tiny", progress=False)


@pytest.fixture(scope="module")
def running(llm: Llama4) -> Iterator[Running]:
    server = Running(llm, Settings("tiny", api_key="secret"))
    server.client.headers["authorization"] = "Bearer secret"
    yield server
    server.close()


@pytest.fixture(scope="module")
def expected(llm: Llama4) -> str:
    """What the library replies to the question."""
    return llm.chat(QUESTION).text


def installed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"the client {name} is not installed")


def has(running: Running, path: str) -> None:
    if path not in running.client.get("/openapi.json").json()["paths"]:
        pytest.skip(f"{path} is not served")


def test_openai(running: Running, expected: str) -> None:
    """Whole and in pieces, tools, a schema, a picture, texts, models and errors."""
    openai = installed("openai")
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)
    create = client.chat.completions.create
    assert create(model="tiny", messages=QUESTION).choices[0].message.content == expected
    chunks = list(create(model="tiny", messages=QUESTION, stream=True, stream_options={"include_usage": True}))
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == expected
    assert chunks[-1].usage.completion_tokens > 0
    call = create(model="tiny", messages=QUESTION, tools=[FUNCTION], tool_choice="required").choices[0]
    assert call.finish_reason == "tool_calls"
    (made,) = call.message.tool_calls
    assert made.function.name == "count" and json.loads(made.function.arguments)["kind"] in ("circle", "square")
    after = [*QUESTION, call.message, {"role": "tool", "tool_call_id": made.id, "content": "3"}]
    assert create(model="tiny", messages=after, tools=[FUNCTION]).choices[0].finish_reason
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    text = create(model="tiny", messages=QUESTION, response_format=wanted).choices[0].message.content
    assert 1 <= json.loads(text)["n"] <= 9
    parts = [
        {"type": "text", "text": "How many?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
    ]
    assert create(model="tiny", messages=[{"role": "user", "content": parts}]).choices[0].message.content
    assert client.completions.create(model="tiny", prompt="Once", max_tokens=3).choices[0].text
    assert [card.id for card in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        create(model="other", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="tiny", messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_openai_responses(running: Running, expected: str) -> None:
    openai = installed("openai")
    has(running, "/v1/responses")
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)
    first = client.responses.create(model="tiny", input=QUESTION[0]["content"])
    assert first.output_text == expected and first.status == "completed"
    events = list(client.responses.create(model="tiny", input=QUESTION[0]["content"], stream=True))
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta") == expected
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    second = client.responses.create(model="tiny", input="And more?", previous_response_id=first.id)
    assert second.previous_response_id == first.id and second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == expected
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_openai_in_javascript(running: Running, expected: str) -> None:
    modules = os.environ.get("LLAMA4_NODE_MODULES")
    if shutil.which("node") is None or modules is None:
        pytest.skip("the client openai of npm is not installed: npm install openai, and LLAMA4_NODE_MODULES=DIRECTORY")
    script = """
        const OpenAI = require("openai").default;
        const client = new OpenAI({baseURL: process.argv[1], apiKey: "secret", maxRetries: 0});
        (async () => {
          const messages = JSON.parse(process.argv[2]);
          const whole = await client.chat.completions.create({model: "tiny", messages});
          let text = "";
          for await (const chunk of await client.chat.completions.create({model: "tiny", messages, stream: true}))
            text += chunk.choices[0]?.delta?.content ?? "";
          let status = 0;
          try { await client.chat.completions.create({model: "other", messages}); }
          catch (error) { status = error.status; }
          console.log(JSON.stringify([whole.choices[0].message.content, text, status]));
        })();
    """
    command = ["node", "-e", script, f"{running.url}/v1", json.dumps(QUESTION)]
    done = subprocess.run(
        command, env={**os.environ, "NODE_PATH": modules}, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout) == [expected, expected, 404]


def test_anthropic(running: Running, expected: str) -> None:
    anthropic = installed("anthropic")
    has(running, "/v1/messages")
    client = anthropic.Anthropic(base_url=running.url, api_key="secret", max_retries=0)
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 100}
    message = client.messages.create(**asked)
    assert message.content[0].text == expected and message.stop_reason == "end_turn"
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == expected
        assert stream.get_final_message().usage.output_tokens == message.usage.output_tokens
    tool = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}
    called = client.messages.create(**asked, tools=[tool], tool_choice={"type": "any"})
    (use,) = [block for block in called.content if block.type == "tool_use"]
    assert use.name == "count" and use.input["kind"] in ("circle", "square") and called.stop_reason == "tool_use"
    assert client.messages.count_tokens(model="tiny", messages=QUESTION).input_tokens == message.usage.input_tokens
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=running.url, api_key="wrong", max_retries=0).messages.create(**asked)


def test_llm(running: Running, expected: str, tmp_path: Path) -> None:
    """Simon Willison's command, through LLM_USER_PATH and OPENAI_API_KEY."""
    installed("llm")
    model = {"model_id": "here", "model_name": "tiny", "api_base": f"{running.url}/v1", "api_key_name": "here"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML
    (tmp_path / "keys.json").write_text('{"here": "secret"}')
    for more in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "-m", "here", QUESTION[0]["content"], "--no-log", *more]
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "secret"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == expected, done.stderr


def test_langchain(running: Running, expected: str, monkeypatch: Any) -> None:
    module = installed("langchain_openai")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{running.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    model = module.ChatOpenAI(model="tiny", max_retries=0, temperature=0)
    question = QUESTION[0]["content"]
    assert model.invoke(question).content == expected
    assert "".join(piece.content for piece in model.stream(question)) == expected
    assert [reply.content for reply in model.batch([question, question])] == [expected, expected]
    (call,) = model.bind_tools([FUNCTION], tool_choice="required").invoke(question).tool_calls
    assert call["name"] == "count" and call["args"]["kind"] in ("circle", "square")
    shaped = model.with_structured_output({**SCHEMA, "title": "n"}, method="json_schema").invoke(question)
    assert 1 <= shaped["n"] <= 9


MEMBERS = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id"),
    *("instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p"),
    *("presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage", "metadata"),
    *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "safety_identifier"),
    "prompt_cache_key",
}
"""That Open Responses demands of a response."""
WEATHER = {
    "type": "object",
    "properties": {"location": {"type": "string", "maxLength": 20, "description": "The city, e.g. San Francisco"}},
    "required": ["location"],
}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"input": [turn("user", "Say hello in exactly 3 words.")]}, id="basic"),
        pytest.param({"input": [turn("user", "Count from 1 to 5.")], "stream": True}, id="streaming"),
        pytest.param(
            {"input": [turn("system", "You are a pirate."), turn("user", "Say hello.")]},
            id="system prompt",
        ),
        pytest.param(
            {
                "input": [turn("user", "What's the weather like in San Francisco?")],
                "tools": [{"type": "function", "name": "get_weather", "description": "x", "parameters": WEATHER}],
                "tool_choice": "required",
                "max_output_tokens": 200,
            },
            id="tool calling",
        ),
        pytest.param(
            {
                "input": [
                    turn(
                        "user",
                        [
                            {"type": "input_text", "text": "What do you see in this image?"},
                            {"type": "input_image", "image_url": f"data:image/png;base64,{PICTURE}"},
                        ],
                    )
                ]
            },
            id="image input",
        ),
        pytest.param(
            {
                "input": [
                    turn("user", "My name is Alice."),
                    turn("assistant", "Hello Alice! How can I help you today?"),
                    turn("user", "What is my name?"),
                ]
            },
            id="multi-turn",
        ),
    ],
)
def test_open_responses(running: Running, asked: dict[str, Any]) -> None:
    """The six cases of openresponses.org; its own tests need a network."""
    has(running, "/v1/responses")
    body = {"model": "tiny", **asked}
    if not asked.get("stream"):
        answer = running.client.post("/v1/responses", json=body)
        assert answer.status_code == 200, answer.text
        response = answer.json()
    else:
        lines = running.client.post("/v1/responses", json=body).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert [each["sequence_number"] for each in events] == list(range(len(events)))
        kinds = [each["type"] for each in events]
        assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
        assert {"response.output_item.added", "response.content_part.added", "response.output_text.delta"} < set(kinds)
        assert {"response.output_text.done", "response.content_part.done", "response.output_item.done"} < set(kinds)
        response = events[-1]["response"]
    assert set(response) >= MEMBERS, MEMBERS - set(response)
    assert response["object"] == "response" and response["output"]
    kinds = [item["type"] for item in response["output"]]
    if "tools" in asked:
        (call,) = [item for item in response["output"] if item["type"] == "function_call"]
        assert call["name"] == "get_weather" and {"call_id", "arguments", "status", "id"} <= set(call)
    else:
        assert kinds == ["message"] and response["status"] == "completed"
        (part,) = response["output"][0]["content"]
        assert part["type"] == "output_text" and part["text"] and {"annotations", "logprobs"} <= set(part)
    details = response["usage"]
    assert details["total_tokens"] == details["input_tokens"] + details["output_tokens"]
    assert {"input_tokens_details", "output_tokens_details"} <= set(details)


@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_eval(running: Running, kind: str, tmp_path: Path) -> None:
    """A task of our own over a local file."""
    installed("lm_eval")
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    route = "chat/completions" if "chat" in kind else "completions"
    given = f"base_url={running.url}/v1/{route},model=tiny,num_concurrent=2,max_retries=1,tokenized_requests=False"
    given += ",tokenizer_backend=None"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--tasks", "sums", "--model_args", given]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    if "chat" in kind:
        command.append("--apply_chat_template")
    environment = {**os.environ, "OPENAI_API_KEY": "secret", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    before = running.engine.scheduler.counts.generated_tokens
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert running.engine.scheduler.counts.generated_tokens > before
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == 4 and all(isinstance(sample["resps"][0][0], str) for sample in samples)


def test_lm_eval_scores(running: Running, llm: Llama4, tmp_path: Path) -> None:
    """Answers to choose from, by how likely each is: lm-eval's sums are those of the model's logits."""
    installed("lm_eval")
    llm.save_pretrained(tmp_path / "model")  # lm-eval asks in token ids
    rows: list[dict[str, Any]] = [{"question": f"What is {n} + 1?", "answer": n % 2} for n in range(3)]
    choices = [" circle", " two squares"]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": choices,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "choices.yaml").write_text(json.dumps(task))
    given = f"base_url={running.url}/v1/completions,model=tiny,max_retries=1,add_bos_token=True"
    given += f",tokenizer={tmp_path / 'model'}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "choices"]
    command += ["--model_args", given, "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "OPENAI_API_KEY": "secret", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run([*command, "--log_samples"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == 3
    for row, sample in zip(rows, sorted(samples, key=lambda sample: sample["doc_id"]), strict=True):
        for choice, (told,) in zip(choices, sample["resps"], strict=True):
            before, after = (llm.tokenizer.encode(text) for text in (row["question"], choice))
            ids = [llm.tokenizer.bos_id, *before, *after]
            with torch.inference_mode():
                logprobs = llm.model(torch.tensor([ids])).float().log_softmax(-1)[0]
            places = range(len(ids) - len(after), len(ids))
            expected = sum(logprobs[i - 1, ids[i]].item() for i in places)
            assert float(told[0]) == pytest.approx(expected, abs=1e-3)
            assert str(told[1]) == str(all(logprobs[i - 1].argmax() == ids[i] for i in places))


def test_ogx(running: Running, expected: str, tmp_path: Path) -> None:
    """Llama Stack's successor, with its vLLM provider at our address. Its executable is LLAMA4_OGX's."""
    command = os.environ.get("LLAMA4_OGX") or shutil.which("ogx")
    if command is None:
        pytest.skip("the client ogx is not installed: pip install ogx with Python 3.12, and LLAMA4_OGX=.../bin/ogx")
    port = "18321"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"VLLM_URL": f"{running.url}/v1", "VLLM_API_TOKEN": "secret", "HOME": str(tmp_path)}
    options = ["--providers-override", "inference=remote::vllm", "--skip-install-deps", "--insecure", "--no-auth"]
    log = (tmp_path / "log").open("w+")
    with subprocess.Popen(
        [command, "go", *options, "--port", port], env=environment, stdout=log, stderr=log, cwd=tmp_path
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}/v1"

            def is_up() -> bool:
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                try:
                    return bool(httpx.get(f"{url}/models", timeout=5).status_code == 200)
                except httpx.TransportError:
                    time.sleep(0.5)
                    return False

            until(is_up)
            (name,) = [
                card["id"] for card in httpx.get(f"{url}/models", timeout=60).json()["data"] if "tiny" in card["id"]
            ]
            body = {"model": name, "messages": QUESTION}
            answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"] == expected
        finally:
            process.terminate()
            process.wait(30)
            log.close()


def test_schemathesis(running: Running, tmp_path: Path) -> None:
    """Requests drawn from /openapi.json: none is answered by an error of the server, or by what is not described.
    LLAMA4_FUZZ sets how many of each route."""
    installed("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{running.url}/openapi.json"]
    command += ["--checks", checks, "--phases", "fuzzing", "-n", os.environ.get("LLAMA4_FUZZ", "5"), "--seed", "1"]
    command += ["--header", "Authorization: Bearer secret", "--request-timeout", "60", "--continue-on-failure"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
