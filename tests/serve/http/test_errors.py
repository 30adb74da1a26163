"""Whatever a client sends, it gets an error of OpenAI's form, and never a 500."""

import asyncio
import json

import httpx
import pytest

from llmos_jax.serve.http.errors import ApiError, strict_json
from llmos_jax.serve.http.hooks import NullHooks
from llmos_jax.serve.request import Output
from tests.serve.http import fake

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    told = response.json()
    assert told.keys() == {"error"} and told["error"].keys() == {"message", "type", "param", "code"}
    assert told["error"]["message"]
    return told["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "m", "messages": [{"role": "user", "content": "\xc3"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
        b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}',
        b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "unknown": Infinity}',
        b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1' + b"0" * 5000 + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "seed": 1' + b"0" * 30 + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "unknown": "\\udfff"}',
        b'{"model": "m", "messages": [{"role": "user", "content": "a\x01b"}]}',
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_bodies_that_are_no_json_of_ours(body):
    error_of(fake.call(fake.app(fake.FakeClient()), "POST", "/v1/chat/completions", content=body, headers=JSON), 400)


@pytest.mark.parametrize("depth", [100, 300, 600, 800, 900, 950, 980])
@pytest.mark.parametrize("field", ["guided_json", "tools", "chat_template_kwargs", "unknown"])
def test_nesting(depth, field):
    """However deep: it is answered, or refused."""
    nested = '{"a":' * depth + "1" + "}" * depth
    if field == "tools":
        nested = f'[{{"type": "function", "function": {{"name": "f", "parameters": {nested}}}}}]'
    content = json.dumps(CHAT)[:-1] + f', "{field}": {nested}, "tool_choice": "auto"}}'
    app = fake.app(fake.FakeClient())
    response = fake.call(app, "POST", "/v1/chat/completions", content=content.encode(), headers=JSON)
    if response.status_code != 200:
        error_of(response, 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
def test_other_content_types(kind):
    app, content = fake.app(fake.FakeClient()), json.dumps(CHAT).encode()
    headers = {"content-type": kind}
    error_of(fake.call(app, "POST", "/v1/chat/completions", content=content, headers=headers), 400)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages.0.role"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stop_token_ids": [400]}, "stop_token_ids"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_json": {"type": "wizard"}}, "response_format"),
        ({"guided_regex": "("}, "response_format"),
        ({"guided_grammar": "start: nothing"}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "fox " * 5000}]}, "messages"),
    ],
)
def test_values_that_cannot_be(change, param):
    client = fake.FakeClient()
    told = error_of(fake.post(fake.app(client), "/v1/chat/completions", CHAT | change), 400)
    assert told["param"].startswith(param) and not client.requests


def test_a_prompt_that_is_too_long_is_told_its_numbers():
    body = {"model": "m", "prompt": [5] * 20}
    told = error_of(fake.post(fake.app(fake.FakeClient(), max_model_len=20), "/v1/completions", body), 400)
    assert "20 tokens" in told["message"] and told["code"] == "context_length_exceeded"
    assert fake.post(fake.app(fake.FakeClient(), max_model_len=21), "/v1/completions", body).status_code == 200


def test_what_is_not_there():
    app = fake.app(fake.FakeClient())
    assert error_of(fake.post(app, "/v1/chat/completions", CHAT | {"model": "x"}), 404)["code"] == "model_not_found"
    error_of(fake.call(app, "GET", "/v1/models/x"), 404)
    error_of(fake.call(app, "GET", "/nowhere"), 404)
    response = fake.call(app, "PUT", "/v1/responses/x")
    error_of(response, 405)
    assert response.headers["allow"] == "DELETE, GET"


@pytest.mark.parametrize("told", [True, False])
def test_bodies_that_are_too_large(told):
    app = fake.app(fake.FakeClient(), max_body_bytes=1000)

    async def parts():
        for _ in range(100):
            yield b" " * 100

    async def go():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            content = b" " * 1001 if told else parts()
            return await http.post("/v1/chat/completions", content=content, headers=JSON)

    error_of(asyncio.run(go()), 413)


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_of_the_engine_before_the_first_token_has_its_status(stream):
    def script(request):
        return [Output(request.id, finish="error", error="the server is full", status=429)]

    hooks = fake.RecordingHooks()
    response = fake.post(fake.app(fake.FakeClient(script), hooks), "/v1/chat/completions", CHAT | {"stream": stream})
    assert error_of(response, 429)["message"] == "the server is full"
    assert response.headers["retry-after"] == "1"
    assert hooks.calls[-1][:4] == ("end", 0, 0, "error")


def test_an_error_within_a_stream_is_an_event_and_then_the_end():
    def script(request):
        first = Output(request.id, tokens=tuple(fake.tokenizer().encode("Hi")))
        return [first, Output(request.id, finish="error", error="it broke", status=500)]

    app = fake.app(fake.FakeClient(script))
    data = fake.data_of(fake.post(app, "/v1/chat/completions", CHAT | {"stream": True}))
    assert json.loads(data[-2])["error"]["message"] == "it broke" and data[-1] == "[DONE]"
    response = fake.post(app, "/v1/responses", {"model": "m", "input": "Hi", "stream": True})
    last = json.loads(fake.data_of(response)[-1])
    assert last["type"] == "error" and last["message"] == "it broke"
    error_of(fake.post(app, "/v1/chat/completions", CHAT), 500)


def test_an_engine_that_goes_away_is_an_error():
    app = fake.app(fake.FakeClient(lambda request: [Output(request.id, tokens=(5,))]))
    error_of(fake.post(app, "/v1/chat/completions", CHAT), 503)


def test_a_fault_of_ours_is_a_500_that_tells_nothing(caplog):
    def script(request):
        raise RuntimeError("secret")

    told = error_of(fake.post(fake.app(fake.FakeClient(script)), "/v1/chat/completions", CHAT), 500)
    assert "secret" not in told["message"] and "secret" in caplog.text


def test_without_a_key_nothing_of_the_body_is_looked_at():
    class Locked(NullHooks):
        def authorize(self, authorization, path):
            if authorization != "Bearer right":
                raise ApiError(401, "a valid API key is needed")
            return super().authorize(authorization, path)

    app = fake.app(fake.FakeClient(), Locked())
    paths = fake.call(app, "GET", "/openapi.json", headers={"authorization": "Bearer right"}).json()["paths"]
    assert "/v1/chat/completions" in paths
    for path, operations in [*paths.items(), ("/openapi.json", {"get": None})]:
        for method in operations:
            response = fake.call(app, method.upper(), path, content=b"{", headers=JSON)
            if path in ("/health", "/ready"):
                assert response.status_code == 200
            else:
                error_of(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"


def test_json_is_read_strictly():
    assert strict_json(rb'{"a": "\ud83d\ude00", "b": 1.5}') == {"a": "😀", "b": 1.5}
    with pytest.raises(ApiError, match="surrogate"):
        strict_json(rb'{"\ud83d": 1}')
