"""The server's one SQLite file, the secret beside it, and a thread that writes to it. No jax.

    serve.sqlite          keys, their use, the audit log (write-ahead logging: readers and the writer do not wait)
    serve.sqlite.secret   32 random bytes, mode 600: hashes keys, derives salts, signs the head of the log

The secret is kept out of the database so that a copy of it, or the right to write to it, is not enough to forge
either. Losing the secret makes every key invalid and the log unverifiable.
"""

import hashlib
import hmac
import logging
import os
import secrets
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from llmos_jax.config import UserError, home

log = logging.getLogger(__name__)

Job = Callable[[sqlite3.Connection], None]

RETRY_S = 0.5

SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, hash TEXT UNIQUE NOT NULL, name TEXT NOT NULL, tenant TEXT NOT NULL, created REAL NOT NULL,
    expires REAL, revoked REAL, priority INTEGER NOT NULL, scopes TEXT NOT NULL, models TEXT, quota TEXT NOT NULL,
    used_tokens INTEGER NOT NULL DEFAULT 0, used_requests INTEGER NOT NULL DEFAULT 0, last_used REAL
) STRICT;
CREATE TABLE IF NOT EXISTS audit (
    sequence INTEGER PRIMARY KEY, id TEXT NOT NULL, body TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS audit_id ON audit (id);
CREATE TABLE IF NOT EXISTS audit_head (
    one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER NOT NULL, hash TEXT NOT NULL, mac TEXT NOT NULL
) STRICT;
"""


def default_path() -> Path:
    return home() / "serve.sqlite"


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode; the file and its tables are made where missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(SCHEMA)
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"{path} cannot be used as the server's database ({error}); name another with --db") from error
    return connection


class Secret:
    """The server's secret, made on first use. One purpose never learns what another computes: each has its label."""

    def __init__(self, path: Path):
        file = path.with_name(path.name + ".secret")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make(file)
            self._key = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read or made ({error.strerror}); mend its permissions") from error
        if len(self._key) != 32:
            raise UserError(f"{file} is damaged: it should hold 32 bytes; restore it from a copy")

    @staticmethod
    def _make(file: Path) -> None:
        """Writes aside and links, so that of two processes that start at once one wins and neither sees a half."""
        if file.exists():
            return
        aside = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
        aside.touch(mode=0o600)
        aside.write_bytes(secrets.token_bytes(32))
        try:
            os.link(aside, file)
        except FileExistsError:
            pass
        finally:
            aside.unlink()

    def mac(self, purpose: str, text: str | bytes) -> str:
        data = text.encode() if isinstance(text, str) else text
        return hmac.new(self._key, purpose.encode() + b"\0" + data, hashlib.sha256).hexdigest()


class Writer:
    """A thread that runs jobs on a connection of its own, all that wait in one transaction.

    A batch is written or it is not: what fails is rolled back and tried again, and no job is dropped. `healthy` is
    False while writing fails or more than `bound` jobs wait; who puts jobs asks it before taking on new work.
    """

    def __init__(self, path: Path, bound: int = 10_000):
        self._connection = connect(path)
        self._jobs: deque[Job] = deque()
        self._bound = bound
        self._changed = threading.Condition()
        self._busy = self._closing = self._failing = False
        self._thread = threading.Thread(target=self._run, name="serve-database", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return not self._failing and len(self._jobs) <= self._bound

    def put(self, job: Job) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits until what was put is on disk; False if that took longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout)

    def close(self, timeout: float = 10.0) -> bool:
        """Writes what waits and ends the thread; False if that could not be done in `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive() and not self._jobs

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    break
                batch, self._busy = list(self._jobs), True
            written = self._write(batch)
            with self._changed:
                self._busy = False
                if written:
                    for _ in batch:
                        self._jobs.popleft()
                elif self._closing:
                    break
                self._changed.notify_all()
                if not written:
                    self._changed.wait_for(lambda: self._closing, RETRY_S)
        self._connection.close()

    def _write(self, batch: list[Job]) -> bool:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for job in batch:
                job(self._connection)
            self._connection.execute("COMMIT")
        except Exception as error:  # whatever it is: what cannot be written must not go on unwritten
            if not self._failing:
                log.error("the server's database cannot be written, new requests are refused: %s", error)
            self._failing = True
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            return False
        self._failing = False
        return True
