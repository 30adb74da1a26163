"""Who gives way where pages or slots are short, by hand."""

import pytest

from llmos_jax.serve.limits import Costs
from tests.serve.schedulers import request, run, scheduler, shape, take


def crowded(n=2, tenants="aa", priorities=(0, 0), **given):
    """Sequences of one page each in a pool that has no page more."""
    s = scheduler(num_blocks=n, **given)
    sequences = [s.add(request(3, tenant=tenants[i], priority=priorities[i], max_tokens=4))[0] for i in range(n)]
    take(s, s.schedule())
    take(s, s.schedule())
    assert all(x.num_computed == 4 and x.slot >= 0 for x in sequences)
    return s, *sequences


def test_the_latest_gives_way():
    s, old, new = crowded()
    step = s.schedule()
    assert [c.sequence for c in step.chunks] == [old] and len(old.blocks) == 2
    assert new.slot < 0 and new.blocks == [] and new.num_computed == 0 and new.preemptions == 1
    take(s, step)
    run(s)
    assert old.finish == new.finish == "length"


def test_the_lowest_priority_gives_way():
    s, low, high = crowded(priorities=(1, 0))
    assert [c.sequence for c in s.schedule().chunks] == [high] and low.preemptions == 1


def test_the_tenant_ahead_gives_way():
    s, ahead, behind = crowded(tenants="ab")
    s._waiting.charge("a", 100)
    assert [c.sequence for c in s.schedule().chunks] == [behind] and ahead.preemptions == 1


def test_a_victim_loses_its_part_of_the_step():
    s = scheduler(num_blocks=3, max_tokens=8)
    (low,) = s.add(request(2, "low", priority=1))
    take(s, s.schedule())
    (high,) = s.add(request(7, "high", priority=0, max_tokens=6))
    step = s.schedule()
    take(s, step)
    take(s, s.schedule())
    step = s.schedule()  # low is planned first, then high needs a page
    assert shape(step) == [("high", 8, 1, 0, 1)] and low.preemptions == 1 and low.pending == 0
    take(s, step)
    run(s)
    assert low.num_output == 8 and high.num_output == 6


def test_a_higher_priority_takes_a_slot():
    s = scheduler(max_sequences=1)
    (low,) = s.add(request(priority=1))
    take(s, s.schedule())
    (equal,) = s.add(request(priority=1))
    take(s, s.schedule())
    assert low.slot >= 0
    (high,) = s.add(request(priority=0))
    assert [c.sequence for c in s.schedule().chunks] == [high] and low.slot < 0 and equal.slot < 0


def test_preempted_while_in_flight():
    s, old, new = crowded()
    ahead = [s.schedule(), s.schedule()]
    take(s, ahead[0])
    tokens = new.tokens[:]
    take(s, ahead[1])
    run(s)
    assert new.tokens[: len(tokens)] == tokens and old.num_output == new.num_output == 4


@pytest.mark.parametrize(("speed", "swaps"), [(1e9, 1), (1e-3, 0)])
def test_swaps_where_it_is_cheaper(speed, swaps):
    s, old, new = crowded(host=2, costs=Costs(1000, speed, 4))
    before = new.blocks[0]
    step = s.schedule()
    assert len(step.swap_out) == s.stats()["swaps"] == swaps
    if swaps:
        assert step.swap_out == [(before, new.swapped[0])] and new.num_computed == 4
    take(s, step)
    while old.finish is None:
        take(s, s.schedule())
    step = s.schedule()
    assert len(step.swap_in) == swaps and step.chunks[0].start == (4 if swaps else 4 * (new.cached_tokens > 0))
    take(s, step)
    run(s)
    assert new.finish == "length" and s.stats()["host_used"] == 0


def test_recomputes_where_the_host_is_full():
    s, _, new = crowded(host=0, costs=Costs(1000, 1e9, 4))
    assert not s.schedule().swap_out and new.num_computed == 0


def test_abort_of_what_is_swapped():
    s, _, new = crowded(host=2, costs=Costs(1000, 1e9, 4))
    take(s, s.schedule())
    s.abort(new.request.id)
    assert s.stats()["host_used"] == 0 and s.num_waiting == 0


def test_preempted_go_first_in_their_class():
    s, old, new = crowded()
    (later,) = s.add(request(3, tenant="a", arrival=-5.0, max_tokens=4))
    take(s, s.schedule())
    while old.finish is None:
        take(s, s.schedule())
    assert s.schedule().chunks[0].sequence is new and later.slot < 0
