"""Each decision of the scheduler, by hand."""

import itertools
import random

import pytest

from llmos_jax.serve import fair
from llmos_jax.serve.block_manager import BlockManager
from llmos_jax.serve.fair import FairQueue
from llmos_jax.serve.limits import Costs, Limits
from llmos_jax.serve.request import Request, Sampling
from llmos_jax.serve.scheduler import Scheduler
from llmos_jax.serve.sequence import Sequence

SERIAL = itertools.count()
SAMPLING = {"max_tokens", "min_tokens", "stop_ids", "prompt_logprobs", "presence_penalty"}


def scheduler(num_blocks=64, block_size=4, host=0, costs=None, clock=lambda: 0.0, **limits):
    limits = {"max_tokens": 16, "max_rows": 16, "max_sequences": 4, "max_model_len": 64} | limits
    return Scheduler(Limits(**limits), BlockManager(num_blocks, block_size, host), costs, clock)


def request(prompt=4, id=None, **given):
    """prompt: its length, of tokens that no other request has, or the tokens."""
    number = next(SERIAL)
    tokens = tuple(range(1000 * number, 1000 * number + prompt)) if isinstance(prompt, int) else tuple(prompt)
    sampling = Sampling(**({"max_tokens": 8} | {name: given.pop(name) for name in SAMPLING & set(given)}))
    given.setdefault("arrival", float(number))
    return Request(id or f"r{number}", tokens, sampling, **given)


def take(s, step, token=7):
    """Takes in a step that drew `token` everywhere."""
    return [s.advance(chunk, [token] * chunk.num_rows) for chunk in step.chunks]


def run(s, token=7, most=1000):
    """Drives it to the end."""
    for _ in range(most):
        if not s.has_work:
            return
        take(s, s.schedule(), token)
    raise AssertionError("no end")


def shape(step):
    return [(c.sequence.request.id, c.start, c.num_tokens, c.num_drafts, c.num_rows) for c in step.chunks]


# Steps.


def test_prefill_then_decode():
    s = scheduler()
    (a,) = s.add(request(5, "a", max_tokens=2))
    step = s.schedule()
    assert shape(step) == [("a", 0, 5, 0, 1)] and a.pending == 1 and a.num_computed == 5
    assert take(s, step) == [[7]] and a.tokens[-1] == 7 and not a.pending
    step = s.schedule()
    assert shape(step) == [("a", 5, 1, 0, 1)]
    assert take(s, step) == [[7]] and a.finish == "length"
    assert not s.has_work and s.schedule() is None and s.blocks.available == 64


def test_chunks_share_the_budget_behind_decodes():
    s = scheduler(max_tokens=6, chunk=4)
    s.add(request(2, "a"))
    take(s, s.schedule())
    s.add(request(9, "b"))
    s.add(request(9, "c"))
    assert shape(s.schedule()) == [("a", 2, 1, 0, 1), ("b", 0, 4, 0, 0), ("c", 0, 1, 0, 0)]


def test_a_prompt_moves_on_in_every_step_even_where_all_others_decode():
    s = scheduler(max_tokens=4, max_rows=4)
    for _ in range(3):
        s.add(request(1, max_tokens=40))
    take(s, s.schedule())
    (long,) = s.add(request(20, "long"))
    for _ in range(20):
        before = long.num_computed
        take(s, s.schedule())
        assert long.num_computed == before + 1


def test_a_prompt_may_be_cut_anywhere():
    for chunk in range(1, 12):
        s = scheduler(chunk=chunk)
        (a,) = s.add(request(11, max_tokens=1))
        starts = []
        while a.finish is None:
            step = s.schedule()
            starts += [c.start for c in step.chunks]
            take(s, step)
        assert starts == list(range(0, 11, chunk))


def test_a_chunk_stops_short_of_its_last_token_where_no_row_is_left():
    s = scheduler(max_rows=5, chunk=4)
    s.add(request(12, "logprobs", prompt_logprobs=0))
    s.add(request(6, "b"))
    s.add(request(1, "c"))
    take(s, s.schedule())
    step = s.schedule()
    assert shape(step) == [("c", 1, 1, 0, 1), ("logprobs", 4, 4, 0, 4), ("b", 4, 1, 0, 0)]
    take(s, step)
    run(s)


