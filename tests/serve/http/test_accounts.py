"""API keys: who gets in, what each may take, and that it gets back what it did not use."""

import sqlite3
import stat
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.config import UserError
from llmos_jax.serve.http.accounts import Accounts, Bucket, Quota, create_key, list_keys, revoke_key
from llmos_jax.serve.http.errors import ApiError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path):
    return tmp_path / "serve.sqlite"


@pytest.fixture
def opened(path):
    made = []

    def start(**arguments):
        made.append(Accounts(path, **arguments))
        return made[-1]

    yield start
    for accounts in made:
        accounts.close()


def bearer(entry):
    return f"Bearer {entry['key']}"


def refused(status, call, *arguments):
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    assert caught.value.status == status
    return caught.value


def test_a_key_gets_in_until_it_is_revoked(path, opened):
    key = create_key("ann", path=path, tenant="blue", priority=3, models=["m"])
    accounts = opened(require_keys=True)
    caller = accounts.authorize(bearer(key), "/v1/models")
    assert (caller.tenant, caller.key_id, caller.priority) == ("blue", key["id"], 3)
    assert caller.may_use("m") and not caller.may_use("other")
    assert revoke_key(key["id"], path=path)["state"] == "revoked"
    refused(401, accounts.authorize, bearer(key), "/v1/models")
    revoked = list_keys(path=path)[0]["revoked"]
    assert revoke_key(key["id"], path=path)["revoked"] == revoked


def test_every_wrong_key_is_told_the_same(path, opened, monkeypatch):
    gone, old = create_key("gone", path=path), create_key("old", path=path, expires_in=50)
    good = create_key("good", path=path)
    revoke_key(gone["id"], path=path)
    accounts = opened()
    accounts.authorize(bearer(old), "/v1/models")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 51)
    wrong = [None, "", "Bearer", "Bearer sk-llmos-", bearer(good) + "x", bearer(good)[:-1], f"Basic {good['key']}"]
    wrong += [bearer(gone), bearer(old), good["key"], "Bearer sk-llmos-é\udcff"]
    told = [refused(401, accounts.authorize, header, "/v1/models") for header in wrong]
    assert len({(error.message, error.code, error.type) for error in told}) == 1
    accounts.authorize(bearer(good), "/v1/models")


def test_the_key_is_nowhere_in_the_files(path, opened):
    key = create_key("ann", path=path)["key"]
    accounts = opened()
    accounts.authorize(f"Bearer {key}", "/v1/models")
    for file in path.parent.iterdir():
        assert key.removeprefix("sk-llmos-").encode() not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
    assert not {"key", "hash"} & set(list_keys(path=path)[0])


def test_keys_of_one_server_are_worth_nothing_at_another(path, tmp_path):
    key = create_key("ann", path=path)
    other = tmp_path / "other" / "serve.sqlite"
    create_key("ben", path=other)
    with sqlite3.connect(path) as source, sqlite3.connect(other) as target:  # even with its row copied over
        target.execute("INSERT INTO keys SELECT * FROM (SELECT ? AS id, ?, ?, ?, 0, NULL, NULL, 0, ?, NULL, ?, 0, 0, NULL)",
                       source.execute("SELECT id, hash, name, tenant, scopes, quota FROM keys").fetchone())  # fmt: skip
    source.close()
    target.close()
    accounts = Accounts(other)
    refused(401, accounts.authorize, bearer(key), "/v1/models")
    accounts.close()


@pytest.mark.parametrize(
    ("scopes", "path_asked", "status"),
    [
        (["infer"], "/v1/chat/completions", None),
        (["infer"], "/admin/keys", 403),
        (["infer"], "/metrics", 403),
        (["metrics"], "/metrics", None),
        (["metrics"], "/v1/models", 403),
        (["admin"], "/admin/keys", None),
        (["admin"], "/metrics", None),
        (["admin"], "/v1/models", None),
    ],
)
def test_scopes(path, opened, scopes, path_asked, status):
    key = create_key("ann", path=path, scopes=scopes)
    accounts = opened()
    if status is None:
        assert accounts.authorize(bearer(key), path_asked).key_id == key["id"]
    else:
        refused(status, accounts.authorize, bearer(key), path_asked)


def test_what_needs_no_key(path, opened):
    accounts = opened(require_keys=True)
    for public in ("/", "/health", "/ready", "/page/page.js"):
        assert not accounts.authorize(None, public).scopes
    for covered in (
        "/healthy",
        "/page",
        "/v1/models",
        "/metrics",
        "/admin/keys",
        "/openapi.json",
        "/docs",
        "/live",
        "//",
    ):
        refused(401, accounts.authorize, None, covered)


def test_open_only_on_this_machine_until_the_first_key(path, opened):
    accounts = opened()
    assert accounts.authorize(None, "/v1/models").tenant == ""
    refused(401, accounts.authorize, None, "/admin/keys")
    assert accounts.authorize("Bearer EMPTY", "/v1/models").tenant == ""  # OpenAI's clients always send something
    key = create_key("ann", path=path)
    refused(401, accounts.authorize, None, "/v1/models")
    revoke_key(key["id"], path=path)
    refused(401, accounts.authorize, None, "/v1/models")  # revoking the last key opens nothing


