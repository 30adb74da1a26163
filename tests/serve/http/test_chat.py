"""Chat completions: whole and streamed answers agree, and what was asked for reaches the engine."""

import json

import pytest

from llmos_jax.serve.request import Grammar
from tests.serve.http import fake

HI = [{"role": "user", "content": "Hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
CALL = 'Look: <tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def chat(client, **body):
    return fake.post(fake.app(client), "/v1/chat/completions", {"model": "m", "messages": HI} | body)


def prompt_of(client) -> str:
    return fake.tokenizer().decode(client.requests[-1].prompt, skip_special=False)


def test_an_answer():
    client = fake.FakeClient("Hello 你好")
    told = chat(client).json()
    (choice,) = told["choices"]
    assert choice["message"]["content"] == "Hello 你好" and choice["finish_reason"] == "stop"
    usage = told["usage"]
    assert usage["prompt_tokens"] == len(client.requests[0].prompt)
    assert usage["completion_tokens"] == len(fake.tokenizer().encode("Hello 你好")) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2


def test_what_is_asked_for_reaches_the_engine():
    client = fake.FakeClient()
    body = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "logit_bias": {"7": -5},
        "seed": 3,
        "n": 2,
        "max_tokens": 9,
        "max_completion_tokens": 8.0,
        "min_tokens": 2,
        "stop_token_ids": [11],
        "priority": 4,
        "logprobs": True,
        "top_logprobs": 3,
        "unknown": {"a": 1},
    }
    assert chat(client, **body).status_code == 200
    (request,) = client.requests
    how = request.sampling
    assert (how.temperature, how.top_p, how.top_k, how.min_p) == (0.5, 0.9, 0, 0.1)
    assert (how.repetition_penalty, how.presence_penalty, how.frequency_penalty) == (1.1, 0.2, -0.2)
    assert (how.logit_bias, how.seed, how.max_tokens, how.min_tokens) == (((7, -5.0),), 3, 8, 2)
    assert how.stop_ids == (*fake.tokenizer().eos_ids, 11) and how.logprobs == 3
    assert (request.n, request.priority, request.model, request.adapter) == (2, 4, "m", "")


def test_defaults():
    client = fake.FakeClient()
    seeds = set()
    for _ in range(3):
        chat(client, model="m-french", ignore_eos=True, temperature=None)
        request = client.requests[-1]
        seeds.add(request.sampling.seed)
        assert request.sampling.max_tokens == 4096 - len(request.prompt)
        assert request.sampling.stop_ids == () and request.sampling.temperature == 1
        assert (request.model, request.adapter) == ("m", "m-french")
    assert len(seeds) == 3


def test_the_conversation_goes_through_the_template():
    client = fake.FakeClient()
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    assert chat(client, messages=messages).status_code == 200
    assert prompt_of(client) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>weather {"city": "Paris"}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
    )
    chat(client, add_generation_prompt=False)
    assert prompt_of(client) == "<|im_start|>user\nHi<|im_end|>\n"


def collected(response) -> tuple[dict[int, dict], dict | None]:
    """What a client puts together of a stream, and the usage."""
    *chunks, done = fake.data_of(response)
    assert done == "[DONE]" and response.headers["content-type"].startswith("text/event-stream")
    found: dict[int, dict] = {}
    usage = None
    for chunk in map(json.loads, chunks):
        assert chunk["object"] == "chat.completion.chunk"
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            one = found.setdefault(choice["index"], {"content": "", "calls": [], "logprobs": [], "finish": None})
            assert one["finish"] is None, "nothing follows the end"
            one["content"] += choice["delta"].get("content") or ""
            one["calls"] += choice["delta"].get("tool_calls", [])
            one["logprobs"] += (choice["logprobs"] or {}).get("content", [])
            one["finish"] = choice["finish_reason"]
    return found, usage


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("text", ["Hello 你好, it is", CALL, CALL[:-20], "a <tool b"])
@pytest.mark.parametrize("more", [{}, {"stop": ["is"]}, {"max_tokens": 7}, {"logprobs": True, "top_logprobs": 2}])
def test_a_stream_is_the_whole_answer_in_pieces(chunk, text, more):
    def script(request):
        return fake.outputs(text, request, 0, chunk) + fake.outputs("other", request, 1, chunk)

    body = {"tools": TOOLS, "n": 2, "stream_options": {"include_usage": True}} | more
    whole = chat(fake.FakeClient(script), **body).json()
    streamed, usage = collected(chat(fake.FakeClient(script), stream=True, **body))
    assert usage == whole["usage"] and len(whole["choices"]) == 2
    for choice in whole["choices"]:
        one, message = streamed[choice["index"]], choice["message"]
        assert one["content"] == (message["content"] or "")
        assert [call["function"] for call in one["calls"]] == [call["function"] for call in message["tool_calls"] or []]
        assert [call["index"] for call in one["calls"]] == list(range(len(one["calls"])))
        assert one["finish"] == choice["finish_reason"]
        assert one["logprobs"] == (choice["logprobs"] or {"content": []})["content"]


