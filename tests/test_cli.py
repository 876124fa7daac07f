"""The command line: the main paths as a person runs them, every bad input in process."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llama4 import Inputs, Llama4, Token, __version__
from llama4.arguments import printable
from llama4.cli.main import main
from llama4.engine.runner import ModelRunner, Session
from llama4.engine.tokens import Event
from tests import small_model

LIMIT = ["--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> Llama4:
    return Llama4.from_pretrained(directory)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "a picture.png"
    Image.new("RGB", (60, 40), (0, 128, 0)).save(path)
    return str(path)


def llama4(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "llama4", *arguments], input=stdin, capture_output=True, check=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    try:
        code = main(arguments)
    except SystemExit as left:  # argparse
        code = int(left.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


# -- generate ------------------------------------------------------------------------------------------------------


def test_generate_as_a_process(directory: Path, picture: str, llm: Llama4) -> None:
    done = llama4("generate", "--model", str(directory), "--image", picture, *LIMIT, "What is this?")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    expected = llm.chat([{"role": "user", "content": content}], max_new_tokens=12).text
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == expected + "\n"


def test_quantize_info_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str], picture: str) -> None:
    """The embedded model in a quarter of the bits, asked through its own directory and quantized while loading."""
    target = str(tmp_path / "small")
    code, out, error = run(capsys, "quantize", "tiny", target, "--scheme", "int4", "--head", "--shard-gb", "0.002")
    assert (code, out) == (0, "")
    assert re.fullmatch(rf"{re.escape(target)}: int4, [\d.]+ MiB of weights\n", error)
    assert len(list((tmp_path / "small").glob("model-*-of-*.safetensors"))) > 1
    facts = json.loads(run(capsys, "info", target, "--json")[1])["quantization"]
    assert facts["format"] == "pack-quantized"
    assert facts["formats"] == ["int4, a scale per 32 weights"]
    assert facts["bits_per_weight"] == 4.5
    on_disk = sum(path.stat().st_size for path in Path(target).glob("*.safetensors"))
    assert 0.95 * on_disk < facts["bytes"] < on_disk, "what is not weights is headers"
    assert "int4, a scale per 32 weights; " in run(capsys, "info", target)[1]
    ask = ("generate", "--image", picture, *LIMIT, "What colour is it?")
    answer = run(capsys, *ask, "--model", target)
    assert answer[0] == 0
    code, _, error = run(capsys, "quantize", "tiny", target, "--scheme", "int4")
    assert (code, "exists already; choose a new directory" in error) == (1, True)
    code, _, error = run(capsys, *ask, "--quantization", "int1")
    assert (code, "quantization='int1' is not known; choose one of int4" in error) == (2, True)
    assert run(capsys, *ask, "--quantization", "int8")[0] == 0


def test_question_from_stdin(directory: Path, llm: Llama4) -> None:
    done = llama4("generate", "--model", str(directory), *LIMIT, "-", stdin="naïve 東京?\n".encode())
    assert done.stdout.decode() == llm.chat("naïve 東京?", max_new_tokens=12).text + "\n"


def test_stdin_that_is_not_utf8(directory: Path) -> None:
    done = llama4("generate", "--model", str(directory), "-", stdin=b"caf\xe9")
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.decode() == (
        "llama4: error: stdin is not UTF-8: byte 0xe9 at 3; convert it first, for instance with "
        "iconv -f latin1 -t utf-8\n"
    )


def test_a_reader_that_leaves(directory: Path) -> None:
    """As in `llama4 generate ... | head -c 1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llama4", "generate", "--model", str(directory), "--max-new-tokens", "2000", "hi"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(300) == 141


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(("closed", "shown"), [("2>&-", True), (">&-", False), ("<&-", True)])
def test_a_stream_that_is_closed(closed: str, shown: bool, directory: Path, llm: Llama4) -> None:
    command = [sys.executable, "-m", "llama4", "generate", "--model", str(directory), *LIMIT, "hi"]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True, check=False)
    expected = f"{llm.chat('hi', max_new_tokens=12).text}\n" if shown else ""
    assert (done.returncode, done.stderr, done.stdout.decode()) == (0, b"", expected)


def test_ctrl_c_in_mid_stream(directory: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "llama4", "generate", "--model", str(directory), "--max-new-tokens", "4000", "hi"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == b"llama4: interrupted\n"


def test_generate_options_reach_the_model(directory: Path, llm: Llama4, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--system", "Short.", "--temperature", "1.5", "--top-p", "0.9", "--top-k", "40", "--seed", "7"]
    options += ["--stop", "zq", "--stop", "xx"]
    code, out, err = run(capsys, "generate", "--model", str(directory), *LIMIT, *options, "hi")
    expected = llm.chat(
        [{"role": "system", "content": "Short."}, {"role": "user", "content": "hi"}],
        max_new_tokens=12,
        temperature=1.5,
        top_p=0.9,
        top_k=40,
        seed=7,
        stop=["zq", "xx"],
    )
    assert (code, out, err) == (0, expected.text + "\n", "")


def test_generate_json(directory: Path, picture: str, llm: Llama4, capsys: pytest.CaptureFixture[str]) -> None:
    images = ["--image", picture, "--image", picture]
    code, out, err = run(capsys, "generate", "--model", str(directory), "--json", *images, *LIMIT, "compare")
    parts = [*({"type": "image", "image": picture} for _ in range(2)), {"type": "text", "text": "compare"}]
    expected = llm.chat([{"role": "user", "content": parts}], max_new_tokens=12)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["text"] == expected.text
    assert found["finish_reason"] == "length"
    assert found["tool_calls"] == []
    assert found["usage"] == {
        "prompt_tokens": expected.usage.prompt_tokens,
        "completion_tokens": 12,
        "total_tokens": expected.usage.prompt_tokens + 12,
    }
    assert [token["id"] for token in found["logprobs"]] == [token.id for token in expected.logprobs]


def test_raw_completion(directory: Path, llm: Llama4, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "generate", "--model", str(directory), "--raw", *LIMIT, "Once upon")
    assert (code, out) == (0, llm.complete("Once upon", max_new_tokens=12).text + "\n")


def test_dtype_and_experts(directory: Path, capsys: pytest.CaptureFixture[str], llm: Llama4) -> None:
    options = ["--dtype", "float64", "--experts", "loop", "--device", "cpu"]
    code, out, _ = run(capsys, "generate", "--model", str(directory), *options, *LIMIT, "hi")
    assert (code, out) == (0, llm.chat("hi", max_new_tokens=12).text + "\n")


CALL = '{"name": "weigh", "arguments": {"what": "Käse", "kg": [1, null]}}'


@pytest.mark.parametrize(("said", "printed"), [("I weigh. ", "I weigh.\n"), ("", "")])
def test_tool_calls_are_printed(
    said: str,
    printed: str,
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    llm: Llama4,
) -> None:
    prompts: list[str] = []

    def events(runner: object, tokenizer: object, inputs: Inputs, **_: object) -> Iterator[Event]:
        prompts.append(llm.tokenizer.decode(inputs.input_ids[0].tolist()))
        yield Event(0, Token(llm.tokenizer.special("<|eom|>"), b"", 0.0), said + CALL, "stop")

    monkeypatch.setattr("llama4.api.generate", events)
    printed += CALL + "\n"
    assert run(capsys, "generate", "--model", str(directory), "hi")[:2] == (0, printed)
    found = json.loads(run(capsys, "generate", "--model", str(directory), "--json", "hi")[1])
    assert (found["finish_reason"], len(found["tool_calls"])) == ("tool_calls", 1)
    code, out, _ = talk(monkeypatch, capsys, directory, "hi", "well?")
    assert (code, "\n".join(out)) == (0, printed * 2)
    assert '"name": "weigh"' in prompts[-1]  # the conversation holds the call


# -- chat ----------------------------------------------------------------------------------------------------------


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], directory: Path, *lines: str
) -> tuple[int, list[str], str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, err = run(capsys, "chat", "--model", str(directory), *LIMIT)
    return code, out.split("\n"), err


def test_chat_remembers_the_conversation(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    directory: Path,
    picture: str,
    llm: Llama4,
) -> None:
    lines = [f"/image '{picture}'", "what is this?", "and now?", "", "/reset", "and now?", "/quit", "never said"]
    _, out, err = talk(monkeypatch, capsys, directory, *lines)
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what is this?"}]
    messages: list[dict[str, object]] = [{"role": "user", "content": parts}]
    first = llm.chat(messages, max_new_tokens=12).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and now?"}]
    second, fresh = llm.chat(messages, max_new_tokens=12).text, llm.chat("and now?", max_new_tokens=12).text
    cut = " (cut at --max-new-tokens or the window)"
    expected = [
        "Added picture 1 to your next message.",
        *(first + cut).split("\n"),
        *(second + cut).split("\n"),
        "A new conversation.",
        *(fresh + cut).split("\n"),
    ]
    assert err == ""
    assert out == [*expected, ""]


def test_chat_goes_on_after_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], directory: Path, llm: Llama4
) -> None:
    code, out, err = talk(
        monkeypatch, capsys, directory, "/image nowhere.png", "/image", "/nonsense", "7" * 5000, "/help", "hi"
    )
    assert code == 1, "something failed, which a script must be told"
    assert "error: no such image file: nowhere.png" in err
    assert "error: /image needs a file" in err
    assert "the window holds 4096" in err
    text = "\n".join(out)
    assert "error: /nonsense is no command" in err
    assert "/reset" in text
    assert llm.chat("hi", max_new_tokens=12).text in text


def test_ctrl_c_stops_the_reply_and_keeps_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], directory: Path, llm: Llama4
) -> None:
    steps = 0
    run = ModelRunner.run

    def interrupted(runner: ModelRunner, *arguments: Any) -> Session:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return run(runner, *arguments)

    monkeypatch.setattr(ModelRunner, "run", interrupted)
    code, out, _ = talk(monkeypatch, capsys, directory, "hi", "go on")
    begun = llm.chat("hi", max_new_tokens=4).text
    messages = [("user", "hi"), ("assistant", begun), ("user", "go on")]
    expected = llm.chat([{"role": role, "content": text} for role, text in messages], max_new_tokens=12).text
    assert code == 0
    assert f"{begun} (stopped)" in "\n".join(out)
    assert expected in "\n".join(out)


def test_chat_as_a_process(directory: Path, llm: Llama4) -> None:
    done = llama4("chat", "--model", str(directory), *LIMIT, stdin=b"hi\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().startswith(llm.chat("hi", max_new_tokens=12).text)
    done = llama4("chat", "--model", str(directory), stdin=b"\xff\n")
    assert done.returncode == 1
    assert done.stderr.startswith(b"llama4: error: stdin is not UTF-8")


def read_until(terminal: int, wanted: bytes, again: Callable[[], None] = lambda: None) -> bytes:
    """What a program writes to its terminal, up to and with `wanted`; `again` is called after seconds of silence."""
    seen, end = b"", time.monotonic() + 120
    while time.monotonic() < end:
        if wanted in seen:
            return seen
        if select.select([terminal], [], [], 5)[0]:
            seen += os.read(terminal, 1024)
        else:
            again()
    raise AssertionError(f"{wanted!r} did not come, but {seen!r}")


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_chat_in_a_terminal(directory: Path, llm: Llama4) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llama4", "chat", "--model", str(directory), "--max-new-tokens", "3000"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"})
    os.close(theirs)
    try:
        assert b"/help shows what you can do" in read_until(ours, b"> ")
        interrupt = partial(process.send_signal, signal.SIGINT)
        interrupt()  # input() misses a signal that comes while it makes ready
        read_until(ours, b"(Ctrl-D leaves)\r\n", interrupt)
        os.write(ours, b"hello\n")
        begun = printable(next(llm.stream("hello"))).encode().replace(b"\n", b"\r\n")
        read_until(ours, b"hello\r\n")
        read_until(ours, begun)
        interrupt()
        read_until(ours, b"(stopped)\r\n")
        os.write(ours, b"/quit\n")
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


# -- info ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total", "active", "window"),
    [("scout", 109, 17, 10_485_760), ("maverick", 400, 17, 1_048_576), ("behemoth", 2000, 288, None)],
)
def test_info_of_presets(
    name: str, total: int, active: int, window: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "info", name, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["parameters"] / 1e9 == pytest.approx(total, rel=0.02)
    assert facts["active_parameters"] / 1e9 == pytest.approx(active, rel=0.02)
    assert window is None or facts["window"] == window
    assert facts["bytes"]["bfloat16"] == 2 * facts["parameters"]


def test_info_of_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    """Scout: 8 heads of 128, keys and values, 2 bytes: 4096 bytes per token and layer; 12 of 48 layers see all."""
    facts = json.loads(run(capsys, "info", "scout", "--json")[1])
    assert facts["cache_bytes_per_token"] == 12 * 4096
    assert facts["cache_bytes_full"] == 12 * 4096 * 10_485_760 + 36 * 4096 * 8192


def test_info_as_a_table(capsys: pytest.CaptureFixture[str], directory: Path, llm: Llama4) -> None:
    code, out, _ = run(capsys, "info", "scout")
    assert code == 0
    for fact in ("109B", "17B", "10,485,760 tokens", "16, 1 per token", "48.0 KiB per token", "GiB in bfloat16"):
        assert fact in out
    assert "guessed" in run(capsys, "info", "behemoth")[1]
    assert "experts     none" in run(capsys, "info", "guard4")[1]
    parameters = sum(parameter.numel() for parameter in llm.model.parameters())
    assert f"{parameters:,}" in run(capsys, "info", str(directory))[1]


def test_info_at_a_context(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run(capsys, "info", "scout", "--context", "10000", "--json")[1])["cache_at_context"]
    assert facts["context"] == 10_000
    held, full = 256 * (10_000 // 256 + 1), 256 * ((10_000 - 8192) // 256 + 1)
    assert facts["bytes"]["bfloat16"] == 4096 * (12 * held + 36 * full)
    assert facts["peak_bytes"]["int8"] == 12 * 2 * 8 * 130 * held + 36 * 4096 * 8192
    line = next(line for line in run(capsys, "info", "scout", "--context", "1M")[1].splitlines() if "1,048,576" in line)
    assert "49.1 GiB in bfloat16" in line and "in int4" in line
    code, _, error = run(capsys, "info", "scout", "--context", "11M")
    assert code == 2 and "11,534,336" in error


# -- plan ----------------------------------------------------------------------------------------------------------


def test_plan_of_ten_million_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "scout", "--context", "10M", "--device-memory", "80GiB", "--devices", "8"]
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "DOES NOT FIT" in out and "--cache fp8" in out
    code, out, _ = run(capsys, *command, "--weights", "int4", "--cache", "fp8", "--json")
    facts = json.loads(out)
    assert (code, facts["fits"], facts["largest_context"], facts["tensor_parallel"]) == (0, True, 10_485_760, 8)
    assert facts["seconds_per_token"] == pytest.approx(0.0141, rel=0.01)


def test_plan_with_given_rates(capsys: pytest.CaptureFixture[str]) -> None:
    """On this CPU, too, without measuring."""
    given = ["plan", "scout", "--context", "1M", "--memory-rate", "1TB/s", "--gemm-rate", "100TFLOP/s", "--json"]
    gpu, cpu = (json.loads(run(capsys, *given, "--device", device)[1]) for device in ("b200", "cpu"))
    assert gpu["seconds"] == cpu["seconds"] and gpu["device_memory"] != cpu["device_memory"]
    assert gpu["rates"]["source"] == cpu["rates"]["source"] == "1,000 GB/s and 100,000 GFLOP/s, as given"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scout", "--context", "11M"], "11,534,336"),
        (["scout", "--context", "ten"], "'ten'"),
        (["scout", "--device-memory", "80 apples"], "'80 apples'"),
        (["scout", "--memory-rate", "fast"], "'fast'"),
        (["scout", "--device-memory", "80"], "write 80GiB"),
        (["scout", "--context", "10"], "write 10K or 10M"),
        (["scout", "--gemm-rate", "400"], "write 400G or 400T"),
        (["scout", "--devices", "0"], "devices is 0; it must be at least 1"),
        (["scout", "--context", ""], "'' is not a number of tokens"),
        (["scout", "--device-memory", ""], "'' is not a size"),
        (["scout", "--finetune", "lora", "--context", "11M"], "11,534,336"),
        (["scout", "--finetune", "lora", "--batch-tokens", "0"], "a batch of 0 tokens"),
        (["scout", "--devices", "8", "--tensor-parallel", "3"], "8 key heads"),
        (["guard4", "--weights", "fp8_mixed"], "this model has none"),
    ],
)
def test_plan_of_what_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = run(capsys, "plan", *arguments)
    assert (code, out) == (1 if "this model" in message else 2, "")
    assert message in error and len(error.splitlines()) == 1


def test_plan_knows_dtypes_by_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "scout", "--context", "1M", "--json"]
    short, long = (run(capsys, *command, "--weights", name, "--cache", name)[1] for name in ("bf16", "bfloat16"))
    assert short == long and json.loads(short)["weights"] == "bfloat16"


def test_plan_measures_this_machine_alone() -> None:
    for wrong in (["--devices", "2"], ["--device", "h200"]):
        with pytest.raises(SystemExit):
            main(["plan", "tiny", "--measure", *wrong])


# -- what goes wrong -----------------------------------------------------------------------------------------------


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"llama4 {__version__}\n")
    assert "generate" in run(capsys, "--help")[1]
    assert "/image FILE" in run(capsys, "chat", "--help")[1]


def damaged_pictures(directory: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no usable picture, and what must be said of each."""
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(whole, "PNG")
    contents = {
        "text.png": (b"this is text", "not an image"),
        "empty.png": (b"", "empty"),
        "cut.png": (whole.getvalue()[: len(whole.getvalue()) // 2], "truncated"),
    }
    for name, (content, _) in contents.items():
        (directory / name).write_bytes(content)
    Image.new("1", (20_000, 20_000)).save(directory / "bomb.png")
    return {name: (directory / name, words) for name, (_, words) in contents.items()} | {
        "bomb.png": (directory / "bomb.png", "too large"),
        "missing.png": (directory / "missing.png", "no such image file"),
        "folder": (directory, "is a directory; give the file of an image"),
    }


@pytest.mark.parametrize("name", ["text.png", "empty.png", "cut.png", "bomb.png", "missing.png", "folder"])
def test_bad_pictures(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path, words = damaged_pictures(tmp_path)[name]
    code, out, err = run(capsys, "generate", "--model", str(directory), "--image", str(path), "what?")
    assert (code, out) == (1, "")
    assert err.startswith("llama4: error: ")
    assert words in err
    assert path.name in err


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "LA", "RGBA", "I;16", "1"])
def test_unusual_pictures_are_converted(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    path = tmp_path / "picture.tiff"
    Image.new(mode, (30, 20)).save(path)
    assert run(capsys, "generate", "--model", str(directory), "--image", str(path), *LIMIT, "what?")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "value", "remedy"),
    [
        (["--temperature", "-1", "hi"], "temperature is -1.0", "0 (greedy) or more"),
        (["--temperature", "nan", "hi"], "temperature is nan", "0 (greedy) or more"),
        (["--top-p", "0", "hi"], "top_p is 0.0", "above 0 and at most 1"),
        (["--top-k", "0", "hi"], "top_k is 0", "at least 1"),
        (["--seed", "-3", "hi"], "seed is -3", "0 or more"),
        (["--max-new-tokens", "0", "hi"], "max_new_tokens is 0", "1 or more"),
        (["--stop", "", "hi"], "stop string is empty", "at least one character"),
        (["--dtype", "int3", "hi"], "dtype='int3'", "bfloat16, float16, float32"),
        (["--device", "abacus", "hi"], "device='abacus'", "'cpu'"),
        (["--experts", "all", "hi"], "experts='all'", "'auto'"),
        (["--max-context", "0", "hi"], "max_context is 0", "between 2 and"),
        ([""], "empty", "write a question"),
        (["--raw", ""], "empty", "write the text"),
        (["7" * 5000], "the window holds 4096", "shorten the prompt"),
    ],
)
def test_bad_values(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], value: str, remedy: str
) -> None:
    code, out, err = run(capsys, "generate", "--model", str(directory), *arguments)
    is_option = arguments[0].startswith("--") and arguments[0] != "--raw"
    assert (code, out) == (2 if is_option else 1, "")
    assert err.startswith("llama4: error: ")
    assert value in err
    assert remedy in err


def test_an_error_for_machines(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", "--model", str(directory), "--json", "--image", "none.png", "what?")
    assert code == 1
    assert json.loads(out) == {"error": "no such image file: none.png; check the path", "type": "ImageError"}
    assert "no such image file" in err


def test_pictures_are_looked_at_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "generate", "--model", str(tmp_path), "--image", "none.png", "what?")
    assert (code, err) == (1, "llama4: error: no such image file: none.png; check the path\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["paint"], "'paint' is not known"),
        (["generate"], "question"),
        (["generate", "--colour", "hi"], "--colour is not known"),
        (["generate", "model.gguf", "hi"], "'hi' is one argument too many; --model names the model; see"),
        (["plan", "scout", "maverick"], "'maverick' is one argument too many; see"),
        (["generate", "--max-new-tokens", "many", "hi"], "invalid int value: 'many'"),
        (["generate", "--temperature", "warm", "hi"], "invalid float value: 'warm'"),
        (["generate", "--raw", "--image", "x.png", "hi"], "leave out --image"),
        (["generate", "--raw", "--system", "x", "hi"], "leave out --system"),
        (["info"], "model"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("command", [["info"], ["generate", "hi", "--model"], ["chat", "--model"]])
def test_models_that_cannot_be_loaded(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    cases = {
        "gpt-5": r"'gpt-5' is no model.*directory.*organisation/name",
        str(tmp_path / "empty"): r"it is empty; fetch the model again",
        str(tmp_path / "other"): r"'mixtral' is not Llama 4",
        str(tmp_path / "broken"): r"config\.json is not valid JSON",
        str(directory / "config.json"): r"is a file; name the directory",
    }
    for name, message in cases.items():
        code, out, err = run(capsys, *command, name)
        assert (code, out) == (1, "")
        assert re.match(rf"llama4: error: .*{message}", err)


def test_damaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    small_model.write(tmp_path)
    weights = tmp_path / "model.safetensors"
    content, tensors = weights.read_bytes(), small_model.model().state_dict()
    weights.write_bytes(content[: len(content) // 2])
    code, out, err = run(capsys, "generate", "--model", str(tmp_path), "hi")
    assert (code, out) == (1, "")
    assert "cut short or damaged" in err

    gone, odd = "language_model.model.norm.weight", "language_model.lm_head.weight"
    changed = {name: tensor for name, tensor in tensors.items() if name != gone}
    changed |= {"what.is.this": tensors[gone], odd: tensors[odd][:5].clone()}
    save_file(changed, weights)
    code, out, err = run(capsys, "generate", "--model", str(tmp_path), "hi")
    assert (code, out) == (1, "")
    assert f"missing: {gone}" in err
    assert "unexpected: what.is.this" in err
    assert f"wrong shape: {odd} is [5, 48], wanted [1024, 48]" in err

    weights.unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    code, out, err = run(capsys, "generate", "--model", str(tmp_path), "hi")
    assert (code, out) == (1, "")
    assert "lacks 1 of its 1 shards" in err
    assert "model-00001-of-00002.safetensors" in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX arguments are bytes")
def test_an_argument_that_is_not_utf8(directory: Path) -> None:
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"llama4", b"generate", b"--model", str(directory).encode(), b"caf\xe9"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"llama4: error: ")
    assert b"surrogate" in done.stderr


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (
            "generate --temprature 1 hi",
            2,
            "llama4 generate: error: --temprature is not known (did you mean --temp",
        ),
        ("plan scout --divices=2", 2, "llama4 plan: error: --divices is not known (did you mean --devices?)"),
        ("generat hi", 2, "'generat' is not known (did you mean generate?)"),
        ("plan scout --weights int3", 2, "'int3' is not known (did you mean int"),
        ("plan scout --context 5x", 2, "llama4: error: '5x' is not a number of tokens"),
        ("generate --temperature -1 hi", 2, "llama4: error: temperature is -1.0; it must be 0"),
        ("generate --dtype float8 hi", 2, "llama4: error: dtype='float8' is not supported"),
        ("generate --max-new-tokens 0 hi", 2, "llama4: error: max_new_tokens is 0"),
        ("info /nowhere/at/all", 1, "there is no '/nowhere/at/all'; check the path"),
        ("info scoutt", 1, "'scoutt' is no model (did you mean scout?): give"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], command: str, code: int, message: str) -> None:
    """Exit code 2 for a command that is not written right, 1 for what it meets."""
    found, out, error = run(capsys, *command.split())
    assert (found, out, error.count("\n")) == (code, "", 1)
    assert message in error


def test_a_bad_file_is_one_line(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the keys that are missing, the first are named."""
    broken = shutil.copytree(directory, tmp_path / "model")
    content = json.loads((broken / "config.json").read_text())
    content["text_config"] |= {"num_hidden_layers": 5, "no_rope_layers": None, "layer_types": None}
    (broken / "config.json").write_text(json.dumps(content))
    code, out, error = run(capsys, "generate", "--model", str(broken), "hi")
    assert (code, out, error.count("\n")) == (1, "", 1)
    assert "missing: language_model.model.layers." in error and re.search(r"and \d+ more$", error.strip())