def test_limits_that_would_starve_are_refused():
    with pytest.raises(ValueError, match="gets a token in each step"):
        Limits(max_tokens=3, max_rows=4, max_sequences=4, max_model_len=8)


def test_stops():
    s = scheduler()
    (a,) = s.add(request(stop_ids=(9,)))
    take(s, s.schedule())
    take(s, s.schedule(), 9)
    assert a.finish == "stop" and a.tokens[-2:] == [7, 9]
    (b,) = s.add(request(stop_ids=(9,), min_tokens=2))
    take(s, s.schedule(), 9)
    take(s, s.schedule(), 9)
    assert b.finish is None
    take(s, s.schedule(), 9)
    assert b.finish == "stop" and b.num_output == 3


def test_ends_at_the_longest_sequence():
    s = scheduler(max_model_len=6)
    (a,) = s.add(request(4))
    run(s)
    assert a.finish == "length" and len(a.tokens) == 6


def test_an_embedding_draws_nothing():
    s = scheduler(max_model_len=4)
    (a,) = s.add(request(4, embed=True))
    assert take(s, s.schedule()) == [[]]
    assert a.finish == "stop" and a.num_output == 0 and not s.has_work


def test_the_engine_may_end_an_answer():
    s = scheduler()
    (a,) = s.add(request())
    take(s, s.schedule())
    s.finish(a, "stop")
    s.finish(a, "error")
    assert a.finish == "stop" and not s.has_work and s.blocks.stats()["used"] == 0


# Planning ahead.


def test_runs_ahead_of_the_host():
    s = scheduler()
    (a,) = s.add(request(4, max_tokens=3))
    first = s.schedule()
    assert s.runs_ahead
    second = s.schedule()
    assert shape(second)[0][1:] == (4, 1, 0, 1) and a.pending == 2 and a.num_ahead == 6
    take(s, first)
    third = s.schedule()
    assert s.schedule() is None  # as many are pending as may be drawn
    assert take(s, second) == [[7]] and take(s, third) == [[7]] and a.finish == "length"


def test_results_after_the_end_are_dropped():
    s = scheduler()
    (a,) = s.add(request(4, stop_ids=(9,)))
    first, second = s.schedule(), s.schedule()
    take(s, first, 9)
    assert a.finish == "stop" and s.blocks.stats()["used"] == 0
    assert take(s, second) == [[]] and a.tokens[-1] == 9


def test_waits_for_the_token_where_the_next_draw_depends_on_it():
    s = scheduler()
    s.add(request(presence_penalty=1.0))
    step = s.schedule()
    assert not s.runs_ahead and s.schedule() is None
    take(s, step)
    assert s.schedule()


# Drafts.


def drafted(drafts, **given):
    s = scheduler(**given)
    (a,) = s.add(request(4, max_tokens=6))
    take(s, s.schedule())
    a.drafts = list(drafts)
    return s, a


def test_drafts_are_accepted_while_equal():
    s, a = drafted([1, 2, 3])
    step = s.schedule()
    assert shape(step)[0][1:] == (4, 4, 3, 4) and not s.runs_ahead and s.schedule() is None
    assert s.advance(step.chunks[0], [1, 2, 8, 9]) == [1, 2, 8]
    assert a.num_computed == len(a.tokens) - 1 == 7 and a.drafts == []


def test_all_drafts_and_the_token_after_them():
    s, a = drafted([1, 2])
    assert s.advance(s.schedule().chunks[0], [1, 2, 3]) == [1, 2, 3]
    assert a.num_computed == len(a.tokens) - 1


def test_drafts_stop_at_the_end_of_the_answer():
    s, a = drafted([1, 2, 3, 4, 5, 6, 7])
    step = s.schedule()
    assert step.chunks[0].num_drafts == 4 == len(a.drafts)  # with the token after them, 6 in all
    assert s.advance(step.chunks[0], [1, 2, 3, 4, 5]) == [1, 2, 3, 4, 5] and a.finish == "length"


def test_drafts_leave_a_token_for_each_running_sequence():
    s, _ = drafted([1, 2, 3, 4], max_tokens=5, max_rows=5)
    s.add(request(9, "b"))
    s.schedule()
    assert len(s.running) == 1  # all went to drafts and nothing waited in a slot
    s, a = drafted([], max_tokens=5, max_rows=5)
    s.add(request(9, "b"))
    take(s, s.schedule())
    a.drafts = [1, 2, 3, 4]
    assert shape(s.schedule())[1] == ("b", 4, 1, 0, 0)


