"""The web page in a real headless Chromium, before the real routes and an engine that only pretends."""

import asyncio
import json
import math
import os
import random
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from llmos_jax.serve.http import errors
from llmos_jax.serve.http.accounts import Accounts, create_key
from llmos_jax.serve.http.admin import PAGE, router
from llmos_jax.serve.http.gatekeeper import Gatekeeper
from llmos_jax.serve.http.metrics import Metrics
from llmos_jax.serve.request import Request as EngineRequest
from llmos_jax.serve.request import Sampling
from tests.serve.http.browser import CHROMIUM, Browser

FOLDER = Path(__file__).parents[3] / "llmos_jax" / "serve" / "http" / "page"
HOSTILE = "<img src=x onerror=\"document.title='broken into'\"><b>bold</b>"
TWICE = (
    "def twice(x):\n    return 2 * x  # a line that is wider than the page of a telephone, and scrolls in its own box"
)
CODE = f"Here it is:\n```python\n{TWICE}\n```\nCall `twice(4)`."
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


class Engine:
    """Stats of a busy engine that change with each look."""

    def __init__(self):
        self.looks = 0

    async def stats(self):
        self.looks += 1
        t = self.looks
        blue, red, green = 190 + round(40 * math.sin(t / 3)), 120, 60 + t % 20
        used = blue + red + green
        cached = 140
        told = {"running": 24 + t % 5, "waiting": max(0, round(30 * math.sin(t / 4))), "blocks": 1000, "used": used}
        told |= {
            "cached": cached,
            "free": 1000 - used - cached,
            "queries": 1000 * t,
            "hits": 420 * t,
            "preemptions": t // 3,
        }
        told |= {"generated_tokens": 640 * t, "draft_tokens": 100 * t, "accepted_tokens": 61 * t}
        return told | {"tenant_pages": {"blue": blue, "red": red, "green": green}, "tenant_service": {}}


class Site:
    """The server, in a thread. `asked`: bodies of chat requests; `left`: clients that went before the end."""

    def __init__(self, path):
        self.key = create_key("browser", path=path, tenant="blue")["key"]
        self.admin = create_key("root", path=path, scopes=["admin", "infer"])["key"]
        self.gate = Gatekeeper(Accounts(path, require_keys=True), Metrics())
        self.asked, self.left, self.endless = [], 0, False
        self._fill()
        app = FastAPI()
        errors.install(app)
        app.include_router(router(self.gate, {"smol": Engine(), "other/large": Engine()}, path))
        app.get("/v1/models")(self.models)
        app.post("/v1/chat/completions")(self.chat)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="warning", ws="none"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def close(self):
        self._server.should_exit = True
        self._thread.join(10)
        self.gate.close()

    def _fill(self):
        """Requests of three tenants, with latencies as a loaded server has them."""
        meter, chance = self.gate.metrics, random.Random(3)
        for i in range(120):
            tenant = ("blue", "blue", "red", "green")[i % 4]
            meter.end(meter.begin(tenant, 300), 300, 200, "stop")
            meter._recent["ttft"].append((time.time(), chance.lognormvariate(-1.6, 0.6)))
            for _ in range(3):
                meter._recent["itl"].append((time.time(), chance.lognormvariate(-3.9, 0.35)))

    async def models(self, request: Request):
        self.gate.authorize(request.headers.get("authorization"), "/v1/models")
        return {"object": "list", "data": [{"id": "smol"}, {"id": "other/large"}]}

    async def chat(self, request: Request):
        caller = self.gate.authorize(request.headers.get("authorization"), "/v1/chat/completions")
        body = json.loads(await request.body())
        self.asked.append(body)
        question = body["messages"][-1]["content"]
        if question == "fail":
            raise errors.ApiError(429, "the rate limit of this API key is reached; try again in 3 s", retry_after=3)
        self.gate.begin(caller, EngineRequest("r", (1,), Sampling(5)), body["model"])
        return StreamingResponse(self._events(question), media_type="text/event-stream")

    async def _events(self, question):
        text = {"code": CODE, "hostile": HOSTILE, "endless": "and on " * 10_000}.get(
            question, "Grüße, 你好! That is all."
        )
        try:
            for i in range(0, len(text), 7):
                event = {"choices": [{"index": 0, "delta": {"content": text[i : i + 7]}, "finish_reason": None}]}
                data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
                yield data[:9]  # cut where no border is
                await asyncio.sleep(0.01)
                yield data[9:]
            last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            yield f"data: {json.dumps(last)}\n\n"
            yield 'data: {"choices": [], "usage": {"completion_tokens": 41}}\n\ndata: [DONE]\n\n'
        except asyncio.CancelledError:
            self.left += 1
            raise


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("site") / "serve.sqlite")
    yield made
    made.close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def page(site, chromium, tmp_path):
    """The page, opened anew and given a key. A folder named by LLMOS_SHOTS keeps how it looked in the end."""
    chromium.open(site.url)
    chromium.run("sessionStorage.clear(); localStorage.clear()")
    chromium.open(site.url)
    chromium.wait("document.getElementById('status').className === 'bad'")
    chromium.errors.clear()
    chromium.type("#key", site.key, enter=True)
    chromium.wait("document.getElementById('status').textContent === 'live'")
    return chromium


