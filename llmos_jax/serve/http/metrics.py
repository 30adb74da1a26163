"""What Prometheus scrapes and what the page draws. No jax.

Names follow vLLM's (its `vllm:` is `llmos_` here), so that dashboards need one change of prefix. Times in seconds,
measured in this process: from the request's acceptance, over queue and engine, to the tokens' arrival here.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_TENANTS = 64  # that have a label of their own; the rest share one, so that keys cannot flood the database
OTHER = "(other)"
RECENT = 400  # requests and tokens whose latencies the page shows

FIRST = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
LENGTHS = tuple(float(2**power) for power in range(18))

# name, what it is, key of the engine's stats
GAUGES = (
    ("num_requests_running", "Sequences in the batch", "running"),
    ("num_requests_waiting", "Sequences in the queue", "waiting"),
    ("kv_cache_pages", "Pages of the KV cache", "blocks"),
    ("kv_cache_pages_used", "Pages held by sequences", "used"),
    ("kv_cache_pages_cached", "Pages nobody holds, kept for their prefix", "cached"),
)
COUNTERS = (
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", "queries"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache", "hits"),
    ("preemptions", "Sequences put back into the queue", "preemptions"),
    ("swaps", "Sequences whose pages were moved to the host", "swaps"),
    ("engine_steps", "Steps of the engine", "steps"),
    ("spec_draft_tokens", "Tokens guessed ahead", "draft_tokens"),
    ("spec_accepted_tokens", "Guessed tokens that were right", "accepted_tokens"),
    ("compile_events", "Compilations after the server was ready", "compilations"),
    ("engine_restarts", "Engines started anew after a crash or a hang", "restarts"),
    ("poison_refused", "Requests refused because their like broke an engine", "refused"),
)


class HasStats(Protocol):
    async def stats(self) -> dict[str, Any]: ...


class EngineCollector(Collector):
    """Turns the engines' last stats, by model, into gauges and counters; a count that no engine tells is left out."""

    def __init__(self) -> None:
        self.stats: Mapping[str, Mapping[str, Any]] = {}

    def collect(self) -> Iterator[Metric]:
        for name, help, key in GAUGES:
            yield self._fill(GaugeMetricFamily(f"llmos_{name}", help, labels=["model"]), key)
        for name, help, key in COUNTERS:
            yield self._fill(CounterMetricFamily(f"llmos_{name}", help, labels=["model"]), key)
        usage = GaugeMetricFamily("llmos_kv_cache_usage", "Share of the pages held, 1 is all", labels=["model"])
        for model, stats in self.stats.items():
            if stats.get("blocks"):
                usage.add_metric([model], stats["used"] / stats["blocks"])
        yield usage

    def _fill(self, family: Any, key: str) -> Any:
        for model, stats in self.stats.items():
            if key in stats:
                family.add_metric([model], float(stats[key]))
        return family


class Timing:
    """When the tokens of one request came."""

    __slots__ = ("begun", "last", "tenant")

    def __init__(self, tenant: str, now: float):
        self.tenant, self.begun = tenant, now
        self.last: dict[int, float] = {}


class Metrics:
    """One registry a server: two of them in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engines = EngineCollector()
        self.registry.register(self._engines)
        self._first = self._histogram("time_to_first_token_seconds", "From acceptance to the first token", FIRST)
        self._between = self._histogram("inter_token_latency_seconds", "Between tokens of an answer", BETWEEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From acceptance to the end", WHOLE)
        self._queue = self._histogram("request_queue_seconds", "From the engine's acceptance to the first step", FIRST)
        self._length = self._histogram("request_prompt_tokens", "Tokens of a prompt", LENGTHS)
        self._requests = self._counter("requests", "Requests that ended", ["finish"])
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._generated = self._counter("generation_tokens", "Tokens of answers")
        self._tenant_tokens = self._counter("tenant_tokens", "Tokens of prompts and answers, by tenant", ["tenant"])
        self.tenants: dict[str, int] = {}  # tokens served
        self._recent: dict[str, deque[tuple[float, float]]] = {x: deque(maxlen=RECENT) for x in ("ttft", "itl")}

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"llmos_{name}", help, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, help: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"llmos_{name}", help, labels or [], registry=self.registry)

    def begin(self, tenant: str, prompt_tokens: int) -> Timing:
        self._length.observe(prompt_tokens)
        return Timing(tenant, time.monotonic())

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def first_token(self, timing: Timing) -> None:
        seconds = time.monotonic() - timing.begun
        self._first.observe(seconds)
        self._recent["ttft"].append((time.time(), seconds))

    def token(self, timing: Timing, count: int, index: int) -> None:
        """`count` tokens that came together share the time since the ones before."""
        now = time.monotonic()
        before = timing.last.get(index)
        timing.last[index] = now
        if before is None or count < 1:
            return
        each = (now - before) / count
        for _ in range(count):
            self._between.observe(each)
        self._recent["itl"].append((time.time(), each))

    def end(self, timing: Timing, prompt_tokens: int, output_tokens: int, finish: str) -> None:
        self._whole.observe(time.monotonic() - timing.begun)
        self._requests.labels(finish=finish).inc()
        self._prompt.inc(prompt_tokens)
        self._generated.inc(output_tokens)
        tenant = timing.tenant
        if tenant not in self.tenants and len(self.tenants) >= MAX_TENANTS:
            tenant = OTHER
        self.tenants[tenant] = self.tenants.get(tenant, 0) + prompt_tokens + output_tokens
        self._tenant_tokens.labels(tenant=tenant).inc(prompt_tokens + output_tokens)

    async def scrape(self, clients: Mapping[str, HasStats]) -> bytes:
        """The text that Prometheus reads, with the engines' counts of this moment."""
        self._engines.stats = await gather(clients)
        return generate_latest(self.registry)

    def recent(self) -> dict[str, list[tuple[float, float]]]:
        """Latest (time of day, seconds) of first tokens ("ttft") and of the tokens after them ("itl")."""
        return {name: list(points) for name, points in self._recent.items()}


async def gather(clients: Mapping[str, HasStats]) -> dict[str, dict[str, Any]]:
    """The stats of each model whose engine answers; one that is being restarted has none, and harms nobody."""
    answer = {}
    for name, client in clients.items():
        try:
            answer[name] = await client.stats()
        except Exception:  # whatever it is, the others are told, and the supervisor sees to it
            continue
    return answer
