"""GPTQ: rounding by what a model does with texts."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama4.api import Llama4
from llama4.cli.main import main
from llama4.errors import ArgumentError
from llama4.progress import Bar
from llama4.quantization import gptq
from llama4.quantization.gptq import Hessian
from llama4.quantization.int4 import Int4, quantize_groups, unpack
from llama4.tiny import EMBEDDED
from llama4.weights import calibrating
from llama4.weights.convert import convert_to_gguf, quantize
from llama4.weights.safetensors import write_tensors
from tests.parity.references import relative_error
from tests.quantization.test_checkpoints import loaded, same

I, O = 64, 48  # noqa: E741 (the letter of shapes)


def samples(count: int, seed: int) -> Tensor:
    """Inputs that have much to do with each other, some large and some small."""
    mix = torch.randn(I, I, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1.5, I)
    return torch.randn(count, I, generator=torch.Generator().manual_seed(seed)) @ mix.mT


WEIGHT = torch.randn(O, I, generator=torch.Generator().manual_seed(1)) * 0.05


def hessian_of(x: Tensor) -> Hessian:
    hessian = Hessian(I)
    for piece in x.split(100):
        hessian.add(piece)
    return hessian


def numbers(parts: dict[str, Tensor]) -> Tensor:
    scales = parts["weight_scale"].float().repeat_interleave(32, dim=1)
    return unpack(parts["weight_packed"]).float() * scales


def error_of(parts: dict[str, Tensor], x: Tensor) -> float:
    return relative_error(x @ numbers(parts).mT, x @ WEIGHT.mT)


def test_against_the_definition() -> None:
    """Column after column, the weights that are not rounded yet are those with the least squared error of the outputs,
    found each time anew by solving for them in float64."""
    x = samples(400, 2).double()
    H = x.mT @ x
    H += gptq.DAMPING * H.diagonal().mean() * torch.eye(I, dtype=torch.float64)
    importance = (x * x).sum(0).float().unflatten(0, (-1, 32))
    _, scale = quantize_groups(WEIGHT.unflatten(-1, (-1, 32)), torch.float32, importance)
    scales = scale.squeeze(-1).double().repeat_interleave(32, dim=1)
    order = (x * x).sum(0).argsort(descending=True)
    wanted = WEIGHT.double().clone()
    for at in range(I):
        fixed, rest = order[:at], order[at:]
        moved = WEIGHT[:, rest].double()
        if at:
            errors = wanted[:, fixed] - WEIGHT[:, fixed].double()
            moved = moved - torch.linalg.solve(H[rest][:, rest], H[rest][:, fixed] @ errors.mT).mT
        column = order[at]
        wanted[:, column] = (moved[:, 0] / scales[:, column]).round().clamp(-8, 7) * scales[:, column]
    found = numbers(gptq.quantize(WEIGHT, hessian_of(x.float()), Int4(32)))
    assert relative_error(found, wanted.float()) < 1e-6


@pytest.mark.parametrize(("count", "part"), [(2000, 0.6), (I, 0.8), (16, 1.0)])
def test_the_error_on_other_inputs_is_smaller(count: int, part: float) -> None:
    """Few inputs do no harm: what is not known of the others is damped."""
    held_out, plain = samples(1000, 3), Int4(32).quantize(WEIGHT)
    found = gptq.quantize(WEIGHT, hessian_of(samples(count, 4)), Int4(32))
    assert error_of(found, held_out) < part * error_of(plain, held_out)


def test_inputs_that_never_come() -> None:
    x = samples(200, 5)
    x[:, ::3] = 0
    parts = gptq.quantize(WEIGHT, hessian_of(x), Int4(32))
    assert numbers(parts).isfinite().all()
    assert error_of(parts, x) < error_of(Int4(32).quantize(WEIGHT), x)


TEXT = (Path(__file__).parents[2] / "docs" / "long_context.md").read_text(encoding="utf-8")
TEXTS, HELD_OUT = TEXT[:4000], TEXT[-1500:]
TINY = EMBEDDED["tiny"]


def run(target: Path, source: Path = TINY) -> list[str]:
    said: list[str] = []
    quantize(source, target, "gptq", calibration=TEXTS, say=said.append, progress=False)
    return said


class Seen(Bar):
    """A bar that remembers where it was."""

    places: ClassVar[set[float]] = set()

    def _show(self, at: float) -> None:
        assert self._settings["unit"] == " tokens"
        self.places.add(at / self._settings["total"])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    target = tmp_path_factory.mktemp("gptq") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "Bar", Seen)
        return target, run(target)


def test_the_bar_moves_within_layers(written: tuple[Path, list[str]]) -> None:
    """While texts are read and while matrices are rounded, for each expert."""
    assert len(Seen.places) > 40 and min(Seen.places) == 0 and max(Seen.places) == 1


@torch.inference_mode()
def test_a_model_on_held_out_text(written: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Experts by their own tokens; those that had hardly any are counted, and are as plain rounding has them."""
    target, said = written
    quantize(TINY, tmp_path / "plain", "int4", progress=False)
    llm = Llama4.from_pretrained(TINY, dtype="float32")
    assert llm.tokenizer is not None
    ids = torch.tensor([llm.tokenizer.encode(HELD_OUT)])
    logits = {path.name: loaded(path)(ids) for path in (tmp_path / "plain", target)}
    error = {name: relative_error(own, llm.model(ids)) for name, own in logits.items()}
    assert error["model"] < 0.85 * error["plain"]
    found, plain = (load_file(path / "model.safetensors") for path in (target, tmp_path / "plain"))
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in plain.items()}
    key = "language_model.model.layers.{}.feed_forward.experts.{}.gate_proj.weight_packed"
    as_plain = sum(torch.equal(found[key.format(i, e)], plain[key.format(i, e)]) for i in range(6) for e in range(8))
    assert said == [f"{as_plain} experts got fewer than 32 tokens of the texts, and are rounded as without calibration"]


