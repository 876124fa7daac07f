"""`llama4 info` and `llama4 plan`: what a model is, and where it fits."""

from __future__ import annotations

import argparse
import json
from typing import Any

from llama4.adapters.methods import PLANNED
from llama4.arguments import printable
from llama4.cache.formats import QUANTIZED
from llama4.cli.finetune import LORA, SETTINGS, parse_targets
from llama4.cli.options import add_hub_options
from llama4.files import user_path
from llama4.progress import starting
from llama4.quantization.schemes import SCHEMES
from llama4.units import MIN_CONTEXT, dtype_name, parse_bytes, parse_rate, parse_tokens

MODEL = {
    "help": "scout, maverick, guard4, behemoth, llama-3.1-8b and the like, tiny, a directory, a GGUF file or a Hub id"
}
DEVICES = ("h100", "h200", "b200", "cpu")
FINETUNE = {name: LORA[name] for name in ("rank", "targets")}
FINETUNE |= {name: SETTINGS[name] for name in ("batch_tokens", "optimizer_states")}
FINETUNE["batch_tokens"] = SETTINGS["batch_tokens"] | {"help": "tokens of a batch, on each device (default: 4096)"}
"""Arguments of `llama4 finetune` that `plan --finetune` takes."""
NOT_OF_FINETUNE = ("cache", "tensor_parallel", "memory_rate", "disk_rate", "measure")


def add_parsers(commands: Any) -> None:
    about = "Show what a model is, or with --system what this machine is and which CPU kernels it runs."
    info = commands.add_parser("info", help="show what a model is, or this machine", description=about)
    info.add_argument("model", nargs="?", **MODEL)
    info.add_argument(
        "--system", action="store_true", help="show this machine: its CPU, the kernels that it runs, and why"
    )
    add_hub_options(info)
    info.add_argument("--context", metavar="N", help="also show the size of a cache of N tokens: 131072, 128K, 10M")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run_info, parser=info)

    about = "Calculate what fits where and how fast it is, before anything is bought or downloaded."
    plan = commands.add_parser("plan", help="what fits where, and how fast", description=about)
    plan.add_argument("model", **MODEL)
    add_hub_options(plan)
    plan.add_argument(
        "--context",
        metavar="N",
        help="length of the context in tokens: 131072, 128K, 10M (default: the model's window)",
    )
    plan.add_argument(
        "--weights",
        type=dtype_name,
        choices=("auto", "bfloat16", *SCHEMES),
        default="auto",
        help="format of the weights (default: as stored)",
    )
    plan.add_argument(
        "--cache",
        type=dtype_name,
        choices=("auto", "bfloat16", *QUANTIZED),
        default="auto",
        help="format of keys and values in layers that see the whole context (default: the model's dtype)",
    )
    plan.add_argument("--devices", type=int, default=1, metavar="N", help="number of devices (default: 1)")
    plan.add_argument("--tensor-parallel", type=int, metavar="T", help="number of devices that split heads and experts")
    plan.add_argument("--device", choices=DEVICES, help="kind of device (default: h100); cpu measures this machine")
    plan.add_argument(
        "--device-memory",
        type=parse_bytes,
        metavar="SIZE",
        help="memory of one device, such as 80GiB (default: that of its kind)",
    )
    plan.add_argument(
        "--memory-rate",
        type=parse_rate,
        metavar="RATE",
        help="memory bandwidth that one device reaches, such as 2.4TB/s",
    )
    plan.add_argument(
        "--gemm-rate",
        type=parse_rate,
        metavar="RATE",
        help="speed of matrix products that one device reaches, such as 400TFLOP/s",
    )
    plan.add_argument(
        "--disk-rate",
        type=parse_rate,
        metavar="RATE",
        help="speed of the disk, for a model larger than this CPU's memory, such as 1GB/s",
    )
    plan.add_argument("--measure", action="store_true", help="run the model on this CPU, too, to compare with the plan")
    plan.add_argument("--json", action="store_true", help="print JSON")
    group = plan.add_argument_group("training")
    about = "plan its training, each device with a share of all; --context is of an example (default: 2048)"
    group.add_argument("--finetune", choices=PLANNED, metavar="METHOD", help=f"{', '.join(PLANNED)}: {about}")
    for name, settings in FINETUNE.items():
        group.add_argument("--" + name.replace("_", "-"), **settings)
    plan.set_defaults(run=run_plan, parser=plan)


def run_info(options: argparse.Namespace) -> int:
    if options.system == bool(options.model):
        options.parser.error("give a model, or --system")
    if options.system:
        for name in ("revision", "subfolder", "context"):
            if getattr(options, name) is not None:
                options.parser.error(f"--{name} is of a model; --system shows this machine, leave one out")
        with starting():
            from llama4.bench import machine

        system = machine.system()
        print(json.dumps(system, indent=2) if options.json else machine.table(system))
        return 0
    with starting():
        from llama4.analysis.info import describe_model, find, table

    model = find(options.model, options.revision, subfolder=options.subfolder)
    context = parse_tokens(options.context, MIN_CONTEXT) if options.context is not None else None
    facts = describe_model(model, context)
    text = json.dumps({"model": options.model, **facts}, indent=2) if options.json else table(options.model, facts)
    print(printable(text))
    return 0


