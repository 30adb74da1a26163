"""Keys, quotas, metrics and the log under OpenAI's routes: one application with everything in it but a model."""

import json
import sqlite3

import pytest

from llmos_jax.serve.http.accounts import Quota, create_key, list_keys
from llmos_jax.serve.http.admin import router
from llmos_jax.serve.http.audit import replay_record, verify
from llmos_jax.serve.http.gatekeeper import Gatekeeper
from tests.serve.http.fake import FakeClient, app, call, post

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50, "seed": 4}


class Server:
    def __init__(self, path, **quota):
        self.path, self.engine = path, FakeClient("Hello there")
        self.key = create_key("ann", path=path, tenant="blue", priority=2, quota=Quota(**quota))["key"]
        self.gate = Gatekeeper.open(path, require_keys=True, store_text=True)
        self.app = app(self.engine, self.gate)
        self.app.include_router(router(self.gate, {"m": self.engine}, path))

    def post(self, body, key=None, url="/v1/chat/completions"):
        return post(self.app, url, body, headers={"Authorization": f"Bearer {key or self.key}"})


@pytest.fixture
def start(tmp_path):
    made = []

    def server(**quota):
        made.append(Server(tmp_path / "serve.sqlite", **quota))
        return made[-1]

    yield server
    for one in made:
        one.gate.close()


def log(server):
    server.gate.audit.close()
    connection = sqlite3.connect(server.path)
    bodies = [json.loads(row[0]) for row in connection.execute("SELECT body FROM audit ORDER BY sequence")]
    connection.close()
    return bodies


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_counted_charged_and_logged(start, stream):
    server = start(tokens=1000)
    answer = server.post(CHAT | {"stream": stream})
    assert answer.status_code == 200
    (request,) = server.engine.requests
    assert (request.tenant, request.priority) == ("blue", 2) and len(request.salt) == 64
    (row,) = log(server)
    assert row["finish"] == "stop" and row["seed"] == request.sampling.seed == 4
    assert row["prompt_tokens"] == len(request.prompt) and row["cached_tokens"] == 2
    stored, outputs = replay_record(server.path, request.id)
    assert stored.prompt == request.prompt and row["output_tokens"] == [len(outputs[0])] and len(outputs[0]) > 2
    (key,) = list_keys(path=server.path)
    assert key["used_tokens"] == len(request.prompt) + len(outputs[0]) and key["used_requests"] == 1
    assert server.gate.metrics.tenants == {"blue": key["used_tokens"]}
    assert verify(server.path) is None


def test_without_a_key_no_engine_hears_of_it(start):
    server = start()
    for key in ("x", "sk-llmos-x"):
        answer = server.post(CHAT, key)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert call(server.app, "GET", "/v1/models").status_code == 401
    assert call(server.app, "GET", "/openapi.json").status_code == 401
    assert call(server.app, "GET", "/health").status_code == 200
    assert call(server.app, "GET", "/").headers["content-security-policy"].startswith("default-src 'self'")
    assert not server.engine.requests


def test_a_rate_limit_says_when_to_come_back(start):
    server = start(requests_per_minute=2)
    assert [server.post(CHAT | {"stream": stream}).status_code for stream in (False, True, False, True)] == [
        200,
        200,
        429,
        429,
    ]
    answer = server.post(CHAT)
    assert 25 <= int(answer.headers["retry-after"]) <= 30 and answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert len(server.engine.requests) == 2


def test_one_at_a_time_means_one_after_the_other_is_fine(start):
    server = start(concurrent=1)
    for _ in range(3):
        assert server.post(CHAT).status_code == 200
    server.engine.script = lambda request: 1 / 0  # an engine that fails gives its place back too
    assert server.post(CHAT).status_code == 500
    server.engine.script = lambda request: FakeClient.all("Hello", request)
    assert server.post(CHAT).status_code == 200


def test_a_budget_ends(start):
    server = start(tokens=80)
    statuses = [server.post(CHAT | {"max_tokens": 20}).status_code for _ in range(8)]
    assert statuses[0] == 200 and statuses[-1] == 429
    spent = sum(row["prompt_tokens"] + sum(row["output_tokens"]) for row in log(server))
    assert spent <= 80


def test_a_model_of_others_does_not_exist(start, tmp_path):
    server = start()
    key = create_key("ben", path=server.path, models=["other"])["key"]
    assert server.post(CHAT, key).status_code == 404
    assert not server.engine.requests
    embeddings = server.post({"model": "m", "input": "a"}, key, "/v1/embeddings")
    assert embeddings.status_code == 404