def test_drafts_take_no_page_from_others():
    s, a = drafted([1, 2, 3, 4, 5], num_blocks=3)
    s.blocks.extend(Sequence(request()), 1)  # somebody else's
    step = s.schedule()
    assert step.chunks[0].num_drafts == 3 == len(a.drafts) and not s.stats()["preemptions"]


# The prefix cache.


def test_a_full_hit_computes_the_last_token_again():
    s = scheduler()
    tokens = range(8)
    s.add(request(tokens, max_tokens=1))
    run(s)
    (a,) = s.add(request(tokens))
    step = s.schedule()
    assert shape(step)[0][1:] == (4, 4, 0, 1) and a.cached_tokens == 4
    assert s.stats()["hits"] == 4


def test_answers_are_found_again_too():
    s = scheduler()
    (a,) = s.add(request(4, max_tokens=8))
    run(s)
    (b,) = s.add(request(a.tokens))
    s.schedule()
    assert b.cached_tokens == 8  # of 12 tokens the last one is drawn only


def test_prompt_logprobs_compute_everything_in_chunks_of_rows():
    s = scheduler(max_rows=5)
    s.add(request(range(8), max_tokens=1))
    run(s)
    s.add(request(range(8), "a", prompt_logprobs=0))
    step = s.schedule()
    assert shape(step) == [("a", 0, 5, 0, 5)]
    take(s, step)
    step = s.schedule()
    assert shape(step) == [("a", 5, 3, 0, 3)] and take(s, step) == [[7]]


# Many answers.


def test_answers_share_the_pages_of_the_prompt():
    s = scheduler()
    first, second, third = s.add(request(6, "a", n=3))
    assert s.num_waiting == 3
    step = s.schedule()
    assert [c.sequence for c in step.chunks] == [first]
    take(s, step)
    step = s.schedule()
    assert shape(step) == [("a", 6, 1, 0, 1), ("a", 5, 1, 0, 1), ("a", 5, 1, 0, 1)]
    assert second.blocks[0] == third.blocks[0] == first.blocks[0]
    assert step.copies == [(first.blocks[1], second.blocks[1]), (first.blocks[1], third.blocks[1])]
    assert s.stats()["used"] == 4
    take(s, step)
    run(s)
    assert {x.finish for x in (first, second, third)} == {"length"}


def test_nothing_is_copied_where_the_prompt_ends_with_a_block_and_one_token():
    s = scheduler()
    s.add(request(5, n=2))
    take(s, s.schedule())
    step = s.schedule()
    assert step.copies == [] and [c.start for c in step.chunks] == [5, 4]


def test_answers_go_on_where_the_first_one_ended():
    s = scheduler()
    sequences = s.add(request(6, n=3, max_tokens=1))
    run(s)
    assert [x.finish for x in sequences] == ["length"] * 3


def test_abort_ends_all_answers():
    for steps in range(3):
        s = scheduler()
        sequences = s.add(request(6, "a", n=3))
        for _ in range(steps):
            take(s, s.schedule())
        assert set(s.abort("a")) == set(sequences) and s.abort("a") == []
        assert not s.has_work and s.num_waiting == 0 and s.blocks.stats()["used"] == 0


# Replay.


def test_replay_goes_on_from_the_tokens_given():
    s = scheduler()
    (a,) = s.add(request(4, outputs=((1, 2),), max_tokens=4))
    assert shape(s.schedule())[0][1:] == (0, 6, 0, 1)
    assert a.num_output == 2
    s = scheduler()
    (a,) = s.add(request(4, outputs=((1, 2),), max_tokens=4))
    run(s)
    assert a.tokens[4:] == [1, 2, 7, 7] and a.finish == "length"


def test_a_replayed_answer_that_was_complete_ends_at_once():
    s = scheduler()
    done, cut, open_ = s.add(request(4, outputs=((1, 9), (1, 2, 3), ()), n=3, max_tokens=3, stop_ids=(9,)))
    assert (done.finish, cut.finish, open_.finish) == ("stop", "length", None)
    run(s)
    assert open_.finish == "length" and open_.num_output == 3


