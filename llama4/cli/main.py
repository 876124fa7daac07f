"""The command `llama4`: generate, chat, info, plan, convert, quantize, bench."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llama4 import __version__
from llama4.bench.__main__ import BENCHES
from llama4.bench.__main__ import main as run_bench
from llama4.bench.__main__ import usage as bench_usage
from llama4.quantization.schemes import SCHEMES

if TYPE_CHECKING:
    from llama4.api import Llama4, Options
    from llama4.engine.replies import Reply

HELP = """\
Write a message and press Enter.
  /image FILE   add a picture to your next message
  /reset        start a new conversation
  /help         show this
  /quit         leave (so does Ctrl-D)
Ctrl-C stops a reply."""

LAYOUTS = ("hf", "meta")
"""As in `llama4.convert`, which is imported late because it imports torch."""

CACHES = ("auto", "bf16", "fp8", "int8", "int4")
"""As in `llama4.config`, which is imported late for the same reason."""

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit codes of a shell's commands that end by SIGINT and SIGPIPE."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. What a user can cause ends in one line on stderr, not a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    options = make_parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        if getattr(options, "json", False):
            print(json.dumps({"error": str(error), "type": type(error).__name__}))
        print(f"llama4: error: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llama4", description="Ask Llama 4 about text and images.")
    parser.add_argument("--version", action="version", version=f"llama4 {__version__}")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="generate | chat | info | plan | convert | quantize | bench"
    )

    generate = commands.add_parser("generate", help="answer one question", description="Answer one question.")
    generate.add_argument("question", help="what to ask; - reads it from stdin")
    generate.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture: path or URL; repeatable"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object when the reply is complete")
    generate.add_argument("--raw", action="store_true", help="continue the text as it is, without the format of a chat")
    _add_reply_options(generate)
    generate.set_defaults(run=run_generate, parser=generate)

    chat = commands.add_parser("chat", help="talk in the terminal", description="Talk in the terminal. " + HELP)
    chat.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_reply_options(chat)
    chat.set_defaults(run=run_chat)

    info = commands.add_parser("info", help="show what a model is", description="Show what a model is.")
    info.add_argument("model", help="scout, maverick, guard4, behemoth, tiny, a directory or a Hub id")
    info.add_argument("--revision", help="branch, tag or commit on the Hub")
    info.add_argument("--context", metavar="N", help="what the cache takes at so many tokens: 131072, 128K, 10M")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run_info)

    about = "Say what fits where and how long it takes, before any of it is bought or downloaded."
    plan = commands.add_parser("plan", help="what fits where, and how fast", description=about)
    plan.add_argument("model", help="scout, maverick, guard4, behemoth, tiny, a directory or a Hub id")
    plan.add_argument("--revision", help="branch, tag or commit on the Hub")
    plan.add_argument("--context", metavar="N", help="tokens: 131072, 128K, 10M (default: the model's window)")
    plan.add_argument("--weights", choices=("auto", "bf16", *SCHEMES), default="auto", help="default: as they are")
    plan.add_argument(
        "--cache",
        choices=CACHES,
        default="auto",
        help="of layers that see every token (default: the model's dtype)",
    )
    plan.add_argument("--devices", type=int, default=1, metavar="N", help="how many (default: 1)")
    plan.add_argument("--tensor-parallel", type=int, metavar="T", help="as many share heads and experts")
    plan.add_argument("--device", choices=("h100", "h200", "b200", "cpu"), help="h100 (default), or this CPU, measured")
    plan.add_argument("--device-memory", metavar="SIZE", help="of one device: 80GiB (default: the device's)")
    plan.add_argument("--memory-rate", metavar="RATE", help="that one reaches: 2.4TB/s")
    plan.add_argument("--gemm-rate", metavar="RATE", help="that one reaches: 400TFLOP/s")
    plan.add_argument("--measure", action="store_true", help="run the model on this CPU, beside the plan")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=run_plan, parser=plan)

    about = "Write a checkpoint in another layout, bit by bit."
    convert = commands.add_parser("convert", help="change a checkpoint's layout", description=about)
    convert.add_argument("source", metavar="SRC", help="a directory in Hugging Face's or Meta's layout, or a Hub id")
    convert.add_argument("target", metavar="DST", help="the directory to make")
    convert.add_argument("--to", required=True, choices=LAYOUTS, help="hf: safetensors; meta: consolidated.NN.pth")
    convert.add_argument("--ranks", type=int, default=1, metavar="N", help="files of Meta's layout (default: 1)")
    convert.add_argument("--revision", help="branch, tag or commit on the Hub")
    convert.set_defaults(run=run_convert, parser=convert)

    about = "Write a checkpoint in few bits, in the compressed-tensors format. Interrupted, it goes on when run again."
    quantize = commands.add_parser("quantize", help="make a checkpoint smaller", description=about)
    quantize.add_argument("source", metavar="SRC", help="a directory in Hugging Face's or Meta's layout, or a Hub id")
    quantize.add_argument("target", metavar="DST", help="the directory to make")
    quantize.add_argument("--scheme", required=True, choices=SCHEMES, help="which weights, and how")
    quantize.add_argument("--head", action="store_true", help="the head, too")
    quantize.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file (default: 5)")
    quantize.add_argument("--revision", help="branch, tag or commit on the Hub")
    quantize.set_defaults(run=run_quantize, parser=quantize)

    bench = commands.add_parser("bench", help="measure speed and quality here", description=bench_usage())
    bench.formatter_class = argparse.RawDescriptionHelpFormatter
    bench.add_argument("name", metavar="NAME", choices=BENCHES, help="what to measure; NAME --help shows its options")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of that")
    bench.set_defaults(run=lambda options: run_bench([options.name, *options.arguments]))
    return parser


def _add_reply_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="tiny", help="embedded name, directory or Hub id (default: tiny)")
    model.add_argument("--revision", help="branch, tag or commit on the Hub")
    model.add_argument("--dtype", default="auto", help="bfloat16, float16, float32, float64 (default: auto)")
    model.add_argument("--quantization", metavar="SCHEME", help=f"while loading: {', '.join(SCHEMES)}")
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    model.add_argument("--experts", default="auto", help="loop, grouped or megablocks (default: auto)")
    model.add_argument("--experts-device", metavar="DEVICE", help="where experts stay: cpu spares a GPU's memory")
    model.add_argument("--experts-memory", metavar="SIZE", help="of the GPU for copies of experts in use, as 8GiB")
    model.add_argument("--cache-dtype", default="auto", help="of keys and values: fp8, int8, int4 (default: auto)")
    model.add_argument(
        "--cache-device", metavar="DEVICE", help="where what grows of them is held: cpu spares a GPU's memory"
    )
    model.add_argument(
        "--no-memory-map",
        dest="memory_map",
        action="store_false",
        help="read all weights into memory of their own: slower to load, at times faster to decode with",
    )
    model.add_argument("--max-context", type=int, metavar="N", help="most tokens of prompt and reply together")
    reply = parser.add_argument_group("reply")
    reply.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    reply.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of a reply (default: 256)"
    )
    reply.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default), higher varies"
    )
    reply.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that sum to P"
    )
    reply.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    reply.add_argument("--seed", type=int, metavar="N", help="makes a reply with a temperature repeatable")
    reply.add_argument("--stop", action="append", metavar="TEXT", help="end the reply before this text; repeatable")


def _load(options: argparse.Namespace) -> Llama4:
    from llama4.api import Llama4

    return Llama4.from_pretrained(
        options.model,
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        experts=options.experts,
        experts_device=options.experts_device,
        experts_memory=options.experts_memory,
        max_context=options.max_context,
        cache_dtype=options.cache_dtype,
        cache_device=options.cache_device,
        memory_map=options.memory_map,
    )


def _reply_options(options: argparse.Namespace) -> Options:
    return {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "seed": options.seed,
        "stop": options.stop,
    }


def _start(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A conversation before its first question."""
    return [{"role": "system", "content": options.system}] if options.system else []


