"""Metrics, the gatekeeper that joins the hooks, and the routes beside OpenAI's, through a real application."""

import subprocess
import sys

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from llmos_jax.config import UserError
from llmos_jax.serve.http import errors, metrics
from llmos_jax.serve.http.accounts import Accounts, Quota, create_key
from llmos_jax.serve.http.admin import Operations, router
from llmos_jax.serve.http.audit import Audit, verify
from llmos_jax.serve.http.errors import ApiError
from llmos_jax.serve.http.gatekeeper import Gatekeeper
from llmos_jax.serve.http.metrics import MAX_TENANTS, OTHER, Metrics
from llmos_jax.serve.request import Request, Sampling
from tests.serve.http import fake

STATS = {"running": 3, "waiting": 5, "blocks": 64, "used": 16, "cached": 8, "free": 40, "queries": 100, "hits": 25}
STATS |= {"preemptions": 2, "draft_tokens": 9, "accepted_tokens": 4, "generated_tokens": 77, "compilations": 0}
STATS |= {"tenant_pages": {"blue": 10, "red": 4, "green": 2}, "tenant_service": {"blue": 5.0, "red": 7.0}}


class Engine:
    async def stats(self):
        return {**STATS, "tenant_pages": dict(STATS["tenant_pages"])}


class Down:
    async def stats(self):
        raise ConnectionError("it is being restarted")


class Server:
    """An application of the routes under test, and keys of two kinds."""

    def __init__(self, path, operations=None):
        self.path = path
        self.admin = create_key("root", path=path, scopes=["admin"])
        self.blue = create_key("blue", path=path, models=["m"], quota=Quota(tokens_per_minute=1000))
        self.gate = Gatekeeper(Accounts(path, require_keys=True), Metrics(), Audit(path))
        app = FastAPI()
        errors.install(app)
        app.include_router(router(self.gate, {"m": Engine(), "broken": Down()}, path, operations))
        self.client = TestClient(app, raise_server_exceptions=False)

    def call(self, method, url, key=None, **arguments):
        headers = {"Authorization": f"Bearer {key['key']}"} if key else {}
        return self.client.request(method, url, headers=headers, **arguments)

    def answer(self, key, request=None, output=20):
        """One request through all hooks."""
        caller = self.gate.authorize(f"Bearer {key['key']}", "/v1/completions")
        request = request or Request("r1", (1,) * 10, Sampling(100), tenant=caller.tenant)
        self.gate.admit(caller, len(request.prompt), request.sampling.max_tokens)
        ticket = self.gate.begin(caller, request, "m")
        self.gate.first_token(ticket)
        self.gate.token(ticket, 1)
        self.gate.token(ticket, 4)
        self.gate.end(ticket, output, 0, "stop", ((7,) * output,))
        self.gate.end(ticket, output, 0, "stop", ((7,) * output,))
        return ticket


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "serve.sqlite")
    yield made
    made.gate.close()


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_one_request_is_counted_once_everywhere(server):
    server.answer(server.blue)
    answer = server.call("GET", "/metrics", server.admin)
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)
    assert found["llmos_requests_total", "stop"] == 1
    assert found["llmos_prompt_tokens_total",] == 10 and found["llmos_generation_tokens_total",] == 20
    assert found["llmos_tenant_tokens_total", "blue"] == 30
    assert found["llmos_time_to_first_token_seconds_count",] == 1
    assert found["llmos_inter_token_latency_seconds_count",] == 4  # four tokens that came after the first
    server.gate.audit.close()
    assert verify(server.path) is None
    assert server.call("GET", "/admin/audit/verify", server.admin).json()["sequence"] == 1