def test_calls_are_told_apart_from_text():
    choice = chat(fake.FakeClient(CALL), tools=TOOLS).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "Look:" and choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert call["id"].startswith("call_") and call["type"] == "function"


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
def test_without_tools_nothing_is_parsed(more):
    client = fake.FakeClient(CALL)
    choice = chat(client, **more).json()["choices"][0]
    assert choice["message"]["content"] == CALL and choice["message"]["tool_calls"] is None
    assert "weather" not in prompt_of(client)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_choice_is_a_grammar(choice):
    client = fake.FakeClient(CALL)
    chat(client, tools=TOOLS, tool_choice=choice)
    grammar = client.requests[0].sampling.grammar
    assert grammar.kind == "lark" and '"weather"' in grammar.text
    refused = chat(client, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "nothing"}})
    assert refused.status_code == 400


def test_tools_reach_a_model_whose_template_takes_none():
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    client = fake.FakeClient(CALL)
    body = {"model": "m", "messages": HI, "tools": TOOLS}
    told = fake.post(fake.app(client, template=template), "/v1/chat/completions", body).json()
    assert '"name": "weather"' in prompt_of(client)
    assert told["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", "")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}},
            Grammar("json_schema", '{"type": "integer"}'),
        ),
        ({"guided_json": {"type": "integer"}}, Grammar("json_schema", '{"type": "integer"}')),
        ({"guided_json": '{"type": "integer"}'}, Grammar("json_schema", '{"type": "integer"}')),
        ({"guided_regex": "[a-z]+"}, Grammar("regex", "[a-z]+")),
        ({"guided_choice": ["a", "b"]}, Grammar("choice", '["a", "b"]')),
        ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
    ],
)
def test_forms_of_answers(body, grammar):
    client = fake.FakeClient()
    assert chat(client, **body).status_code == 200
    assert client.requests[0].sampling.grammar == grammar
    if grammar is not None:
        assert chat(client, **body | {"guided_choice": ["c"], "guided_regex": "d"}).status_code == 400


def test_logprobs_spell_every_byte():
    told = chat(fake.FakeClient("你"), logprobs=True, top_logprobs=1).json()
    content = told["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == "你"
    assert all(one["top_logprobs"][0]["bytes"] == one["bytes"] for one in content)


def test_hooks_are_told_of_everything():
    hooks = fake.RecordingHooks()
    client = fake.FakeClient("Hi")
    fake.post(fake.app(client, hooks), "/v1/chat/completions", {"model": "m", "messages": HI, "max_tokens": 50, "n": 2})
    tokens = (*fake.tokenizer().encode("Hi"), fake.tokenizer().eos_id)
    assert hooks.calls[:3] == [("admit", len(client.requests[0].prompt), 100), ("begin", "m"), ("first",)]
    assert sum(call[1] for call in hooks.calls if call[0] == "token") == 2 * len(tokens)
    assert hooks.calls[-1] == ("end", 2 * len(tokens), 2, "stop", (tokens, tokens))