def run_generate(options: argparse.Namespace) -> int:
    if options.raw and (options.image or options.system):
        options.parser.error("--raw continues a text; it takes neither --image nor --system")
    question = read_stdin() if options.question == "-" else options.question
    content = [*({"type": "image", "image": image} for image in options.image), {"type": "text", "text": question}]
    llm = _load(options)
    prompt = (
        llm.processor.complete(question) if options.raw else [*_start(options), {"role": "user", "content": content}]
    )
    stream = llm.stream(prompt, **_reply_options(options))
    for piece in stream:
        if not options.json:
            print(piece, end="", flush=True)
    print(json.dumps(as_json(stream.reply), ensure_ascii=False) if options.json else "")
    return 0


def read_stdin() -> str:
    """All of stdin, without the line break at its end.

    Raises:
        ValueError: it is not UTF-8.
    """
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"stdin is not UTF-8: byte {data[error.start]:#04x} at {error.start}; convert it first, for instance with "
            "iconv -f latin1 -t utf-8"
        ) from None


def as_json(reply: Reply) -> dict[str, Any]:
    """A reply as `--json` prints it."""
    return {
        "text": reply.text,
        "tool_calls": [call.to_openai() for call in reply.tool_calls],
        "finish_reason": reply.finish_reason,
        "usage": dataclasses.asdict(reply.usage),
        "logprobs": [{"id": token.id, "text": token.text, "logprob": token.logprob} for token in reply.logprobs],
    }


