"""The `openai` Python client: every route that it has and that we answer."""

import base64
import json
import struct
import sys

import openai
from pydantic import BaseModel
from telling import KEY, MESSAGES, MODEL, TOOL, URL, WEATHER, tell

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=120)
FORCED = {"type": "function", "function": {"name": "weather"}}


class Person(BaseModel):
    name: str
    age: int


def models() -> None:
    assert MODEL in [one.id for one in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def chat() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content and answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 8


def stream() -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 2
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def tools() -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "tools": [TOOL], "temperature": 0, "max_tokens": 200}
    answer = client.chat.completions.create(**asked, tool_choice=FORCED).choices[0]
    call = answer.message.tool_calls[0]
    assert call.function.name == "weather" and isinstance(json.loads(call.function.arguments)["city"], str)
    with client.chat.completions.stream(**asked, tool_choice=FORCED) as events:
        events.until_done()
        streamed = events.get_final_completion().choices[0].message.tool_calls[0]
    assert streamed.function.arguments == call.function.arguments
    said = [*MESSAGES, answer.message.model_dump(exclude_none=True)]
    said.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    last = client.chat.completions.create(model=MODEL, messages=said, tools=[TOOL], tool_choice="none", max_tokens=8)
    assert last.choices[0].message.content and not last.choices[0].message.tool_calls


def json_schema() -> None:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Ada is 36."}], "temperature": 0}
    parsed = client.chat.completions.parse(**asked, max_tokens=200, response_format=Person).choices[0].message.parsed
    assert isinstance(parsed, Person)


def logprobs() -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3, "temperature": 0}
    told = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    for one in told:
        assert len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
        assert one.token == one.top_logprobs[0].token and one.logprob <= 0


def several_answers() -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 1.0, "seed": 7}
    first, again = (
        [choice.message.content for choice in client.chat.completions.create(**asked, n=3).choices] for _ in "ab"
    )
    assert len(first) == 3 and len(set(first)) > 1 and first == again


def stop() -> None:
    asked = {"model": MODEL, "prompt": "1, 2, 3, 4, 5,", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    cut = client.completions.create(**asked, stop=whole[4:7]).choices[0]
    assert cut.text == whole[: whole.index(whole[4:7])] and cut.finish_reason == "stop"


def embeddings() -> None:
    floats = client.embeddings.create(model=MODEL, input=["a cat", "a dog"], encoding_format="float").data
    packed = client.embeddings.create(model=MODEL, input="a cat", encoding_format="base64").data[0].embedding
    assert len(floats) == 2 and abs(sum(x * x for x in floats[0].embedding) - 1) < 1e-3
    size = len(floats[0].embedding)
    unpacked = struct.unpack(f"<{size}f", base64.b64decode(packed))
    assert max(abs(a - b) for a, b in zip(unpacked, floats[0].embedding, strict=True)) < 0.02


def responses() -> None:
    asked = {"model": MODEL, "input": "Name a colour.", "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**asked)
    assert whole.output_text and client.responses.retrieve(whole.id).output_text == whole.output_text
    after = client.responses.create(model=MODEL, input="Another?", previous_response_id=whole.id, max_output_tokens=16)
    assert after.output_text and after.usage.input_tokens > whole.usage.input_tokens
    with client.responses.stream(**asked) as events:
        told = list(events)
    text = "".join(event.delta for event in told if event.type == "response.output_text.delta")
    # The client's get_final_response takes response.completed only; an answer that was cut ends with .incomplete.
    assert told[-1].type == f"response.{whole.status}", told[-1].type
    assert told[-1].response.output_text == text == whole.output_text
    client.responses.delete(whole.id)


def responses_tools() -> None:
    tool = {"type": "function", "strict": False, **WEATHER}
    choice = {"type": "function", "name": "weather"}
    answer = client.responses.create(
        model=MODEL, input="Rome?", tools=[tool], tool_choice=choice, max_output_tokens=200, temperature=0
    )
    call = answer.output[-1]
    assert call.type == "function_call" and "city" in json.loads(call.arguments)
    parsed = client.responses.parse(model=MODEL, input="Ada is 36.", text_format=Person, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Person)


def errors() -> None:
    def refused(kind: type[openai.APIStatusError], key: str = KEY, **fields: object) -> None:
        asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2} | fields
        try:
            openai.OpenAI(base_url=URL, api_key=key, max_retries=0).chat.completions.create(**asked)
        except kind:
            return
        raise AssertionError(f"no {kind.__name__} for {fields}")

    refused(openai.NotFoundError, model="nobody")
    refused(openai.BadRequestError, temperature=99)
    refused(openai.BadRequestError, messages=[{"role": "user", "content": "fox " * 9000}])
    refused(openai.AuthenticationError, key="sk-wrong")


def a_wrong_key_sees_nothing() -> None:
    wrong = openai.OpenAI(base_url=URL, api_key="sk-llmos-wrong", max_retries=0)
    for call in (
        wrong.models.list,
        lambda: wrong.models.retrieve(MODEL),
        lambda: wrong.completions.create(model=MODEL, prompt="1, 2,", max_tokens=2),
        lambda: list(wrong.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2, stream=True)),
        lambda: wrong.embeddings.create(model=MODEL, input="a cat"),
        lambda: wrong.responses.create(model=MODEL, input="a cat", max_output_tokens=2),
        lambda: wrong.responses.retrieve("resp_0"),
    ):
        try:
            call()
        except openai.AuthenticationError as error:
            assert MODEL not in str(error)
            continue
        raise AssertionError("a wrong key was taken")


ALL = [models, chat, stream, tools, json_schema, logprobs, several_answers, stop, embeddings, responses]
sys.exit(tell(f"openai {openai.__version__}", [*ALL, responses_tools, errors, a_wrong_key_sees_nothing]))
