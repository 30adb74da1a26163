"""Load on any OpenAI endpoint, and what its clients see: `llmos bench serve`. No jax.

Arrivals are an open loop: a Poisson process that does not wait for answers, as users do not; a request's times count
from when it should have been sent, so that a slow client machine or server cannot hide its delay (it is told as
"lag"). With `concurrency` the loop is closed: so many users, each asking again when answered.
"""

import asyncio
import itertools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from llmos_jax.config import UserError
from llmos_jax.runtime.charts import Series, draw, standalone_style

WORDS = tuple("the of and to in is that it was for on are with as his they be at one have this from or".split())  # noqa: SIM905
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """What is asked of whom.

    url: of the API, with /v1. rate: requests a second, infinite for all at once. concurrency: a closed loop of so many
    users instead. prompt, output: tokens, as distributions (`lengths`). prompts: "random" token ids below `vocabulary`
    (completions only), or "text", words of about a token each. endpoint: "completions" or "chat". extra: fields for
    each body, such as {"ignore_eos": true}. timeout, slo_ttft, slo_itl: seconds.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    requests: int = 100
    rate: float = math.inf
    concurrency: int | None = None
    prompt: str = "lognormal:256:0.8"
    output: str = "fixed:128"
    prompts: str = "text"
    vocabulary: int = 30_000
    endpoint: str = "completions"
    extra: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    timeout: float = 600.0
    slo_ttft: float = 1.0
    slo_itl: float = 0.1

    def __post_init__(self) -> None:
        if self.requests < 1 or not self.rate > 0 or (self.concurrency is not None and self.concurrency < 1):
            raise UserError("requests, rate and concurrency must be above 0")
        if self.endpoint not in ("completions", "chat") or self.prompts not in ("random", "text"):
            raise UserError("endpoint is completions or chat, prompts are random or text")
        if self.prompts == "random" and self.endpoint == "chat":
            raise UserError("a chat is of text: use --prompts text, or --endpoint completions")
        if self.concurrency is not None and self.rate != math.inf:
            raise UserError("a closed loop has no rate: give --rate or --concurrency, not both")


@dataclass(frozen=True)
class Sample:
    """One request as its client saw it. Times in seconds: `arrival` from the start of the load, others from arrival.

    gaps: between pieces of the stream, of which each may hold several tokens. error: "" for a whole answer.
    """

    arrival: float
    lag: float
    ttft: float = math.nan
    total: float = math.nan
    gaps: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def mean_itl(self) -> float:
        """Mean time between tokens; 0 for an answer of one."""
        return (self.total - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def lengths(text: str) -> Callable[[random.Random], int]:
    """A distribution of whole numbers above 0 by its name. Raises UserError.

    fixed:N, uniform:A:B, lognormal:MEDIAN:SIGMA (sigma of the natural logarithm), file:PATH (drawn from, one a line).
    """
    name, _, rest = text.partition(":")
    try:
        if name == "file":
            choices = [int(line) for line in Path(rest).read_text().split()]
            if not choices or min(choices) < 1:
                raise ValueError
            return lambda draw: draw.choice(choices)
        numbers = [float(part) for part in rest.split(":")]
        if not all(0 <= number < 1e9 for number in numbers) or numbers[0] < 1:
            raise ValueError
        match name, numbers:
            case "fixed", [n]:
                return lambda draw: int(n)
            case "uniform", [low, high] if low <= high:
                return lambda draw: draw.randint(int(low), int(high))
            case "lognormal", [median, sigma]:
                return lambda draw: max(1, round(draw.lognormvariate(math.log(median), sigma)))
    except (ValueError, OSError):
        pass
    raise UserError(f"{text!r} is no distribution; use fixed:N, uniform:A:B, lognormal:MEDIAN:SIGMA or file:PATH")


async def measure(load: Load) -> list[Sample]:
    """Sends the load and waits for all answers. The same seed makes the same requests at the same times."""
    chance = random.Random(load.seed)
    of_prompt, of_output = lengths(load.prompt), lengths(load.output)
    bodies = [_body(load, of_prompt(chance), of_output(chance), chance) for _ in range(load.requests)]
    arrivals, now = [], 0.0
    for _ in bodies:
        arrivals.append(now)
        now += 0.0 if load.rate == math.inf else chance.expovariate(load.rate)
    headers = {"Authorization": f"Bearer {load.key}"} if load.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(headers=headers, timeout=load.timeout, limits=limits) as client:
        start = time.perf_counter()
        if load.concurrency is None:
            tasks = [_at(client, load, body, start, arrival) for body, arrival in zip(bodies, arrivals, strict=True)]
            return list(await asyncio.gather(*tasks))
        waiting, samples = iter(bodies), []

        async def user() -> None:
            for body in waiting:
                samples.append(await _at(client, load, body, start, time.perf_counter() - start))

        await asyncio.gather(*(user() for _ in range(load.concurrency)))
        return samples


def _body(load: Load, prompt: int, output: int, chance: random.Random) -> dict[str, Any]:
    body = {"model": load.model, "max_tokens": output, "stream": True, "stream_options": {"include_usage": True}}
    if load.prompts == "random":
        return body | {"prompt": [chance.randrange(load.vocabulary) for _ in range(prompt)]} | load.extra
    text = " ".join(chance.choices(WORDS, k=prompt))
    if load.endpoint == "chat":
        return body | {"messages": [{"role": "user", "content": text}]} | load.extra
    return body | {"prompt": text} | load.extra


async def _at(client: httpx.AsyncClient, load: Load, body: dict[str, Any], start: float, arrival: float) -> Sample:
    await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
    due = start + arrival
    lag = time.perf_counter() - due
    try:
        async with asyncio.timeout(load.timeout):
            return await _ask(client, load, body, due, Sample(arrival, lag))
    except (httpx.HTTPError, ValueError, KeyError, TimeoutError) as error:
        return Sample(arrival, lag, total=time.perf_counter() - due, error=type(error).__name__)


async def _ask(client: httpx.AsyncClient, load: Load, body: dict[str, Any], due: float, sample: Sample) -> Sample:
    path = "chat/completions" if load.endpoint == "chat" else "completions"
    times: list[float] = []
    usage, finish, error = {"prompt_tokens": 0, "completion_tokens": 0}, None, ""
    async with client.stream("POST", f"{load.url.rstrip('/')}/{path}", json=body) as response:
        if response.status_code != 200:
            error = f"HTTP {response.status_code}"
            await response.aread()
        else:
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    error = "error in the stream"
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    finish = choice.get("finish_reason") or finish
                    if choice.get("text") or choice.get("delta", {}).get("content"):
                        times.append(time.perf_counter() - due)
    total = time.perf_counter() - due
    if not error and finish is None:
        error = "the stream broke off"
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    first = times[0] if times else total
    tokens = usage["prompt_tokens"], usage["completion_tokens"] or len(times)
    return Sample(sample.arrival, sample.lag, first, total, gaps, *tokens, error)


def summarize(load: Load, samples: Sequence[Sample]) -> dict[str, Any]:
    """The report as plain data; times in seconds, rates a second.

    Goodput is the rate of requests whose time to the first token and mean time between tokens are within the SLO.
    """
    whole = [sample for sample in samples if not sample.error]
    duration = max((s.arrival + s.total for s in samples if math.isfinite(s.total)), default=0.0)
    good = sum(sample.ttft <= load.slo_ttft and sample.mean_itl <= load.slo_itl for sample in whole)

    def rate(amount: float) -> float:
        return amount / duration if duration else 0.0

    asked = {name: value for name, value in asdict(load).items() if name != "key"}
    return {
        "load": asked | {"rate": None if load.rate == math.inf else load.rate},
        "completed": len(whole),
        "failed": dict(Counter(sample.error for sample in samples if sample.error)),
        "duration": duration,
        "prompt_tokens": sum(sample.prompt_tokens for sample in whole),
        "output_tokens": sum(sample.output_tokens for sample in whole),
        "requests_per_second": rate(len(whole)),
        "prompt_tokens_per_second": rate(sum(sample.prompt_tokens for sample in whole)),
        "output_tokens_per_second": rate(sum(sample.output_tokens for sample in whole)),
        "goodput": {"requests_per_second": rate(good), "share": good / len(samples) if samples else 0.0},
        "ttft": _spread([sample.ttft for sample in whole]),
        "itl": _spread([gap for sample in whole for gap in sample.gaps]),
        "mean_itl": _spread([sample.mean_itl for sample in whole if sample.output_tokens > 1]),
        "total": _spread([sample.total for sample in whole]),
        "lag": _spread([sample.lag for sample in samples]),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the nearest of the sorted `values`, as numpy's default; share is of 100."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    spread = {"mean": sum(values) / len(values)} | {f"p{share}": percentile(values, share) for share in PERCENTILES}
    return spread | {"max": max(values)}


def table(report: dict[str, Any]) -> Any:
    """The report as a rich table for a terminal."""
    from rich.table import Table

    made = Table("", "mean", *(f"p{share}" for share in PERCENTILES), "max", title=_title(report))
    names = {"ttft": "time to first token", "itl": "between pieces", "mean_itl": "mean between tokens"}
    for key, name in (names | {"total": "whole answer"}).items():
        if report[key] is not None:
            made.add_row(name, *(_time(value) for value in report[key].values()))
    good = report["goodput"]
    told = f"{report['requests_per_second']:.2f} requests/s, {report['output_tokens_per_second']:.1f} output tokens/s, "
    told += f"{report['prompt_tokens_per_second']:.1f} prompt tokens/s\n"
    told += f"goodput {good['requests_per_second']:.2f} requests/s ({good['share']:.0%} have a first token "
    told += f"within {_time(report['load']['slo_ttft'])}\nand then one each {_time(report['load']['slo_itl'])})"
    if report["failed"]:
        told += "\nfailed: " + ", ".join(f"{count} {reason}" for reason, count in report["failed"].items())
    made.caption = told
    return made


def _title(report: dict[str, Any]) -> str:
    load = report["load"]
    users, rate = load["concurrency"], load["rate"]
    how = f"{users} users" if users else f"{rate:g} requests/s" if rate else "all at once"
    return f"{load['model']}: {report['completed']} of {load['requests']} requests, {how}"


def _time(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def write(load: Load, samples: Sequence[Sample], folder: Path) -> list[Path]:
    """report.json, samples.jsonl, and percentiles.svg, the latencies by percentile."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_finite(asdict(sample))) for sample in samples]
    texts = {
        "report.json": json.dumps(summarize(load, samples), indent=2),
        "samples.jsonl": "".join(line + "\n" for line in lines),
    }
    if whole := [sample for sample in samples if not sample.error]:
        texts["percentiles.svg"] = _percentiles(whole)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _percentiles(whole: Sequence[Sample]) -> str:
    shares = range(1, 100)
    series = []
    pools = {"to first token, ms": [s.ttft for s in whole], "between, ms": [gap for s in whole for gap in s.gaps]}
    for (name, values), color in zip(pools.items(), ("--line-1", "--line-2"), strict=True):
        if values:
            series.append(Series(name, shares, [1000 * percentile(values, share) for share in shares], color))
    svg = draw(series, label="Milliseconds by percentile", style=standalone_style()).svg
    return svg.replace(">step<", ">percentile<")  # the chart's usual axis
