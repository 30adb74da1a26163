"""Checkpoints: every bit comes back, on any mesh; damage is found; a full disk costs nothing that was safe."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.config import CheckpointConfig, OptimizerConfig, UserError
from llmos_jax.models.decoder import abstract_params
from llmos_jax.runtime.checkpoint import SEAL, Checkpoints, _problem, load_params
from llmos_jax.train import step as programs
from tests import tiny

POLICY = CheckpointConfig(keep=10, keep_best=0)


class Said(list):
    """What the checkpoints tell about themselves."""

    def __call__(self, kind: str, step: int, **details) -> None:
        self.append((kind, step, details))

    def kinds(self) -> list[tuple[str, int]]:
        return [(kind, step) for kind, step, _ in self]


def arrays(seed: int) -> dict[str, jax.Array]:
    key = jax.random.key(seed)
    return {"w": jax.random.normal(key, (8, 64)), "half": jax.random.normal(key, (16,)).astype(jnp.bfloat16)}


REST = {"count": jnp.zeros((), jnp.int32)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(workdir: Path, *steps: int, config: CheckpointConfig = POLICY, said: Said | None = None, losses=None) -> None:
    checkpoints = Checkpoints(workdir, config, said if said is not None else Said())
    for step in steps:
        rest = {"count": jnp.asarray(step, jnp.int32)}
        metrics = {"eval_loss": losses[step]} if losses else None
        checkpoints.save(step, arrays(step), rest, {"data": {"row": step}}, metrics)
        checkpoints.wait()
    checkpoints.close()


def restore(workdir: Path, said: Said | None = None):
    checkpoints = Checkpoints(workdir, POLICY, said if said is not None else Said())
    try:
        return checkpoints.restore(abstract(arrays(0)), abstract(REST))
    finally:
        checkpoints.close()


def same(got, want) -> None:
    def compare(a, b):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()

    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(compare, got, want)


def data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


@pytest.mark.compat
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon", "sgd"])
def test_a_training_state_comes_back_bit_for_bit(tmp_path, optimizer):
    config = tiny.run(tiny.model(param_dtype="bfloat16"), optimizer=OptimizerConfig(optimizer))
    mesh = tiny.mesh(data=1)
    state = programs.init_program(config, mesh).compile()()
    extra = {"data": {"shard": 3}, "judge": {"mean": 0.1 + 0.2}}
    checkpoints = Checkpoints(tmp_path, POLICY)
    checkpoints.save(7, state.params, state._replace(params=None), extra)
    checkpoints.wait()
    target = programs.abstract_state(config, mesh)
    found = checkpoints.restore(target.params, target._replace(params=None))
    assert (found.step, found.extra, checkpoints.latest_step()) == (7, extra, 7)
    same(found.rest._replace(params=found.params), state)
    checkpoints.close()


@pytest.mark.usefixtures("eight_devices")
def test_a_checkpoint_moves_to_another_mesh(tmp_path):
    config = tiny.run(tiny.MOE)
    written, read = tiny.mesh(fsdp=4, expert=2), tiny.mesh(data=2, tensor=2)
    state = programs.init_program(config, written).compile()()
    checkpoints = Checkpoints(tmp_path, POLICY)
    checkpoints.save(1, state.params, state._replace(params=None), {})
    checkpoints.wait()
    target = programs.abstract_state(config, read)
    found = checkpoints.restore(target.params, target._replace(params=None))
    got = found.rest._replace(params=found.params)
    same(got, state)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), got, target)
    checkpoints.close()
    step, params = load_params(tmp_path, abstract_params(config.model, read))
    assert step == 1
    same(params, state.params)


def test_an_empty_folder_has_none(tmp_path):
    assert restore(tmp_path) is None
    with pytest.raises(UserError, match=r"there is no whole checkpoint in .*; train first, or name another folder"):
        load_params(tmp_path, abstract(arrays(0)))


def test_what_is_saved_is_said(tmp_path):
    said = Said()
    save(tmp_path, 1, said=said)
    assert said.kinds() == [("checkpoint_saved", 1)]
    assert said[0][2]["bytes"] == sum(p.stat().st_size for p in data_files(tmp_path / "checkpoints" / "1"))


def test_a_save_is_not_held_up_by_later_changes(tmp_path):
    """Arrays are copied before `save` returns: the next step overwrites their buffers."""
    checkpoints, state = Checkpoints(tmp_path, POLICY), arrays(1)
    checkpoints.save(1, state, REST, {})
    jax.tree.map(lambda x: x.delete(), state)
    checkpoints.close()
    same(restore(tmp_path).params, arrays(1))


# Damage.


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("three")
    save(workdir, 1, 2, 3)
    return workdir


def copied(workdir: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", str(workdir / "checkpoints"), str(tmp_path)], check=True)
    return tmp_path


def test_a_flipped_bit_in_any_file_is_found(three_steps, tmp_path):
    names = [p.relative_to(three_steps) for p in data_files(three_steps / "checkpoints" / "3")]
    assert len(names) > 5
    checkpoints = Checkpoints(copied(three_steps, tmp_path), POLICY)
    for name in names:
        if not (tmp_path / name).stat().st_size:
            continue
        before = (tmp_path / name).read_bytes()
        assert _problem(checkpoints._step_folder(3)) is None
        flip(tmp_path / name)
        assert (
            _problem(checkpoints._step_folder(3))
            == f"{name.relative_to('checkpoints/3')} has changed since it was written"
        )
        (tmp_path / name).write_bytes(before)
    checkpoints.close()


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(three_steps, tmp_path):
    workdir, said = copied(three_steps, tmp_path), Said()
    folder = workdir / "checkpoints"
    largest = max(data_files(folder / "3"), key=lambda p: p.stat().st_size)
    flip(largest)
    found = restore(workdir, said)
    assert found.step == 2 and found.extra == {"data": {"row": 2}} and int(found.rest["count"]) == 2
    same(found.params, arrays(2))
    problem = f"{largest.relative_to(folder / '3')} has changed since it was written"
    assert said == [("checkpoint_damaged", 3, {"problem": problem})]
    assert (folder / "3.damaged").is_dir() and not (folder / "3").exists()
    save(workdir, 3)  # its place is free again, and the next damaged one finds another name
    flip(max(data_files(folder / "3"), key=lambda p: p.stat().st_size))
    assert restore(workdir).step == 2
    assert (folder / "3.damaged2").is_dir()


@pytest.mark.parametrize("harm", ["missing file", "short file", "seal is no json", "seal of another kind"])
def test_other_kinds_of_damage(three_steps, tmp_path, harm):
    workdir, said = copied(three_steps, tmp_path), Said()
    newest = workdir / "checkpoints" / "3"
    file = max(data_files(newest), key=lambda p: p.stat().st_size)
    if harm == "missing file":
        file.unlink()
    elif harm == "short file":
        os.truncate(file, file.stat().st_size // 2)
    else:
        (newest / SEAL).write_text("{" if harm == "seal is no json" else "[1]")
    assert load_params(workdir, abstract(arrays(0)))[0] == 2
    assert restore(workdir, said).step == 2
    assert said.kinds() == [("checkpoint_damaged", 3)]


def test_load_params_passes_over_damage_and_changes_nothing(three_steps, tmp_path):
    workdir = copied(three_steps, tmp_path)
    flip(max(data_files(workdir / "checkpoints" / "3"), key=lambda p: p.stat().st_size))
    before = sorted(p.relative_to(workdir) for p in workdir.rglob("*"))
    step, params = load_params(workdir, abstract(arrays(0)))
    assert step == 2
    same(params, arrays(2))
    assert sorted(p.relative_to(workdir) for p in workdir.rglob("*")) == before


def test_a_checkpoint_that_was_not_sealed_is_used(three_steps, tmp_path):
    """Killed between the commit and the seal: it is whole, as far as anyone can tell."""
    workdir = copied(three_steps, tmp_path)
    (workdir / "checkpoints" / "3" / SEAL).unlink()
    assert restore(workdir).step == 3


def test_a_torn_checkpoint_is_passed_over_and_removed(three_steps, tmp_path):
    workdir, said = copied(three_steps, tmp_path), Said()
    torn = workdir / "checkpoints" / "4.orbax-checkpoint-tmp-12345"
    subprocess.run(["cp", "-r", str(workdir / "checkpoints" / "3"), str(torn)], check=True)
    assert restore(workdir, said).step == 3
    assert said.kinds() == [("checkpoint_torn", 4)] and not torn.exists()


def test_when_all_are_damaged_it_says_so_and_keeps_them(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        flip(max(data_files(tmp_path / "checkpoints" / str(step)), key=lambda p: p.stat().st_size))
    with pytest.raises(
        UserError, match=r"every checkpoint in .* is damaged \(steps 1, 2; .*start again in a new --workdir"
    ):
        restore(tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} >= {"1.damaged", "2.damaged"}


REFUSE = """
import sys
import jax, jax.numpy as jnp
from llmos_jax.config import CheckpointConfig, UserError
from llmos_jax.runtime.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep=10, keep_best=0))
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
half = jax.ShapeDtypeStruct((16,), jnp.bfloat16, sharding=place)
rest = {"count": jax.ShapeDtypeStruct((), jnp.int32, sharding=place)}
for name, shape in [("w", (8, 32)), ("other", (8, 64))]:
    try:
        checkpoints.restore({name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place), "half": half}, rest)
    except UserError as error:
        print(error, flush=True)
