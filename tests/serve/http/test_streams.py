"""Clients that leave: the engine's iterator is closed, though no token flows."""

import asyncio
import json

import pytest

from llmos_jax.serve.request import Output
from tests.serve.http import fake

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
PROMPTS = {"model": "m", "prompt": ["one", "two", "three"]}


def speechless(request):
    return []


def one_token(request):
    return [Output(request.id, index, (5,)) for index in range(request.n)]


@pytest.mark.parametrize("script", [speechless, one_token])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/completions", PROMPTS),
        ("/v1/completions", PROMPTS | {"stream": True}),
        ("/v1/responses", {"model": "m", "input": "Hi", "stream": True}),
        ("/v1/embeddings", {"model": "m", "input": ["a", "b"]}),
    ],
)
def test_a_client_that_leaves_ends_its_requests(script, path, body):
    client, hooks = fake.FakeClient(script, hang=True), fake.RecordingHooks()
    app = fake.app(client, hooks)

    async def go() -> None:
        leave = asyncio.Event()
        sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if sent:
                return sent.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "headers": [(b"content-type", b"application/json")],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        running = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(0.1)
        assert not running.done() and not client.closed
        leave.set()
        await asyncio.wait_for(running, 2)

    asyncio.run(go())
    assert sorted(client.closed) == sorted(request.id for request in client.requests) != []
    ends = [call for call in hooks.calls if call[0] == "end"]
    assert len(ends) == len(client.requests) and {call[3] for call in ends} == {"abort"}


def test_a_stop_string_ends_the_engines_work():
    client = fake.FakeClient("one two three four five", hang=True)
    response = fake.post(fake.app(client), "/v1/completions", {"model": "m", "prompt": "x", "stop": "three"})
    choice = response.json()["choices"][0]
    assert choice["text"] == "one two " and choice["finish_reason"] == "stop"
    assert client.closed == [client.requests[0].id]


def test_the_engine_goes_on_until_all_answers_have_stopped():
    def script(request):
        return fake.outputs("one END two", request, 0) + fake.outputs("three four END five", request, 1)

    client = fake.FakeClient(script, hang=True)
    body = {"model": "m", "prompt": "x", "stop": ["END"], "n": 2}
    choices = fake.post(fake.app(client), "/v1/completions", body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["one ", "three four "]
    assert len(client.closed) == 1
