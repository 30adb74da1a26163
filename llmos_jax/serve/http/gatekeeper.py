"""The hooks of a real server: keys and quotas, metrics and the audit log under one ticket. No jax."""

from dataclasses import dataclass
from pathlib import Path

from llmos_jax.serve.http.accounts import Accounts, Reservation
from llmos_jax.serve.http.audit import Audit
from llmos_jax.serve.http.database import Writer, default_path
from llmos_jax.serve.http.errors import ApiError
from llmos_jax.serve.http.hooks import Caller
from llmos_jax.serve.http.metrics import Metrics, Timing
from llmos_jax.serve.request import Request, Token


@dataclass(slots=True)
class Ticket:
    caller: Caller
    request: Request
    model: str
    reservation: Reservation
    timing: Timing
    ended: bool = False


class Gatekeeper:
    """What `Hooks` asks for. audit: None keeps no log. `open` makes one with all its parts."""

    def __init__(self, accounts: Accounts, metrics: Metrics, audit: Audit | None = None, writer: Writer | None = None):
        self.accounts, self.metrics, self.audit, self._writer = accounts, metrics, audit, writer

    @classmethod
    def open(
        cls,
        path: Path | None = None,
        *,
        require_keys: bool = False,
        local: bool = True,
        page_bytes: int = 0,
        log: bool = True,
        store_text: bool = False,
        model_hashes: dict[str, str] | None = None,
    ) -> "Gatekeeper":
        """Keys and log in one database, written by one thread; see `Accounts` and `Audit`. Raises UserError."""
        path = path or default_path()
        writer = Writer(path)
        try:
            accounts = Accounts(path, require_keys=require_keys, local=local, page_bytes=page_bytes, writer=writer)
            audit = Audit(path, model_hashes=model_hashes, store_text=store_text, writer=writer) if log else None
        except BaseException:
            writer.close()
            raise
        return cls(accounts, Metrics(), audit, writer)

    def authorize(self, authorization: str | None, path: str) -> Caller:
        return self.accounts.authorize(authorization, path)

    def admit(self, caller: Caller, prompt_tokens: int, max_tokens: int) -> None:
        if self.audit is not None and not self.audit.healthy:
            raise ApiError(
                503, "the audit log cannot be written", type="server_error", code="unavailable", retry_after=1
            )
        self.accounts.admit(caller, prompt_tokens, max_tokens)

    def begin(self, caller: Caller, request: Request, model: str) -> Ticket:
        if not caller.may_use(model):  # as if there were no such model
            message = f"the model {model} does not exist"
            raise ApiError(404, message, type="invalid_request_error", param="model", code="model_not_found")
        most = 0 if request.embed else request.n * request.sampling.max_tokens
        reservation = self.accounts.reserve(caller, len(request.prompt), most)
        return Ticket(caller, request, model, reservation, self.metrics.begin(caller.tenant, len(request.prompt)))

    def queued(self, ticket: Ticket, seconds: float) -> None:
        self.metrics.queued(seconds)

    def first_token(self, ticket: Ticket) -> None:
        self.metrics.first_token(ticket.timing)

    def token(self, ticket: Ticket, count: int, index: int = 0) -> None:
        self.metrics.token(ticket.timing, count, index)

    def end(
        self, ticket: Ticket, output_tokens: int, cached: int, finish: str, outputs: tuple[tuple[Token, ...], ...]
    ) -> None:
        if ticket.ended:
            return
        ticket.ended = True
        self.accounts.settle(ticket.reservation, output_tokens)
        self.metrics.end(ticket.timing, len(ticket.request.prompt), output_tokens, finish)
        if self.audit is not None:
            self.audit.add(ticket.caller.key_id, ticket.request, ticket.model, finish, cached, outputs)

    def close(self) -> None:
        """Writes what waits; the last thing a server does."""
        if self.audit is not None:
            self.audit.close()
        self.accounts.close()
        if self._writer is not None:
            self._writer.close()