def test_the_time_in_the_queue_is_counted_once_a_request(server):
    app = fake.app(fake.FakeClient(), server.gate)
    headers = {"Authorization": f"Bearer {server.blue['key']}"}
    for path, body in (
        ("completions", {"prompt": "Hi", "n": 2, "max_tokens": 4}),
        ("completions", {"prompt": ["Hi", "Ho"], "max_tokens": 4}),
        ("embeddings", {"input": "Hi"}),
    ):
        answer = fake.call(app, "POST", f"/v1/{path}", json={"model": "m"} | body, headers=headers)
        assert answer.status_code == 200, answer.text
    found = samples(server.call("GET", "/metrics", server.admin).text)
    assert found["llmos_request_queue_seconds_count",] == 4
    assert found["llmos_request_queue_seconds_sum",] == 1.0


def test_the_engines_stats_become_gauges_and_counters(server):
    found = samples(server.call("GET", "/metrics", server.admin).text)
    assert found["llmos_num_requests_running", "m"] == 3 and found["llmos_num_requests_waiting", "m"] == 5
    assert found["llmos_kv_cache_usage", "m"] == 0.25
    assert found["llmos_prefix_cache_hits_total", "m"] == 25 and found["llmos_prefix_cache_queries_total", "m"] == 100
    assert found["llmos_spec_accepted_tokens_total", "m"] == 4 and found["llmos_preemptions_total", "m"] == 2
    assert found["llmos_compile_events_total", "m"] == 0
    assert not any("broken" in labels for labels in found)  # an engine that is down fails nothing


def test_many_tenants_do_not_make_many_labels():
    meter = Metrics()
    for i in range(MAX_TENANTS + 50):
        meter.end(meter.begin(f"t{i}", 1), 1, 1, "stop")
    assert len(meter.tenants) == MAX_TENANTS + 1 and meter.tenants[OTHER] == 100


