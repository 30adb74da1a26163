"""The supervisor over real processes with a counting engine: nothing that was accepted is lost, whatever happens."""

import asyncio
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from llmos_jax.config import MeshConfig, UserError
from llmos_jax.serve import supervisor
from llmos_jax.serve.request import Output, Request, Sampling
from llmos_jax.serve.supervisor import Supervisor, kill
from llmos_jax.serve.worker import Job
from tests.serve import fake_worker as fake


@pytest.fixture(autouse=True)
def fake_process(monkeypatch):
    monkeypatch.setattr(supervisor, "WORKER", (sys.executable, "-m", "tests.serve.fake_worker"))


def job(reference: str = "m") -> Job:
    return Job((SimpleNamespace(name="m", reference=reference),), MeshConfig())


def request(id: str, *prompt: int, max_tokens: int = 10, **fields) -> Request:
    return Request(id, prompt or (1, 2), Sampling(max_tokens), "m", **fields)


async def told(one: Supervisor, request: Request) -> list[Output]:
    return [output async for output in one.generate(request)]


def ends(outputs: list[Output]) -> tuple[str | None, int, str]:
    last = outputs[-1]
    return last.finish, last.status, last.error


def is_whole(request: Request, outputs: list[Output]) -> bool:
    """Each token of each answer came once, in order."""
    for index in range(request.n):
        tokens = [token for output in outputs if output.index == index for token in output.tokens]
        if tokens != [fake.token(request.prompt, index, i) for i in range(request.sampling.max_tokens)]:
            return False
    return True


def run(scenario, *, most: int = 64, replicas: int = 1, hang_seconds: float = 30.0, reference: str = "m") -> list[str]:
    """Runs `scenario` with a supervisor that is ready; what it said."""
    said: list[str] = []

    async def whole() -> None:
        one = Supervisor([job(reference)] * replicas, most=most, hang_seconds=hang_seconds, say=said.append)
        await one.start()
        try:
            await one.wait_ready()
            await scenario(one)
        finally:
            await one.close()

    asyncio.run(asyncio.wait_for(whole(), 60))
    return said


def test_answers_come_whole_and_several_at_once():
    async def scenario(one):
        asked = [request(str(i), i, n=1 + i % 3) for i in range(20)]
        answers = await asyncio.gather(*(told(one, each) for each in asked))
        assert all(is_whole(*pair) for pair in zip(asked, answers, strict=True))
        assert one.num_live == 0

    run(scenario, replicas=2)


def test_a_killed_engine_loses_and_repeats_nothing():
    async def scenario(one):
        asked = [request(str(i), i, max_tokens=400, n=1 + i % 2) for i in range(12)]
        tasks = [asyncio.create_task(told(one, each)) for each in asked]
        for _ in range(2):
            await asyncio.sleep(0.15)
            assert one.num_live > 0
            pid = one.replicas[0].pid
            kill(one.replicas[0])
            while one.replicas[0].pid == pid:
                await asyncio.sleep(0.001)
            assert not await one.ready()
            await one.wait_ready()
        answers = await asyncio.gather(*tasks)
        assert all(is_whole(*pair) for pair in zip(asked, answers, strict=True))
        assert one.replicas[0].restarts == 2

    run(scenario)


def test_a_request_that_raises_is_found_among_innocents_and_refused_from_then_on():
    async def scenario(one):
        innocents = [request(f"i{i}", i, max_tokens=60) for i in range(12)]
        tasks = [asyncio.create_task(told(one, each)) for each in innocents]
        await asyncio.sleep(0.05)
        bad = request("bad", 5, fake.RAISES)
        assert ends(await told(one, bad)) == ("error", 500, "this request makes the engine fail; it is not tried again")
        assert all(is_whole(*pair) for pair in zip(innocents, await asyncio.gather(*tasks), strict=True))
        like = Request("like", bad.prompt, Sampling(10, seed=99), "m", tenant="other")
        finish, status, error = ends(await told(one, like))
        assert (finish, status) == ("error", 400) and "made the engine fail before" in error
        other = request("other", 5, 6)
        assert is_whole(other, await told(one, other))
        assert one.replicas[0].restarts == 0

    said = run(scenario)
    assert sum("a step failed" in line for line in said) <= 2


@pytest.mark.parametrize("harm", [fake.DIES, fake.HANGS])
def test_a_request_that_kills_or_hangs_the_process_is_found_too(harm):
    async def scenario(one):
        innocents = [request(f"i{i}", i, max_tokens=40) for i in range(4)]
        tasks = [asyncio.create_task(told(one, each)) for each in innocents]
        assert ends(await told(one, request("bad", harm)))[:2] == ("error", 500)
        assert all(is_whole(*pair) for pair in zip(innocents, await asyncio.gather(*tasks), strict=True))
        assert ends(await told(one, request("again", harm)))[:2] == ("error", 400)
        assert one.replicas[0].restarts == 3  # twice among others, once alone

    run(scenario, hang_seconds=1.0)


