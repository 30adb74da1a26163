"""`litellm`, with the server as an OpenAI-compatible provider."""

import json
import sys
from importlib.metadata import version

import litellm
from telling import KEY, MESSAGES, MODEL, TOOL, URL, tell

litellm.suppress_debug_info = True
TO = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "num_retries": 0, "temperature": 0}


def chat_and_stream() -> None:
    whole = litellm.completion(**TO, messages=MESSAGES, max_tokens=12).choices[0].message.content
    chunks = litellm.completion(**TO, messages=MESSAGES, max_tokens=12, stream=True)
    assert whole and "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def tools() -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = litellm.completion(**TO, messages=MESSAGES, tools=[TOOL], tool_choice=choice, max_tokens=200)
    call = answer.choices[0].message.tool_calls[0].function
    assert call.name == "weather" and "city" in json.loads(call.arguments)


def embedding() -> None:
    told = litellm.embedding(
        model=f"openai/{MODEL}", api_base=URL, api_key=KEY, input=["a cat"], encoding_format="float"
    )
    assert len(told.data) == 1 and told.data[0]["embedding"]


def errors() -> None:
    try:
        litellm.completion(**(TO | {"api_key": "sk-wrong"}), messages=MESSAGES)
    except litellm.AuthenticationError:
        return
    raise AssertionError("a wrong key was taken")


sys.exit(tell(f"litellm {version('litellm')}", [chat_and_stream, tools, embedding, errors]))