def ask(page, text):
    page.type("#prompt", text, enter=True)
    page.wait("document.getElementById('stop').hidden && document.querySelectorAll('.message').length > 1")


def shot(page, name):
    if folder := os.environ.get("LLMOS_SHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")


def last(page):
    return page.run("[...document.querySelectorAll('.message.assistant')].at(-1).textContent")


def test_the_page_is_whole_and_asks_nobody_else():
    assert {file.name for file in FOLDER.iterdir()} == set(PAGE)
    for file in FOLDER.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\bstyle=|\bon\w+=|innerHTML|eval\(", text), file.name
        for used in re.findall(r"/page/([\w.]+)", text):
            assert used in PAGE


@browser_only
def test_without_a_key_it_says_so(site, chromium):
    chromium.open(site.url)
    chromium.run("sessionStorage.clear()")
    chromium.open(site.url)
    chromium.wait("document.getElementById('status').textContent === 'a valid API key is needed'")
    assert chromium.run("document.getElementById('model').options.length") == 0
    shot(chromium, "nokey")


@browser_only
def test_an_answer_streams(site, page):
    assert page.run("[...document.getElementById('model').options].map(o => o.value)") == ["smol", "other/large"]
    page.run("document.getElementById('seed').value = '7'")
    ask(page, "hello")
    assert last(page) == "Grüße, 你好! That is all."
    note = page.text(".note")
    assert note.startswith("41 tokens · first after ") and note.endswith("tokens/s · stop")
    asked = site.asked[-1]
    assert asked["model"] == "smol" and asked["stream"] and asked["seed"] == 7 and asked["temperature"] == 0.7
    ask(page, "more")
    assert [message["role"] for message in site.asked[-1]["messages"]] == ["user", "assistant", "user"]
    assert site.asked[-1]["messages"][1]["content"] == "Grüße, 你好! That is all."
    assert not page.errors and all(url.startswith(site.url) or url == "about:blank" for url in page.urls)


@browser_only
def test_code_is_readable_and_nothing_is_read_as_html(page):
    ask(page, "code")
    assert page.text(".message.assistant pre") == TWICE
    assert page.text(".message.assistant code") == "twice(4)"
    ask(page, "hostile")
    assert last(page) == HOSTILE
    assert page.run("document.title") == "llmos serve" and not page.run(
        "document.querySelector('.message img, .message b')"
    )
    page.wait("document.querySelectorAll('#batch polyline')[0]?.getAttribute('points').split(' ').length > 4")
    shot(page, "light")
    page.click("#theme")
    page.wait("document.documentElement.dataset.theme === 'dark'")
    page.run("document.getElementById('options').open = true")
    time.sleep(1.2)
    shot(page, "dark")
    page.size(420, 900)
    time.sleep(1.2)
    shot(page, "narrow")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    page.run("document.getElementById('live').scrollIntoView()")
    shot(page, "narrow-live")
    page.size(1280, 860)
    assert not page.errors


@browser_only
def test_stop_ends_the_stream_and_the_server_knows(site, page):
    before = site.left
    page.type("#prompt", "endless", enter=True)
    page.wait("document.querySelector('.message.assistant')?.textContent.length > 20")
    page.click("#stop")
    page.wait("document.getElementById('stop').hidden && !document.getElementById('send').disabled")
    page.wait(lambda: site.left == before + 1)
    assert page.text(".note").endswith("stopped")
    page.click("#clear")
    assert page.run("document.querySelectorAll('.message, .note').length") == 0
    ask(page, "hello")
    assert len(site.asked[-1]["messages"]) == 1  # a new chat knows nothing of the old one


@browser_only
def test_an_error_is_told_and_the_question_can_be_asked_again(site, page):
    ask(page, "fail")
    assert page.text(".error") == "the rate limit of this API key is reached; try again in 3 s"
    ask(page, "hello")
    assert last(page) == "Grüße, 你好! That is all." and len(site.asked[-1]["messages"]) == 1


@browser_only
def test_the_live_view_draws_what_the_server_says(page):
    page.wait("document.querySelectorAll('#cards .card').length === 7")
    cards = page.run(
        "[...document.querySelectorAll('.card')].map(c => [c.children[1].textContent, c.children[0].textContent])"
    )
    cards = dict(cards)
    assert cards["prefix hits"] == "42 %" and cards["drafts taken"] == "61 %" and 24 <= int(cards["running"]) <= 28
    assert page.run("document.querySelectorAll('#ttft circle').length") == 120
    assert page.run("document.querySelectorAll('#itl circle').length") == 360
    assert re.fullmatch(r"p50 \d+ ms · p99 \d+ ms", page.text("#itl-summary"))
    assert re.search(r"blue \d+\(others\) \d+.*cached 140free \d+", page.text("#pages-legend"))
    painted = page.run("""(() => { const c = document.getElementById('pages');
        const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, seen = new Set();
        for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) seen.add(data.slice(i, i + 3).join());
        return seen.size; })()""")
    assert painted >= 4  # two owners, cached, free
    assert page.text("#tenants .share span") == "blue"
    first = page.run("document.querySelector('#batch polyline').getAttribute('points')")
    page.wait(f"document.querySelector('#batch polyline').getAttribute('points') !== {json.dumps(first)}")
