"""What an operator does with a server, checked: TLS, SIGTERM within a stream, the log verified, tampered with, replayed."""

import json
import signal
import sqlite3
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ASKED = {"messages": [{"role": "user", "content": "Tell me a long story about a fox."}], "temperature": 1.0, "seed": 3}


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of its own for 127.0.0.1, and its key. Raises FileNotFoundError where openssl is not there."""
    made, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(made), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return made, key


def ask(server: Any, path: str, body: dict[str, Any] | None = None) -> Any:
    """The open response. `server.trust` is the SSL context that knows the server's certificate."""
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps({"model": server.model} | body).encode()
    request = urllib.request.Request(f"{server.root}{path}", data, headers)
    return urllib.request.urlopen(request, timeout=120, context=server.trust)


def strangers_are_refused(server: Any) -> str:
    """A client that does not know the certificate goes no further."""
    try:
        urllib.request.urlopen(f"{server.root}/health", timeout=10, context=ssl.create_default_context())
    except urllib.error.URLError as error:
        return "" if isinstance(error.reason, ssl.SSLCertVerificationError) else f"another error: {error}"
    return "a client that does not know the certificate was answered"


def ended_within_a_stream(server: Any) -> str:
    """SIGTERM after the third event: /ready turns 503 while the stream goes on to its end, then the status is 0."""
    status, not_ready = None, threading.Event()

    def look() -> None:
        while not not_ready.is_set() and server.process.poll() is None:
            try:
                ask(server, "/ready").close()
            except urllib.error.HTTPError as error:
                if error.code == 503:
                    not_ready.set()
            except OSError:
                return
            time.sleep(0.05)

    body = ASKED | {"stream": True, "max_tokens": 200, "ignore_eos": True, "stream_options": {"include_usage": True}}
    events: list[str] = []
    after = 0  # events that came when /ready had said 503
    with ask(server, "/v1/chat/completions", body) as response:
        for line in response:
            if line.startswith(b"data: "):
                events.append(line[6:].decode().strip())
                after += not_ready.is_set()
            if len(events) == 3 and status is None:
                server.process.send_signal(signal.SIGTERM)
                status = "draining"
                threading.Thread(target=look, daemon=True).start()
    exit_status = server.process.wait(60)
    finish = [json.loads(event)["choices"] for event in events[:-1]]
    if events[-1] != "[DONE]" or not any(choices and choices[0]["finish_reason"] == "length" for choices in finish):
        return f"the stream was cut: {events[-2:]}"
    if json.loads(events[-2])["usage"]["completion_tokens"] != 200:
        return f"not all tokens came: {events[-2]}"
    if not after:
        return "/ready did not turn 503 while the stream was going on"
    return "" if exit_status == 0 else f"the server ended with status {exit_status}"


def audited(llmos: Callable[..., subprocess.CompletedProcess], database: Path, id: str, model: str) -> dict[str, str]:
    """The problem of each check, "" for none, of a log that is no longer written. `id`: of a request in it."""
    found = {}
    done = llmos("audit", "verify", "--db", str(database))
    found["the log is as it was written"] = "" if done.returncode == 0 else done.stdout + done.stderr
    done = llmos("replay", id, "--db", str(database), "--model", model)
    found["a logged request gives the same tokens again"] = "" if done.returncode == 0 else done.stdout + done.stderr
    with sqlite3.connect(database) as connection:
        (rows,) = connection.execute("SELECT count(*) FROM audit").fetchone()
    changes = {
        "a changed row": "UPDATE audit SET body = replace(body, '\"seed\":3', '\"seed\":4') WHERE sequence = 1",
        "a deleted row": "DELETE FROM audit WHERE sequence = 1",
        "a deleted end": f"DELETE FROM audit WHERE sequence = {rows}",
    }
    for name, change in changes.items():
        copy = database.with_name("changed.sqlite")
        copy.with_name(f"{copy.name}.secret").write_bytes(database.with_name(f"{database.name}.secret").read_bytes())
        with sqlite3.connect(database) as connection, sqlite3.connect(copy) as changed:
            connection.backup(changed)
            changed.execute(change)
            if not changed.total_changes:
                found[f"{name} is found"] = "the log was not changed"
                continue
        done = llmos("audit", "verify", "--db", str(copy))
        found[f"{name} is found"] = "" if done.returncode == 3 else f"status {done.returncode}: {done.stdout}"
    return found
