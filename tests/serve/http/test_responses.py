"""Responses: items, the events of a stream, conversations that the server keeps."""

import json

import pytest

from llmos_jax.serve.http.errors import ApiError
from llmos_jax.serve.http.hooks import Caller, NullHooks
from llmos_jax.serve.http.responses import Store
from llmos_jax.serve.http.responses_schemas import Response
from tests.serve.http import fake

TOOLS = [{"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False}]
CALL = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'


def prompt_of(client) -> str:
    return fake.tokenizer().decode(client.requests[-1].prompt, skip_special=False)


def respond(app, **body):
    return fake.post(app, "/v1/responses", {"model": "m", "input": "Hi"} | body)


def test_a_conversation_that_the_server_keeps():
    client = fake.FakeClient("Hello")
    app = fake.app(client)
    first = respond(app, instructions="Be brief.").json()
    assert first["status"] == "completed" and first["output"][0]["content"][0]["text"] == "Hello"
    assert prompt_of(client).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    second = respond(app, input="And?", previous_response_id=first["id"]).json()
    assert prompt_of(client) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second["previous_response_id"] == first["id"]
    path = f"/v1/responses/{first['id']}"
    assert fake.call(app, "GET", path).json() == first
    assert fake.call(app, "DELETE", path).json() == {"id": first["id"], "object": "response", "deleted": True}
    assert fake.call(app, "GET", path).status_code == 404
    assert respond(app, previous_response_id=first["id"]).status_code == 404
    unkept = respond(app, store=False).json()
    assert fake.call(app, "GET", f"/v1/responses/{unkept['id']}").status_code == 404


def test_calls_and_their_results():
    client = fake.FakeClient(f"Let me see. {CALL}")
    app = fake.app(client)
    first = respond(app, tools=TOOLS).json()
    message, call = first["output"]
    assert (message["type"], call["type"], call["name"], call["arguments"]) == (
        "message",
        "function_call",
        "weather",
        "{}",
    )
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    respond(app, tools=TOOLS, previous_response_id=first["id"], input=[result])
    kept = prompt_of(client)
    assert "<tool_call>weather {}</tool_call><|im_end|>\n<|im_start|>tool\nsunny<|im_end|>" in kept
    # The same, with the items sent by the client.
    items = [{"role": "user", "content": "Hi"}, message, call, result]
    respond(app, tools=TOOLS, input=items)
    assert prompt_of(client) == kept


@pytest.mark.parametrize("text", ["Hello there", f"Look: {CALL}", CALL, f"{CALL}{CALL}", ""])
@pytest.mark.parametrize("limit", [None, 2])
def test_the_events_add_up_to_the_response(text, limit):
    app = fake.app(fake.FakeClient(text))
    whole = respond(app, tools=TOOLS, max_output_tokens=limit).json()
    response = respond(app, tools=TOOLS, max_output_tokens=limit, stream=True)
    events = [json.loads(line) for line in fake.data_of(response)]
    names = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    assert names == [one["type"] for one in events]
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    assert names[:2] == ["response.created", "response.in_progress"]
    items: dict[int, dict] = {}
    for one in events:
        if one["type"] == "response.output_item.added":
            assert one["output_index"] == len(items)
            items[len(items)] = {"id": one["item"]["id"], "text": ""}
        elif one["type"].endswith(".delta"):
            assert one["item_id"] == items[one["output_index"]]["id"]
            items[one["output_index"]]["text"] += one["delta"]
        elif one["type"] == "response.output_item.done":
            items[one["output_index"]]["item"] = one["item"]
    last = events[-1]["response"]
    assert last["output"] == [one["item"] for one in items.values()]
    for one in items.values():
        item = one["item"]
        assert one["text"] == (item["content"][0]["text"] if item["type"] == "message" else item["arguments"])
    assert [without_ids(item) for item in last["output"]] == [without_ids(item) for item in whole["output"]]
    assert last["usage"] == whole["usage"] and last["status"] == whole["status"]
    cut = limit is not None and text != ""
    assert names[-1] == ("response.incomplete" if cut else "response.completed") == f"response.{whole['status']}"
    assert fake.call(app, "GET", f"/v1/responses/{last['id']}").json() == last


def without_ids(item: dict) -> dict:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


def test_a_form_of_answer():
    client = fake.FakeClient()
    form = {"type": "json_schema", "name": "x", "schema": {"type": "integer"}, "strict": True}
    told = respond(fake.app(client), text={"format": form}).json()
    assert client.requests[0].sampling.grammar.text == '{"type": "integer"}' and told["text"]["format"] == form
    assert respond(fake.app(client), text={"format": {"type": "json_schema"}}).status_code == 400


@pytest.mark.parametrize(
    "item",
    [
        {"type": "message"},
        {"type": "item_reference", "id": "x"},
        {"type": "function_call", "name": "x"},
        {"type": "function_call_output", "call_id": "x"},
        {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
        {"type": "reasoning", "id": "x"},
    ],
)
def test_items_that_are_not_read(item):
    response = respond(fake.app(fake.FakeClient()), input=[item])
    assert response.status_code == 400 and response.json()["error"]["param"] == "input"


def response_of(app) -> Response:
    return Response(**respond(app).json())


def test_the_store_is_bounded_and_keeps_tenants_apart():
    store, app = Store(max_bytes=10_000, max_count=5), fake.app(fake.FakeClient("Hello"))
    responses = [response_of(app) for _ in range(8)]
    for response in responses:
        store.add("a", response, [])
    kept = [response for response in responses if response.id in store._kept]
    assert kept == responses[-5:]
    with pytest.raises(ApiError):
        store.get(Caller(tenant="b").tenant, responses[-1].id)
    store.add("a", response_of(app), [{"role": "user", "content": "x" * 9000}])
    assert store._size <= 10_000 and len(store._kept) < 5
    for response in list(store._kept):
        store.drop("a", response)
    assert store._size == 0


def test_a_response_of_one_tenant_is_not_there_for_another():
    class Tenants(NullHooks):
        def authorize(self, authorization, path):
            return Caller(tenant=authorization or "")

    app = fake.app(fake.FakeClient("Hello"), Tenants())
    a, b = {"authorization": "a"}, {"authorization": "b"}
    path = f"/v1/responses/{respond_as(app, a).json()['id']}"
    before = {"previous_response_id": path.rpartition("/")[2]}
    assert respond_as(app, b, **before).status_code == 404 and respond_as(app, a, **before).status_code == 200
    for method in ("GET", "DELETE"):
        assert fake.call(app, method, path, headers=b).status_code == 404
        assert fake.call(app, method, path, headers=a).status_code == 200
    assert fake.call(app, "GET", path, headers=a).status_code == 404


def respond_as(app, headers, **body):
    return fake.post(app, "/v1/responses", {"model": "m", "input": "Hi"} | body, headers=headers)
