"""Variants of a configuration and advice: what is enumerated, that it keeps the run's meaning, and that it fits."""

import dataclasses
import itertools
import math

import pytest

from llmos_jax.compiler.analytic import training_memory
from llmos_jax.compiler.target import Target
from llmos_jax.config import MESH_AXES, OptimizerConfig, check, mesh_shape
from llmos_jax.overrides import apply_settings
from llmos_jax.plan import advice, candidates
from llmos_jax.plan.advice import advise, advise_here
from tests import tiny

CPUS = Target.parse("cpu:8")
CONFIG = tiny.run(tiny.DENSE, 16, 16)


SAVING = tiny.run(tiny.model(remat="names", remat_save=("input", "q"), remat_offload=("k",)), 16, 16)


@pytest.mark.parametrize("config", [CONFIG, tiny.run(tiny.MOE, 12, 16, accumulate=3)], ids=["dense", "moe"])
def test_as_many_are_scored_as_are_announced(config):
    found = list(candidates.every(config, CPUS))
    assert len(found) == candidates.number(config, CPUS)
    possible = [one for one in found if one]
    assert possible and len({one.settings for one in possible}) == len(possible)


def test_meshes_are_all_the_ways_to_split_the_devices():
    """Three axes of powers of two that multiply to 8: the pairs of bars among 3 factors, (3 + 2) over 2 = 10."""
    found = [dict(s.removeprefix("mesh.").split("=") for s in mesh) for mesh in candidates.meshes(CONFIG, CPUS)]
    assert all(set(mesh) == set(MESH_AXES) and math.prod(map(int, mesh.values())) == 8 for mesh in found)
    assert len({tuple(mesh.items()) for mesh in found}) == len(found) == math.comb(5, 2)
    assert all(mesh["context"] == mesh["expert"] == "1" for mesh in found)


def test_long_sequences_and_experts_open_their_axes():
    long = tiny.run(tiny.MOE, 16, candidates.LONGEST_UNSPLIT * 2)
    sizes = [dict(s.removeprefix("mesh.").split("=") for s in mesh) for mesh in candidates.meshes(long, CPUS)]
    assert {mesh["context"] for mesh in sizes} == {mesh["expert"] for mesh in sizes} == {"1", "2", "4", "8"}


def test_micro_batches_divide_the_batch():
    assert candidates.accumulations(tiny.run(batch_size=12, accumulate=3)) == [1, 2, 3, 4, 6, 12]
    assert candidates.accumulations(tiny.run(batch_size=1)) == [1]
    assert 3 in candidates.accumulations(tiny.run(batch_size=768)), "three sequences a device, one at a time"


def test_what_published_runs_of_a_pod_keep_is_among_the_policies():
    """Google's Llama-3.1-8B recipes for v6e: on the host the layer's input, q, k, v and the output projection."""
    assert ("names", "", "input,q,k,v,attention_out") in candidates.REMAT


def test_a_candidate_is_scored_as_the_configuration_it_stands_for():
    for one in filter(None, itertools.islice(candidates.every(CONFIG, CPUS), 200)):
        config = apply_settings(CONFIG, list(one.settings))
        check(config, 8)
        assert one.memory == training_memory(config, mesh_shape(config.mesh, 8), CPUS.chip).total
        assert one.tokens_per_second == pytest.approx(16 * 16 / one.seconds)
        assert (config.train.batch_size, config.train.seq_len) == (16, 16)


def test_what_breaks_a_rule_is_no_candidate():
    assert candidates.evaluate(CONFIG, CPUS, ("mesh.fsdp=1", "mesh.tensor=16")) is None
    assert candidates.evaluate(CONFIG, CPUS, ("train.accumulate=5",)) is None


def test_a_new_remat_policy_starts_from_no_names():
    for saving, plain in zip(candidates.remats(SAVING), candidates.remats(CONFIG), strict=True):
        assert apply_settings(SAVING, list(saving)) == apply_settings(CONFIG, list(plain))
        ours, theirs = (candidates.evaluate(one, CPUS, to) for one, to in ((SAVING, saving), (CONFIG, plain)))
        assert ours and theirs and ours.memory == theirs.memory
        assert not any(setting.endswith("=") for setting in plain), "nothing to clear, nothing said"


def test_settings_of_candidates_are_valid_for_a_configuration_that_names_activations():
    possible = list(filter(None, itertools.islice(candidates.every(SAVING, CPUS), 100)))
    changed = [apply_settings(SAVING, " ".join(one.settings).split()) for one in possible]
    assert {config.model.remat for config in changed} == {"none", "names", "full"}
    for config in changed:
        check(config, 8)


