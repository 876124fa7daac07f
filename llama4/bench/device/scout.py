"""Scout: cut to four layers in several formats beside transformers, and whole in int4.

A prompt is read in pieces, as generation does. A step of decoding is one token in every row, by the model's own forward
("eager"), and as generation does it, from a CUDA graph ("graph").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from llama4.bench import roofline
from llama4.bench.device import timing, workload
from llama4.bench.device.record import Figures, Record, Skip
from llama4.cache.sequence import SequenceCache
from llama4.config import TextConfig
from llama4.engine.cuda_graphs import CudaGraphRunner, GraphSession
from llama4.engine.prefill import piece_size
from llama4.model.multimodal import Llama4Model
from llama4.ops.sampling import Draw, draw_token
from llama4.quantization.plan import QuantizationPlan

BATCHES = (1, 4, 16)


class Subject:
    """A model on the device, made when a case first wants it.

    Attributes:
        kind: of the GEMM rate that its prompts are held to.
    """

    def __init__(self, record: Record, text: TextConfig, scheme: str | None, *, vision: bool = False) -> None:
        self.record, self.text, self.scheme = record, text, scheme
        self.name = scheme or "bfloat16"
        self.kind = "fp8" if scheme == "fp8" else "bf16"
        self.vision = vision
        self._made: tuple[Llama4Model, QuantizationPlan] | None = None

    def get(self) -> tuple[Llama4Model, QuantizationPlan]:
        if self._made is None:
            torch.manual_seed(0)
            config = workload.config(self.text, vision=self.vision, dry=self.record.dry)
            self._made = workload.build(config, self.record.device, self.scheme)
        return self._made

    def release(self) -> None:
        self._made = None
        timing.release(self.record.device)

    def built(self) -> Figures:
        """Weights alone."""
        begin = time.perf_counter()
        model, _ = self.get()
        timing.synchronize(self.record.device)
        parameters = [*model.parameters()]
        return {
            "build_s": time.perf_counter() - begin,
            "weights_gib": sum(p.nbytes for p in parameters) / 2**30,
            "layers": self.text.num_hidden_layers,
        }

    def prompt(self, tokens: int) -> Figures:
        """Milliseconds of reading a prompt, up to the logits of its last token."""
        model, plan = self.get()
        device = self.record.device
        ids_BT = workload.ids(self.text, 1, tokens, device)
        workload.read(model, ids_BT[:, : 300 if tokens > 300 else tokens], model.new_cache())  # compiles

        def read() -> Tensor:
            return workload.read(model, ids_BT, model.new_cache())

        spent = self.record.time(read, 1.0, 5)
        pieces = -(-tokens // piece_size(model))
        work = roofline.prefill(self.text, plan, torch.bfloat16, tokens)
        work = roofline.Work(work.flops, work.bytes * pieces)
        held = workload.shares(work, spent, self.record.rates, self.kind)
        return {"prompt_ms": spent * 1e3, "tokens_per_s": tokens / spent, **held}

    @property
    def context(self) -> int:
        """Tokens before the steps that are timed."""
        return 40 if self.record.dry else 512

    @property
    def steps(self) -> int:
        return 4 if self.record.dry else 16

    def decode(self, batch: int) -> Figures:
        """Milliseconds of a step, eagerly."""
        model, _ = self.get()
        device, context = self.record.device, self.context
        cache = self._filled(model, batch, context)
        ids_SB1 = workload.ids(self.text, self.steps, batch, device)[..., None]
        for ids_B1 in ids_SB1[:3]:
            model(ids_B1, cache=cache, last_only=True)

        def steps() -> None:
            for ids_B1 in ids_SB1:
                model(ids_B1, cache=cache, last_only=True)

        spent = timing.once(steps, device) / self.steps
        waits = timing.host_waits(partial(model, ids_SB1[0], cache=cache, last_only=True), device)
        return self._step_figures(spent, batch, context) | {"host_waits": waits}

    def decode_graph(self, batch: int) -> Figures:
        """Milliseconds of a step from a CUDA graph, of one whose most likely token the host waits for, and how far its
        logits are from those of an eager step."""
        model, _ = self.get()
        device, context = self.record.device, self.context
        cache = self._filled(model, batch, context)
        ids = workload.ids(self.text, 1, batch, device)[0]
        eager_BV = model(ids[:, None], cache=cache.fork(), last_only=True)[:, 0]
        session = self._session(model, cache)
        session.run(ids.tolist(), cache)
        error = workload.relative(session.logits_BV, eager_BV)
        waits = timing.host_waits(lambda: session.run(ids.tolist(), cache), device) - 1  # for these ids
        chosen = session.greedy_token()[0]

        def steps(is_read: bool) -> None:
            nonlocal chosen
            for _ in range(self.steps):
                session.run(chosen, cache)
                chosen = session.greedy_token()[0] if is_read else chosen

        steps(True)
        spent = timing.once(partial(steps, False), device) / self.steps
        read = timing.once(partial(steps, True), device) / self.steps
        figures = {"host_waits": waits, "difference": error, "token_ms": read * 1e3}
        return self._step_figures(spent, batch, context) | figures

    def _session(self, model: Llama4Model, cache: SequenceCache) -> GraphSession:
        runner = CudaGraphRunner(model)
        if (reason := runner.unsupported_reason(cache)) is not None:
            raise Skip(reason)
        return runner.open(cache)

    def _step_figures(self, spent: float, batch: int, context: int) -> dict[str, float]:
        _, plan = self.get()
        met = roofline.expected_experts(self.text, batch)
        work = roofline.decode(self.text, plan, torch.bfloat16, [context] * batch, met)
        held = workload.shares(work, spent, self.record.rates)
        held.pop("share_of_gemm", None)
        return {"step_ms": spent * 1e3, "tokens_per_s": batch / spent, **held}

    def _filled(self, model: Llama4Model, batch: int, context: int) -> SequenceCache:
        cache = model.new_cache(batch)
        workload.read(model, workload.ids(self.text, batch, context, self.record.device), cache)
        return cache

    def one_prompt(self, tokens: int) -> Callable[[], object]:
        """For a profile."""
        model, _ = self.get()
        ids_BT = workload.ids(self.text, 1, tokens, self.record.device)
        return lambda: workload.read(model, ids_BT, model.new_cache())

    def one_graph_step(self, batch: int) -> Callable[[], object]:
        """For a profile; from a graph."""
        model, _ = self.get()
        cache = self._filled(model, batch, self.context)
        session = self._session(model, cache)
        return lambda: session.run([0] * batch, cache)


def four_layers(record: Record) -> None:
    text = workload.text_config("scout", layers=4, dry=record.dry)
    prompts = (96,) if record.dry else (2048, 16384)
    milliseconds: dict[tuple[str, int], float] = {}
    for scheme in (None, "int4", "fp8"):
        subject = Subject(record, text, scheme)
        record.case(f"{subject.name}: built", subject.built)
        for tokens in prompts:
            figures = record.case(
                f"{subject.name}: prompt of {tokens}", partial(_beside, subject, tokens, milliseconds)
            )
            if figures is not None:
                milliseconds[subject.name, tokens] = figures["prompt_ms"]
        for batch in BATCHES:
            figures = _decode(record, subject, batch, f"{subject.name}: ")
            if figures is not None:
                milliseconds[f"{subject.name}, a step of", batch] = figures["step_ms"]
        record.profile(f"{subject.name}: prompt of {prompts[0]}", partial(subject.one_prompt, prompts[0]))
        record.profile(f"{subject.name}: decode, batch 1, graph", partial(subject.one_graph_step, 1))
        if scheme is None:
            _transformers(record, subject, prompts, milliseconds)
        subject.release()


def _beside(subject: Subject, tokens: int, milliseconds: dict[tuple[str, int], float]) -> Figures:
    """A prompt, beside the same in bfloat16."""
    figures = dict(subject.prompt(tokens))
    in_bfloat16 = milliseconds.get(("bfloat16", tokens))
    return figures | ({"times_bfloat16": in_bfloat16 / figures["prompt_ms"]} if in_bfloat16 else {})


def _transformers(
    record: Record, subject: Subject, prompts: Sequence[int], milliseconds: dict[tuple[str, int], float]
) -> None:
    """With the same weights, which both hold."""
    made: list[object] = []

    def peer() -> object:
        if not made:
            from llama4.bench.device import transformers_baseline

            made.append(transformers_baseline.Peer(subject.get()[0]))
        return made[0]

    def prompt(tokens: int) -> Figures:
        ids_BT = workload.ids(subject.text, 1, tokens, record.device)
        theirs: Tensor = peer().read(ids_BT)[0]  # type: ignore[attr-defined]
        model, _ = subject.get()
        ours = workload.read(model, ids_BT, model.new_cache())
        read: Callable[[], object] = lambda: peer().read(ids_BT)  # type: ignore[attr-defined]  # noqa: E731
        spent = record.time(read, 1.0, 5)
        own = milliseconds.get(("bfloat16", tokens))
        slower = {"times_slower": spent * 1e3 / own} if own else {}
        return {"prompt_ms": spent * 1e3, "difference": workload.relative(ours, theirs), **slower}

    def decode(batch: int) -> Figures:
        _, cache = peer().read(workload.ids(subject.text, batch, subject.context, record.device))  # type: ignore[attr-defined]
        ids_SB1 = workload.ids(subject.text, subject.steps, batch, record.device)[..., None]
        peer().step(ids_SB1[0], cache)  # type: ignore[attr-defined]

        def steps() -> None:
            for ids_B1 in ids_SB1:
                peer().step(ids_B1, cache)  # type: ignore[attr-defined]

        spent = timing.once(steps, record.device) / subject.steps * 1e3
        own = milliseconds.get(("bfloat16, a step of", batch))
        return {"step_ms": spent} | ({"times_slower": spent / own} if own else {})

    for tokens in prompts:
        record.case(f"transformers: prompt of {tokens}", partial(prompt, tokens))
    for batch in BATCHES:
        record.case(f"transformers: decode, batch {batch}", partial(decode, batch))
    made.clear()


def _decode(record: Record, subject: Subject, batch: int, prefix: str = "") -> Figures | None:
    """-> what is seen of steps from a graph."""
    figures = record.case(f"{prefix}decode, batch {batch}, graph", partial(subject.decode_graph, batch))
    record.case(f"{prefix}decode, batch {batch}, eager", partial(subject.decode, batch))
    return figures


def all_layers(record: Record) -> None:
    text = workload.text_config("scout", dry=record.dry)
    subject = Subject(record, text, "int4", vision=True)
    record.case("built", subject.built)
    _decode(record, subject, 1)
    prompts = (96, 200) if record.dry else (2048, 16384)
    record.case(f"prompt of {prompts[0]}", partial(subject.prompt, prompts[0]))
    for batch in BATCHES[1:]:
        _decode(record, subject, batch)
    record.case("drawing a token", partial(_drawing, record, text))
    record.case("a picture of 17 tiles and a question: first token", partial(_picture, subject))
    record.profile("decode, batch 1, graph", partial(subject.one_graph_step, 1))
    record.profile("decode, batch 16, graph", partial(subject.one_graph_step, 16))
    record.profile(f"prompt of {prompts[0]}", partial(subject.one_prompt, prompts[0]))
    record.case(f"prompt of {prompts[1]}", partial(subject.prompt, prompts[1]))


def _drawing(record: Record, text: TextConfig) -> Figures:
    """Of one row of logits, as Llama 4's own settings have it; greedily no time passes outside of the graph."""
    logits_1V = 3 * torch.randn(1, text.vocab_size, device=record.device).bfloat16()
    figures: dict[str, float] = {}
    for name, draw in {"drawn": Draw(0, 0, 0.6, 0.9, 0.0, 0.4), "top_k_drawn": Draw(0, 50, 0.6, 0.9, 0.0, 0.4)}.items():
        run = partial(draw_token, logits_1V, [draw])
        figures |= {f"{name}_ms": record.time(run, 0.2) * 1e3, f"{name}_waits": timing.host_waits(run, record.device)}
    return figures


def _picture(subject: Subject) -> Figures:
    """From pixels on the host; random ids stand for the question's words."""
    model, _ = subject.get()
    device, vision = subject.record.device, model.config.vision
    assert vision is not None
    tiles = 3 if subject.record.dry else 17
    pixels = torch.randn(tiles, 3, vision.image_size, vision.image_size)
    words = workload.ids(subject.text, 1, 32, device)
    patches = torch.full((1, tiles * vision.tokens_per_tile), model.config.image_token_index, device=device)
    ids_BT = torch.cat([words[:, :8], patches, words[:, 8:]], dim=1)
    spent: dict[str, float] = {}

    def first_token() -> None:
        spent["tower"] = timing.once(lambda: features.append(model.encode_images(pixels)), device)
        model(ids_BT, image_features=features.pop(), cache=model.new_cache(), last_only=True).argmax()

    features: list[Tensor] = []
    first_token()
    whole = timing.once(first_token, device)
    return {
        "first_token_ms": whole * 1e3,
        "tower_ms": spent["tower"] * 1e3,
        "prompt_tokens": ids_BT.shape[1],
    }
