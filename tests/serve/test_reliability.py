"""The reliability check in small: a real server, its engine killed once; and that the check finds what is wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"scripts.{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


load = script("reliability_load")
run = script("reliability_run")
check = script("reliability_checks")


@pytest.mark.slow  # it compiles a server's programs
def test_a_small_run_keeps_every_promise(tmp_path):
    command = [sys.executable, "scripts/check_reliability.py", "--requests", "200", "--kills", "1", "--samples", "8"]
    command += ["--share-seconds", "3", "--max-requests", "32", "--keep", str(tmp_path)]
    # With a store of compiled programs and the compiler's own options, as a user has it, so that a restart is fast.
    environment = os.environ | {
        "LLMOS_HOME": str(tmp_path / "home"),
        "LLMOS_CACHE_BYTES": "1000000000",
        "XLA_FLAGS": "",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{(tmp_path / 'server.log').read_text()[-3000:]}"


def whole(text: str = "abc", finish: str = "length", tokens: int = 3) -> "load.Reply":
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return load.Reply(200, {}, json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode())


def streamed(*pieces: str, finish: str | None = "length", tokens: int = 3, last: str = "data: [DONE]\n\n"):
    events = [{"choices": [{"index": 0, "text": piece, "finish_reason": None}]} for piece in pieces]
    events[-1]["choices"][0]["finish_reason"] = finish
    events.append({"choices": [], "usage": {"completion_tokens": tokens}})
    return load.Reply(200, {}, ("".join(f"data: {json.dumps(event)}\n\n" for event in events) + last).encode())


SAME = load.Answer(("abc",), ("length",), 3)


@pytest.mark.parametrize(
    ("reply", "is_streamed", "passes"),
    [
        (whole(), False, True),
        (streamed("a", "bc"), True, True),
        (whole("abd"), False, False),  # another text
        (whole(tokens=2), False, False),  # a token is missing
        (whole(finish="stop"), False, False),
        (streamed("a", "a", "bc"), True, False),  # told twice
        (streamed("a", "bc", finish=None), True, False),
        (streamed("a", "bc", last=""), True, False),  # cut off
        (load.Reply(500, {}, b'{"error": {"message": "x"}}'), False, False),
        (load.Reply(0, {}, b""), False, False),
    ],
)
def test_an_answer_is_judged(reply, is_streamed, passes):
    assert (load.answers(1, 3, is_streamed, SAME)(reply) == "") is passes


def test_the_length_is_judged_without_a_known_answer():
    assert load.answers(1, 3, False)(whole("anything")) == ""
    assert "2 tokens of 3" in load.answers(1, 3, False)(whole(tokens=2))
    assert "1 answers of 2" in load.answers(2, 3, False)(whole())
    assert load.answers(1, 40, False, form="yes,no")(whole("yes", "stop", 1)) == ""
    assert "is none of" in load.answers(1, 40, False, form="yes,no")(whole("ye", "length", 1))


def test_a_refusal_is_judged():
    error = load.Reply(400, {}, b'{"error": {"message": "it is too long"}}')
    assert load.refused(400, says="long")(error) == ""
    assert load.refused(413)(error) and load.refused(400, says="short")(error)
    assert load.refused(400)(load.Reply(400, {}, b"Bad Request"))
    assert load.refused(400)(load.Reply(0, {}, b""))


def test_memory_that_grows_is_found():
    def samples(growth: float) -> list:
        return [run.Sample(float(i), int((100 + growth * i) * 2**20), 2**28, 7) for i in range(100)]

    assert all(one.passed for one in check.check_memory(samples(0.0), 10))
    assert [one.passed for one in check.check_memory(samples(1.0), 10)] == [False, True]
    assert not any(one.passed for one in check.check_memory(samples(0.0)[:5], 1))
