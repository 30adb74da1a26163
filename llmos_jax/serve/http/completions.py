"""POST /v1/completions, as its own clients and lm_eval's `local-completions` use it."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request

from llmos_jax.serve.http import logprobs, served
from llmos_jax.serve.http.answers import Answers, Piece
from llmos_jax.serve.http.chat import usage
from llmos_jax.serve.http.errors import bad
from llmos_jax.serve.http.hooks import Caller
from llmos_jax.serve.http.schemas import Completion, CompletionBody, CompletionChoice, CompletionLogprobs
from llmos_jax.serve.http.served import Service, Target
from llmos_jax.serve.http.streams import Events, EventStream, event, stream, while_connected
from llmos_jax.serve.request import Request as EngineRequest
from llmos_jax.serve.request import Token, TokenLogprobs


async def completions(
    service: Service, caller: Caller, body: CompletionBody, http: Request
) -> Completion | EventStream:
    """Raises ApiError for a request that cannot be answered."""
    target = service.target(body.model)
    answers = await _answers(service, caller, body, target)
    if body.stream:
        return await stream(http, _events(answers, body, target))
    return await while_connected(http, _whole(answers, body, target))


async def _answers(service: Service, caller: Caller, body: CompletionBody, target: Target) -> Answers:
    if body.suffix:
        raise bad("suffix is not supported: the model continues a prompt, it does not fill in", "suffix")
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if best_of < n:
        raise bad(f"best_of={best_of} is less than n={n}", "best_of")
    if best_of > n and body.stream:
        raise bad("best_of cannot be streamed: the best is known at the end only", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise bad("max_tokens=0 leaves nothing to answer without echo", "max_tokens")
    prompts = await served.prompts(target, body.prompt, "prompt")
    grammar = await served.checked(served.grammar_of(body))
    wanted = None if body.max_tokens is None else max(1, body.max_tokens)
    requests: list[EngineRequest] = []
    for prompt in prompts:
        max_tokens = served.room(target, prompt, wanted, "prompt")
        told = body.logprobs if body.logprobs is not None or best_of == n else 0
        how = served.sampling(target, body, max_tokens, grammar, told)
        if body.echo and body.logprobs is not None:
            how = replace(how, prompt_logprobs=body.logprobs)
        requests.append(served.request(caller, target, prompt, how, best_of, body.priority or 0))
    return Answers(
        service,
        caller,
        body.model,
        requests,
        target.tokenizer,
        served.stops(body),
        bool(body.include_stop_str_in_output),
        body.skip_special_tokens is not False,
    )


@dataclass
class _Collected:
    """One answer. only_echo: of the token that the engine draws in any case, nothing is told."""

    only_echo: bool
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    entries: list[TokenLogprobs] = field(default_factory=list)
    finish: str = "stop"

    def add(self, piece: Piece) -> None:
        self.finish = piece.finish or self.finish
        if self.only_echo:
            self.finish = "length"
            return
        self.text.append(piece.text)
        self.tokens += piece.tokens
        self.entries += piece.logprobs

    @property
    def mean_logprob(self) -> float:
        return sum(entry.logprob for entry in self.entries) / max(1, len(self.entries))


async def _whole(answers: Answers, body: CompletionBody, target: Target) -> Completion:
    n = body.n or 1
    collected = [[_Collected(body.max_tokens == 0) for _ in range(request.n)] for request in answers.requests]
    of_prompts: list[Sequence[TokenLogprobs | None]] = [() for _ in answers.requests]
    async with aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            collected[piece.prompt][piece.index].add(piece)
            of_prompts[piece.prompt] = piece.prompt_logprobs or of_prompts[piece.prompt]
    choices: list[CompletionChoice] = []
    for number, request in enumerate(answers.requests):
        several = collected[number]
        if len(several) > n:
            several = sorted(several, key=lambda one: one.mean_logprob, reverse=True)[:n]
        for one in several:
            choices.append(_choice(len(choices), request, one, of_prompts[number], body, target))
        await asyncio.sleep(0)  # spelling a thousand long prompts takes a while: let others in between
    return Completion(
        id=f"cmpl-{answers.requests[0].id}",
        object="text_completion",
        created=int(time.time()),
        model=body.model,
        choices=choices,
        usage=_usage(answers, body),
    )


def _usage(answers: Answers, body: CompletionBody) -> Any:
    told = usage(answers)
    if body.max_tokens == 0:
        told = told.model_copy(update={"completion_tokens": 0, "total_tokens": told.prompt_tokens})
    return told


def _choice(
    index: int,
    request: EngineRequest,
    one: _Collected,
    of_prompt: Sequence[TokenLogprobs | None],
    body: CompletionBody,
    target: Target,
) -> CompletionChoice:
    tokens, entries, text = list(one.tokens), list[TokenLogprobs | None](one.entries), "".join(one.text)
    if body.echo:
        text = _prompt_text(request, target) + text
        tokens, entries = [*request.prompt, *tokens], [*of_prompt, *entries]
    told = logprobs.of_completion(target.tokenizer, tokens, entries) if body.logprobs is not None else None
    finish: Any = one.finish
    return CompletionChoice(index=index, text=text, logprobs=told, finish_reason=finish)


def _prompt_text(request: EngineRequest, target: Target) -> str:
    return target.tokenizer.decode(request.prompt)


async def _events(answers: Answers, body: CompletionBody, target: Target) -> Events:
    n = body.n or 1
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    frame = {
        "id": f"cmpl-{answers.requests[0].id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
    } | ({"usage": None} if with_usage else {})
    offsets: dict[int, int] = {}  # where the tokens of each choice have come to in its text
    async with aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            index = piece.prompt * n + piece.index
            one = _Collected(body.max_tokens == 0)
            one.add(piece)
            request = answers.requests[piece.prompt]
            text, tokens, entries = "".join(one.text), one.tokens, list[TokenLogprobs | None](one.entries)
            if body.echo and index not in offsets:
                text = _prompt_text(request, target) + text
                tokens, entries = [*request.prompt, *tokens], [*(piece.prompt_logprobs or ()), *entries]
            told: CompletionLogprobs | None = None
            if body.logprobs is not None and entries:
                told = logprobs.of_completion(target.tokenizer, tokens, entries, offsets.get(index, 0))
            offsets[index] = offsets.get(index, 0) + sum(map(len, told.tokens if told else ()))
            finish = one.finish if piece.finish else None
            if text or told or finish:
                choice = {"index": index, "text": text, "logprobs": told and told.model_dump(), "finish_reason": finish}
                yield event(frame | {"choices": [choice]})
    if with_usage:
        yield event(frame | {"choices": [], "usage": _usage(answers, body).model_dump()})
