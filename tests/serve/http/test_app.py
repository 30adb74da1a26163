"""The application as a whole: models, tokens, health, the OpenAPI document, and what it imports."""

import subprocess
import sys

from llmos_jax.serve.http.hooks import Caller, NullHooks
from tests.serve.http import fake


def test_it_does_not_load_jax():
    code = "import sys, llmos_jax.serve.http.app; print([m for m in ('jax', 'flax', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_models():
    app = fake.app(fake.FakeClient())
    told = fake.call(app, "GET", "/v1/models").json()["data"]
    assert [(one["id"], one["parent"]) for one in told] == [("m", None), ("m-french", "m")]
    assert fake.call(app, "GET", "/v1/models/m-french").json() == told[1]

    class Few(NullHooks):
        def authorize(self, authorization, path):
            return Caller(models=frozenset(["m"]))

    app = fake.app(fake.FakeClient(), Few())
    assert [one["id"] for one in fake.call(app, "GET", "/v1/models").json()["data"]] == ["m"]
    assert fake.call(app, "GET", "/v1/models/m-french").status_code == 404


def test_tokens_and_back():
    app = fake.app(fake.FakeClient())
    text = "The <|im_end|> 你好"
    told = fake.post(app, "/tokenize", {"model": "m", "prompt": text}).json()
    assert told["tokens"] == fake.tokenizer().encode(text) and told["count"] == len(told["tokens"])
    assert fake.tokenizer().eos_id not in told["tokens"]  # a user's text holds no control token
    back = fake.post(app, "/detokenize", {"model": "m", "tokens": told["tokens"]}).json()
    assert back == {"prompt": text}
    messages = [{"role": "user", "content": "Hi"}]
    told = fake.post(app, "/tokenize", {"model": "m", "messages": messages}).json()
    assert told["tokens"] == fake.tokenizer().chat(messages)
    assert fake.post(app, "/tokenize", {"model": "m"}).status_code == 400
    assert fake.post(app, "/detokenize", {"model": "m", "tokens": [400]}).status_code == 400


def test_alive_and_ready():
    client = fake.FakeClient()
    app = fake.app(client)
    assert fake.call(app, "GET", "/ready").json() == {"status": "ready"}
    client.alive = False
    assert fake.call(app, "GET", "/health").status_code == 200
    assert fake.call(app, "GET", "/ready").status_code == 503

    async def ready() -> bool:
        return True

    client.ready = ready
    assert fake.call(app, "GET", "/ready").status_code == 200


def test_the_document_tells_of_every_error():
    document = fake.call(fake.app(fake.FakeClient()), "GET", "/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            statuses = operation["responses"].keys()
            assert "422" not in statuses
            if "requestBody" in operation:
                assert statuses >= {"400", "401", "404", "413", "500"}
            if path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"):
                assert statuses >= {"429", "503"}
    assert "securitySchemes" not in document["components"]
    secured = fake.call(fake.app(fake.FakeClient(), NullHooks()), "GET", "/openapi.json").json()
    assert secured["paths"]["/v1/models"]["get"]["security"] and "security" not in secured["paths"]["/health"]["get"]
