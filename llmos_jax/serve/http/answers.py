"""Runs requests and turns the engine's outputs into pieces of text. Every hook is called here, and only here."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.serve.http.errors import ApiError
from llmos_jax.serve.http.hooks import Caller
from llmos_jax.serve.http.served import Service
from llmos_jax.serve.request import Output, Request, Token, TokenLogprobs
from llmos_jax.serve.text import Text


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of answer `index` to request number `prompt`. finish: "stop" or "length" with its last piece."""

    prompt: int
    index: int
    text: str
    tokens: tuple[Token, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: str | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    embedding: tuple[float, ...] | None = None


@dataclass
class _Answer:
    """One answer on its way. tokens: what counts as output, so none after a stop string."""

    text: Text
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


class Answers:
    """All answers to some requests of one HTTP request.

    `pieces` runs them; after it, or where it was closed early, `completion_tokens` and `cached_tokens` tell of them.
    """

    def __init__(
        self,
        service: Service,
        caller: Caller,
        model: str,
        requests: Sequence[Request],
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special: bool = True,
    ):
        self.service, self.caller, self.model, self.requests = service, caller, model, requests
        self._answers = [
            [_Answer(Text(tokenizer, stop, include_stop, skip_special)) for _ in range(request.n)]
            for request in requests
        ]
        self._cached = [0] * len(requests)
        self._tickets: list[Any] = []
        self._started: set[int] = set()

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def completion_tokens(self) -> int:
        return sum(len(answer.tokens) for answers in self._answers for answer in answers)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What is new, as it comes. Raises ApiError for an error of the engine or of a quota.

        Closing it closes the engine's iterators, at once.
        """
        finish = "abort"
        try:
            self._begin()
            streams = [self.service.client.generate(request) for request in self.requests]
            async with aclosing(_merged(streams)) as outputs:
                async for number, output in outputs:
                    piece = self._piece(number, output)
                    if piece is not None:
                        yield piece
                    if self._all_done():
                        break
            if not self._all_done():
                raise ApiError(503, "the engine went away before the answer was complete; try again", retry_after=1)
            finish = ""
        except ApiError:
            finish = "error"
            raise
        finally:
            self._end(finish)

    def _begin(self) -> None:
        hooks = self.service.hooks
        for request in self.requests:
            hooks.admit(self.caller, len(request.prompt), request.sampling.max_tokens * request.n)
            self._tickets.append(hooks.begin(self.caller, request, self.model))

    def _end(self, finish: str) -> None:
        """finish: why all ended; "" where each answer has its own reason."""
        for number, ticket in enumerate(self._tickets):
            answers = self._answers[number]
            done = all(answer.finish for answer in answers)
            reasons = {answer.finish for answer in answers if answer.finish}
            reason = ("length" if "length" in reasons else "stop") if done else finish or "abort"
            outputs = tuple(tuple(answer.tokens) for answer in answers)
            self.service.hooks.end(ticket, sum(map(len, outputs)), self._cached[number], reason, outputs)

    def _all_done(self) -> bool:
        return all(answer.finish for answers in self._answers for answer in answers)

    def _piece(self, number: int, output: Output) -> Piece | None:
        if output.finish == "error":
            raise ApiError(output.status, output.error, retry_after=1 if output.status in (429, 503) else None)
        if output.finish == "abort":
            raise ApiError(503, "the request was aborted by the server; try again", retry_after=1)
        self._cached[number] = max(self._cached[number], output.cached_tokens)
        if output.queued is not None:
            self.service.hooks.queued(self._tickets[number], output.queued)
        answer = self._answers[number][output.index]
        if answer.finish:  # a stop string ended it; the engine goes on for the others
            return None
        before, tokens = answer.text.num_tokens, output.tokens
        ids = self.requests[number].sampling.stop_ids
        # A stop id ends the answer and is no part of its text.
        ended = output.finish == "stop" and bool(tokens) and tokens[-1] in ids
        text = answer.text.add(tokens[:-1] if ended else tokens)
        stopped = answer.text.stopped is not None
        if stopped:
            tokens, answer.finish = tokens[: answer.text.num_tokens - before], "stop"
        elif output.finish:
            text, answer.finish = text + answer.text.finish(), output.finish
            answer.finish = "stop" if answer.text.stopped is not None else output.finish
        answer.tokens.extend(tokens)
        self._count(number, output.index, len(tokens))
        shown = len(tokens) - (ended and not stopped)
        logprobs = output.logprobs[:shown]
        told = output.prompt_logprobs, output.embedding
        return Piece(number, output.index, text, tokens[:shown], logprobs, answer.finish, *told)

    def _count(self, number: int, index: int, count: int) -> None:
        if not count:
            return
        hooks, ticket = self.service.hooks, self._tickets[number]
        if number not in self._started:
            self._started.add(number)
            hooks.first_token(ticket)
        hooks.token(ticket, count, index)


async def _merged(streams: Sequence[AsyncIterator[Output]]) -> AsyncGenerator[tuple[int, Output], None]:
    """Outputs of all streams with the number of their stream, as they come. Closing it closes all of them."""
    if len(streams) == 1:
        async with aclosing(_generator(streams[0])) as only:
            async for one in only:
                yield 0, one
        return
    queue: asyncio.Queue[tuple[int, Output | BaseException | None]] = asyncio.Queue(maxsize=64)

    async def pump(number: int, stream: AsyncIterator[Output]) -> None:
        try:
            async with aclosing(_generator(stream)) as outputs:
                async for output in outputs:
                    await queue.put((number, output))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            number, output = await queue.get()
            if isinstance(output, BaseException):
                raise output
            if output is None:
                running -= 1
            else:
                yield number, output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _generator(stream: AsyncIterator[Output]) -> AsyncGenerator[Output, None]:
    """`stream`, closed with this where it can be closed."""
    try:
        async for output in stream:
            yield output
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()
