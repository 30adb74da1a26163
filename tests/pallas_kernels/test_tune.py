"""The tuner: what it tries, keeps and stores, with costs made up; and once for real, on the CPU."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import blocks, schedule, tune
from pallas_kernels.schedule import CompileError, Outcome

DUMP = Path(__file__).parent / "schedule_dump"


def asked(kernel="k.forward", count=4, key="n=1"):
    return {"kernel": kernel, "key": key, "candidates": [{"q": q} for q in range(count)], "chosen": {"q": 0}}


def from_list(costs):
    def evaluate(forced, kernel):
        cost = costs[forced[kernel]["q"]]
        if math.isinf(cost):
            raise CompileError("takes 200 MiB of VMEM\nof 128")
        return cost, ""

    return evaluate


@pytest.mark.compat
@given(st.lists(st.one_of(st.floats(1, 9), st.just(math.inf)), min_size=2, max_size=6))
def test_the_cheapest_that_compiles_is_found(costs):
    found = tune.tune([asked(count=len(costs))], from_list(costs), worth=0.0)
    if math.isinf(min(costs)):
        assert found == []
    else:
        assert found[0].cost == min(costs) == costs[found[0].sizes["q"]]


def test_a_small_static_gain_is_not_kept():
    kept = []
    [best] = tune.tune([asked(count=3)], from_list([100, 98, 99]), worth=0.03, keep=kept.append)
    assert (best.sizes, kept) == ({"q": 0}, [])
    [best] = tune.tune([asked(count=3)], from_list([100, 90, 80]), worth=0.03, keep=kept.append)
    assert best.sizes == {"q": 2} and [one.cost for one in kept] == [90, 80]


def test_one_kernel_after_the_other_with_the_first_settled():
    calls = []

    def evaluate(forced, kernel):
        calls.append((kernel, {name: sizes["q"] for name, sizes in forced.items()}))
        return 10 - forced[kernel]["q"], ""

    tune.tune([asked("a", 2), asked("b", 2), asked("a", 2, key="n=2"), asked("single", 1)], evaluate, worth=0.0)
    assert calls == [("a", {"a": 0}), ("a", {"a": 1}), ("b", {"a": 1, "b": 0}), ("b", {"a": 1, "b": 1})]


def test_an_interrupt_loses_nothing_that_was_kept():
    kept = []

    def evaluate(forced, kernel):
        if forced[kernel]["q"] == 3:
            raise KeyboardInterrupt
        return 10.0 - forced[kernel]["q"], ""

    with pytest.raises(KeyboardInterrupt):
        tune.tune([asked()], evaluate, worth=0.0, keep=kept.append)
    assert kept[-1].sizes == {"q": 2}


def test_the_command_stores_its_choice(tmp_path, monkeypatch, capsys):
    outcome = Outcome({}, [], "", [asked()], "TPU v6 lite")
    monkeypatch.setattr(blocks, "FOLDER", tmp_path)
    monkeypatch.setattr(tune, "by_schedule", lambda *args: (outcome, from_list([100, 50, math.inf, 60])))
    assert tune.main(["--target", "v6e", "--op", "attention", "--shape", "queries=64"]) == 0
    blocks.tuned.cache_clear()
    assert blocks.tuned("TPU v6 lite") == {"k.forward": {"n=1": {"q": 1}}}
    said = capsys.readouterr().out
    assert "takes 200 MiB of VMEM" in said and "0.50 of the model's choice" in said
    blocks.tuned.cache_clear()


def test_the_kernel_in_question_is_found_by_its_name():
    [small] = schedule.read(DUMP)
    kernels = [small._replace(name=name) for name in ("jvp_attention_forward_.1", "transpose_attention_backward__.1")]
    assert tune.named(kernels, "attention.backward") == kernels[1:]
    assert tune.named(kernels, "other.forward") == kernels[:1]
    assert tune.named(kernels, "other.dq") == kernels
    assert tune.static_cost(small) == small.cycles()
    ragged = small._replace(kernel=small.kernel._replace(inside=tuple(_unknown(r) for r in small.kernel.inside)))
    sizes = {"q": 64, "kv": 10, "held": 1000}
    assert tune.static_cost(ragged, "attention.backward", sizes) == ragged.hot.bundles / 640
    assert tune.static_cost(ragged) == ragged.hot.bundles / ragged.hot.total("MXU")


def _unknown(region):
    return region._replace(trips=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "h200"], "a described GPU gives no ranking"),
        (["--target", "v9"], "--target v9 is not known"),
        (["--shape", "queries"], "invalid shape value"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--op", "attention", *arguments])
    assert message in capsys.readouterr().err


def test_measured_here():
    options = {"op": "attention", "dtype": "float32", "implementation": "xla", "queries": 16, "keys": 16, "head_dim": 8}
    asked, evaluate = tune.by_time(options, repeats=2)
    assert asked == []  # XLA's path has no blocks to choose
    cost, _ = evaluate({}, "none")
    assert 0 < cost < 10