# ------------------------------------------------------------------------------------------------------------- advice

WIDE = tiny.run(tiny.model(embed_dim=512, mlp_dim=2048, num_layers=8), 64, 32)


@pytest.fixture(scope="module")
def now() -> float:
    return candidates.evaluate(WIDE, CPUS, ()).memory


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_advice_fits_by_the_formula_it_was_given_by(share: float, now: float):
    """The compiler said twice what the formula does: so the advice's memory counts twice too."""
    capacity = share * 2 * now
    found = advise(WIDE, CPUS, 2 * now, capacity)
    assert 0 < len(found) <= advice.MOST
    for one in found:
        config = apply_settings(WIDE, list(one.settings))
        check(config, 8)
        memory = training_memory(config, mesh_shape(config.mesh, 8), CPUS.chip).total
        assert one.peak == pytest.approx(2 * memory) and one.peak <= capacity
        assert one.slower > 0
    smaller = ["batch_size" in " ".join(one.settings) for one in found]
    assert smaller == sorted(smaller), "a smaller batch comes last"


def test_combined_advice_sets_nothing_twice(now: float):
    """A capacity that no single change reaches."""
    alone = [candidates.evaluate(WIDE, CPUS, one) for one in advice._singles(WIDE, CPUS)]
    least = min(one.memory for one in alone if one)
    found = advise(WIDE, CPUS, now, 0.98 * least)
    assert found
    for one in found:
        names = [setting.partition("=")[0] for setting in one.settings]
        assert len(set(names)) == len(names) and len(names) >= 2
        # One of `mesh` or of remat alone sets several fields; two of them would undo each other.
        sizes = mesh_shape(apply_settings(WIDE, list(one.settings)).mesh, 8)
        assert math.prod(sizes.values()) == 8


@pytest.mark.parametrize(
    ("one", "other", "clashes"),
    [
        (("model.remat=full",), ("model.remat=names", "model.remat_save=input"), True),
        (("mesh.data=1", "mesh.fsdp=8"), ("mesh.fsdp=4", "mesh.tensor=2"), True),
        (("mesh.data=1", "mesh.fsdp=8"), ("mesh.tensor=2", "mesh.context=1"), True),
        (("train.accumulate=2",), ("train.accumulate=4",), True),
        (("train.accumulate=2",), ("train.batch_size=4",), False),
        (("model.remat=full",), ("model.param_dtype=bfloat16",), False),
        (("model.remat=full",), ("mesh.data=1", "mesh.fsdp=8"), False),
    ],
)
def test_changes_that_undo_each_other_are_not_combined(one, other, clashes: bool):
    assert advice._clash(one, other) is advice._clash(other, one) is clashes


def test_nothing_is_advised_where_nothing_helps(now: float):
    assert advise(WIDE, CPUS, now, 1.0) == []
    assert "take more devices" in advise_here(WIDE, now, 1.0)


def test_a_configuration_that_breaks_a_rule_has_no_advice(now: float):
    assert advise(tiny.run(WIDE.model, 13, 32), CPUS, now, now) == []


def test_lighter_optimizers_are_only_offered_for_adamw():
    names = {" ".join(one) for one in advice._singles(WIDE, CPUS)}
    assert "optimizer.name=adafactor" in names and "model.param_dtype=bfloat16" in names
    lighter = tiny.run(tiny.model(param_dtype="bfloat16"), optimizer=OptimizerConfig(name="lion"))
    assert not any("optimizer" in " ".join(one) or "dtype" in " ".join(one) for one in advice._singles(lighter, CPUS))


@pytest.mark.parametrize(
    "names", [{}, {"remat": "names", "remat_save": ("input", "q", "gate", "up")}], ids=["", "names"]
)
def test_advice_for_this_machine_is_lines_to_paste(names, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(advice, "MOST", 1000)  # all of it: which is fastest depends on the machine
    config = dataclasses.replace(WIDE, model=dataclasses.replace(WIDE.model, **names))
    memory = candidates.evaluate(config, CPUS, ()).memory
    lines = advise_here(config, memory, 0.8 * memory).splitlines()
    assert len(lines) > 1 and all(line.startswith("  --set ") and "GiB, " in line for line in lines[1:])
    assert any("model.remat=full" in line for line in lines)
    for line in lines[1:]:
        check(apply_settings(config, line.removeprefix("  --set ").partition("  (")[0].split()), 8)
