"""How tenants share, and who comes next."""

import random

from llmos_jax.serve import fair
from llmos_jax.serve.fair import FairQueue
from llmos_jax.serve.sequence import Sequence
from tests.serve.schedulers import request, run, scheduler, shape, take


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
