"""The audit log: one row a request, each row's hash over the one before. No jax.

    hash of row n = SHA-256(hash of row n - 1, body of row n)        head = (n, hash of row n, HMAC under the secret)

Rows are only ever added. Whoever can write to the database but does not hold the secret cannot change, add, remove
or reorder a row, nor cut off the end, without `verify` finding it: the chain gives away the first four, the signed
head the last. What cannot be found: an earlier state put back, rows and head together (so keep what `head` says
somewhere else now and then, and give it to `verify`), and anything done by who holds the secret.

Prompts and answers are kept as HMACs, not plain hashes: a plain hash of a short prompt can be guessed back.
"""

import hashlib
import hmac
import json
import sqlite3
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmos_jax.config import UserError
from llmos_jax.serve.http.database import Secret, Writer, connect, default_path
from llmos_jax.serve.request import Grammar, Request, Sampling, Token

START = "0" * 64


@dataclass(frozen=True, slots=True)
class Head:
    """The last row: its number (0 for none, rows count from 1) and its hash."""

    sequence: int
    hash: str

    @property
    def text(self) -> str:
        return f"{self.sequence}:{self.hash}"


@dataclass(frozen=True, slots=True)
class Broken:
    """The first row that is not as it was written, and why."""

    sequence: int
    reason: str


class Audit:
    """Adds rows through the writer's thread. `model_hashes`: of each served model, what tells its weights.

    store_text: keep the requests and answers too, as tokens, so that they can be replayed. Raises UserError if the
    log was tampered with: adding to it would sign what was done to it.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        model_hashes: dict[str, str] | None = None,
        store_text: bool = False,
        writer: Writer | None = None,
    ):
        path = path or default_path()
        self._secret, self._hashes, self._store = Secret(path), model_hashes or {}, store_text
        connection = connect(path)
        try:
            connection.execute("BEGIN IMMEDIATE")
            _start(connection, self._secret)
            connection.execute("COMMIT")
        finally:
            connection.close()
        self._writer, self._owns_writer = writer or Writer(path), writer is None

    @property
    def healthy(self) -> bool:
        return self._writer.healthy

    def close(self) -> None:
        self._writer.flush()
        if self._owns_writer:
            self._writer.close()

    def add(
        self,
        key_id: str,
        request: Request,
        model: str,
        finish: str,
        cached: int,
        outputs: tuple[tuple[Token, ...], ...],
    ) -> None:
        """Adds a row. It is on disk some milliseconds later; a crash may lose the rows of that time, never half a one."""
        now = time.time()

        def append(connection: sqlite3.Connection) -> None:  # hashing a long prompt is not for the event loop
            self._append(connection, {"time": now} | self._body(key_id, request, model, finish, cached, outputs))

        self._writer.put(append)

    def _body(
        self,
        key_id: str,
        request: Request,
        model: str,
        finish: str,
        cached: int,
        outputs: tuple[tuple[Token, ...], ...],
    ) -> dict[str, Any]:
        parameters = asdict(request.sampling)
        grammar = parameters.pop("grammar")
        body: dict[str, Any] = {
            "id": request.id,
            "key": key_id,
            "tenant": request.tenant,
            "model": model,
            "model_hash": self._hashes.get(model, ""),
            "adapter": request.adapter,
            "n": request.n,
            "seed": parameters.pop("seed"),
            "parameters": parameters,
            "grammar": grammar and {"kind": grammar["kind"], "mac": self._secret.mac("grammar", grammar["text"])},
            "prompt_tokens": len(request.prompt),
            "cached_tokens": cached,
            "output_tokens": [len(output) for output in outputs],
            "finish": finish,
            "prompt_mac": self._secret.mac("tokens", _canonical(request.prompt)),
            "output_macs": [self._secret.mac("tokens", _canonical(output)) for output in outputs],
        }
        if self._store:
            body["request"], body["outputs"] = asdict(request), outputs
            body["request"].pop("salt")  # tells tenants' prefixes apart, and is nobody's business
        return body

    def _append(self, connection: sqlite3.Connection, body: dict[str, Any]) -> None:
        head = _read_head(connection, self._secret)
        if head is None:
            raise UserError("the head of the audit log was changed; see `llmos audit verify`")
        sequence = head.sequence + 1
        text = _canonical({"sequence": sequence} | body)
        row = (sequence, body["id"], text, head.hash, _chain(head.hash, text))
        connection.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?)", row)
        _write_head(connection, self._secret, Head(sequence, row[-1]))


def head(path: Path | None = None) -> Head:
    """The last row; worth keeping where the server's administrator cannot reach it. Raises UserError if forged."""
    path = _existing(path)
    connection = connect(path)
    try:
        found = _read_head(connection, Secret(path))
    finally:
        connection.close()
    if found is None:
        raise UserError(f"{path} has no audit log, or its head was changed; see `llmos audit verify`")
    return found


