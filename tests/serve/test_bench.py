"""The load generator: arrivals, lengths and figures that can be checked by hand, before a server whose times are known."""

import asyncio
import json
import math
import random
import socket
import statistics
import threading
import time

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from rich.console import Console

from llmos_jax.config import UserError
from llmos_jax.serve.bench import Load, Sample, lengths, measure, percentile, summarize, table, write

FIRST, BETWEEN, TOKENS = 0.1, 0.02, 6


class Endpoint:
    def __init__(self):
        self.bodies, self.now, self.most = [], 0, 0
        app = FastAPI()
        app.post("/v1/completions")(self.answer)
        app.post("/v1/chat/completions")(self.answer)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="warning", ws="none"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    async def answer(self, request: Request):
        body = json.loads(await request.body())
        self.bodies.append(body)
        if body["model"] == "full":
            return JSONResponse({"error": {"message": "full"}}, 429)
        return StreamingResponse(self.events(body), media_type="text/event-stream")

    async def events(self, body):
        self.now += 1
        self.most = max(self.most, self.now)
        chat = "messages" in body
        await asyncio.sleep(FIRST)
        for i in range(TOKENS):
            if i:
                await asyncio.sleep(BETWEEN)
            if body["model"] == "breaks" and i == 3:
                self.now -= 1
                return
            finish = "length" if i == TOKENS - 1 else None
            piece = {"delta": {"content": "x"}} if chat else {"text": "x"}
            yield f"data: {json.dumps({'choices': [piece | {'finish_reason': finish}]})}\n\n"
        usage = {"prompt_tokens": 40, "completion_tokens": TOKENS}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        self.now -= 1


@pytest.fixture(scope="module")
def endpoint():
    made = Endpoint()
    yield made
    made.server.should_exit = True
    made.thread.join(10)


@pytest.fixture(autouse=True)
def forget(endpoint):
    endpoint.bodies.clear()
    endpoint.most = endpoint.now = 0


@pytest.mark.timed
def test_an_open_loop_does_not_wait_for_answers(endpoint):
    load = Load(endpoint.url, "m", requests=30, rate=100, output="fixed:6", endpoint="chat")
    samples = asyncio.run(measure(load))
    report = summarize(load, samples)
    assert report["completed"] == 30 and not report["failed"]
    assert endpoint.most > 5  # some 20 arrive while one is answered
    assert FIRST <= report["ttft"]["p50"] < FIRST + 0.15 and BETWEEN * 0.9 <= report["mean_itl"]["p50"] < BETWEEN + 0.03
    assert report["output_tokens"] == 30 * TOKENS and report["prompt_tokens"] == 30 * 40
    assert report["output_tokens_per_second"] == pytest.approx(30 * TOKENS / report["duration"])


def test_a_closed_loop_has_so_many_users(endpoint):
    load = Load(endpoint.url, "m", requests=9, concurrency=3)
    samples = asyncio.run(measure(load))
    assert len(samples) == 9 and endpoint.most == 3
    assert summarize(load, samples)["duration"] >= 3 * (FIRST + (TOKENS - 1) * BETWEEN)


def test_failures_are_counted_by_their_kind(endpoint):
    for model, reason in (("full", "HTTP 429"), ("breaks", "the stream broke off")):
        load = Load(endpoint.url, model, requests=4)
        report = summarize(load, asyncio.run(measure(load)))
        assert report["failed"] == {reason: 4} and report["completed"] == 0 and report["ttft"] is None
        assert report["goodput"] == {"requests_per_second": 0.0, "share": 0.0}
    load = Load("http://127.0.0.1:9/v1", "m", requests=2)
    assert summarize(load, asyncio.run(measure(load)))["failed"] == {"ConnectError": 2}
    load = Load(endpoint.url, "m", requests=2, timeout=0.05)
    assert sum(summarize(load, asyncio.run(measure(load)))["failed"].values()) == 2


