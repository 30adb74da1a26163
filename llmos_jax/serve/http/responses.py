"""POST /v1/responses: items in, items out, a typed stream of events, and conversations kept by the server."""

import json
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any, NamedTuple

from starlette.requests import Request

from llmos_jax.serve.http import prompting, served
from llmos_jax.serve.http.answers import Answers
from llmos_jax.serve.http.errors import ApiError, bad
from llmos_jax.serve.http.hooks import Caller
from llmos_jax.serve.http.prompting import ToolUse
from llmos_jax.serve.http.responses_events import Writer
from llmos_jax.serve.http.responses_schemas import InputItem, InputPart, Response, ResponseBody, ResponseNamedTool
from llmos_jax.serve.http.schemas import Function, FunctionName, NamedTool, Tool
from llmos_jax.serve.http.served import Service
from llmos_jax.serve.http.streams import Events, EventStream, event, stream, while_connected


class Kept(NamedTuple):
    tenant: str
    response: Response
    messages: list[dict[str, Any]]  # the whole conversation, without instructions
    size: int  # bytes, about


class Store:
    """Responses in memory, the oldest dropped where they come to more than `max_bytes` or `max_count`."""

    def __init__(self, max_bytes: int = 64 << 20, max_count: int = 10_000):
        self.max_bytes, self.max_count, self._size = max_bytes, max_count, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def add(self, tenant: str, response: Response, messages: list[dict[str, Any]]) -> None:
        size = len(json.dumps(messages)) + len(response.model_dump_json())
        self._kept[response.id] = Kept(tenant, response, messages, size)
        self._size += size
        while self._kept and (self._size > self.max_bytes or len(self._kept) > self.max_count):
            self._size -= self._kept.popitem(last=False)[1].size

    def get(self, tenant: str, id: str, param: str | None = None) -> Kept:
        """Raises ApiError 404, for one of another tenant too."""
        kept = self._kept.get(id)
        if kept is None or kept.tenant != tenant:
            raise ApiError(404, f"there is no response {id!r}; it was not stored, or dropped since", param=param)
        return kept

    def drop(self, tenant: str, id: str) -> None:
        self._size -= self.get(tenant, id).size
        del self._kept[id]


async def respond(
    service: Service, store: Store, caller: Caller, body: ResponseBody, http: Request
) -> Response | EventStream:
    """Raises ApiError for a request that cannot be answered."""
    target = service.target(body.model)
    given = body.tools or []
    tools = [Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in given]
    use = prompting.tool_use(target, tools, _choice(body), body.parallel_tool_calls)
    how = body.as_sampling()
    form = served.grammar_of(how)
    if use.grammar is not None and form is not None:
        raise bad("a forced tool_choice and a form of answer exclude each other; give one of them", "tool_choice")
    grammar = await served.checked(use.grammar or form)
    before = (
        store.get(caller.tenant, body.previous_response_id, "previous_response_id").messages
        if (body.previous_response_id)
        else []
    )
    messages = [*before, *_messages(body.input)]
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    prompt = await prompting.conversation(target, system + messages, use.tools, variables=body.chat_template_kwargs)
    max_tokens = served.room(target, prompt, body.max_output_tokens, "input")
    sampling = served.sampling(target, how, max_tokens, grammar, None)
    request = served.request(caller, target, prompt, sampling, priority=body.priority or 0)
    stop = served.stops(how)
    answers = Answers(service, caller, body.model, [request], target.tokenizer, stop, skip_special=use.skip_special)
    writer = Writer(_begun(body, request.id))

    def keep(response: Response) -> None:
        if response.store:
            store.add(caller.tenant, response, [*messages, *_messages_of(response)])

    if body.stream:
        failed = writer.failed
        return await stream(http, _events(answers, writer, use, keep), failed, last="")
    return await while_connected(http, _whole(answers, writer, use, keep))


def _choice(body: ResponseBody) -> str | NamedTool | None:
    choice = body.tool_choice
    if isinstance(choice, ResponseNamedTool):
        return NamedTool(type="function", function=FunctionName(name=choice.name))
    return choice


