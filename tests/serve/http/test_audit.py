"""The audit log: whatever is done to it, `verify` finds it; and a stored request comes back as it was."""

import hashlib
import json
import shutil
import sqlite3
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.config import UserError
from llmos_jax.serve.http.audit import Audit, Head, head, replay_record, verify
from llmos_jax.serve.http.database import Writer
from llmos_jax.serve.request import Grammar, Request, Sampling

ROWS = 6
REQUEST = Request(
    "r1",
    (11, 22, 33),
    Sampling(9, seed=5, stop_ids=(2, 3), logit_bias=((7, -1.5),), grammar=Grammar("regex", "[a-z]+")),
    model="m",
    n=2,
    tenant="blue",
    salt="pepper",
    outputs=((1,), (2, 3)),
)


def record(path, count=ROWS, **arguments):
    audit = Audit(path, **arguments)
    for i in range(count):
        request = Request(f"r{i}", tuple(range(i + 1)), Sampling(8), tenant="blue")
        audit.add("key-1", request, "m", "stop", 0, ((i, i + 1),))
    audit.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "serve.sqlite"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("audit") / "serve.sqlite"
    record(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path


def change(path, *statements):
    connection = sqlite3.connect(path)
    with connection:
        for statement, *values in statements:
            connection.execute(statement, values)
    connection.close()


def rows(path):
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT * FROM audit ORDER BY sequence").fetchall()
    connection.close()
    return found


def test_a_log_goes_on_after_a_restart_and_is_intact(path):
    assert head_of_new(path) == Head(0, "0" * 64)
    record(path)
    kept = head(path)
    record(path)
    assert verify(path) is None and verify(path, kept) is None
    assert len(rows(path)) == head(path).sequence == 2 * ROWS


def head_of_new(path):
    Audit(path).close()
    return head(path)


def test_a_row_says_all_but_the_text(path):
    audit = Audit(path, model_hashes={"m": "sha256:abc"})
    audit.add("key-1", REQUEST, "m", "length", 2, ((101, 102), (103,)))
    audit.close()
    text = rows(path)[0][2]
    body = json.loads(text)
    assert (body["key"], body["tenant"], body["model_hash"], body["seed"]) == ("key-1", "blue", "sha256:abc", 5)
    assert (body["prompt_tokens"], body["output_tokens"], body["finish"]) == (3, [2, 1], "length")
    assert body["parameters"]["max_tokens"] == 9 and body["cached_tokens"] == 2
    for secret in ("11,22", "101,102", "pepper", "[a-z]+"):
        assert secret not in text
    with pytest.raises(UserError, match="store-text"):
        replay_record(path, "r1")


def test_a_stored_request_comes_back_as_it_was(path):
    audit = Audit(path, store_text=True)
    audit.add("key-1", REQUEST, "m", "length", 0, ((101, 102), (103,)))
    audit.close()
    request, outputs = replay_record(path, "r1")
    assert outputs == ((101, 102), (103,))
    assert request.sampling == REQUEST.sampling and hash(request) is not None
    fields = ("id", "prompt", "model", "n", "tenant", "outputs", "arrival")
    assert all(getattr(request, name) == getattr(REQUEST, name) for name in fields)
    with pytest.raises(UserError, match="no request r9"):
        replay_record(path, "r9")


@pytest.mark.parametrize(
    ("done", "sequence"),
    [
        (["DELETE FROM audit WHERE sequence = 3"], 3),
        (["DELETE FROM audit WHERE sequence = 1"], 1),
        (["DELETE FROM audit WHERE sequence >= 5"], 5),
        (["DELETE FROM audit"], 1),
        (["DELETE FROM audit_head"], ROWS + 1),
        (["UPDATE audit SET sequence = 100 WHERE sequence = 2", "UPDATE audit SET sequence = 2 WHERE sequence = 3",
          "UPDATE audit SET sequence = 3 WHERE sequence = 100"], 2),
        (["DELETE FROM audit WHERE sequence = 6", "UPDATE audit_head SET sequence = 5, "
          "hash = (SELECT hash FROM audit WHERE sequence = 5)"], 6),
        (["UPDATE audit SET id = 'x' WHERE sequence = 4"], 4),
        (["UPDATE audit SET body = replace(body, 'blue', 'pink') WHERE sequence = 4"], 4),
    ],
)  # fmt: skip
def test_tampering_is_found_where_it_is(written, tmp_path, done, sequence):
    copy = clone(written, tmp_path)
    change(copy, *[(statement,) for statement in done])
    assert verify(copy).sequence == sequence


def clone(written, folder):
    copy = folder / "serve.sqlite"
    for suffix in ("-wal", "-shm"):
        copy.with_name(copy.name + suffix).unlink(missing_ok=True)
    for name in (written.name, written.name + ".secret"):
        shutil.copy(written.with_name(name), folder / name)
    return copy


def test_a_whole_chain_computed_anew_is_found(written, tmp_path):
    """Who can write and knows how hashes are made, but not the secret, cannot sign the head."""
    copy, last, forged = clone(written, tmp_path), "0" * 64, []
    for sequence, id, body, _, _ in rows(copy):
        text = body.replace("blue", "pink")
        link = chained(last, text)
        forged.append((sequence, id, text, last, link))
        last = link
    change(copy, ("DELETE FROM audit",), *[("INSERT INTO audit VALUES (?, ?, ?, ?, ?)", *row) for row in forged])
    assert verify(copy).reason == "it differs from the signed head"
    change(copy, ("UPDATE audit_head SET hash = ?", last))
    assert "signature" in verify(copy).reason
    with pytest.raises(UserError, match="tampered"):
        Audit(copy)  # adding to it would sign the forgery


def chained(previous, body):
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()


def test_one_row_forged_with_its_hash_does_not_fit_the_next(written, tmp_path):
    copy = clone(written, tmp_path)
    _, _, body, previous, _ = rows(copy)[2]
    forged = body.replace("blue", "pink")
    change(copy, ("UPDATE audit SET body = ?, hash = ? WHERE sequence = 3", forged, chained(previous, forged)))
    assert verify(copy).sequence == 4


def test_an_earlier_state_put_back_is_found_with_a_head_kept_elsewhere(path, tmp_path):
    record(path)
    change(path, ("PRAGMA wal_checkpoint(TRUNCATE)",))
    folder = tmp_path / "old"
    folder.mkdir()
    old = clone(path, folder)
    record(path)
    kept = head(path)
    assert verify(old) is None  # it was the truth once
    assert verify(old, kept).sequence == ROWS + 1


@given(st.data())
def test_any_byte_of_any_row_flipped_is_found(written, tmp_path_factory, data):
    copy = clone(written, tmp_path_factory.mktemp("flip"))
    table = data.draw(st.sampled_from(["audit", "audit", "audit", "audit_head"]))
    names = {"audit": ("sequence", "id", "body", "previous", "hash"), "audit_head": ("sequence", "hash", "mac")}[table]
    column = data.draw(st.sampled_from(names))
    row = data.draw(st.integers(1, ROWS)) if table == "audit" else 1
    key = "sequence" if table == "audit" else "one"
    connection = sqlite3.connect(copy)
    old = connection.execute(f"SELECT {column} FROM {table} WHERE {key} = ?", (row,)).fetchone()[0]
    if column == "sequence":
        new = data.draw(st.integers(-5, 50).filter(lambda value: not 1 <= value <= ROWS or value == old))
    else:
        at, char = data.draw(st.integers(0, len(old) - 1)), data.draw(st.characters(codec="utf-8"))
        new = old[:at] + char + old[at + 1 :]
    connection.close()
    if new == old:
        assert verify(copy) is None
        return
    change(copy, (f"UPDATE {table} SET {column} = ? WHERE {key} = ?", new, row))
    assert verify(copy) is not None


@given(st.permutations(range(1, ROWS + 1)), st.sets(st.integers(1, ROWS), max_size=3))
def test_any_order_but_the_true_one_and_any_gap_are_found(written, tmp_path_factory, order, gone):
    copy = clone(written, tmp_path_factory.mktemp("order"))
    kept = [row for row in (rows(copy)[i - 1] for i in order) if row[0] not in gone]
    moved = [(number, *row[1:]) for number, row in enumerate(kept, 1)]
    change(copy, ("DELETE FROM audit",), *[("INSERT INTO audit VALUES (?, ?, ?, ?, ?)", *row) for row in moved])
    same = order == sorted(order) and not gone
    assert (verify(copy) is None) == same


def test_rows_wait_while_the_database_is_locked_and_none_is_lost(path, monkeypatch):
    monkeypatch.setattr("llmos_jax.serve.http.database.RETRY_S", 0.02)
    writer = Writer(path, bound=3)
    writer._connection.execute("PRAGMA busy_timeout = 20")
    audit = Audit(path, writer=writer)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    for i in range(5):
        audit.add("k", Request(f"r{i}", (1,), Sampling(1)), "m", "stop", 0, ((1,),))
    assert not audit.healthy  # new requests are refused meanwhile
    assert not writer.flush(0.1)
    blocker.execute("ROLLBACK")
    blocker.close()
    audit.close()
    assert audit.healthy and writer.close()
    assert verify(path) is None and [row[1] for row in rows(path)] == [f"r{i}" for i in range(5)]


def test_two_servers_on_one_log(path):
    audits = [Audit(path) for _ in range(2)]

    def fill(audit, name):
        for i in range(50):
            audit.add("k", Request(f"{name}{i}", (1,), Sampling(1)), "m", "stop", 0, ((1,),))

    threads = [threading.Thread(target=fill, args=pair) for pair in zip(audits, "ab", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for audit in audits:
        audit.close()
    assert verify(path) is None and len(rows(path)) == 100
