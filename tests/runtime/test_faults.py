"""What a run does about trouble: judged steps, stop signals, hangs."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.config import FaultConfig
from llmos_jax.runtime.faults import StepJudge, StopSignal, Watchdog


def judged(judge: StepJudge, *losses: float, applied: bool = True) -> list[str]:
    return [judge.judge(loss, applied) for loss in losses]


def warm(**changes) -> StepJudge:
    """A judge that has seen enough steps of loss 2."""
    judge = StepJudge(FaultConfig(**changes))
    assert set(judged(judge, *[2.0] * StepJudge.WARM_UP)) == {"good"}
    return judge


def test_a_spike_is_above_a_multiple_of_the_running_mean():
    judge = warm(spike_factor=4.0)
    assert judged(judge, 7.9, 2.0) == ["good", "good"]
    assert judged(judge, 100.0) == ["spike"]
    mean = judge.mean
    assert judged(judge, 100.0) == ["spike"] and judge.mean == mean  # a spike does not move the mean
    assert judged(warm(spike_factor=0.0), 1e9) == ["good"]


def test_the_mean_forgets():
    judge = warm()
    judged(judge, 4.0)
    assert judge.mean == pytest.approx(0.95 * 2.0 + 0.05 * 4.0)


def test_no_spike_is_seen_before_there_is_a_mean():
    judge = StepJudge(FaultConfig())
    assert judged(judge, *[1.0] * (StepJudge.WARM_UP - 1), 50.0) == ["good"] * StepJudge.WARM_UP


def test_skipped_steps_in_a_row_ask_for_a_rewind():
    judge = StepJudge(FaultConfig(max_bad_steps=3))
    assert judged(judge, math.nan, math.inf) == ["skipped"] * 2
    assert judged(judge, 1.0) == ["good"]  # the row is broken
    assert judged(judge, 1.0, 1.0, applied=False) == ["skipped"] * 2
    assert judged(judge, 1.0, applied=False) == ["too_many_bad"]
    assert judged(StepJudge(FaultConfig(max_bad_steps=1)), math.nan) == ["too_many_bad"]


@given(
    losses=st.lists(st.sampled_from([1.0, 1.5, 3.0, 40.0, math.nan]), max_size=60),
    cut=st.integers(0, 60),
)
def test_a_resumed_judge_judges_alike(losses, cut):
    config = FaultConfig(max_bad_steps=2)
    whole = StepJudge(config)
    want = judged(whole, *losses)
    first = StepJudge(config)
    got = judged(first, *losses[:cut])
    second = StepJudge(config, json.loads(json.dumps(first.state())))  # as a checkpoint keeps it
    assert got + judged(second, *losses[cut:]) == want
    assert second.state() == whole.state()


# Stop signals, in a process of their own.

LOOP = """
import time
from llmos_jax.runtime.faults import StopSignal

with StopSignal() as stop:
    step = 0
    print("ready", flush=True)
    while not stop.requested(step):
        step += 1
        time.sleep(0.01)
    print(stop.name, flush=True)
    {then}
"""


def interrupted(*signals: int, then: str = "pass") -> tuple[str, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.format(then=then)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signals[0])
    name = process.stdout.readline().strip()
    for number in signals[1:]:
        process.send_signal(number)
    process.stdout.close()
    return name, process.wait(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_loop_between_two_steps(number):
    assert interrupted(number) == (number.name, 0)


def test_a_second_interrupt_does_not_wait():
    name, code = interrupted(signal.SIGINT, signal.SIGINT, then="time.sleep(60)")
    assert name == "SIGINT" and code != 0


def test_a_second_sigterm_lets_the_save_go_on():
    assert interrupted(signal.SIGTERM, signal.SIGTERM, then="time.sleep(0.3)") == ("SIGTERM", 0)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(1) and stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_of_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append(stop.requested(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False] and signal.getsignal(signal.SIGTERM) is before


# Hangs.


def wait_for(said: list, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(said) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_step_that_hangs_is_reported_once(tmp_path):
    said = []
    with Watchdog(0.1, tmp_path, lambda step, seconds: said.append((step, seconds))) as watchdog:
        time.sleep(0.2)
        assert said == []  # nothing has begun
        watchdog.beat(7)
        wait_for(said, 1)
        time.sleep(0.3)
        assert [step for step, _ in said] == [7] and said[0][1] > 0.1
        watchdog.beat(8)
        wait_for(said, 2)
        assert [step for step, _ in said] == [7, 8]
        watchdog.beat(9)
        watchdog.pause()  # an evaluation may take any time
        time.sleep(0.3)
    assert [step for step, _ in said] == [7, 8]
    stacks = (tmp_path / "hangs.txt").read_text()
    assert "step 7, " in stacks and "test_a_step_that_hangs_is_reported_once" in stacks


def test_steps_in_time_are_not_reported(tmp_path):
    said = []
    with Watchdog(0.5, tmp_path, lambda *args: said.append(args)) as watchdog:
        for step in range(30):
            watchdog.beat(step)
            time.sleep(0.02)
    assert said == [] and not (tmp_path / "hangs.txt").exists()
