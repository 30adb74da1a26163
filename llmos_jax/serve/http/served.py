"""What is served, and what every route needs of it: the model a request names, its prompt, its room, its Sampling."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from llmos_jax.config import ModelConfig
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.serve.http.errors import ApiError, bad
from llmos_jax.serve.http.hooks import Caller, Hooks
from llmos_jax.serve.http.schemas import SamplingBody
from llmos_jax.serve.request import Grammar, Output, Request, Sampling, Token

LONG_TEXT = 4096  # characters; from here on a text is tokenized in a thread, so that other requests go on meanwhile


class Client(Protocol):
    """The engine as the HTTP process sees it."""

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Closing the iterator aborts the request and frees its pages."""

    async def stats(self) -> dict[str, Any]: ...


@dataclass
class Served:
    """A model that is served. adapters: name of a LoRA adapter -> base; an adapter is addressed as a model."""

    name: str
    tokenizer: Tokenizer
    model: ModelConfig
    max_model_len: int
    adapters: dict[str, str] = field(default_factory=dict)


class Target(NamedTuple):
    """What the `model` of a body means."""

    served: Served
    adapter: str  # "" for the base model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.served.tokenizer


@dataclass
class Service:
    """What the routes share."""

    served: Callable[[], dict[str, Served]]
    client: Client
    hooks: Hooks

    def target(self, model: str) -> Target:
        """The model or adapter of that name. Raises ApiError 404 with the names there are."""
        all_served = self.served()
        if model in all_served:
            return Target(all_served[model], "")
        for one in all_served.values():
            if model in one.adapters:
                return Target(one, model)
        names = ", ".join([*all_served, *(name for one in all_served.values() for name in one.adapters)])
        raise ApiError(404, f"there is no model {model!r}; served: {names}", param="model", code="model_not_found")


async def encoded(tokenizer: Tokenizer, text: str) -> list[Token]:
    """The tokens of a plain prompt."""
    if len(text) >= LONG_TEXT:
        return await asyncio.to_thread(tokenizer.encode_prompt, text)
    return tokenizer.encode_prompt(text)


async def prompts(target: Target, given: str | Sequence[Any], param: str) -> list[list[Token]]:
    """The prompts of a body that may give one or many, as text or as tokens."""
    if isinstance(given, str):
        return [await encoded(target.tokenizer, given)]
    several: list[Any] = list(given)
    if isinstance(several[0], int):
        return [check_tokens(target, several, param)]
    if isinstance(several[0], str):
        return [await encoded(target.tokenizer, text) for text in several]
    return [check_tokens(target, tokens, param) for tokens in several]


def check_tokens(target: Target, tokens: list[Token], param: str) -> list[Token]:
    """`tokens`. Raises ApiError 400 for one that the model has no embedding for."""
    size = target.served.model.vocab_size
    wrong = next((token for token in tokens if token >= size), None)
    if wrong is not None:
        raise bad(f"{param}: token {wrong} is not below the model's vocabulary of {size}", param)
    return tokens


def room(target: Target, prompt: Sequence[Token], wanted: int | None, param: str) -> int:
    """How many tokens an answer may have: what was asked for, cut to what the model's length leaves.

    Raises ApiError 400 where the prompt leaves none, or is empty.
    """
    length = target.served.max_model_len
    if not prompt:
        raise bad(f"{param}: the prompt has no tokens; give some text", param)
    if len(prompt) + 1 > length:
        message = f"the prompt has {len(prompt)} tokens, and the model takes {length} with at least one for the answer"
        raise bad(f"{message}; shorten it", param, "context_length_exceeded")
    left = length - len(prompt)
    return left if wanted is None else min(wanted, left)


def sampling(
    target: Target, body: SamplingBody, max_tokens: int, grammar: Grammar | None, logprobs: int | None
) -> Sampling:
    """The Sampling that `body` asks for. Raises ApiError 400 for tokens that the model does not have."""
    bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
    check_tokens(target, [token for token, _ in bias], "logit_bias")
    stop_ids = () if body.ignore_eos else target.tokenizer.eos_ids
    extra = check_tokens(target, body.stop_token_ids or [], "stop_token_ids")
    seed = secrets.randbits(31) if body.seed is None else body.seed % 2**32
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min(body.min_tokens or 0, max_tokens),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, min(body.top_k or 0, target.served.model.vocab_size)),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=bias,
        seed=seed,
        stop_ids=tuple(dict.fromkeys([*stop_ids, *extra])),
        logprobs=logprobs,
        grammar=grammar,
    )


def grammar_of(body: SamplingBody) -> Grammar | None:
    """What the answer must look like by response_format or one of guided_*. Raises ApiError 400 for more than one."""
    found: list[Grammar] = []
    form = body.response_format
    if form is not None and form.type == "json_object":
        found.append(Grammar("json_object", ""))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise bad("response_format.json_schema.schema is missing", "response_format")
        found.append(Grammar("json_schema", json.dumps(form.json_schema.schema_)))
    if body.guided_json is not None:
        text = body.guided_json if isinstance(body.guided_json, str) else json.dumps(body.guided_json)
        found.append(Grammar("json_schema", text))
    if body.guided_regex is not None:
        found.append(Grammar("regex", body.guided_regex))
    if body.guided_choice is not None:
        found.append(Grammar("choice", json.dumps(body.guided_choice)))
    if body.guided_grammar is not None:
        found.append(Grammar("lark", body.guided_grammar))
    if len(found) > 1:
        raise bad("response_format and guided_* ask for more than one form of answer; give one of them")
    return found[0] if found else None


async def checked(grammar: Grammar | None) -> Grammar | None:
    """`grammar`. Raises ApiError 400 with the reason where it cannot be followed.

    A large schema takes long to compile, so that happens in a thread.
    """
    if grammar is not None:
        from llmos_jax.serve.structured import compiled

        try:
            await asyncio.to_thread(compiled, grammar)
        except ValueError as error:
            raise bad(str(error), "response_format", "invalid_grammar") from None
    return grammar


def request(
    caller: Caller, target: Target, prompt: Sequence[Token], how: Sampling, n: int = 1, priority: int = 0, embed=False
) -> Request:
    """A request to the engine. A client may lower its own priority, never raise it above its key's."""
    return Request(
        id=secrets.token_hex(12),
        prompt=tuple(prompt),
        sampling=how,
        model=target.served.name,
        n=n,
        tenant=caller.tenant,
        salt=caller.salt,
        adapter=target.adapter,
        priority=max(caller.priority, priority) if priority else caller.priority,
        max_pages=caller.max_pages,
        embed=embed,
    )


def stops(body: SamplingBody) -> tuple[str, ...]:
    return () if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
