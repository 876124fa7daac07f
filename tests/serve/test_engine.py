"""`Engine` from asyncio and from threads: replies are those of `Llama4.chat`, whoever leaves."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from llama4 import Engine
from llama4.api import Llama4
from llama4.engine.observers import MeanHidden
from llama4.engine.replies import Reply, ToolCallDelta
from llama4.errors import ArgumentError, BusyError, ClosedError, ContextLengthError, ImageError, Llama4Error
from llama4.serve.engine import EngineStream
from llama4.serve.mailbox import Mailbox

QUESTIONS = ["What can you do?", "How many circles are there?", "What is 3 + 4?", "Say hello."]


@pytest.fixture
def engine(llm: Llama4) -> Iterator[Engine]:
    with Engine(llm, cache_memory="64MiB") as engine:
        yield engine


def essence(reply: Reply) -> tuple[object, ...]:
    """All but the last digits of log-probabilities."""
    return reply.text, reply.finish_reason, reply.usage, [token.id for token in reply.logprobs]


def until(is_so: Any) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_replies_are_those_of_chat(llm: Llama4, engine: Engine) -> None:
    """From asyncio, from threads and as a batch, all at once."""
    options: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}, {"stop": ["a"]}, {"max_new_tokens": 3}]
    options += [{"presence_penalty": 1.5, "logit_bias": {70: 5.0}}, {"frequency_penalty": 2.0, "min_tokens": 40}]
    options += [{"ignore_eos": True, "max_new_tokens": 30}]
    asked = [(question, each) for question in QUESTIONS for each in options]
    expected = [essence(llm.chat(question, **each)) for question, each in asked]
    batch: list[Reply] = []
    thread = threading.Thread(target=lambda: batch.extend(engine.chat_batch(QUESTIONS)))
    thread.start()

    async def ask() -> list[Reply]:
        return await asyncio.gather(*(engine.chat(question, **each) for question, each in asked))

    assert list(map(essence, asyncio.run(ask()))) == expected
    thread.join()
    assert list(map(essence, batch)) == expected[:: len(options)]


def test_a_batch_that_fails_leaves_no_work(engine: Engine) -> None:
    """While it is asked for, and later."""
    grammar = "start: " + "|".join(f'"a"/./"{chr(0x4E00 + i)}"' for i in range(2100))  # is given up by llguidance
    with pytest.raises(Llama4Error, match="content"):
        engine.chat_batch([QUESTIONS[0], [{"role": "user", "content": 5}]], max_new_tokens=10**5, ignore_eos=True)
    until(lambda: not engine.scheduler.has_work)
    with pytest.raises(ArgumentError, match="cannot be followed"):
        engine.chat_batch(QUESTIONS, grammar=grammar, max_new_tokens=10**5)
    until(lambda: not engine.scheduler.has_work)


def test_pieces_join_to_the_reply(llm: Llama4, engine: Engine) -> None:
    async def pieces() -> list[str]:
        return [piece async for piece in engine.stream(QUESTIONS[0])]

    expected = llm.chat(QUESTIONS[0]).text
    assert "".join(asyncio.run(pieces())) == expected == "".join(engine.stream(QUESTIONS[0]))


def test_leaving_stops_the_work(engine: Engine) -> None:
    """By break, by cancelling a task, by letting go of an iterator."""

    async def leave() -> None:
        async for _ in engine.stream(QUESTIONS[0], max_new_tokens=10**5, stop=[]):
            break
        task = asyncio.create_task(engine.chat(QUESTIONS[1], max_new_tokens=10**5))
        await asyncio.sleep(0.05)
        task.cancel()

    engine.llm.generation_config, before = (
        type(engine.llm.generation_config)(eos_token_id=(1,)),
        (engine.llm.generation_config),
    )
    try:
        asyncio.run(leave())
        next(iter(engine.stream(QUESTIONS[2], max_new_tokens=10**5)))
        until(lambda: not engine.scheduler.has_work)
    finally:
        engine.llm.generation_config = before
    until(lambda: not engine.scheduler.index.evict() and engine.scheduler.pool.used == 0)


def test_a_stream_goes_on_in_another_loop(llm: Llama4, engine: Engine) -> None:
    """And nobody waits for one that has ended or was cancelled, whichever thread did so."""
    expected, stream, pieces = llm.chat(QUESTIONS[0]).text, engine.stream(QUESTIONS[0]), list[str]()

    async def read(count: int) -> None:
        async for piece in stream:
            pieces.append(piece)
            if len(pieces) == count:
                return

    asyncio.run(read(2))
    asyncio.run(asyncio.wait_for(read(-1), 60))
    assert "".join(pieces) == expected
    waiting = engine.stream(QUESTIONS[0])
    hold = threading.Event()
    engine._worker.commands.put(hold.wait)
    try:
        readers = [threading.Thread(target=list, args=(waiting,), daemon=True) for _ in range(2)]
        waiting.open()
        for reader in readers:
            reader.start()
        waiting.cancel()
        for reader in readers:
            reader.join(60)
        assert not any(reader.is_alive() for reader in readers)
    finally:
        hold.set()


def read_by_two(stream: EngineStream) -> list[str | Exception]:
    """What two threads get of a stream, together."""

    def read(got: list[str | Exception]) -> None:
        try:
            for piece in stream:
                got.append(piece)
        except Exception as error:
            got.append(error)

    both: list[list[str | Exception]] = [[], []]
    readers = [threading.Thread(target=read, args=(got,), daemon=True) for got in both]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert not any(reader.is_alive() for reader in readers)
    return [*both[0], *both[1]]


def test_threads_share_a_stream(llm: Llama4, engine: Engine) -> None:
    for question in QUESTIONS:
        expected = list(engine.stream(question))
        stream = engine.stream(question)
        assert sorted(map(str, read_by_two(stream))) == sorted(expected)
        assert stream.reply.text == "".join(expected)


async def read_by_two_tasks(stream: EngineStream) -> list[str | Exception]:
    async def read() -> list[str | Exception]:
        return [piece async for piece in stream]

    both = await asyncio.wait_for(asyncio.gather(read(), read(), return_exceptions=True), 60)
    errors = [got for got in both if isinstance(got, Exception)]
    assert len(errors) == 1
    return [*errors]


@pytest.mark.parametrize("read", [read_by_two, lambda stream: asyncio.run(read_by_two_tasks(stream))])
def test_nobody_waits_for_a_reply_that_failed(engine: Engine, read: Any) -> None:
    """Of two threads, or two tasks, one gets the error, and for the other the stream ends."""
    stream = engine.stream(QUESTIONS[0])
    error = ArithmeticError()
    hold = threading.Event()
    engine._worker.commands.put(hold.wait)
    try:
        stream.open()
        engine._worker.commands.put(lambda: engine.scheduler.fail_all(error))
        release = threading.Timer(0.1, hold.set)  # when both wait
        release.start()
        assert read(stream) == [error]
    finally:
        hold.set()


def read_by_two_loops(stream: EngineStream) -> list[str | Exception]:
    """What two event loops and a thread get of a stream, together."""
    got: list[str | Exception] = []

    async def read() -> None:
        try:
            async for piece in stream:
                got.append(piece)
        except Exception as error:
            got.append(error)

    def iterate() -> None:
        for piece in stream:
            got.append(piece)

    targets = [lambda: asyncio.run(asyncio.wait_for(read(), 60))] * 2 + [iterate]
    readers = [threading.Thread(target=target, daemon=True) for target in targets]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert not any(reader.is_alive() for reader in readers)
    return got


def test_loops_share_a_stream(engine: Engine) -> None:
    """Each wakes for what comes, though another asked later; pieces are made of tokens in their order."""
    for question in QUESTIONS:
        expected = list(engine.stream(question))
        stream = engine.stream(question)
        assert sorted(map(str, read_by_two_loops(stream))) == sorted(expected)
        assert stream.reply.text == "".join(expected)


def test_a_loop_that_asked_first_is_woken() -> None:
    """Though another asked after it, and what came is taken by nobody else."""
    box, waits = Mailbox(), threading.Barrier(3)

    async def wait() -> None:
        task = asyncio.ensure_future(box.wait_async())
        await asyncio.sleep(0)
        await asyncio.to_thread(waits.wait, 60)
        await asyncio.wait_for(task, 60)

    loops = [threading.Thread(target=asyncio.run, args=(wait(),), daemon=True) for _ in range(2)]
    for loop in loops:
        loop.start()
    waits.wait(60)
    box.put(ArithmeticError())
    for loop in loops:
        loop.join(30)
    assert not any(loop.is_alive() for loop in loops)


def test_an_engine_that_nobody_holds_ends_its_thread(llm: Llama4) -> None:
    engine = Engine(llm)
    thread = engine._worker.thread
    next(iter(engine.stream(QUESTIONS[0], max_new_tokens=10**5, ignore_eos=True)))
    assert thread.is_alive()
    del engine
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_a_batch_is_checked_as_that_of_the_model(llm: Llama4, engine: Engine) -> None:
    wrong: tuple[tuple[Any, str], ...] = (
        ("Hi", "it must be a list, with one for each reply"),
        (None, "it must be a list, with one for each reply"),
        ([{"role": "user", "content": "Hi"}], r"give a list of conversations: \[messages\]"),
        (["Hi", None], "conversation 1 is None"),
    )
    for asked in (llm, engine):
        for rows, said in wrong:
            with pytest.raises(ArgumentError, match=said):
                asked.chat_batch(rows)
        with pytest.raises(ArgumentError, match="temperature is"):
            asked.chat_batch([], temperature=-1.0)
        assert asked.chat_batch([]) == []


def test_errors_are_those_of_chat(llm: Llama4) -> None:
    with Engine(llm, cache_memory=llm.model.new_cache().num_bytes_of(1)) as engine:
        for prompt, kind, text in (
            ([{"role": "user", "content": "word " * 300}], ContextLengthError, "cache_memory=1.5 MiB holds 256"),
            ([{"role": "nobody", "content": "hello"}], Llama4Error, "role"),
            ([{"role": "user", "content": [{"type": "image", "image": "/none.png"}]}], ImageError, "none.png"),
        ):
            with pytest.raises(kind, match=text):
                engine.chat_batch([prompt])
        assert engine.chat_batch(["Hello"])[0].text


def test_an_error_that_is_kept_keeps_no_memory(llm: Llama4) -> None:
    """What fails is forgotten at once, although who asked keeps the error: the next gets all of the pool."""

    class Failing(MeanHidden):
        def read(self, *_: Any) -> None:
            raise ArithmeticError

    with Engine(llm, cache_memory=llm.model.new_cache().num_bytes_of(1)) as engine:
        with pytest.raises(ArithmeticError) as kept:
            list(engine.observe("Hello", Failing(), max_new_tokens=1))
        gc.disable()
        try:
            reply = list(engine.stream("Hello", max_new_tokens=10**5, ignore_eos=True))
        finally:
            gc.enable()
        assert kept.tb and reply


def test_a_full_queue_refuses(llm: Llama4) -> None:
    """And one who is closed; those who wait learn of it."""
    with Engine(llm, max_batch=1, max_waiting=1) as engine:
        hold = threading.Event()
        engine._worker.commands.put(hold.wait)
        until(lambda: engine.num_waiting == 0)
        waiting = engine.stream("Hello")
        waiting.open()
        with pytest.raises(BusyError, match="1 requests wait"):
            engine.stream("Hello").open()
        closing = threading.Thread(target=engine.close)
        closing.start()
        until(lambda: engine._worker.is_closed)
        hold.set()
        closing.join()
        with pytest.raises(BusyError, match="closed before"):
            list(waiting)
        with pytest.raises(BusyError, match="is closed"):
            engine.stream("Hello").open()


def test_threads_for_pictures_end_with_the_engine(engine: Engine) -> None:
    """What one is at is completed; what waits for one, or comes later, is not begun."""
    picture, done = [{"type": "image"}], list[int]()
    at_work, hold = threading.Semaphore(0), threading.Event()

    def work(number: int) -> None:
        done.append(number)
        at_work.release()
        hold.wait()

    async def ask() -> list[BaseException | None]:
        with engine:
            number = engine._pictures._max_workers
            asked = [asyncio.create_task(engine.in_thread(picture, partial(work, i))) for i in range(number + 1)]
            for _ in range(number):
                await asyncio.to_thread(at_work.acquire)
        hold.set()
        return await asyncio.gather(*asked, engine.in_thread(picture, partial(work, -1)), return_exceptions=True)

    *completed, waited, late = asyncio.run(ask())
    assert not any(completed) and sorted(done) == list(range(len(completed)))
    assert all(isinstance(error, ClosedError) and "is closed" in str(error) for error in (waited, late))
    until(lambda: not any(thread.is_alive() for thread in engine._pictures._threads))


def test_a_command_that_fails_does_not_end_the_thread(llm: Llama4) -> None:
    """Who waits learns why, and the next is answered."""

    def fail() -> None:
        raise ArithmeticError

    with Engine(llm) as engine:
        stream = iter(engine.stream("Hello", max_new_tokens=10**5, ignore_eos=True))
        next(stream)
        engine._worker.commands.put(fail)
        with pytest.raises(ArithmeticError):
            list(stream)
        assert engine.chat_batch(["Hello"], max_new_tokens=4)[0].text


def test_computations_let_those_who_run_have_a_token_between(llm: Llama4) -> None:
    with Engine(llm) as engine:
        steps: list[int] = []

        async def three() -> None:
            hold = threading.Event()
            engine._worker.commands.put(hold.wait)
            asked = [
                asyncio.ensure_future(engine.compute(lambda llm: steps.append(engine.scheduler.counts.steps)))
                for _ in range(3)
            ]
            await asyncio.sleep(0)
            hold.set()
            await asyncio.gather(*asked)

        asyncio.run(three())
        assert len(set(steps)) == 3


def test_tool_calls_come_as_events(llm: Llama4, engine: Engine) -> None:
    tools = [{"type": "function", "function": {"name": "count_shapes", "parameters": {"type": "object"}}}]
    stream = engine.stream(QUESTIONS[1], tools=tools)
    deltas = list(stream.events())
    expected = llm.chat(QUESTIONS[1], tools=tools)
    assert [delta.name for delta in deltas if isinstance(delta, ToolCallDelta)] == [
        call.name for call in expected.tool_calls
    ]
    assert stream.reply.text == expected.text


FORK = """
import asyncio, os, signal, sys
from PIL import Image
from llama4 import Llama4
from llama4.errors import Llama4Error
from llama4.serve.engine import Engine

