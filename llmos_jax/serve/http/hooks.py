"""What the routes ask and tell of a request: who sends it, whether it may run, and how it went. No jax.

The order of calls is authorize, admit, begin, queued, first_token, token ..., end. Call `admit` and `begin` from the
event loop with no await between them: admit checks the quotas, begin takes from them. `end` must follow every `begin`,
whatever happens; a second `end` of one ticket does nothing.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from llmos_jax.serve.request import Request, Token

INFER, ADMIN, METRICS = "infer", "admin", "metrics"
SCOPES = (INFER, ADMIN, METRICS)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request. salt, priority and max_pages go into its Request; models: None is all of them."""

    tenant: str = ""
    salt: str = ""
    key_id: str = ""
    priority: int = 0
    max_pages: int | None = None
    scopes: frozenset[str] = field(default=frozenset((INFER,)))
    models: frozenset[str] | None = None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


class Hooks(Protocol):
    def authorize(self, authorization: str | None, path: str) -> Caller:
        """Who sends the header `authorization` for `path`. Raises ApiError 401 (no valid key) or 403 (scope)."""

    def admit(self, caller: Caller, prompt_tokens: int, max_tokens: int) -> None:
        """Counts the request and checks quotas; `max_tokens` of all its answers. Raises ApiError 429 or 400."""

    def begin(self, caller: Caller, request: Request, model: str) -> Any:
        """A ticket for a request about to run. Raises ApiError 404 for a model its key may not use, 503 if unfit."""

    def queued(self, ticket: Any, seconds: float) -> None:
        """The request waited so long in the engine before its first step; once, where the engine tells."""

    def first_token(self, ticket: Any) -> None: ...

    def token(self, ticket: Any, count: int, index: int = 0) -> None:
        """Answer `index` has `count` more tokens; called for the first ones too, after `first_token`."""

    def end(
        self, ticket: Any, output_tokens: int, cached: int, finish: str, outputs: tuple[tuple[Token, ...], ...]
    ) -> None:
        """The request is over: tokens of all answers, prompt tokens found in the cache, why it ended, the answers."""


class NullHooks:
    """Everybody may do everything, and nothing is kept."""

    def authorize(self, authorization: str | None, path: str) -> Caller:
        return Caller(scopes=frozenset(SCOPES))

    def admit(self, caller: Caller, prompt_tokens: int, max_tokens: int) -> None:
        return None

    def begin(self, caller: Caller, request: Request, model: str) -> None:
        return None

    def queued(self, ticket: None, seconds: float) -> None:
        return None

    def first_token(self, ticket: None) -> None:
        return None

    def token(self, ticket: None, count: int, index: int = 0) -> None:
        return None

    def end(
        self, ticket: None, output_tokens: int, cached: int, finish: str, outputs: tuple[tuple[Token, ...], ...]
    ) -> None:
        return None
