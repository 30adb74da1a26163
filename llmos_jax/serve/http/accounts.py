"""API keys and their quotas. No jax.

A key is "sk-llmos-" and 256 random bits; the database holds its HMAC-SHA256 under the server's secret. A slow hash
(scrypt, argon2) is for secrets a person could have chosen: nobody can try out 2^256 keys, so a fast one is as safe,
and it costs microseconds in each request where a slow one would cost a tenth of a second.
"""

import hmac
import json
import math
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmos_jax.config import UserError
from llmos_jax.serve.http.database import Secret, Writer, connect, default_path
from llmos_jax.serve.http.errors import ApiError
from llmos_jax.serve.http.hooks import ADMIN, INFER, METRICS, SCOPES, Caller

PREFIX = "sk-llmos-"
PUBLIC = ("/", "/health", "/ready", "/favicon.ico")
PUBLIC_FOLDER = "/page/"
MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Quota:
    """Bounds of one key; None is unbounded. tokens: in all, ever. concurrent: requests at once. kv_bytes: at once."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens: int | None = None
    concurrent: int | None = None
    kv_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(
                    f"quota {name} must be a whole number above 0, not {value!r}; leave it out for no bound"
                )


class Bucket:
    """A token bucket: holds one minute's worth, and fills at `per_minute`. May be overdrawn; times in seconds."""

    __slots__ = ("_level", "_time", "capacity")

    def __init__(self, per_minute: int, now: float):
        self.capacity = float(per_minute)
        self._level, self._time = self.capacity, now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken, 0 for at once; infinite for more than the bucket can ever hold."""
        self._fill(now)
        if amount > self.capacity:
            return math.inf
        return max(0.0, amount - self._level) * MINUTE / self.capacity

    def take(self, amount: float, now: float) -> None:
        """A negative amount gives back."""
        self._fill(now)
        self._level = min(self.capacity, self._level - amount)

    def _fill(self, now: float) -> None:
        self._level = min(self.capacity, self._level + (now - self._time) * self.capacity / MINUTE)
        self._time = now


@dataclass(slots=True)
class Use:
    """What one key has taken: in the process that serves, beside the totals in the database."""

    quota: Quota
    spent: int  # tokens in all, of the past too
    requests: Bucket | None
    tokens: Bucket | None
    reserved: int = 0  # of requests that run
    running: int = 0


@dataclass(slots=True)
class Reservation:
    key_id: str
    prompt_tokens: int
    tokens: int
    open: bool = True


class Accounts:
    """Keys as the server uses them: authorize, admit, reserve, settle. All from one thread, the event loop's.

    require_keys: False lets everybody in, whatever key they send (OpenAI's clients always send one), for as long as no
    key was ever made, and only where `local` (bound to this machine alone); even then /admin needs a key. page_bytes:
    of one KV page, to count a quota of KV bytes in pages. clock: monotonic seconds.
    Raises UserError for a server open to others without keys.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        require_keys: bool = False,
        local: bool = True,
        page_bytes: int = 0,
        writer: Writer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        path = path or default_path()
        self._secret, self._connection = Secret(path), connect(path)
        self._may_open = local and not require_keys
        self._page_bytes, self._clock = page_bytes, clock
        self._writer, self._owns_writer = writer or Writer(path), writer is None
        self._uses: dict[str, Use] = {}
        if not local and not self._any_keys():
            self.close()
            raise UserError(
                "a server that others can reach needs API keys: make one with `llmos keys create NAME`, "
                "or bind to 127.0.0.1"
            )

    def close(self) -> None:
        if self._owns_writer:
            self._writer.close()
        self._connection.close()

    # Who it is.

    def authorize(self, authorization: str | None, path: str) -> Caller:
        """Raises ApiError 401, the same for a missing, unknown, expired or revoked key, or 403 for a missing scope."""
        if path in PUBLIC or path.startswith(PUBLIC_FOLDER):
            return Caller(scopes=frozenset())
        row = self._find(authorization)
        if row is None:
            if self._may_open and self._scopes(path) != {ADMIN} and not self._any_keys():
                return Caller(salt=self.salt(""), scopes=frozenset((INFER, METRICS)))
            raise ApiError(401, "a valid API key is needed", type="authentication_error", code="invalid_api_key")
        caller = self._caller(row)
        self._use(row)
        if not caller.scopes & self._scopes(path):
            raise ApiError(403, "this API key may not do that", type="permission_error", code="missing_scope")
        return caller

    def salt(self, tenant: str) -> str:
        """What keeps the cached prefixes of tenants apart; nobody without the secret can compute another's."""
        return self._secret.mac("prefix", tenant)

    def _find(self, authorization: str | None) -> sqlite3.Row | None:
        """Reads the database each time, some 20 microseconds, so that a key revoked by anybody is dead at once."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key.startswith(PREFIX):
            return None
        digest = self._secret.mac("key", key.encode("utf-8", "surrogatepass"))
        cursor = self._connection.execute("SELECT * FROM keys WHERE hash = ?", (digest,))
        cursor.row_factory = sqlite3.Row
        row = cursor.fetchone()
        if row is None or not hmac.compare_digest(row["hash"], digest):
            return None
        expired = row["expires"] is not None and row["expires"] <= time.time()
        return None if expired or row["revoked"] is not None else row

    def _caller(self, row: sqlite3.Row) -> Caller:
        kv_bytes = json.loads(row["quota"]).get("kv_bytes")
        pages = max(1, kv_bytes // self._page_bytes) if kv_bytes and self._page_bytes else None
        models = None if row["models"] is None else frozenset(json.loads(row["models"]))
        scopes = frozenset(json.loads(row["scopes"]))
        return Caller(row["tenant"], self.salt(row["tenant"]), row["id"], row["priority"], pages, scopes, models)

    @staticmethod
    def _scopes(path: str) -> frozenset[str]:
        """Any one of these is enough."""
        if path == "/admin" or path.startswith("/admin/"):
            return frozenset((ADMIN,))
        return frozenset((ADMIN, METRICS)) if path == "/metrics" else frozenset((INFER, ADMIN))

    def _any_keys(self) -> bool:
        return self._connection.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None

    # What it may take.

    def _use(self, row: sqlite3.Row) -> Use:
        quota = Quota(**json.loads(row["quota"]))
        use = self._uses.get(row["id"])
        if use is None:
            now, per_minute = self._clock(), (quota.requests_per_minute, quota.tokens_per_minute)
            requests, tokens = (None if rate is None else Bucket(rate, now) for rate in per_minute)
            use = self._uses[row["id"]] = Use(quota, row["used_tokens"], requests, tokens)
        return use

    def admit(self, caller: Caller, prompt_tokens: int, max_tokens: int) -> None:
        """Counts a request against the rate and checks that all it could take is there, taking nothing yet.

        Raises ApiError 429, with the seconds to wait where waiting helps, or 400 for one that no waiting helps.
        """
        use = self._uses.get(caller.key_id)
        if use is None:
            return
        now, need, quota = self._clock(), prompt_tokens + max_tokens, use.quota
        if quota.tokens is not None and use.spent + use.reserved + need > quota.tokens:
            left = max(0, quota.tokens - use.spent - use.reserved)
            message = f"the request may take {need} tokens and this API key has {left} left; lower max_tokens"
            raise ApiError(429, message, type="insufficient_quota", code="insufficient_quota")
        if quota.concurrent is not None and use.running >= quota.concurrent:
            message = f"this API key may run {quota.concurrent} requests at once; wait for one to end"
            raise ApiError(429, message, type="rate_limit_error", code="too_many_requests", retry_after=1)
        waits = [bucket.wait(amount, now) for bucket, amount in ((use.requests, 1), (use.tokens, need)) if bucket]
        wait = max(waits, default=0.0)
        if wait == math.inf:
            message = f"the request may take {need} tokens, this API key {quota.tokens_per_minute} a minute"
            raise ApiError(400, f"{message}; lower max_tokens", type="invalid_request_error", code="request_too_large")
        if wait > 0:
            seconds = math.ceil(wait - 1e-9)
            message = f"the rate limit of this API key is reached; try again in {seconds} s"
            raise ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", retry_after=seconds)
        if use.requests:
            use.requests.take(1, now)

    def reserve(self, caller: Caller, prompt_tokens: int, max_tokens: int) -> Reservation:
        """Takes all that a request could use; `settle` gives back what it did not."""
        reservation = Reservation(caller.key_id, prompt_tokens, prompt_tokens + max_tokens)
        if (use := self._uses.get(caller.key_id)) is not None:
            use.running += 1
            use.reserved += reservation.tokens
            if use.tokens:
                use.tokens.take(reservation.tokens, self._clock())
        return reservation

    def settle(self, reservation: Reservation, output_tokens: int) -> None:
        """The request is over. The database hears of it from the writer's thread, some milliseconds later."""
        use = self._uses.get(reservation.key_id)
        if use is None or not reservation.open:
            return
        reservation.open = False
        used = reservation.prompt_tokens + output_tokens
        use.running -= 1
        use.reserved -= reservation.tokens
        use.spent += used
        if use.tokens:
            use.tokens.take(used - reservation.tokens, self._clock())
        update = "UPDATE keys SET used_tokens = used_tokens + ?, used_requests = used_requests + 1, last_used = ?"
        values = (used, time.time(), reservation.key_id)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(f"{update} WHERE id = ?", values)

        self._writer.put(write)


# For the command line and the admin routes.


def create_key(
    name: str,
    *,
    path: Path | None = None,
    tenant: str = "",
    scopes: Iterable[str] = (INFER,),
    models: Iterable[str] | None = None,
    expires_in: float | None = None,
    priority: int = 0,
    quota: Quota | None = None,
) -> dict[str, Any]:
    """A new key as `list_keys` tells it, and with "key" the key itself, which is never to be had again.

    tenant: whose share it counts against, by default `name`. expires_in: seconds. Raises UserError.
    """
    path, scopes = path or default_path(), sorted(set(scopes))
    if not name.strip() or len(name) > 200:
        raise UserError("a key needs a name of 1 to 200 characters; say whose it is")
    if unknown := set(scopes) - set(SCOPES):
        raise UserError(f"there is no scope {', '.join(sorted(unknown))}; use {', '.join(SCOPES)}")
    if not scopes:
        raise UserError(f"a key without a scope can do nothing; use {', '.join(SCOPES)}")
    if expires_in is not None and not 0 < expires_in < math.inf:
        raise UserError(f"a key cannot expire in {expires_in} s; give a number above 0")
    key, id, now = PREFIX + secrets.token_urlsafe(32), "key-" + secrets.token_hex(6), time.time()
    limits = {name: value for name, value in asdict(quota or Quota()).items() if value is not None}
    allowed = None if models is None else json.dumps(sorted(set(models)))
    expires = None if expires_in is None else now + expires_in
    row = (id, Secret(path).mac("key", key), name, tenant or name, now, expires, priority, json.dumps(scopes), allowed)
    columns = "id, hash, name, tenant, created, expires, priority, scopes, models, quota"
    connection = connect(path)
    try:
        connection.execute(f"INSERT INTO keys ({columns}) VALUES ({', '.join('?' * 10)})", (*row, json.dumps(limits)))
    finally:
        connection.close()
    return {"key": key} | next(entry for entry in list_keys(path=path) if entry["id"] == id)


def list_keys(*, path: Path | None = None) -> list[dict[str, Any]]:
    """All keys, oldest first, without the keys themselves. Times in seconds since the epoch."""
    connection = connect(path or default_path())
    try:
        cursor = connection.execute("SELECT * FROM keys ORDER BY created, id")
        cursor.row_factory = sqlite3.Row
        rows = [dict(row) for row in cursor]
    finally:
        connection.close()
    now = time.time()
    for row in rows:
        del row["hash"]
        row["scopes"], row["quota"] = json.loads(row["scopes"]), json.loads(row["quota"])
        row["models"] = None if row["models"] is None else json.loads(row["models"])
        expired = row["expires"] is not None and row["expires"] <= now
        row["state"] = "revoked" if row["revoked"] is not None else "expired" if expired else "active"
    return rows


def revoke_key(id: str, *, path: Path | None = None) -> dict[str, Any]:
    """Revokes a key, from the next request on; once more changes nothing. Raises UserError where there is none."""
    path = path or default_path()
    connection = connect(path)
    try:
        connection.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (time.time(), id))
    finally:
        connection.close()
    for entry in list_keys(path=path):
        if entry["id"] == id:
            return entry
    raise UserError(f"there is no key {id}; `llmos keys list` shows them")