def test_a_server_that_others_reach_needs_keys(path, opened):
    with pytest.raises(UserError, match="llmos keys create"):
        opened(local=False)
    create_key("ann", path=path)
    refused(401, opened(local=False).authorize, None, "/v1/models")


def test_salts_differ_by_tenant_and_outlive_the_process(path, opened):
    first, second = opened(), opened()
    assert first.salt("a") == second.salt("a") != first.salt("b")


def test_requests_a_minute_with_the_exact_wait(path, opened):
    key, clock = create_key("ann", path=path, quota=Quota(requests_per_minute=3)), Clock()
    accounts = opened(clock=clock)
    caller = accounts.authorize(bearer(key), "/v1/models")
    for _ in range(3):
        accounts.admit(caller, 1, 1)
    assert refused(429, accounts.admit, caller, 1, 1).retry_after == 20
    clock.now += 13.5
    assert refused(429, accounts.admit, caller, 1, 1).retry_after == 7
    clock.now += 6.5
    accounts.admit(caller, 1, 1)
    assert refused(429, accounts.admit, caller, 1, 1).retry_after == 20


def test_tokens_a_minute_are_reserved_and_given_back(path, opened):
    key, clock = create_key("ann", path=path, quota=Quota(tokens_per_minute=600)), Clock()
    accounts = opened(clock=clock)
    caller = accounts.authorize(bearer(key), "/v1/models")
    accounts.admit(caller, 100, 400)
    held = accounts.reserve(caller, 100, 400)
    assert refused(429, accounts.admit, caller, 100, 50).retry_after == 5  # 150 needed, 100 there, 10 a second
    accounts.settle(held, 20)
    accounts.admit(caller, 100, 380)  # 600 - 120
    refused(429, accounts.admit, caller, 100, 381)
    accounts.settle(held, 20)  # once more changes nothing
    refused(429, accounts.admit, caller, 100, 381)
    assert refused(400, accounts.admit, caller, 300, 301).retry_after is None


def test_a_budget_in_all_outlives_the_process(path, opened):
    key = create_key("ann", path=path, quota=Quota(tokens=100))
    accounts = opened()
    caller = accounts.authorize(bearer(key), "/v1/models")
    held = accounts.reserve(caller, 10, 80)
    refused(429, accounts.admit, caller, 1, 10)
    accounts.settle(held, 30)
    accounts.admit(caller, 10, 50)
    accounts.close()
    again = Accounts(path)
    caller = again.authorize(bearer(key), "/v1/models")
    again.admit(caller, 10, 50)
    error = refused(429, again.admit, caller, 10, 51)
    assert error.code == "insufficient_quota" and error.retry_after is None and "60 left" in error.message
    again.close()
    assert (list_keys(path=path)[0]["used_tokens"], list_keys(path=path)[0]["used_requests"]) == (40, 1)


def test_requests_at_once(path, opened):
    key = create_key("ann", path=path, quota=Quota(concurrent=2))
    accounts = opened()
    caller = accounts.authorize(bearer(key), "/v1/models")
    held = [accounts.reserve(caller, 1, 1) for _ in range(2)]
    assert refused(429, accounts.admit, caller, 1, 1).retry_after == 1
    accounts.settle(held[0], 1)
    accounts.admit(caller, 1, 1)


def test_kv_bytes_become_pages(path, opened):
    key = create_key("ann", path=path, quota=Quota(kv_bytes=10_000))
    assert opened(page_bytes=4096).authorize(bearer(key), "/v1/models").max_pages == 2
    assert opened(page_bytes=1 << 20).authorize(bearer(key), "/v1/models").max_pages == 1  # never none at all


@pytest.mark.parametrize(
    "make",
    [
        lambda path: create_key(" ", path=path),
        lambda path: create_key("a", path=path, scopes=["root"]),
        lambda path: create_key("a", path=path, scopes=[]),
        lambda path: create_key("a", path=path, expires_in=-1),
        lambda path: create_key("a", path=path, expires_in=float("nan")),
        lambda path: Quota(tokens=0),
        lambda path: revoke_key("key-none", path=path),
    ],
)
def test_what_cannot_be_is_told(path, make):
    with pytest.raises(UserError):
        make(path)


@given(
    st.integers(1, 5000),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 6000)), min_size=1, max_size=40),
)
def test_a_bucket_never_gives_more_than_its_rate_and_its_wait_is_exact(per_minute, steps):
    now, taken, bucket = 0.0, 0, Bucket(per_minute, 0.0)
    for pause, amount in steps:
        now += pause
        wait = bucket.wait(amount, now)
        if amount > per_minute:
            assert wait == float("inf")
            continue
        if wait > 1e-6:
            assert bucket.wait(amount, now + wait * 0.999) > 0
            now += wait
            assert bucket.wait(amount, now) < 1e-6
        bucket.take(amount, now)
        taken += amount
        assert taken <= per_minute + now * per_minute / 60 + 1e-3