def test_one_death_is_nobodys_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOS_FAKE_ONCE", str(tmp_path / "once"))

    async def scenario(one):
        asked = request("a", fake.DIES_ONCE)
        assert is_whole(asked, await told(one, asked))
        assert (one.replicas[0].restarts, one.replicas[0].num_refused) == (1, 0)

    run(scenario)


def test_a_worker_that_stops_reading_does_not_stop_the_loop():
    async def scenario(one):
        os.kill(one.replicas[0].pid, signal.SIGSTOP)
        long = (1,) * 100_000
        asked = [request(str(i), *long, max_tokens=3) for i in range(12)]  # far more than a pipe holds
        started = time.monotonic()
        tasks = [asyncio.create_task(told(one, each)) for each in asked]
        await asyncio.sleep(0.1)
        assert time.monotonic() - started < 1
        answers = await asyncio.gather(*tasks)
        assert all(is_whole(*pair) for pair in zip(asked, answers, strict=True))
        assert one.replicas[0].restarts == 1

    said = run(scenario, hang_seconds=1.0)
    assert any("has not answered for 1 s; it is killed" in line for line in said)


def test_what_was_sent_before_a_failure_was_heard_is_taken_once():
    """Requests that come while a step that fails is under way reach the worker on both sides of the failure."""

    async def scenario(one):
        bad = asyncio.create_task(told(one, request("bad", fake.SLOW, fake.RAISES)))
        await asyncio.sleep(0.1)
        asked = [request(str(i), i, max_tokens=100) for i in range(10)]
        tasks = [asyncio.create_task(told(one, each)) for each in asked]
        await asyncio.sleep(0.02)
        bad.cancel()  # its client leaves, so that nobody is suspected and all are sent again at once
        answers = await asyncio.gather(*tasks)
        assert all(is_whole(*pair) for pair in zip(asked, answers, strict=True))

    assert any("a step failed" in line for line in run(scenario))


def test_a_request_that_cannot_be_taken_is_told_why():
    async def scenario(one):
        assert ends(await told(one, request("a", fake.REFUSED))) == ("error", 400, "refused")
        outputs = await told(one, request("b", fake.BREAKS_ADD, n=2))
        assert [(output.index, output.status) for output in outputs] == [(0, 500), (1, 500)]
        assert one.replicas[0].restarts == 0

    run(scenario)


def test_leaving_aborts():
    async def scenario(one):
        outputs = one.generate(request("a", max_tokens=100_000))
        await anext(outputs)
        await outputs.aclose()
        assert one.num_live == 0
        while (await one.replicas[0].call("stats"))["m"]["running"]:
            await asyncio.sleep(0.01)

    run(scenario)


def test_too_many_requests_are_refused_but_no_tenant_is_shut_out():
    async def scenario(one):
        flood = [asyncio.create_task(told(one, request(f"a{i}", i, max_tokens=60, tenant="a"))) for i in range(12)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(told(one, request(f"b{i}", i, max_tokens=60, tenant="b"))) for i in range(12)]
        floods = [ends(outputs)[:2] for outputs in await asyncio.gather(*flood)]
        assert floods == [("length", 500)] * 8 + [("error", 429)] * 4
        assert [ends(outputs)[0] for outputs in await asyncio.gather(*others)] == ["length"] * 4 + ["error"] * 8

    run(scenario, most=8)


def test_draining_takes_nothing_new_and_lets_the_rest_end():
    async def scenario(one):
        asked = request("a", max_tokens=100)
        running = asyncio.create_task(told(one, asked))
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(one.drain(30))
        await asyncio.sleep(0)
        assert ends(await told(one, request("b")))[:2] == ("error", 503)
        assert not await one.ready() and not draining.done()
        await draining
        assert is_whole(asked, await running)

    run(scenario)


def test_a_call_is_answered_or_told_that_the_engine_went_away():
    async def scenario(one):
        assert (await one.call("stats"))["m"]["asleep"] is False
        with pytest.raises(UserError, match="no attribute"):
            await one.call("nonsense")
        os.kill(one.replicas[0].pid, signal.SIGSTOP)
        cancelled = asyncio.create_task(one.call("stats"))
        waiting = asyncio.create_task(one.call("stats"))
        await asyncio.sleep(0.05)
        cancelled.cancel()  # its caller left; the end of the process must be noticed all the same
        kill(one.replicas[0])
        with pytest.raises(UserError, match="restarted meanwhile"):
            await waiting
        await one.wait_ready()

    run(scenario)


def test_a_model_that_is_not_there_is_told_at_the_start():
    async def scenario(one):
        raise AssertionError("it cannot be ready")

    with pytest.raises(UserError, match="there is no such model"):
        run(scenario, reference="missing")


def test_an_engine_that_cannot_be_started_again_is_tried_ever_more_slowly(monkeypatch):
    async def scenario(one):
        replica = one.replicas[0]
        replica._job = job("unstartable")
        kill(replica)
        assert ends(await told(one, request("a"))) == ("error", 503, "the engine cannot be started at the moment")
        assert replica.restarts == supervisor.MOST_STARTS
        replica._job = job()
        asked = request("b")
        assert is_whole(asked, await told(one, asked))

    run(scenario)