signal.alarm(60)
engine = Engine(Llama4.from_pretrained("tiny", progress=False))
asked = "What is two and two?"
picture = {"type": "image", "image": Image.new("RGB", (30, 30))}
pictured = [{"role": "user", "content": [picture]}]
before = engine.chat_batch([asked], max_new_tokens=3)[0].text
half_read = iter(engine.stream(asked, max_new_tokens=10**5, ignore_eos=True))
next(half_read)
asyncio.run(engine.chat(pictured, max_new_tokens=3))  # by a thread that the child has not
child = os.fork()
if not child:
    signal.alarm(40)
    try:
        list(half_read)
        os._exit(3)
    except Llama4Error as error:
        assert "make an Engine in each process" in str(error)
    try:
        engine.chat_batch([asked], max_new_tokens=3)
    except Llama4Error as error:
        assert "make an Engine in each process" in str(error)
        for work in (engine.compute(lambda llm: None), engine.chat(pictured, max_new_tokens=3)):
            try:
                asyncio.run(work)
                os._exit(4)
            except Llama4Error as error:
                assert "make an Engine in each process" in str(error)
        engine.close()
        with Engine(engine.llm) as own:
            os._exit(0 if own.chat_batch([asked], max_new_tokens=3)[0].text == before else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
assert engine.chat_batch([asked], max_new_tokens=3)[0].text == before
engine.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_makes_its_own() -> None:
    """In place of waiting for ever for the thread that is not there."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=90)


EXIT = """
from llama4 import Engine, Llama4

llm = Llama4.from_pretrained("tiny", progress=False)
engines = [Engine(llm) for _ in range(4)]
for i in range(4):
    stream = engines[i].stream("Hello", max_new_tokens=10**5, ignore_eos=True)
    globals()[f"kept_{i}"] = iter(stream)
    next(globals()[f"kept_{i}"])
"""


def test_a_script_may_end_while_requests_run() -> None:
    """And engines are open."""
    ended = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=90)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_several_replies_and_likely_tokens(llm: Llama4, engine: Engine) -> None:
    reply = llm.chat(QUESTIONS[0], temperature=1.5, seed=5, n=3, top_logprobs=3, max_new_tokens=12)
    alone = [llm.chat(QUESTIONS[0], temperature=1.5, seed=seed, max_new_tokens=12) for seed in (5, 6, 7)]
    assert list(map(essence, (reply, *reply.others))) == list(map(essence, alone))
    (other,) = engine.chat_batch([QUESTIONS[0]], temperature=1.5, seed=5, top_logprobs=3, max_new_tokens=12)
    for token, same in zip(reply.logprobs, other.logprobs, strict=True):
        assert [id_ for id_, _ in token.alternatives] == [id_ for id_, _ in same.alternatives]
        values = dict(token.alternatives)
        assert len(values) == 3 and max(values.values()) >= token.logprob - 1e-6
        assert values.get(token.id, token.logprob) == pytest.approx(token.logprob, abs=1e-5)