"""


def run(script: str, *args: object) -> list[str]:
    """The lines that a process of its own prints."""
    command = [sys.executable, "-c", script, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.stdout, result.stderr[-2000:]
    return result.stdout.splitlines()


def test_a_checkpoint_of_another_model_is_refused(three_steps):
    """Another shape, then another name. Orbax leaves its other reads unfinished, so this is a process of its own."""
    refusals = run(REFUSE, three_steps)
    assert len(refusals) == 2
    for line in refusals:
        assert re.fullmatch(r"the checkpoint of step 3 .* does not fit this configuration \(.+\); use the .*", line), (
            line
        )


# Which ones are kept.


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (CheckpointConfig(keep=2, keep_best=0), {5, 6}),
        (CheckpointConfig(keep=1, keep_every=2, keep_best=0), {2, 4, 6}),
        (CheckpointConfig(keep=1, keep_best=1), {3, 6}),
        (CheckpointConfig(keep=1, keep_best=2), {2, 3, 6}),
    ],
    ids=["keep", "keep_every", "keep_best", "two_best"],
)
def test_what_is_kept(tmp_path, config, kept):
    losses = {1: 9.0, 2: 2.0, 3: 1.0, 4: 5.0, 5: 4.0, 6: 3.0}
    save(tmp_path, *losses, config=config, losses=losses)
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()} == kept


def test_without_a_held_out_loss_none_is_best(tmp_path):
    save(tmp_path, 1, 2, 3, config=CheckpointConfig(keep=2, keep_best=1))
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()} == {2, 3}


# A full disk.

FILL = """
import json, resource, signal, sys
import jax, jax.numpy as jnp
from llmos_jax.config import CheckpointConfig, UserError
from llmos_jax.runtime.checkpoint import Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep=10, keep_best=0))
rest = {"count": jnp.zeros((), jnp.int32)}
checkpoints.save(1, {"w": jnp.ones((8, 64))}, rest, {})
checkpoints.wait()
limit = 64 * 2**10  # of every file from here on, as if the disk were full
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}, rest, {})
    checkpoints.wait()
except UserError as error:
    print(json.dumps({"error": str(error)}), flush=True)
"""


def test_a_full_disk_is_said_and_leaves_the_older_checkpoint_whole(tmp_path):
    message = json.loads(run(FILL, tmp_path)[-1])["error"]
    assert message.startswith(f"a checkpoint could not be written to {tmp_path}/checkpoints: ")
    assert "Checkpoints written before are whole; make room and run the same command again" in message
    step, params = load_params(tmp_path, abstract({"w": jnp.ones((8, 64))}))
    assert step == 1
    same(params, {"w": jnp.ones((8, 64))})
