"""POST /v1/chat/completions."""

import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from llmos_jax.serve.http import logprobs, prompting, served
from llmos_jax.serve.http.answers import Answers, Piece
from llmos_jax.serve.http.errors import bad
from llmos_jax.serve.http.hooks import Caller
from llmos_jax.serve.http.prompting import Reader, ToolUse
from llmos_jax.serve.http.schemas import (
    AnswerMessage,
    CallFunction,
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    PromptDetails,
    ToolCall,
    Usage,
)
from llmos_jax.serve.http.served import Service, Target
from llmos_jax.serve.http.streams import Events, EventStream, event, stream, while_connected
from llmos_jax.serve.http.tools import Call


async def chat(service: Service, caller: Caller, body: ChatBody, http: Request) -> ChatCompletion | EventStream:
    """Raises ApiError for a request that cannot be answered."""
    target = service.target(body.model)
    use = prompting.tool_use(target, body.tools, body.tool_choice, body.parallel_tool_calls)
    answers = await _answers(service, caller, body, target, use)
    if body.stream:
        return await stream(http, _events(answers, body, target, use))
    return await while_connected(http, _whole(answers, body, target, use))


async def _answers(service: Service, caller: Caller, body: ChatBody, target: Target, use: ToolUse) -> Answers:
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    grammar = served.grammar_of(body)
    if use.grammar is not None and grammar is not None:
        raise bad("a forced tool_choice and a form of answer exclude each other; give one of them", "tool_choice")
    grammar = await served.checked(use.grammar or grammar)
    messages = prompting.as_template_takes(body.messages)
    generation = body.add_generation_prompt is not False
    prompt = await prompting.conversation(target, messages, use.tools, generation, body.chat_template_kwargs)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if wanted == 0:
        raise bad("max_tokens must be at least 1", "max_tokens")
    max_tokens = served.room(target, prompt, wanted, "messages")
    how = served.sampling(target, body, max_tokens, grammar, (body.top_logprobs or 0) if body.logprobs else None)
    request = served.request(caller, target, prompt, how, body.n or 1, body.priority or 0)
    return Answers(
        service,
        caller,
        body.model,
        [request],
        target.tokenizer,
        served.stops(body),
        bool(body.include_stop_str_in_output),
        use.skip_special and body.skip_special_tokens is not False,
    )


def usage(answers: Answers) -> Usage:
    prompt, completion = answers.prompt_tokens, answers.completion_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(cached_tokens=answers.cached_tokens),
    )


def tool_call(call: Call) -> ToolCall:
    return ToolCall(id=call.id, type="function", function=CallFunction(name=call.name, arguments=call.arguments))


async def _whole(answers: Answers, body: ChatBody, target: Target, use: ToolUse) -> ChatCompletion:
    readers = [use.reader() for _ in range(body.n or 1)]
    entries: list[list] = [[] for _ in readers]
    async with aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            readers[piece.index].read(piece)
            entries[piece.index] += piece.logprobs
    return ChatCompletion(
        id=f"chatcmpl-{answers.requests[0].id}",
        object="chat.completion",
        created=int(time.time()),
        model=body.model,
        choices=[
            _choice(index, reader, logprobs.of_chat(target.tokenizer, told) if body.logprobs else None)
            for index, (reader, told) in enumerate(zip(readers, entries, strict=True))
        ],
        usage=usage(answers),
    )


def _choice(index: int, reader: Reader, told: ChatLogprobs | None) -> ChatChoice:
    calls = [tool_call(call) for call in reader.calls]
    content = reader.text if reader.text is not None or calls else ""
    message = AnswerMessage(role="assistant", content=content, tool_calls=calls or None)
    finish: Any = reader.finish
    return ChatChoice(index=index, message=message, logprobs=told, finish_reason=finish)


async def _events(answers: Answers, body: ChatBody, target: Target, use: ToolUse) -> Events:
    options = body.stream_options
    with_usage = bool(options and options.include_usage)
    frame = {
        "id": f"chatcmpl-{answers.requests[0].id}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": body.model,
    } | ({"usage": None} if with_usage else {})
    readers = [use.reader() for _ in range(body.n or 1)]
    begun: set[int] = set()
    async with aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            if piece.index not in begun:
                begun.add(piece.index)
                yield event(frame | {"choices": [_chunk(piece.index, {"role": "assistant", "content": ""})]})
            for choice in _chunks(readers[piece.index], piece, body, target):
                yield event(frame | {"choices": [choice]})
    if with_usage:
        yield event(frame | {"choices": [], "usage": usage(answers).model_dump()})


def _chunk(index: int, delta: dict[str, Any], finish: str | None = None, told: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}


def _chunks(reader: Reader, piece: Piece, body: ChatBody, target: Target) -> Iterator[dict[str, Any]]:
    """The choices of the chunks that `piece` gives: its texts and calls, then the end."""
    told = logprobs.of_chat(target.tokenizer, piece.logprobs).model_dump() if body.logprobs and piece.logprobs else None
    number = len(reader.calls)
    found = reader.read(piece)
    if not found and told:
        found = [""]  # text that is held back has log-probabilities already
    for one in found:
        if isinstance(one, str):
            delta: dict[str, Any] = {"content": one}
        else:
            delta = {"tool_calls": [{"index": number, **tool_call(one).model_dump()}]}
            number += 1
        yield _chunk(piece.index, delta, told=told)
        told = None
    if reader.finish:
        yield _chunk(piece.index, {}, reader.finish)
