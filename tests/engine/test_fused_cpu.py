"""The compiled step of decoding against the eager one."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama4.api import Llama4
from llama4.engine import fused_cpu, prefill
from llama4.engine.fused_cpu import FusedCpuRunner
from llama4.engine.fused_prompt import read_by_steps
from llama4.engine.generate import generate
from llama4.engine.prefill import read_pieces
from llama4.engine.prompt import Piece
from llama4.engine.runner import EagerRunner, ModelRunner
from llama4.engine.sampling import Sampler
from llama4.engine.tokens import Token
from llama4.inputs import Inputs
from llama4.kernels import loader, threads
from llama4.model.experts import GroupedExperts
from llama4.model.multimodal import Llama4Model
from llama4.model.norm import RMSNorm
from llama4.ops import cpu_kernels
from llama4.quantization.schemes import SCHEMES
from tests import small_model
from tests.marks import needs_kernels
from tests.parity.references import reference_config, reference_model, relative_error, write_mixed

pytestmark = needs_kernels
PROMPT = torch.randint(0, 490, (3, 20), generator=torch.Generator().manual_seed(8))
MASK = torch.ones(3, 20, dtype=torch.bool)
MASK[1, :7] = MASK[2, :13] = False


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "MIN_WIDTH", 1)
    monkeypatch.setattr(cpu_kernels, "MIN_MATRIX", 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed(tmp_path_factory.mktemp("checkpoint") / "model", num_hidden_layers=4)


def load(directory: Path, scheme: str | None, dtype: str, experts: str = "auto") -> Llama4Model:
    return Llama4.from_pretrained(
        directory, quantization=scheme, dtype=dtype, experts=experts, activations="float", progress=False
    ).model


@torch.inference_mode()
def decoded(model: Llama4Model, steps: int = 40) -> Tensor:
    """Logits of steps over several chunk borders, of rows of unequal length, the last for fewer rows."""
    cache, runner = model.new_cache(3), ModelRunner(model)
    model(PROMPT, cache=cache, attention_mask=MASK)
    ids = torch.randint(0, 490, (3, steps), generator=torch.Generator().manual_seed(9))
    logits = [runner.step(ids[:, i], cache) for i in range(steps)]
    cache.select_rows([0, 2])
    return torch.cat([*(row.flatten() for row in logits), runner.step(ids[:2, 0], cache).flatten()])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by each compiled step."""
    taken: list[int] = []
    run = fused_cpu.FusedSession.run

    def counted(*arguments: Any) -> None:
        run(*arguments)
        taken.append(1)

    monkeypatch.setattr(fused_cpu.FusedSession, "run", counted)
    return taken


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_equals_the_eager_step(
    directory: Path, scheme: str | None, dtype: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 but for the order of sums. In bfloat16, and where e4m3 rounds inputs, a sum in another order is
    rounded the other way now and then, and sends a token to another expert; a step of e4m3 is 6% of a number."""
    model = load(directory, scheme, dtype)
    ours = decoded(model)
    assert len(steps) == 41
    monkeypatch.setattr(loader, "library", lambda: None)
    truth = decoded(model)
    assert len(steps) == 41
    if dtype == "float32" and scheme not in ("fp8", "fp8_mixed"):
        assert relative_error(ours, truth) < 1e-5
    else:
        rows = zip(ours.view(-1, 512).double(), truth.view(-1, 512).double(), strict=True)
        errors = torch.tensor([relative_error(one, other) for one, other in rows])
        assert errors.median() < (0.2 if scheme == "fp8" else 2e-2)


@torch.inference_mode()
@pytest.mark.parametrize(("cache_dtype", "most"), [("auto", 1e-5), ("int8", 1e-2)])
def test_prompts_equal_those_of_the_modules(
    cache_dtype: str, most: float, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two pieces across chunks, of rows of unequal length, and what comes after them."""
    model = load(directory, None, "float32")
    calls: list[int] = []

    def read() -> Tensor:
        cache = model.new_cache(2, cache_dtype)
        outputs: list[Tensor] = []
        for part in (slice(0, 12), slice(12, 20)):
            pieces = [Piece(PROMPT[0, part].tolist()), Piece(PROMPT[1, part].tolist()[:7])]
            outputs += read_pieces(FusedCpuRunner(model), cache, pieces)
        outputs.append(ModelRunner(model).step(PROMPT[:2, 0], cache))
        return torch.cat([each.flatten() for each in outputs])

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return read_by_steps(*arguments)

    monkeypatch.setattr(prefill, "read_by_steps", counted)
    ours = read()
    monkeypatch.setattr(fused_cpu.FusedCpuRunner, "prompt_description", lambda runner, cache: None)
    truth = read()
    assert len(calls) == 2
    assert relative_error(ours, truth) < most


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices that are worth more than one thread."""
    text: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 512, "intermediate_size_mlp": 512}
    text["num_hidden_layers"] = 3
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    reference_model(reference_config(head_dim=64, **text), 4).bfloat16().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("scheme", "dtype", "count"), [(None, "float32", 2), (None, "bfloat16", 3), ("int4", "float32", 3)]
)
def test_by_a_team(
    wide: Path, scheme: str | None, dtype: str, count: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads give what one gives, bit by bit, whichever of them is quicker."""
    model = load(wide, scheme, dtype)
    alone = decoded(model)
    monkeypatch.setenv(threads.VARIABLE, str(count))
    assert all(torch.equal(decoded(model), alone) for _ in range(6))
    assert len(steps) == 7 * 41
    if dtype == "float32":
        monkeypatch.setattr(loader, "library", lambda: None)
        assert relative_error(alone, decoded(model)) < 1e-5


def hook(model: Llama4Model) -> None:
    small_model.layers(model)[1].feed_forward.router.register_forward_hook(lambda *_: None)


class Doubled(nn.Module):
    """What a fine-tuning library might put in the place of a Linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * self.inner(x)
        return out


def replace(model: Llama4Model) -> None:
    attention = small_model.layers(model)[2].self_attn
    attention.v_proj = Doubled(attention.v_proj)


@torch.no_grad()
def change(model: Llama4Model) -> None:
    small_model.layers(model)[0].self_attn.o_proj.weight.mul_(2)


@torch.no_grad()
def exchange(model: Llama4Model) -> None:
    weight = small_model.layers(model)[3].feed_forward.experts.down_proj
    weight.data = weight.data * 2


@torch.no_grad()
def new_parameter(model: Llama4Model) -> None:
    norm = small_model.layers(model)[3].input_layernorm
    norm.weight = nn.Parameter(norm.weight * 2)


def strided_parameter(model: Llama4Model) -> None:
    norm = small_model.layers(model)[1].post_attention_layernorm
    norm.weight = nn.Parameter(torch.stack([2 * norm.weight, norm.weight.flip(0)], dim=1)[:, 0])


def parameter_for_all(model: Llama4Model) -> None:
    model.language_model.model.norm.weight = nn.Parameter(torch.full((1,), 0.5))


def more_experts_for_each_token(model: Llama4Model) -> None:
    small_model.layers(model)[1].feed_forward.router.k = 2


def other_eps(model: Llama4Model) -> None:
    for norm in (small_model.layers(model)[0].input_layernorm, small_model.layers(model)[0].post_attention_layernorm):
        norm.eps = 0.5


class HalfNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def other_class(model: Llama4Model) -> None:
    small_model.layers(model)[2].input_layernorm.__class__ = HalfNorm


def larger_vocabulary(model: Llama4Model) -> None:
    for module in (model.language_model.lm_head, model.language_model.model.embed_tokens):
        module.weight = nn.Parameter(torch.cat([module.weight, torch.ones(512, module.weight.shape[1])]))


def fewer_layers(model: Llama4Model) -> None:
    model.language_model.model.layers = nn.ModuleList(small_model.layers(model)[:2])


def there_and_back(model: Llama4Model) -> None:
    model.double().float()


CHANGES = [
    *(hook, replace, change, exchange, new_parameter, strided_parameter, parameter_for_all),
    *(more_experts_for_each_token, other_eps, other_class, larger_vocabulary, fewer_layers, there_and_back),
]


@pytest.mark.parametrize("how", CHANGES)
def test_what_changes_is_seen(directory: Path, how: Callable[[Llama4Model], None]) -> None:
    """A plan made before does not outlive what it was made of."""
    model = load(directory, None, "float32")
    decoded(model, steps=2)
    how(model)
    other = copy.deepcopy(model)
    assert relative_error(decoded(model, steps=2), decoded(other, steps=2)) < 1e-6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "library", lambda: None)
        truth = decoded(other, steps=2)
    assert relative_error(decoded(model, steps=2), truth) < 1e-5


@torch.inference_mode()
def test_batch_invariance_asked_for_later_is_seen(directory: Path) -> None:
    model = load(directory, None, "float32")
    runner, cache = fused_cpu.FusedCpuRunner(model), model.new_cache(1)
    for is_invariant in (False, True):
        model.is_batch_invariant = is_invariant
        assert runner.unsupported_reason(cache) is None
        assert runner.description.decoder is not None
        assert runner.description.decoder.is_batch_invariant == is_invariant


def test_hooks_are_called(directory: Path, steps: list[int]) -> None:
    model, seen = load(directory, None, "float32"), []
    handle = small_model.layers(model)[1].feed_forward.router.register_forward_hook(lambda *_: seen.append(1))
    decoded(model, steps=3)
    assert len(seen) == 5
    assert not steps
    handle.remove()
    decoded(model, steps=3)
    assert len(seen) == 5
    assert len(steps) == 4


def test_chosen_experts_stay_chosen(directory: Path, steps: list[int]) -> None:
    model = load(directory, None, "float32", experts="grouped")
    assert any(isinstance(module, GroupedExperts) for module in model.modules())
    decoded(model, steps=1)
    assert not steps


def truth_of(model: Llama4Model, ids: list[int]) -> Tensor:
    """Logits after all of these, in one go."""
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0, -1]


def test_a_cache_that_others_use_too(directory: Path, steps: list[int]) -> None:
    """Steps that were prepared do not outlive what they were prepared for: forks, what is cut off, what a forward adds,
    and rows that leave."""
    model, rest = load(directory, None, "float32"), [7, 8, 9, 10, 11, 12, 13]
    runner = ModelRunner(model)
    prompt = PROMPT[0].tolist()
    with torch.inference_mode():
        cache = model.new_cache(1)
        model(PROMPT[:1], cache=cache)
        for id_ in rest[:2]:
            runner.step(torch.tensor([id_]), cache)
        fork = cache.fork()
        theirs = runner.step(torch.tensor([100]), fork)
        assert relative_error(theirs[0], truth_of(model, [*prompt, *rest[:2], 100])) < 1e-5
        ours = runner.step(torch.tensor([rest[2]]), cache)
        assert relative_error(ours[0], truth_of(model, [*prompt, *rest[:3]])) < 1e-5
        model(torch.tensor([rest[3:5]]), cache=cache)
        ours = runner.step(torch.tensor([rest[5]]), cache)
        assert relative_error(ours[0], truth_of(model, [*prompt, *rest[:6]])) < 1e-5
        left = cache.truncate(len(prompt))
        assert left == len(prompt)
        ours = runner.step(torch.tensor([rest[6]]), cache)
        assert relative_error(ours[0], truth_of(model, [*prompt, rest[6]])) < 1e-5
    assert len(steps) == 6


def test_within_a_reply_hooks_are_called(directory: Path, steps: list[int]) -> None:
    model, seen = load(directory, None, "float32"), []
    cache, id_, runner = model.new_cache(1), torch.tensor([5]), ModelRunner(model)
    for _ in range(2):
        runner.step(id_, cache)
    router = small_model.layers(model)[1].feed_forward.router
    handle = router.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        runner.step(id_, cache)
    handle.remove()
    runner.step(id_, cache)
    assert len(seen) == 2
    assert len(steps) == 3


@torch.inference_mode()
def test_within_a_session_weights_stay(directory: Path) -> None:
    """Another weight counts once the cache is released; until then the old one stays in memory."""
    model = load(directory, None, "float32")
    before, id_ = copy.deepcopy(model), torch.tensor([5])
    old_runner, old_cache = ModelRunner(before, [EagerRunner(before)]), before.new_cache(1)
    old = [old_runner.step(id_, old_cache) for _ in range(3)]
    cache, runner = model.new_cache(1), ModelRunner(model)
    runner.step(id_, cache)
    norm = model.language_model.model.norm
    norm.weight = nn.Parameter(norm.weight * 2)
    gc.collect()
    assert relative_error(runner.step(id_, cache), old[1]) < 1e-5
    runner.release(cache)
    assert relative_error(runner.step(id_, cache), 2 * old[2]) < 1e-5


def test_ids_are_checked(directory: Path) -> None:
    model = load(directory, None, "float32")
    cache, runner = model.new_cache(1), ModelRunner(model)
    for bad in (-1, 512):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 512"):
            runner.step(torch.tensor([bad]), cache)
    with pytest.raises(ValueError, match="2 rows, but the cache was made for 1"):
        runner.step(torch.tensor([1, 2]), cache)


def test_no_copy_of_the_model_stays_behind(directory: Path) -> None:
    model = load(directory, None, "float32")
    decoded(model, steps=2)
    seen = weakref.ref(small_model.layers(model)[0].self_attn.q_proj.weight)
    del model
    gc.collect()
    assert seen() is None


@torch.no_grad()
def test_a_router_in_another_dtype_is_not_misread(directory: Path, steps: list[int]) -> None:
    model = load(directory, None, "bfloat16")
    small_model.layers(model)[1].feed_forward.router.float()
    decoded(model, steps=1)
    assert not steps


@torch.inference_mode()
def test_a_bias_of_packed_weights_counts(directory: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(directory, "int8", "float32")
    attention = small_model.layers(model)[1].self_attn
    attention.q_proj.bias = nn.Parameter(torch.linspace(-3, 3, attention.q_proj.shape[0]))
    ours = decoded(model)
    assert not steps
    monkeypatch.setattr(loader, "library", lambda: None)
    assert relative_error(ours, decoded(model)) < 1e-5


class NoText:
    """A tokenizer for tokens whose text nobody reads."""

    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b""


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"repetition_penalty": 1.5}])
@torch.inference_mode()
def test_a_token_is_a_step_and_a_choice(directory: Path, settings: dict[str, float], steps: list[int]) -> None:
    model = load(directory, None, "float32")
    sampler, runner = Sampler(**settings, seed=3), ModelRunner(model)  # type: ignore[arg-type]
    inputs, found = Inputs(PROMPT, MASK, None), [list[Token](), [], []]
    for event in generate(runner, NoText(), inputs, sampler=sampler, max_new_tokens=21):
        found[event.row].append(event.token)
    cache = model.new_cache(3)
    logits_BV = model(PROMPT, cache=cache, attention_mask=MASK)[:, -1]
    rows = [sampler.row(ids_T[mask_T].tolist()) for ids_T, mask_T in zip(PROMPT, MASK, strict=True)]
    kept = []
    for i in range(21):
        ids_B, logprobs_B = sampler(logits_BV, rows)
        assert [row[i].id for row in found] == ids_B.tolist()
        assert [row[i].logprob for row in found] == pytest.approx(logprobs_B.tolist(), abs=1e-5)
        logits_BV = runner.step(ids_B, cache)
        kept.append(logits_BV)
    assert len(steps) == 20 + 21
    assert len({row.sum().item() for row in kept}) == 21  # logits that were given stay as they are


class Called(TorchDispatchMode):
    """The names of the operations of torch that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


DRAWN = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5}, DRAWN], ids=str)
def test_between_two_steps_nothing_of_torch_is_called(
    directory: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    """Each of its operations would take as long as a layer of a small model."""
    runner, sampler = ModelRunner(load(directory, None, "bfloat16")), Sampler(**settings)
    events = generate(runner, NoText(), Inputs(PROMPT, MASK, None), sampler=sampler, max_new_tokens=8)
    for _ in range(3 + 2 * 3):  # the prompt's, and two steps
        next(events)
    with Called() as called:
        assert {next(events).row for _ in range(3)} == {0, 1, 2}
    assert len(steps) == 3
    assert called.names == []