def run_plan(options: argparse.Namespace) -> int:
    with starting():
        from llama4.analysis import hardware, mapped_experts, planner
        from llama4.bench import calibration as cpu
        from llama4.families import PRESETS
        from llama4.tiny import EMBEDDED

    if options.finetune:
        return run_plan_of_training(options)
    for name in FINETUNE:
        if getattr(options, name) is not None:
            options.parser.error(f"--{name.replace('_', '-')} is of a training; add --finetune lora, qlora or full")
    on_cpu = options.measure or options.device == "cpu"
    if on_cpu and (options.devices != 1 or options.device not in (None, "cpu")):
        options.parser.error("--measure and --device cpu are for this one CPU")
    if options.disk_rate and not on_cpu:
        options.parser.error("--disk-rate is of a model larger than this CPU's memory; add --device cpu")
    if options.measure and options.model in PRESETS and options.model not in EMBEDDED:
        options.parser.error(f"--measure runs a model, and {options.model} is a shape without weights; leave it out")
    config, stored = planner.read_model(options.model, options.revision, options.subfolder, weights=options.weights)
    device = "h100" if on_cpu else options.device or "h100"
    rates = options.memory_rate, options.gemm_rate
    deployment = planner.make_deployment(
        config,
        stored,
        weights=options.weights,
        dtype=cpu.dtype_of(config, options.weights) if on_cpu else "auto",
        cache_dtype=options.cache,
        devices=options.devices,
        tensor_parallel=options.tensor_parallel,
        device_memory=_device_memory(options),
        device_type="cpu" if on_cpu else "cuda",
    )
    wanted = parse_tokens(options.context, MIN_CONTEXT) if options.context is not None else None
    context = planner.checked_context(deployment, wanted)
    if on_cpu and None in rates:
        reached = cpu.measure_rates(deployment)
    else:
        reached = hardware.published_rates(device, planner.fp8_share(deployment))
    facts = planner.describe(options.model, deployment, context, hardware.overridden(reached, *rates))
    mapped = mapped_experts.mapped_experts(deployment, context) if on_cpu else None
    if mapped is not None:
        disk = options.disk_rate
        if disk is None and (directory := user_path(options.model) / (options.subfolder or "")).is_dir():
            disk = cpu.disk_rate(directory)
        if disk is not None:
            facts["mapped_experts"] = mapped_experts.describe(mapped, facts, disk)
    if options.measure:
        facts["measured"] = cpu.measure_model(options.model, options.revision, options.subfolder, deployment, context)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(planner.table(facts))
    if "mapped_experts" in facts:
        print(mapped_experts.table(facts["mapped_experts"]))
    if options.measure:
        print(cpu.comparison(facts, deployment))
    return 0


def run_plan_of_training(options: argparse.Namespace) -> int:
    from llama4.adapters.config import LoraConfig
    from llama4.analysis import finetuning, hardware, planner
    from llama4.train.options import MOST_BATCH_TOKENS, TrainingOptions

    for name in NOT_OF_FINETUNE:
        if getattr(options, name) != options.parser.get_default(name):
            options.parser.error(f"--{name.replace('_', '-')} is not of a training; leave it or --finetune out")
    for name in ("rank", "targets"):
        if options.finetune == "full" and getattr(options, name) is not None:
            options.parser.error(f"--{name} is of an adapter; --finetune full has none")
    if options.device == "cpu" and options.gemm_rate is None:
        options.parser.error("--finetune with --device cpu needs --gemm-rate, what this CPU reaches")
    config, stored = planner.read_model(options.model, options.revision, options.subfolder, weights=options.weights)
    device = "h100" if options.device in (None, "cpu") else options.device
    deployment = planner.make_deployment(
        config,
        stored,
        weights=finetuning.weights_of(options.finetune, options.weights, bool(stored)),
        devices=options.devices,
        device_memory=_device_memory(options),
    )
    lora: dict[str, Any] = {"rank": options.rank} if options.rank is not None else {}
    lora |= parse_targets(options.targets) if options.targets is not None else {}
    settings = TrainingOptions(optimizer_states=options.optimizer_states or TrainingOptions.optimizer_states)
    window = config.text.max_position_embeddings
    wanted = min(settings.max_length, window) if options.context is None else parse_tokens(options.context)
    training = finetuning.Training(
        options.finetune,
        LoraConfig(**lora),
        batch_tokens=MOST_BATCH_TOKENS if options.batch_tokens is None else options.batch_tokens,
        length=planner.checked_context(deployment, wanted),
        optimizer_states=settings.optimizer_states,
    )
    rates = hardware.overridden(hardware.published_rates(device), None, options.gemm_rate)
    facts = finetuning.describe(options.model, deployment, training, rates)
    print(json.dumps(facts, indent=2) if options.json else finetuning.table(facts))
    return 0


def _device_memory(options: argparse.Namespace) -> int:
    """Bytes of one device, as given or as the device has."""
    import torch

    from llama4.analysis import hardware
    from llama4.weights import memory

    if options.device_memory is not None:
        return int(options.device_memory)
    on_cpu = options.measure or options.device == "cpu"
    return memory.total(torch.device("cpu")) if on_cpu else hardware.DEVICES[options.device or "h100"].memory
