"""Whether what was only seen on a CPU is right on the device: kernels, experts, whole models.

Held to float64 on the device where that is cheap, and to the CPU in float32 for whole models. Bounds are those of the
tests: bfloat16 rounds inputs, what is between and the result; fp8 rounds its inputs to three bits of mantissa.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.api import Llama4
from llama4.bench.device import attention, elementwise, machine, timing, workload
from llama4.bench.device.record import Figures, Record, Skip
from llama4.bench.vqa import exam
from llama4.config import TextConfig
from llama4.errors import Llama4Error
from llama4.kernels.triton import common, launch_cache, launch_products, support
from llama4.model.experts import BACKENDS
from llama4.ops import quantized_gpu
from llama4.quantization.formats import FORMATS
from llama4.quantization.modules import QuantizedExperts
from llama4.quantization.weight import QuantizedWeight
from llama4.tiny.shapes_dataset import KINDS_OF_QUESTION, is_right

BOUNDS = {"loop": 1e-2, "grouped": 1e-2, "megablocks": 1e-2, "int8": 1e-2, "int4": 1e-2, "fp8": 6e-2}
"""Largest relative error of experts in bfloat16."""
SCHEMES = ("int4", "int8", "fp8")


def run(record: Record) -> None:
    record.case("Triton compiles", partial(_compiles, record))
    for scheme in SCHEMES:
        for rows in (1, 8, 9, 100) if not record.dry else (2, 9):
            record.case(f"kernel {scheme}, {rows} rows", partial(_kernel, record, scheme, rows))
    for scheme in ("int4", "int8"):
        record.case(f"kernel unpack {scheme}", partial(_unpack, record, scheme))
    for tokens in (1, 40, 2048) if not record.dry else (3,):
        for name, case in elementwise.CASES.items():
            if tokens <= case.most_tokens:
                record.case(f"kernel {name}, {tokens} tokens", partial(_between, record, case, tokens))
    record.case("launch of a Triton kernel", partial(_launch, record))
    attention.run(record)
    for name in BACKENDS:
        _experts(record, name, None)
    for scheme in SCHEMES:
        _experts(record, scheme, scheme)
    record.case("small model, bfloat16", partial(_model, record, None))
    for scheme in SCHEMES:
        record.case(f"small model, {scheme}", partial(_model, record, scheme))
    record.case("tiny, float32: answers about pictures", partial(_tiny, record, "float32"))
    record.case("tiny, bfloat16: answers about pictures", partial(_tiny, record, "bfloat16"))


def _compiles(record: Record) -> Figures:
    if reason := machine.triton_missing(record.device):
        raise Skip(reason)
    if record.device.type != "cuda":
        raise Skip("not a GPU; the kernels run in Triton's interpreter")
    if reason := support.unsupported_reason(record.device, torch.bfloat16):
        raise Llama4Error(reason)
    return {}


def _held(error: float, bound: float) -> Figures:
    """Raises where the error is beyond the bound, or no number."""
    if not error <= bound:
        raise Llama4Error(f"the relative error is {error:.2g}, beyond {bound:g}")
    return {"relative_error": error, "bound": bound}


def _kernel(record: Record, kind: str, rows: int) -> Figures:
    """The Triton kernels alone, on float32 rows, against float64: sums in float32 are all that rounds."""
    if reason := machine.triton_missing(record.device):
        raise Skip(reason)
    E, O, I = (4, 6, 128) if record.dry else (4, 2064, 5120)  # noqa: E741  # outputs that end inside a block
    device = record.device
    module = _packed_matrices(kind, E, O, I, device)
    counts = [rows - rows // 3, 0, rows // 3, 0]
    x = torch.randn(rows, I, device=device)
    x_scales, exact = None, x.double()
    if kind == "fp8":
        x_scales = x.abs().amax(1) / 448
        x = (x / x_scales[:, None]).to(torch.float8_e4m3fn)
        exact, x = x.double() * x_scales[:, None].double(), x.view(torch.uint8)
    y = launch_products.product(
        kind,
        x,
        module.part(module.format.parts[0]),
        module.part("weight_scale"),
        torch.tensor(counts, device=device),
        x_scales_R=x_scales,
        dtype=torch.float32,
    )
    parts = [part @ module.dequantize(i).double().mT for i, part in enumerate(exact.split(counts)) if len(part)]
    return _held(workload.relative(y, torch.cat(parts)), 1e-5)


def _unpack(record: Record, kind: str) -> Figures:
    """Each weight as torch rounds it."""
    if reason := machine.triton_missing(record.device):
        raise Skip(reason)
    E, O, I = (2, 6, 128) if record.dry else (4, 16384, 5120)  # noqa: E741
    module = _packed_matrices(kind, E, O, I, record.device)
    values, scales = module.part(module.format.parts[0]), module.part("weight_scale")
    weights = launch_products.unpack(kind, values, scales)
    for i, own in enumerate(weights):
        if not torch.equal(own, module.dequantize(i).bfloat16()):
            raise Llama4Error("a weight is not what torch makes of it")
    spent = record.time(lambda: launch_products.unpack(kind, values, scales), 0.02)
    return {"gb_s": (values.nbytes + scales.nbytes + weights.nbytes) / spent / 1e9}


def _packed_matrices(kind: str, E: int, O: int, I: int, device: torch.device) -> QuantizedWeight:  # noqa: E741
    with torch.device("meta"):
        module = QuantizedWeight(FORMATS[kind](64 if kind == "int4" else None), (E, O, I))
    workload.fill(module, lambda name: device)
    return module


def _between(record: Record, case: elementwise.Case, tokens: int) -> Figures:
    """A kernel between matrix products, alone; without waiting for the device."""
    if reason := machine.triton_missing(record.device):
        raise Skip(reason)
    torch.manual_seed(0)
    text = workload.text_config("scout", layers=1, dry=record.dry)
    given = elementwise.Inputs(text, tokens, record.device)
    outputs = case.run(given)
    errors = [workload.relative(y, truth) for y, truth in zip(outputs, case.truth(given), strict=True)]
    with timing.waiting_is_an_error(record.device):
        case.run(given)
    return {"us": record.time(lambda: case.run(given), 0.02) * 1e6} | _held(max(errors), case.bound)


def _launch(record: Record) -> Figures:
    """What the launch of a small kernel takes the host, as Triton does it and from the cache."""
    if record.device.type != "cuda":
        raise Skip("not a GPU")
    from llama4.kernels.triton import elementwise as kernels

    x, y = torch.ones(2, 1, 5120, device=record.device)
    weight, sizes = torch.ones(5120, device=record.device).bfloat16(), common.whole_row(5120)
    arguments, sizes = (x, None, None, None, weight, None, y.bfloat16(), 1e-5), {"k": 0, "D": 5120, **sizes}
    ways = {
        "triton_us": lambda: kernels.rms_norm[(1,)](*arguments, **sizes, **launch_cache.OPTIONS),
        "cached_us": lambda: common.launch(kernels.rms_norm, (1,), x, *arguments, **sizes),
    }
    return {name: timing.host_seconds_each(launch, record.device) * 1e6 for name, launch in ways.items()}


def _experts(record: Record, name: str, scheme: str | None) -> None:
    """A backend or a scheme: any number of tokens, spread or all to one expert, without waiting, in a CUDA graph."""
    device = record.device
    D, width = (128, 128) if record.dry else (1024, 2048)
    text = TextConfig(hidden_size=D, intermediate_size=width, num_local_experts=16)
    made: list[nn.Module] = []

    def experts() -> nn.Module:
        if not made:
            if scheme is None and (reason := BACKENDS[name].unsupported_reason(device, torch.bfloat16)):
                raise Skip(reason)
            torch.manual_seed(0)
            layer = workload.moe_layer(text, device, scheme)
            made.append(layer.experts if scheme else workload.with_backend(layer, text, name))
        return made[0]

    def check(rows: int) -> Figures:
        """Spread over the experts, or, if less than none, so many to one of them."""
        module = experts()
        counts_E = workload.spread(rows, 16, device) if rows >= 0 else workload.all_to(11, -rows, 16, device)
        x_RD = torch.randn(int(counts_E.sum()), D, device=device).bfloat16()
        y_RD = module(x_RD, counts_E)
        if y_RD.shape != x_RD.shape or y_RD.dtype != x_RD.dtype:
            raise Llama4Error(f"gave {list(y_RD.shape)}, {y_RD.dtype}")
        truth_RD = reference(module, x_RD, counts_E)
        return _held(workload.relative(y_RD, truth_RD) if len(x_RD) else 0.0, BOUNDS[name])

    for rows in (0, 1, 5, 600, 2048, 16 * quantized_gpu.MIN_UNPACKED_ROWS) if not record.dry else (0, 5, 40):
        record.case(f"{name}, {rows} tokens", partial(check, rows))
    record.case(f"{name}, all to one expert", partial(check, -40 if record.dry else -600))
    if name in ("loop", "megablocks"):
        return
    record.case(f"{name}, the host does not wait", lambda: _no_waiting(experts(), D, device))
    record.case(f"{name}, a CUDA graph for other counts", lambda: _replayed(experts(), D, device))


def reference(experts: nn.Module, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """The experts in float64, one after the other."""
    is_fp8 = isinstance(experts, QuantizedExperts) and experts.gate_up_proj.format.kind == "fp8"
    rounded: Callable[[Tensor], Tensor] = _as_fp8 if is_fp8 else nn.Identity()
    outputs = []
    for expert, part in enumerate(x_RD.double().split(counts_E.tolist())):
        if not len(part):
            continue
        if isinstance(experts, QuantizedExperts):
            gate_up = experts.gate_up_proj.dequantize(expert).double().mT
            down = experts.down_proj.dequantize(expert).double().mT
        else:
            gate_up = experts.get_parameter("gate_up_proj")[expert].double()
            down = experts.get_parameter("down_proj")[expert].double()
        gate, up = (rounded(part) @ gate_up).chunk(2, dim=-1)
        outputs.append(rounded(F.silu(gate) * up) @ down)
    return torch.cat(outputs) if outputs else x_RD.double()


def _as_fp8(x_RI: Tensor) -> Tensor:
    """Rounded to e4m3 with a scale per row, as inputs of fp8 are."""
    scale_R1 = x_RI.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    return (x_RI / scale_R1).to(torch.float8_e4m3fn).double() * scale_R1


def _no_waiting(experts: nn.Module, D: int, device: torch.device) -> Figures:
    for rows in (3, 40, 16 * quantized_gpu.MIN_UNPACKED_ROWS) if device.type == "cuda" else (3, 40):
        x_RD, counts_E = torch.randn(rows, D, device=device).bfloat16(), workload.spread(rows, 16, device)
        experts(x_RD, counts_E)  # compiles
        with timing.waiting_is_an_error(device):
            experts(x_RD, counts_E)
    return {}


def _replayed(experts: nn.Module, D: int, device: torch.device) -> Figures:
    """Nothing about the counts may be in the launch."""
    if device.type != "cuda":
        raise Skip("not a GPU")
    errors = []
    for rows in (4, 48):
        x_RD, counts_E = torch.randn(rows, D, device=device).bfloat16(), workload.all_to(2, rows, 16, device)
        outputs: list[Tensor] = []
        replay = timing.graph(lambda: outputs.append(experts(x_RD, counts_E)), device)  # noqa: B023
        for other in (workload.all_to(15, rows, 16, device), workload.spread(rows, 16, device)):
            counts_E.copy_(other)
            replay()
            torch.cuda.synchronize(device)
            errors.append(workload.relative(outputs[-1], experts(x_RD, counts_E)))
    return _held(max(errors), 1e-3)


def _model(record: Record, scheme: str | None) -> Figures:
    """Prompts that cross chunk borders, and steps after them, against the CPU in float32."""
    device = record.device
    text = workload.text_config("scout", layers=4, dry=True)
    torch.manual_seed(0)
    here, _ = workload.build(workload.config(text), torch.device("cpu"), scheme)
    there, _ = workload.build(workload.config(text), device, scheme)
    there.load_state_dict(here.state_dict())
    here = here.float()
    ids_BT = workload.ids(text, 2, 150, torch.device("cpu"))
    truth = here(ids_BT)
    cache = there.new_cache(2)
    parts = ids_BT.to(device).split([140, *[1] * 10], dim=1)
    stepped = torch.cat([there(part, cache=cache) for part in parts], dim=1)
    whole = there(ids_BT.to(device))
    errors = {"whole_error": workload.relative(whole, truth), "stepped_error": workload.relative(stepped, truth)}
    agree = (stepped.argmax(-1).cpu() == truth.argmax(-1)).float().mean().item()
    return errors | {"greedy_share_equal": agree} | _held(max(errors.values()), 0.3)


def _tiny(record: Record, dtype: str) -> Figures:
    """The embedded model answers fresh questions about drawings, and says the same as on the CPU."""
    kinds, each = (KINDS_OF_QUESTION[:1], 2) if record.dry else (KINDS_OF_QUESTION, 4)
    asked = [item for kind in kinds for item in exam(kind, each, seed=0)]
    answers: dict[str, list[str]] = {}
    for name, device in {"cpu": torch.device("cpu"), "device": record.device}.items():
        llm = Llama4.from_pretrained("tiny", device=device, dtype=dtype, progress=False)
        replies = llm.chat_batch([messages for messages, _ in asked], max_new_tokens=24)
        answers[name] = [reply.text for reply in replies]
    right = [is_right(question, said) for (_, question), said in zip(asked, answers["device"], strict=True)]
    same = [a == b for a, b in zip(answers["cpu"], answers["device"], strict=True)]
    figures = {"asked": len(asked), "right_share": sum(right) / len(right), "same_share": sum(same) / len(same)}
    if dtype == "float32" and not all(same):
        raise Llama4Error(f"{same.count(False)} of {len(same)} answers differ from the CPU's: {figures}")
    return figures
