"""Checkpoints of a run, through Orbax: asynchronous, sharded, checked before they are trusted.

A checkpoint counts only when Orbax has committed it (a rename). After that it is sealed: a list of its files' sizes and
checksums is written beside them, because the stored arrays carry none and a flipped bit would otherwise come back as
a wrong weight.
"""

import functools
import json
import logging
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from llmos_jax.config import CheckpointConfig, UserError
from llmos_jax.runtime.distributed import barrier
from llmos_jax.runtime.workdir import is_remote

# Orbax remarks on ordinary things (a folder opened read-only) as warnings.
logging.getLogger("absl").setLevel(logging.ERROR)

SEAL = "seal.json"
ITEMS = ("params", "rest", "extra")
BEST_METRIC = "eval_loss"


class Restored(NamedTuple):
    step: int
    params: dict[str, jax.Array]
    rest: Any
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints in `workdir`/checkpoints.

    What is saved: `params`, a flat dict; `rest`, any pytree of arrays (optimizer state, counters, RNG); `extra`, JSON
    (the data iterator's state, fault counters). `say(kind, step, **details)` is told what happens to a checkpoint.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig, say: Callable[..., None] = lambda *_, **__: None):
        _leave_failures_to_exceptions()
        self._folder = _checkpoints_of(workdir)
        self._say = say
        self._sealing: threading.Thread | None = None
        self._unsealed: list[int] = []
        keep = [policies.LatestN(config.keep)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        if config.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: -metrics[BEST_METRIC],
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=ITEMS)

    def save(self, step: int, params, rest, extra: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts a save of `step`; arrays are copied before this returns, files are written behind it.

        Raises UserError if this save or the one before it could not be written.
        """
        self.poll()
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            rest=ocp.args.StandardSave(_named_leaves(rest)),
            extra=ocp.args.JsonSave(extra),
        )
        with _unwritable_is_an_error(self._folder):
            self._manager.save(step, args=args, metrics=metrics, force=True)
        self._unsealed.append(step)

    def poll(self) -> None:
        """Seals what has been committed since the last call; raises UserError if a save failed behind our back."""
        with _unwritable_is_an_error(self._folder):
            self._manager.check_for_errors()
        if self._unsealed and not self._manager.is_saving_in_progress():
            self._seal_in_background()

    def wait(self) -> None:
        """Returns when every save is committed and sealed."""
        with _unwritable_is_an_error(self._folder):
            self._manager.wait_until_finished()
        self._seal_in_background()
        if self._sealing is not None:
            self._sealing.join()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, params, rest) -> Restored | None:
        """The newest checkpoint that is whole, laid out as the abstract `params` and `rest`; None if there is none yet.

        Damaged ones are set aside (renamed, never deleted) and said. UserError if there are some but none is whole.
        """
        self._report_torn()
        for step in sorted(self._manager.all_steps(), reverse=True):
            problem = _agree(functools.partial(_problem, self._step_folder(step)))
            if problem is None:
                return self._read(step, params, rest)
            self._say("checkpoint_damaged", step, problem=problem)
            self._set_aside(step)
        # Those of earlier starts too: a command that is simply repeated must not begin anew.
        damaged = {int(entry.name.split(".")[0]) for entry in self._folder.glob("*.damaged*")}
        if damaged:
            raise UserError(
                f"every checkpoint in {self._folder} is damaged (steps {', '.join(map(str, sorted(damaged)))}; kept there "
                "with .damaged in their names); restore a copy of one, or start again in a new --workdir"
            )
        return None

    def _read(self, step: int, params, rest) -> Restored:
        names = _named_leaves(rest)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            rest=ocp.args.StandardRestore(names),
            extra=ocp.args.JsonRestore(),
        )
        try:
            found = self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint of step {step} in {self._folder} does not fit this configuration "
                f"({_first_line(error)}); use the configuration it was written with, or a new --workdir"
            ) from error
        leaves = [found.rest[name] for name in names]
        return Restored(step, found.params, jax.tree.unflatten(jax.tree.structure(rest), leaves), found.extra)

    def _step_folder(self, step: int) -> epath.Path:
        return self._folder / str(step)

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target, number = self._folder / f"{step}.damaged", 1
            while target.exists():
                number += 1
                target = self._folder / f"{step}.damaged{number}"
            self._step_folder(step).rename(target)
        barrier(f"set-aside-{step}")
        self._manager.reload()

    def _report_torn(self) -> None:
        if self._folder.exists():
            for entry in sorted(self._folder.iterdir()):
                if ".orbax-checkpoint-tmp" in entry.name:
                    self._say("checkpoint_torn", int(entry.name.split(".")[0]), passed_over=entry.name)
                    if jax.process_index() == 0:
                        entry.rmtree()

    def _seal_in_background(self) -> None:
        if self._sealing is not None:
            self._sealing.join()
        steps, self._unsealed = self._unsealed, []
        if steps and jax.process_index() == 0:
            self._sealing = threading.Thread(target=self._seal, args=(steps,), name="llmos-seal")
            self._sealing.start()

    def _seal(self, steps: list[int]) -> None:
        for step in steps:
            folder = self._step_folder(step)
            try:
                files = {str(path.relative_to(folder)): _checksum(path) for path in _files(folder)}
                temporary = folder / f".{SEAL}"
                temporary.write_text(json.dumps(files))
                temporary.rename(folder / SEAL)
            except OSError:
                continue  # already superseded and deleted, or the disk is full: it stays unsealed, which is no damage
            self._say("checkpoint_saved", step, bytes=sum(size for size, _ in files.values()))


def load_params(workdir: str | Path, params) -> tuple[int, dict[str, jax.Array]]:
    """(step, parameters) of the newest whole checkpoint, laid out as the abstract `params`; writes nothing.

    Raises UserError where there is none.
    """
    folder = _checkpoints_of(workdir)
    with ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(read_only=True, create=False), item_names=ITEMS
    ) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            if _problem(folder / str(step)) is None:
                args = ocp.args.Composite(params=ocp.args.StandardRestore(params))
                return step, manager.restore(step, args=args).params
    raise UserError(f"there is no whole checkpoint in {folder}; train first, or name another folder")


def _problem(folder: epath.Path) -> str | None:
    """What is wrong with the files of one checkpoint, or None. One without a seal was killed right after its commit."""
    if not (folder / SEAL).exists():
        missing = [name for name in ITEMS if not (folder / name).exists()]
        return f"{missing[0]} is missing" if missing else None
    try:
        sealed = json.loads((folder / SEAL).read_text())
        for name, entry in sealed.items():
            if not (folder / name).exists():
                return f"{name} is missing"
            if _checksum(folder / name) != entry:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, AttributeError) as error:
        return _first_line(error)
    return None


def _checkpoints_of(workdir: str | Path) -> epath.Path:
    """The folder of checkpoints, as an address or the absolute path that Orbax asks for."""
    return epath.Path(str(workdir) if is_remote(workdir) else Path(workdir).absolute()) / "checkpoints"


def _leave_failures_to_exceptions() -> None:
    """Keeps a failed write from being told several times over, with the stacks of the threads that met it.

    Orbax logs what it then raises; its other writes fail without anyone waiting for them, some of them after the event
    loop is closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    previous = sys.unraisablehook

    def hook(event) -> None:
        if str(event.exc_value) != "Event loop is closed":
            previous(event)

    if previous.__module__ != __name__:
        sys.unraisablehook = hook


def _named_leaves(tree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _files(folder: epath.Path) -> list[epath.Path]:
    """Every file below `folder`, the seal left out."""
    found = []
    for entry in sorted(folder.iterdir()):
        found += _files(entry) if entry.is_dir() else [entry] * (entry.name != SEAL)
    return found


def _checksum(path: epath.Path) -> list[int]:
    """[size, CRC-32] of a file."""
    size = value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            size, value = size + len(block), zlib.crc32(block, value)
    return [size, value]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _unwritable_is_an_error:
    """Turns a failed write into a UserError that says what is safe."""

    def __init__(self, folder: epath.Path):
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
        reason = "the disk is full" if full else _first_line(error)
        raise UserError(
            f"a checkpoint could not be written to {self._folder}: {reason}. Checkpoints written before are whole; "
            "make room and run the same command again to go on from the newest"
        ) from error


def _agree(check: Callable[[], str | None]) -> str | None:
    """The first process's answer, on all of them."""
    if jax.process_count() == 1:
        return check()
    problem = check() if jax.process_index() == 0 else None
    bad = multihost_utils.broadcast_one_to_all(jax.numpy.asarray(problem is not None))
    return (problem or "see the first process") if bool(bad) else None
