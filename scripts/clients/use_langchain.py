"""`langchain-openai`: a chat model, with structured output and tools."""

import sys
from importlib.metadata import version

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from telling import KEY, MODEL, TOOL, URL, tell

chat = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, temperature=0, max_tokens=200, max_retries=0)
ASKED = "Name a colour of the rainbow."


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def invoke_and_stream() -> None:
    whole = chat.invoke(ASKED)
    assert whole.content and whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(ASKED)) == whole.content


def structured_output() -> None:
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(Person, method=method).invoke("Ada is 36."), Person)


def bound_tools() -> None:
    call = chat.bind_tools([TOOL], tool_choice="weather").invoke("Rome?").tool_calls[0]
    assert call["name"] == "weather" and "city" in call["args"]


def embeddings() -> None:
    embed = OpenAIEmbeddings(model=MODEL, base_url=URL, api_key=KEY, check_embedding_ctx_length=False)
    assert len(embed.embed_documents(["a cat", "a dog"])) == 2


CHECKS = [invoke_and_stream, structured_output, bound_tools, embeddings]
sys.exit(tell(f"langchain-openai {version('langchain-openai')}", CHECKS))