def test_the_same_seed_asks_the_same(endpoint):
    load = Load(
        endpoint.url, "m", requests=5, prompts="random", vocabulary=50, prompt="uniform:3:9", extra={"top_k": 1}
    )
    asked = []
    for seed in (1, 1, 2):
        endpoint.bodies.clear()
        asyncio.run(measure(Load(**vars(load) | {"seed": seed})))
        asked.append(sorted(endpoint.bodies, key=str))
    assert asked[0] == asked[1] != asked[2]
    assert all(3 <= len(body["prompt"]) <= 9 and max(body["prompt"]) < 50 and body["top_k"] == 1 for body in asked[0])


def test_goodput_needs_both_parts_of_the_slo():
    load = Load("u", "m", requests=4, slo_ttft=1.0, slo_itl=0.1)
    samples = [
        Sample(0.0, 0.0, 0.5, 1.3, (0.1,) * 8, 10, 11),  # 0.08 a token
        Sample(0.0, 0.0, 1.5, 1.6, (0.01,) * 10, 10, 11),  # late
        Sample(0.0, 0.0, 0.5, 2.0, (0.15,) * 10, 10, 11),  # slow
        Sample(0.0, 0.0, total=4.0, error="HTTP 500"),
    ]
    report = summarize(load, samples)
    assert report["goodput"] == {"requests_per_second": 0.25, "share": 0.25} and report["duration"] == 4.0


def test_percentiles():
    values = [float(i) for i in range(1, 102)]
    random.Random(1).shuffle(values)
    assert [percentile(values, share) for share in (0, 50, 90, 99, 100)] == [1, 51, 91, 100, 101]
    assert percentile([1.0, 2.0], 75) == 1.75 and percentile([3.0], 99) == 3.0


def test_lengths_follow_their_distribution(tmp_path):
    chance = random.Random(0)

    def drawn(text):
        draw = lengths(text)
        return [draw(chance) for _ in range(4000)]

    assert set(drawn("fixed:7")) == {7} and set(drawn("uniform:2:5")) == {2, 3, 4, 5}
    found = drawn("lognormal:200:0.5")
    assert statistics.median(found) == pytest.approx(200, rel=0.05)
    assert statistics.stdev(map(math.log, found)) == pytest.approx(0.5, rel=0.05)
    (tmp_path / "l.txt").write_text("5\n90\n")
    assert set(drawn(f"file:{tmp_path / 'l.txt'}")) == {5, 90}


@pytest.mark.parametrize(
    "text", ["", "fixed", "fixed:0", "fixed:x", "uniform:5:2", "lognormal:3", "file:/none", "zipf:2"]
)
def test_no_distribution(text):
    with pytest.raises(UserError, match="no distribution"):
        lengths(text)


@pytest.mark.parametrize(
    "wrong", [{"requests": 0}, {"rate": 0.0}, {"rate": math.nan}, {"concurrency": 0}, {"prompts": "random", "endpoint": "chat"},
              {"rate": 2.0, "concurrency": 2}, {"endpoint": "embeddings"}]
)  # fmt: skip
def test_no_load(wrong):
    with pytest.raises(UserError):
        Load("u", "m", **wrong)


def test_the_report_is_written_and_told(endpoint, tmp_path):
    load = Load(endpoint.url, "m", key="sk-secret", requests=8, rate=200)
    samples = asyncio.run(measure(load))
    files = {file.name: file.read_text() for file in write(load, samples, tmp_path / "out")}
    assert json.loads(files["report.json"])["completed"] == 8 and len(files["samples.jsonl"].splitlines()) == 8
    assert files["percentiles.svg"].startswith("<svg") and "between, ms" in files["percentiles.svg"]
    assert ">percentile<" in files["percentiles.svg"]
    assert "sk-secret" not in "".join(files.values()) + repr(load)
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(summarize(load, samples)))
    console.file.close()
    told = console.export_text()
    assert "time to first token" in told and "8 of 8 requests, 200 requests/s" in told and "goodput" in told