def test_latencies_are_of_each_answer_by_itself(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    meter = Metrics()
    timing = meter.begin("", 5)
    for moment, count, index in ((101.0, 1, 0), (103.0, 1, 1), (104.0, 3, 0), (107.0, 1, 1)):
        now[0] = moment
        if moment == 101.0:
            meter.first_token(timing)
        meter.token(timing, count, index)
    seconds = {name: [value for _, value in points] for name, points in meter.recent().items()}
    assert seconds == {"ttft": [1.0], "itl": [1.0, 4.0]}  # 3 tokens in 3 s; 1 token in 4 s


def test_unused_tokens_come_back_through_the_gatekeeper(server):
    for _ in range(8):  # 110 reserved, 30 used each: without giving back the tenth part of it would not fit
        server.answer(server.blue, output=20)
    caller = server.gate.authorize(f"Bearer {server.blue['key']}", "/v1/completions")
    server.gate.admit(caller, 10, 700)
    with pytest.raises(ApiError) as caught:
        server.gate.admit(caller, 10, 800)
    assert caught.value.status == 429 and caught.value.retry_after > 0


def test_a_model_that_a_key_may_not_use_does_not_exist(server):
    caller = server.gate.authorize(f"Bearer {server.blue['key']}", "/v1/completions")
    with pytest.raises(ApiError) as caught:
        server.gate.begin(caller, Request("r", (1,), Sampling(1)), "secret")
    assert caught.value.status == 404
    server.gate.admit(caller, 1, 999)  # nothing was reserved


def test_nothing_is_begun_that_cannot_be_logged(server, monkeypatch):
    monkeypatch.setattr(type(server.gate.audit), "healthy", property(lambda self: False))
    with pytest.raises(ApiError) as caught:
        server.answer(server.blue)
    assert caught.value.status == 503


def test_the_live_view_shows_others_only_in_sum(server):
    server.answer(server.blue)
    own = server.call("GET", "/live", server.blue).json()
    assert own["models"]["m"]["tenant_pages"] == {"blue": 10, "(others)": 6}
    assert own["tenants"] == {"blue": 30, "(others)": 0} and len(own["latency"]["ttft"]) == 1
    assert server.call("GET", "/live", server.admin).json()["models"]["m"]["tenant_pages"]["red"] == 4
    assert server.call("GET", "/admin/stats", server.blue).status_code == 403


ROUTES = [
    ("GET", "/metrics"),
    ("GET", "/live"),
    ("GET", "/admin/keys"),
    ("POST", "/admin/keys"),
    ("GET", "/admin/stats"),
]
ROUTES += [("DELETE", "/admin/keys/x"), ("GET", "/admin/audit/verify")]


@pytest.mark.parametrize(("method", "url"), ROUTES)
def test_without_a_key_nothing_is_seen(server, method, url):
    assert server.call(method, url).status_code == 401
    assert server.call(method, url, content=b"{").status_code == 401  # not even what is wrong with a body
    assert server.call(method, url, {"key": "sk-llmos-wrong"}).json()["error"]["message"] == "a valid API key is needed"


def test_keys_are_administered_over_http(server):
    body = {"name": "eve", "quota": {"tokens": 5.0}, "scopes": ["infer"], "models": ["m"]}
    made = server.call("POST", "/admin/keys", server.admin, json=body)
    assert made.status_code == 201 and made.json()["quota"] == {"tokens": 5}
    eve = made.json()
    assert server.call("GET", "/live", eve).status_code == 200
    assert server.call("POST", "/admin/keys", eve, json=body).status_code == 403
    listed = server.call("GET", "/admin/keys", server.admin)
    assert eve["key"] not in listed.text and eve["id"] in listed.text
    assert server.call("DELETE", f"/admin/keys/{eve['id']}", server.admin).json()["state"] == "revoked"
    assert server.call("GET", "/live", eve).status_code == 401
    assert server.call("DELETE", "/admin/keys/none", server.admin).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "a", "quota": {"tokens": 0}},
        {"name": "a", "quota": {"tokens": True}},
        {"name": "a", "scopes": ["x"]},
        {"name": "a", "scopes": []},
        {"name": "a", "priority": False},
        {"name": "a", "priority": "1"},
        {"name": "a", "expires_in": "60"},
    ],
)
def test_a_bad_key_is_refused_with_a_reason(server, body):
    answer = server.call("POST", "/admin/keys", server.admin, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_operations_have_a_route_each_when_given(tmp_path):
    done = []

    async def sleep(model):
        if model != "m":
            raise UserError(f"there is no model {model}")
        done.append(("sleep", model))
        return {"model": model, "state": "asleep"}

    async def load_adapter(body):
        done.append((body.model, body.name, body.path))
        return {"loaded": body.name}

    async def drain():
        done.append("drain")
        return {"draining": True}

    server = Server(tmp_path / "serve.sqlite", Operations(sleep=sleep, load_adapter=load_adapter, drain=drain))
    assert server.call("POST", "/admin/sleep", server.admin, json={"model": "m"}).json()["state"] == "asleep"
    assert server.call("POST", "/admin/sleep", server.admin, json={"model": "x"}).status_code == 400
    body = {"model": "m", "name": "french", "path": "/adapters/french"}
    assert server.call("POST", "/admin/adapters", server.admin, json=body).status_code == 200
    assert server.call("POST", "/admin/drain", server.admin).json() == {"draining": True}
    assert server.call("POST", "/admin/drain", server.blue).status_code == 403
    assert server.call("POST", "/admin/wake", server.admin, json={"model": "m"}).status_code == 404
    assert done == [("sleep", "m"), ("m", "french", "/adapters/french"), "drain"]
    paths = server.client.app.openapi()["paths"]
    given = {"/admin/sleep", "/admin/adapters", "/admin/drain"}
    assert given < set(paths) and not {"/admin/wake", "/admin/models"} & set(paths)
    assert "requestBody" in paths["/admin/sleep"]["post"] and "requestBody" not in paths["/admin/drain"]["post"]
    server.gate.close()


def test_loading_them_does_not_load_jax():
    check = "import sys, llmos_jax.serve.http.admin; print('jax' in sys.modules, 'numpy' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["False", "False"]
