"""Completions: prompts of every form, echo with log-probabilities, best_of; and embeddings."""

import base64
import json
import struct

import pytest

from tests.serve.http import fake


def complete(client, **body):
    return fake.post(fake.app(client), "/v1/completions", {"model": "m", "prompt": "The fox"} | body)


def test_prompts_of_every_form():
    ids = fake.tokenizer().encode("The fox")
    for prompt, count in (("The fox", 1), (["The fox", "The fox"], 2), (ids, 1), ([ids, ids, ids], 3)):
        client = fake.FakeClient("ok")
        told = complete(client, prompt=prompt, n=2).json()
        assert [request.prompt for request in client.requests] == [tuple(ids)] * count
        assert [choice["index"] for choice in told["choices"]] == list(range(2 * count))
        assert {choice["text"] for choice in told["choices"]} == {"ok"}
        assert told["usage"]["prompt_tokens"] == count * len(ids)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_as_an_evaluation_asks_for_it(max_tokens):
    ids = fake.tokenizer().encode("The fox jumps")
    body = {"prompt": [ids, ids[:3]], "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": max_tokens}
    told = complete(fake.FakeClient("ok"), **body).json()
    for choice, prompt in zip(told["choices"], [ids, ids[:3]], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(prompt) + max_tokens
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert choice["text"].startswith(fake.tokenizer().decode(prompt))
        assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(prompt) - 1 + max_tokens)
        assert logprobs["top_logprobs"][0] is None
        assert all(max(top.values()) == -0.5 for top in logprobs["top_logprobs"][1:])
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert choice["text"][offset:].startswith(token)
        assert choice["finish_reason"] == "length"
    assert told["usage"]["completion_tokens"] == 2 * max_tokens


def test_the_drawn_token_is_among_the_likeliest():
    told = complete(fake.FakeClient("ok"), logprobs=0).json()["choices"][0]["logprobs"]
    assert [list(top) for top in told["top_logprobs"]] == [[token] for token in told["tokens"]]


def test_the_best_of_several():
    def script(request):
        return [one for i, text in enumerate("abc") for one in fake.outputs(text, request, i)]

    client = fake.FakeClient(script)
    told = complete(client, best_of=3, n=2).json()
    assert [choice["text"] for choice in told["choices"]] == ["c", "b"]  # later answers are likelier, see fake.entry
    assert all(choice["logprobs"] is None for choice in told["choices"]) and client.requests[0].n == 3
    assert told["usage"]["completion_tokens"] == 6
    assert complete(client, best_of=1, n=2).status_code == 400
    assert complete(client, best_of=3, stream=True).status_code == 400


@pytest.mark.parametrize("more", [{}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 2, "max_tokens": 0}])
def test_a_stream_is_the_whole_answer_in_pieces(more):
    body = {"prompt": ["The fox", "dog"], "n": 2, "stop": "azy"} | more
    script = "lazy dog 你好"
    whole = complete(fake.FakeClient(script), **body).json()
    response = complete(fake.FakeClient(script), stream=True, stream_options={"include_usage": True}, **body)
    *chunks, last, done = fake.data_of(response)
    assert done == "[DONE]" and json.loads(last)["usage"] == whole["usage"] and len(whole["choices"]) == 4
    for choice in whole["choices"]:
        parts = [one for chunk in chunks for one in json.loads(chunk)["choices"] if one["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if "logprobs" in more else ():
            told = [one for part in parts if part["logprobs"] for one in part["logprobs"][key]]
            assert told == choice["logprobs"][key]


def test_what_is_refused():
    for body in ({"suffix": "x"}, {"prompt": ""}, {"prompt": []}, {"prompt": [400]}, {"max_tokens": 0}):
        assert complete(fake.FakeClient(), **body).status_code == 400


def test_embeddings():
    client = fake.FakeClient()
    app = fake.app(client)

    def embed(**body):
        return fake.post(app, "/v1/embeddings", {"model": "m", "input": "a"} | body).json()

    told = embed(input=["a", "b"])
    assert [one["index"] for one in told["data"]] == [0, 1] and told["data"][1]["embedding"] == [0.6, 0.8, 0, 0]
    assert told["usage"] == {"prompt_tokens": 2, "total_tokens": 2} and all(one.embed for one in client.requests)
    packed = base64.b64decode(embed(encoding_format="base64")["data"][0]["embedding"])
    assert struct.unpack("<4f", packed) == pytest.approx((0.6, 0.8, 0, 0))
    assert embed(dimensions=1)["data"][0]["embedding"] == [1.0]
    assert "4" in embed(dimensions=5)["error"]["message"]