# What can never be answered.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": 0}, "empty prompt"),
        ({"prompt": 64}, "has 64 tokens, and with its answer at most 64 fit"),
        ({"prompt": 30, "max_tokens": 4}, "need 9 pages of 4 tokens, and at most 8 may be held"),
        ({"prompt": 8, "max_tokens": 6, "max_pages": 3}, "need 4 pages of 4 tokens, and at most 3 may be held"),
    ],
)
def test_refuses_what_never_fits(given, message):
    s = scheduler(num_blocks=8)
    with pytest.raises(ValueError, match=message):
        s.add(request(**given))
    assert not s.has_work


def test_refuses_an_id_that_lives():
    s = scheduler()
    s.add(request(id="a"))
    with pytest.raises(ValueError, match="answered already"):
        s.add(request(id="a"))
    s.abort("a")
    s.add(request(id="a"))


def test_fits_with_just_enough_pages():
    s = scheduler(num_blocks=3)
    (a,) = s.add(request(4, max_tokens=9))  # 13 tokens, the last of which needs no page
    run(s)
    assert a.finish == "length" and not s.stats()["preemptions"]


# Preemption.


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


# Tenants.


def test_a_tenant_at_its_pages_waits_and_others_do_not():
    s = scheduler()
    s.add(request(8, "a", tenant="a", max_pages=4))
    s.add(request(12, "b", tenant="a", max_pages=6))
    (waits,) = s.add(request(12, "c", tenant="a", max_pages=6))
    s.add(request(2, "d", tenant="d"))
    assert [row[0] for row in shape(s.schedule())] == ["a", "d", "b"]
    assert waits.slot < 0


def test_a_tenant_at_its_pages_preempts_its_own():
    s = scheduler()
    (mine,) = s.add(request(3, tenant="a", max_pages=2, max_tokens=4))
    (late,) = s.add(request(3, tenant="a", max_pages=2, max_tokens=4))
    (other,) = s.add(request(3, tenant="b"))
    for _ in range(3):
        take(s, s.schedule())
    assert late.preemptions == 1 and mine.preemptions == other.preemptions == 0
    run(s)


def test_order_of_waiting():
    queue = FairQueue()
    names = {}

    def push(name, front=False, **given):
        x = Sequence(request(**given))
        names[x] = name
        queue.push(x, front)

    push("low", priority=1, arrival=0.0)
    push("late", tenant="a", arrival=3.0)
    push("early", tenant="a", arrival=1.0)
    push("deadline", tenant="a", arrival=9.0, deadline=50.0)
    push("back", True, tenant="a", arrival=10.0)
    push("other", tenant="b", arrival=5.0)
    queue.charge("a", 10)
    order = []
    while x := queue.peek():
        queue.pop(x)
        order.append(names[x])
    assert order == ["other", "back", "deadline", "early", "late", "low"] and len(queue) == 0


def test_idle_tenants_save_nothing_up():
    queue = FairQueue()
    queue.push(Sequence(request(tenant="busy")))
    queue.charge("busy", 1000)
    queue.push(Sequence(request(tenant="new")))
    assert queue.served == {"busy": 1000, "new": 1000}


def test_lifted_to_the_last_that_left_where_nobody_waits():
    queue = FairQueue()
    x = Sequence(request(tenant="busy"))
    queue.push(x)
    queue.charge("busy", 300)
    queue.pop(x)
    queue.push(Sequence(request(tenant="new")))
    assert queue.served["new"] == 300