def verify(path: Path | None = None, known: Head | None = None) -> Broken | None:
    """Reads the whole log; the first broken row, or None. `known`: a head kept elsewhere, which must be part of it."""
    path = _existing(path)
    secret, connection = Secret(path), connect(path)
    try:
        connection.execute("BEGIN")  # one snapshot, also while the server writes
        signed = _read_head(connection, secret)
        last = START
        count = 0
        for row in connection.execute("SELECT sequence, id, body, previous, hash FROM audit ORDER BY sequence"):
            count += 1
            if reason := _wrong(row, count, last):
                return Broken(count, reason)
            last = row[-1]
            if known is not None and known.sequence == count and known.hash != last:
                return Broken(count, "it differs from the head that was kept")
    finally:
        connection.close()
    if signed is None:
        return Broken(count + 1, "the head of the log is missing or its signature is wrong")
    if signed.sequence > count or (known is not None and known.sequence > count):
        return Broken(count + 1, "rows are missing at the end")
    if signed.sequence < count:
        return Broken(signed.sequence + 1, "rows were added behind the head")
    return None if signed.hash == last else Broken(count, "it differs from the signed head")


def replay_record(path: Path | None, id: str) -> tuple[Request, tuple[tuple[Token, ...], ...]]:
    """The stored request of that id, the last one of several, and its answers. Raises UserError where there is none."""
    connection = connect(_existing(path))
    try:
        row = connection.execute("SELECT body FROM audit WHERE id = ? ORDER BY sequence DESC LIMIT 1", (id,)).fetchone()
    finally:
        connection.close()
    if row is None:
        raise UserError(f"the audit log has no request {id}")
    body = json.loads(row[0])
    if "request" not in body:
        raise UserError(f"request {id} was logged without its text; start the server with --store-text to replay")
    return _request(body["request"]), tuple(map(tuple, body["outputs"]))


def _request(stored: dict[str, Any]) -> Request:
    sampling = dict(stored["sampling"])
    grammar = sampling["grammar"] and Grammar(**sampling["grammar"])
    bias = tuple((token, value) for token, value in sampling["logit_bias"])
    sampling |= {"grammar": grammar, "logit_bias": bias, "stop_ids": tuple(sampling["stop_ids"])}
    prompt, outputs = tuple(stored["prompt"]), tuple(map(tuple, stored["outputs"]))
    return Request(**stored | {"sampling": Sampling(**sampling), "prompt": prompt, "outputs": outputs})


def _existing(path: Path | None) -> Path:
    path = path or default_path()
    if not path.exists():
        raise UserError(f"{path} does not exist; name the server's database with --db")
    return path


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _chain(previous: str, body: str) -> str:
    return hashlib.sha256(f"{previous}\n{body}".encode("utf-8", "surrogatepass")).hexdigest()


def _wrong(row: tuple[Any, ...], expected: int, last: str) -> str:
    sequence, id, body, previous, hash = row
    if sequence != expected:
        return "the row is missing" if sequence > expected else "the row was inserted"
    if not (isinstance(previous, str) and previous == last):
        return "it does not follow the row before"
    if not isinstance(body, str) or _chain(previous, body) != hash:
        return "its content was changed"
    try:
        told = json.loads(body)
        return "" if (told["sequence"], told["id"]) == (sequence, id) else "its number or id was changed"
    except (ValueError, KeyError, TypeError):
        return "its content was changed"


def _start(connection: sqlite3.Connection, secret: Secret) -> None:
    """Makes the head of a log that has none yet; sees that the one there is genuine and that of the last row."""
    found = _read_head(connection, secret)
    last = connection.execute("SELECT MAX(sequence) FROM audit").fetchone()[0] or 0
    if not last and connection.execute("SELECT 1 FROM audit_head").fetchone() is None:
        found = Head(0, START)
        _write_head(connection, secret, found)
    if found is None or found.sequence != last:
        raise UserError("the audit log was tampered with: `llmos audit verify` says where; move the database away")


def _read_head(connection: sqlite3.Connection, secret: Secret) -> Head | None:
    row = connection.execute("SELECT sequence, hash, mac FROM audit_head").fetchone()
    if row is None:
        return None
    found = Head(row[0], row[1])
    genuine = hmac.compare_digest(str(row[2]).encode(), secret.mac("head", found.text).encode())
    return found if genuine else None


def _write_head(connection: sqlite3.Connection, secret: Secret, head: Head) -> None:
    row = (head.sequence, head.hash, secret.mac("head", head.text))
    connection.execute("INSERT OR REPLACE INTO audit_head VALUES (1, ?, ?, ?)", row)