def run_chat(options: argparse.Namespace) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # some locales let bytes through that are no text
    llm = _load(options)
    settings = _reply_options(options)
    messages, pictures = _start(options), list[dict[str, Any]]()
    interactive = sys.stdin.isatty()
    if interactive:
        print("/help shows what you can do, Ctrl-D leaves.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            print(end="\n" if interactive else "")
            return 0
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin is not UTF-8 ({error}); convert it first") from None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(Ctrl-D leaves)")
            continue
        command, _, argument = line.partition(" ")
        if command in ("/quit", "/exit"):
            return 0
        if command == "/reset":
            messages, pictures = _start(options), []
            print("A new conversation.")
        elif command == "/image":
            with _reported():
                pictures.append(_picture(argument))
                print(f"Added picture {len(pictures)} to your next message.")
        elif command == "/help" or (command.startswith("/") and "/" not in command[1:]):
            print(HELP if command == "/help" else f"{command} is no command; /help shows those there are.")
        elif line:
            question = {"role": "user", "content": [*pictures, {"type": "text", "text": line}]}
            with _reported():
                messages = _exchange(llm, [*messages, question], settings)
                pictures = []


def _picture(name: str) -> dict[str, Any]:
    from llama4.vision.images import load_image

    name = name.strip().strip("'\"")
    if not name:
        raise ValueError("/image needs a file, such as /image photo.jpg")
    return {"type": "image", "image": load_image(name)}


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """What goes wrong in a conversation is said, and does not end it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)


def _exchange(llm: Llama4, messages: list[dict[str, Any]], settings: Options) -> list[dict[str, Any]]:
    """Stream the reply; -> the conversation with as much of it as came before Ctrl-C."""
    stream = None
    try:
        stream = llm.stream(messages, **settings)
        for piece in stream:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="" if stream else "\n")
    if stream is None:  # pictures were still being read
        return messages[:-1]
    reply = stream.reply
    print(" (cut at --max-new-tokens or the window)" if reply.finish_reason == "length" else "")
    return [*messages, {"role": "assistant", "content": reply.text}]


def run_convert(options: argparse.Namespace) -> int:
    from llama4.weights import hub
    from llama4.weights.convert import convert

    if options.to == "hf" and options.ranks != 1:
        options.parser.error("--ranks is for Meta's layout; Hugging Face's has none")
    source = hub.resolve(options.source, revision=options.revision)
    convert(source, options.target, options.to, ranks=options.ranks)
    return 0


def run_quantize(options: argparse.Namespace) -> int:
    from llama4.weights import hub
    from llama4.weights.convert import quantize

    if not options.shard_gb > 0:
        options.parser.error(f"--shard-gb is {options.shard_gb}; it must be more than 0")
    source = hub.resolve(options.source, revision=options.revision)
    shard_bytes = int(options.shard_gb * 1e9)
    quantize(source, options.target, options.scheme, head=options.head, max_shard_bytes=shard_bytes)
    return 0


def run_info(options: argparse.Namespace) -> int:
    from llama4.analysis.info import describe, describe_quantization, read_config, table
    from llama4.units import parse_tokens

    config = read_config(options.model, options.revision)
    context = parse_tokens(options.context) if options.context is not None else None
    facts = describe(config, context) | {"quantization": describe_quantization(options.model, config)}
    print(json.dumps({"model": options.model, **facts}, indent=2) if options.json else table(options.model, facts))
    return 0


def run_plan(options: argparse.Namespace) -> int:
    from llama4 import units
    from llama4.analysis import planner
    from llama4.analysis.hardware import DEVICES, overridden, published_rates
    from llama4.analysis.info import read_config
    from llama4.bench import calibration as cpu

    on_cpu = options.measure or options.device == "cpu"
    if on_cpu and (options.devices != 1 or options.device not in (None, "cpu")):
        options.parser.error("--measure and --device cpu are for this one CPU")
    config = read_config(options.model, options.revision)
    device = "h100" if on_cpu else options.device or "h100"
    memory = units.parse_bytes(options.device_memory) if options.device_memory else None
    rates = tuple(units.parse_rate(rate) if rate else None for rate in (options.memory_rate, options.gemm_rate))
    setup = planner.make_placement(
        options.model,
        config,
        weights=options.weights,
        dtype=cpu.dtype_of(config, options.weights) if on_cpu else "auto",
        cache_dtype=options.cache,
        devices=options.devices,
        tensor_parallel=options.tensor_parallel,
        device_memory=memory or (cpu.memory_bytes() if on_cpu else DEVICES[device].memory),
    )
    context = planner.checked_context(setup, units.parse_tokens(options.context) if options.context else None)
    unmeasured = published_rates(device, planner.fp8_share(setup))
    reached = cpu.measure_rates(setup) if on_cpu and None in rates else unmeasured
    facts = planner.describe(options.model, setup, context, overridden(reached, *rates))
    if options.measure:
        facts["measured"] = cpu.measure_model(options.model, options.revision, setup, context)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(planner.table(facts))
    if options.measure:
        print(cpu.comparison(facts, setup))
    return 0