def live(chance, queues):
    """A random life of both queues, of which the second forgets now and then; how many counters it dropped."""
    whole, forgetful = queues
    running, forgotten = [], 0
    for i in range(400):
        kind, cost = chance.random(), chance.randint(0, 20)
        if kind < (0.3 if i // 40 % 2 else 0.5):  # the queue grows, and is empty at times
            tenant, priority = chance.choice("abcdefghijklmnop"), chance.choice([0, 0, 1])
            x = Sequence(request(tenant=tenant, priority=priority))
            for queue in queues:
                queue.push(x)
        elif kind < 0.8:
            x = whole.peek()
            assert x is forgetful.peek()
            if x is not None:
                running.append(x)
                for queue in queues:
                    queue.pop(x)
                    queue.charge(x.request.tenant, cost)
        elif kind < 0.93 and running:
            x = running.pop(chance.randrange(len(running)))
            for queue in queues:
                queue.charge(x.request.tenant, cost)
                if cost < 4:  # preempted
                    queue.push(x, front=True)
        else:
            before = len(forgetful.served)
            forgetful.forget({x.request.tenant for x in running})
            forgotten += before - len(forgetful.served)
    assert forgetful.served.items() <= whole.served.items()
    return forgotten


def test_sharing_is_the_same_whoever_is_forgotten():
    forgotten = [live(random.Random(seed), (FairQueue(), FairQueue())) for seed in range(200)]
    assert sum(forgotten) > 100


def test_counters_of_idle_tenants_are_bounded(monkeypatch):
    monkeypatch.setattr(fair, "MOST_IDLE", 50)
    s = scheduler()
    s.add(request(50, tenant="greedy", max_tokens=5))
    run(s)
    spent = s.stats()["tenant_service"]["greedy"]
    for i in range(2000):
        s.add(request(5, id=str(i), tenant=f"tenant {i}", max_tokens=2))
        run(s)
    service = s.stats()["tenant_service"]
    assert len(service) <= 2 * (50 + 1) + 65 and len(s._waiting._least) <= 200
    assert service["greedy"] == spent, "who is furthest ahead is not forgotten"


def test_aborted_waiting_are_forgotten():
    s = scheduler(max_sequences=1)
    s.add(request(id="first"))
    for i in range(1000):
        s.add(request(id=f"gone {i}", deadline=1e9))
        s.abort(f"gone {i}")
    s.add(request(id="last"))
    s.schedule()
    assert s.num_waiting == 1
    line = s._waiting._lines[0][""]
    assert len(line.heap) < 30 and len(s._waiting._deadlines) < 30


def serve(s, steps, load):
    """Output and prompt tokens that each tenant was served while `load` keeps requests waiting."""
    served = {}
    for _ in range(steps):
        load(s)
        step = s.schedule()
        for chunk in step.chunks:
            tenant = chunk.sequence.request.tenant
            prompt = max(min(chunk.start + chunk.num_tokens, chunk.sequence.num_prompt) - chunk.start, 0)
            served[tenant] = served.get(tenant, 0) + prompt + 2 * len(s.advance(chunk, [7] * chunk.num_rows))
    return served


def test_a_flood_does_not_starve_a_trickle():
    s = scheduler(num_blocks=200, max_tokens=64, max_sequences=8)
    for _ in range(3000):
        s.add(request(10, tenant="flood", max_tokens=20))

    def trickle(s):
        while s._waiting._waiting.get("trickle", 0) < 2:  # never more than two wait, and they are other in shape
            s.add(request(25, tenant="trickle", max_tokens=10))

    served = serve(s, 3000, trickle)
    assert abs(served["flood"] / served["trickle"] - 1) < 0.1


def test_shares_hold_with_pages_short():
    s = scheduler(num_blocks=24, max_tokens=32, max_sequences=8)
    for _ in range(2000):
        s.add(request(10, tenant="flood", max_tokens=20))

    def trickle(s):
        while s._waiting._waiting.get("trickle", 0) < 2:
            s.add(request(10, tenant="trickle", max_tokens=20))

    outputs = serve(s, 2000, trickle)
    assert s.stats()["preemptions"] > 0 and abs(outputs["flood"] / outputs["trickle"] - 1) < 0.1


# Deadlines.


def test_not_begun_after_the_deadline():
    now = [0.0]
    s = scheduler(max_sequences=1, clock=lambda: now[0])
    (runs,) = s.add(request(deadline=5.0))
    take(s, s.schedule())
    late = s.add(request(deadline=6.0, n=2))
    (soon,) = s.add(request(deadline=9.0))
    now[0] = 6.5
    take(s, s.schedule())
    assert {x.finish for x in late} == {"error"} and set(s.take_expired()) == set(late) and s.take_expired() == []
    assert runs.finish is soon.finish is None  # one had begun, the other has time
    run(s)
    assert runs.finish == soon.finish == "length" and s.num_waiting == 0


def test_stats():
    s = scheduler()
    s.add(request(6, tenant="a"))
    s.add(request(6, tenant="b", priority=1))
    s.schedule()
    stats = s.stats()
    assert (stats["running"], stats["waiting"], stats["used"]) == (2, 0, 4)
    assert stats["tenant_pages"] == {"a": 2, "b": 2} and stats["tenant_service"] == {"a": 6, "b": 6}
