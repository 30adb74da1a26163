"""Which replica gets a request."""

import dataclasses

from llmos_jax.serve.request import Request, Sampling
from llmos_jax.serve.router import Router

PREFIX = tuple(range(256))


def request(id: str, prompt=PREFIX, **fields) -> Request:
    return Request(id, tuple(prompt), Sampling(64), **fields)


def test_a_prefix_goes_where_it_is():
    router = Router(3)
    first = router.choose(request("a"), [0, 1, 2])
    router.done("a")
    other = router.choose(request("b", range(1000, 1200)), [0, 1, 2])
    assert other != first or router._load[first] > 0
    assert router.choose(request("c", (*PREFIX, 1, 2, 3)), [0, 1, 2]) == first


def test_another_tenant_s_prefix_does_not_count():
    router = Router(2)
    first = router.choose(request("a", salt="one"), [0, 1])
    assert router.choose(request("b", salt="two"), [0, 1]) == 1 - first


def test_load_is_spread_where_there_is_no_prefix():
    router = Router(4)
    placed = [router.choose(request(str(i), range(i * 300, i * 300 + 200)), [0, 1, 2, 3]) for i in range(40)]
    assert [placed.count(i) for i in range(4)] == [10] * 4


def test_a_much_busier_replica_is_avoided_in_spite_of_the_prefix():
    router = Router(2)
    first = router.choose(request("a"), [0, 1])
    for i in range(100):
        if router.choose(request(f"x{i}"), [0, 1]) != first:
            break
    else:
        raise AssertionError("everything went to one replica")


def test_only_usable_replicas_are_chosen_and_load_ends_with_the_request():
    router = Router(2)
    assert router.choose(request("a"), [1]) == 1
    router.done("a")
    router.done("a")
    assert router._load == [0, 0]
    big = dataclasses.replace(request("b"), n=4)
    router.choose(big, [0])
    assert router._load[0] == 256 + 4 * 64