def _begun(body: ResponseBody, id: str) -> Response:
    told = body.model_dump(mode="json", exclude_none=True, by_alias=True)
    return Response(
        id=f"resp_{id}",
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        store=body.store is not False,
        temperature=1.0 if body.temperature is None else body.temperature,
        text=told.get("text") or {"format": {"type": "text"}},
        tool_choice=told.get("tool_choice", "auto"),
        tools=told.get("tools", []),
        top_p=1.0 if body.top_p is None else body.top_p,
        user=body.user,
    )


async def _parts(answers: Answers, writer: Writer, use: ToolUse, keep: Any) -> Events:
    """Names and data of events, as lines; the writer's response is whole at the end."""
    reader = use.reader()
    for one in writer.begin():
        yield _line(one)
    async with aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            for found in reader.read(piece):
                for one in writer.text(found) if isinstance(found, str) else writer.call(found):
                    yield _line(one)
    for one in writer.end(reader.finish == "length", answers):
        if one["type"] in ("response.completed", "response.incomplete"):
            keep(writer.response)
        yield _line(one)


def _line(data: dict[str, Any]) -> str:
    return event(data, data["type"])


async def _events(answers: Answers, writer: Writer, use: ToolUse, keep: Any) -> Events:
    """The events; the first ones come with the first token, so that a refusal has its own status."""
    async with aclosing(_parts(answers, writer, use, keep)) as parts:
        held = ""
        async for part in parts:
            held += part
            if writer.number <= 2:  # response.created and response.in_progress
                continue
            yield held
            held = ""


async def _whole(answers: Answers, writer: Writer, use: ToolUse, keep: Any) -> Response:
    async with aclosing(_parts(answers, writer, use, keep)) as parts:
        async for _ in parts:
            pass
    return writer.response


def _messages(given: str | list[InputItem]) -> list[dict[str, Any]]:
    """Items as messages of a chat template. Raises ApiError 400 for items and parts that are not read."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        place = f"input.{i}"
        kind = item.type or "message"
        if kind == "reasoning":
            continue
        if kind == "message":
            if item.role is None or item.content is None:
                raise bad(f"{place}: a message has a role and a content", "input")
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": _text(item.content, f"{place}.content")})
        elif kind == "function_call":
            if not item.name or not item.call_id:
                raise bad(f"{place}: a function_call has a call_id, a name and arguments", "input")
            _add_call(messages, item.call_id, item.name, item.arguments)
        elif kind == "function_call_output":
            if item.call_id is None or item.output is None:
                raise bad(f"{place}: a function_call_output has a call_id and an output", "input")
            text = _text(item.output, f"{place}.output")
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
        else:
            raise bad(f"{place}: an item of type {kind!r} is not read", "input")
    if not messages:
        raise bad("the input has no message", "input")
    return messages


def _add_call(messages: list[dict[str, Any]], id: str, name: str, arguments: str | None) -> None:
    """A call belongs to the assistant's message before it, and so do several in a row."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": name, "arguments": prompting.arguments(arguments)}
    call = {"id": id, "type": "function", "function": function}
    messages[-1] = messages[-1] | {"tool_calls": [*messages[-1].get("tool_calls", []), call]}


def _text(given: str | list[InputPart], place: str) -> str:
    if isinstance(given, str):
        return given
    texts = []
    for i, part in enumerate(given):
        if part.type not in ("input_text", "output_text", "text") or part.text is None:
            raise bad(f"{place}.{i}: a part of type {part.type!r} is not read; give text parts only", "input")
        texts.append(part.text)
    return "\n".join(texts)


def _messages_of(response: Response) -> Iterator[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for item in response.output:
        if item.type == "message":
            messages.append({"role": "assistant", "content": "".join(part.text for part in item.content)})
        else:
            _add_call(messages, item.call_id, item.name, item.arguments)
    return iter(messages)