def test_norms_in_another_dtype(written: tuple[Path, list[str]], tmp_path: Path) -> None:
    """GGUF has them in float32, with the same numbers: the packed values are the same."""
    convert_to_gguf(TINY, tmp_path / "a.gguf", progress=False)
    run(tmp_path / "model", tmp_path / "a.gguf")
    found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "model", written[0]))
    packed = [key for key in wanted if key.endswith("weight_packed")]
    assert packed and all(torch.equal(found[key], wanted[key]) for key in packed)


def test_interrupted_it_continues_after_the_last_layer(
    written: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def write(path: Path, *args: Any) -> None:
        if len(done) == 3:
            done.append("interrupted")
            raise KeyboardInterrupt
        write_tensors(path, *args)
        done.append(path.name)

    monkeypatch.setattr(calibrating, "write_tensors", write)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    run(tmp_path / "model")
    layers = [f"layer-0000{i}.safetensors" for i in range(6)]
    assert done == [*layers[:3], "interrupted", *layers[3:]]
    assert same(tmp_path / "model", written[0])
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing else is left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "gptq"], "--calibration FILE goes with --scheme gptq"),
        (["--scheme", "int8", "--calibration", "texts"], "--calibration FILE goes with --scheme gptq"),
        (["--scheme", "gptq", "--calibration", "nowhere"], "nowhere cannot be read"),
        (["--scheme", "gptq", "--calibration", "bytes"], "bytes is no text in UTF-8"),
        (
            ["--scheme", "gptq", "--calibration", "texts"],
            "the texts for calibration have [0-9]+ tokens; give at least",
        ),
    ],
)
def test_what_calibration_takes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").write_text("A few words.")
    Path("bytes").write_bytes(b"\xff\xfe")
    with suppress(SystemExit):
        assert main(["quantize", str(TINY), "out", *arguments]) == (1 if arguments[-1] in ("nowhere", "bytes") else 2)
    assert re.search(message, capsys.readouterr().err)
    assert not Path("out").exists()


def test_it_is_not_done_while_loading() -> None:
    with pytest.raises(
        ArgumentError, match=r"'gptq' takes texts.* `llama4 quantize SRC DST --scheme gptq --calibration"
    ):
        Llama4.from_pretrained("tiny", quantization="gptq")
