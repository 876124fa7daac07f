"""What happens in a server, for Prometheus, under vLLM's names so that its dashboards work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llama4.engine.request import Request
from llama4.serve.engine import Engine

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Metrics:
    """Counters of one engine."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model}
        self.registry.register(cast(Any, _EngineState(engine, model)))
        self._success = Counter(
            "vllm:request_success",
            "Requests that were answered",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token")
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens, the mean of each request")
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first piece that is read")
        self._prefill = self._histogram("request_prefill_time_seconds", "From there to the first token")
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last")
        steps = self._histogram("iteration_tokens_total", "Tokens that a step computes", _TOKENS)
        engine.scheduler.on_step = steps.observe

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        made = Histogram(f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
        return made.labels(**self._labels)

    def note(self, request: Request, reason: str) -> None:
        """A request that has been answered."""
        self._success.labels(**self._labels, finished_reason=reason).inc()
        times, count = request.times, len(request.ids) - request.prompt_length
        if times.started is None or times.first_token is None or times.last_token is None:
            return
        self._queue.observe(times.started - times.arrival)
        self._prefill.observe(times.first_token - times.started)
        self._first.observe(times.first_token - times.arrival)
        self._whole.observe(times.last_token - times.arrival)
        self._decode.observe(times.last_token - times.first_token)
        if count > 1:
            self._between.observe((times.last_token - times.first_token) / (count - 1))

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineState:
    """What the engine itself counts."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model

    def collect(self) -> Iterator[Metric]:
        scheduler = self._engine.scheduler
        counts, limit = scheduler.counts, scheduler.pool.limit
        gauges = {
            "num_requests_running": (len(scheduler.reading) + len(scheduler.running.requests), "Being computed"),
            "num_requests_waiting": (self._engine.num_waiting, "Waiting"),
            "kv_cache_usage_perc": (
                scheduler.pool.used / limit if limit else 0.0,
                "Share of the cache's memory in use",
            ),
        }
        counters = {
            "num_preemptions": (counts.preemptions, "Requests that were put back"),
            "prompt_tokens": (counts.prompt_tokens, "Tokens of prompts that were read"),
            "generation_tokens": (counts.generated_tokens, "Tokens of replies"),
            "prefix_cache_queries": (counts.prefix_queries, "Tokens of prompts that were looked up"),
            "prefix_cache_hits": (counts.prefix_hits, "Tokens of prompts that were found"),
        }
        for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (value, text) in table.items():
                family = kind(f"vllm:{name}", text, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family
        if adapters := self._engine.llm.adapters:
            labels = {
                "max_lora": str(len(adapters)),
                "running_lora_adapters": _names([*scheduler.running.requests, *scheduler.reading]),
                "waiting_lora_adapters": _names(list(scheduler.waiting)),
            }
            family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of requests; the time", labels=list(labels))
            family.add_metric(list(labels.values()), time.time())
            yield family


def _names(requests: Sequence[Request]) -> str:
    """Of the adapters of some requests."""
    return ",".join(sorted({request.adapter.name for request in requests} - {""}))
