"""The training loop: a compiled step called again and again, and what keeps it honest around it."""

import math
import os
import resource
import sys
import threading
import time
from typing import Any, NamedTuple

import jax

from llmos_jax import opening
from llmos_jax.compiler.chips import peak_flops, usable_bytes
from llmos_jax.compiler.program import Executable, OutOfMemory, Program
from llmos_jax.compiler.roofline import train_flops
from llmos_jax.compiler.watch import CompileWatch
from llmos_jax.config import RunConfig, UserError
from llmos_jax.data.pipeline import DevicePrefetch, eval_batches, prefetch_to_device, train_iterator
from llmos_jax.runtime.checkpoint import BEST_METRIC, Checkpoints
from llmos_jax.runtime.distributed import is_primary
from llmos_jax.runtime.faults import StepJudge, StopSignal, Watchdog
from llmos_jax.runtime.metrics import Metrics
from llmos_jax.runtime.report import write_report
from llmos_jax.sharding import put_batch
from llmos_jax.train.prepare import Run
from llmos_jax.train.step import TrainState, abstract_state, eval_program, init_program, start_program, train_program


class Dispatched(NamedTuple):
    """A step that was given to the device and whose metrics have not been looked at yet."""

    step: int  # 1 for the first
    batch: int  # its number in the data stream
    metrics: dict[str, jax.Array]
    started: float
    data_wait: float  # seconds


class TooLarge(UserError):
    """A program takes more than a device has. Bytes."""

    def __init__(self, program: str, peak: float, capacity: float):
        super().__init__(
            f"the {program} program takes {peak / 2**30:,.1f} GiB of a device, and there are {capacity / 2**30:,.1f}; "
            "make it smaller, or try all the same with --force"
        )
        self.peak, self.capacity = peak, capacity


def train(run: Run, stop_at: int | None = None, force: bool = False) -> dict[str, Any]:
    """Trains to `train.steps`, from the newest checkpoint where there is one. Returns a summary.

    A stop signal, or reaching step `stop_at`, saves and returns with "stopped" set. Raises UserError where the run
    cannot go on, TooLarge before anything is allocated where a program does not fit; `force` tries then too.
    """
    metrics = Metrics(run.workdir, run.config.train.steps, run.config.log, is_primary())
    try:
        checkpoints = Checkpoints(
            run.workdir, run.config.checkpoint, lambda kind, step, **details: metrics.event(step, kind, **details)
        )
        with StopSignal() as signal, _watchdog(run, metrics) as watchdog:
            loop = Loop(run, metrics, checkpoints, signal, watchdog, force)
            try:
                return loop.run(stop_at)
            finally:
                loop.close()
    finally:
        metrics.close()
        if is_primary():
            _report(run.workdir)


def _report(workdir: str) -> None:
    """Writes the report page; where it cannot be written, that is said and takes nothing from the run."""
    try:
        write_report(workdir)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)


def _watchdog(run: Run, metrics: Metrics) -> Watchdog:
    def say(step: int, seconds: float) -> None:
        metrics.event(step, "hang", seconds=round(seconds, 1), stacks="hangs.txt")

    return Watchdog(run.config.faults.hang_seconds, run.workdir, say)


class Loop:
    """One process's part of a run. What changes with a step is `state`, `step` and the place in the data."""

    def __init__(
        self,
        run: Run,
        metrics: Metrics,
        checkpoints: Checkpoints,
        signal: StopSignal,
        watchdog: Watchdog,
        force: bool = False,
    ):
        self.workdir, self.mesh, self.data, self.config = run.workdir, run.mesh, run.data, run.config
        self.rows, self.metrics, self.checkpoints = run.rows, metrics, checkpoints
        self.signal, self.watchdog, self.force = signal, watchdog, force
        self.rewinds = 0
        self.last_eval: dict[str, Any] = {}
        self.window = Window(run.config)
        self.watch = CompileWatch(self._recompiled)
        self.program = self._compile(train_program(run.config, run.mesh))
        self.evaluate = self._compile(eval_program(run.config, run.mesh)) if run.data.eval else None
        self.batches = self._stream()
        self._restore_or_start()

    def run(self, stop_at: int | None) -> dict[str, Any]:
        total, pending = self.config.train.steps, None
        if self.step == 0 and self.config.init_from:
            self._evaluate(0)  # what the pulled model can do already
        while self.step < total:
            if self.signal.requested(self.step) or (stop_at is not None and self.step >= stop_at):
                return self._stop(pending)
            self.watchdog.beat(self.step + 1)
            dispatched = self._dispatch()
            # The device works on this step while the one before it is judged; only the first is waited for.
            pending, late = (dispatched, pending) if self.watch.on else (None, dispatched)
            if not self._settle(late):
                pending = None
                continue
            if not self.watch.on:
                self.window.measure_peak()
                self.watch.start()
            if self._is_boundary(self.step, total):
                if not self._settle(pending):
                    pending = None
                    continue
                pending = None
                self._evaluate_and_save(self.step, total)
        self.metrics.event(self.step, "finished", steps=self.step)
        return self._summary(stopped=False)

    def close(self) -> None:
        self.watch.stop()
        self.batches.close()
        if isinstance(sys.exc_info()[1], UserError):
            return  # the message is about a save that failed, or what is saved is not to be waited for
        self.checkpoints.close()

    def _compile(self, program: Program) -> Executable:
        """Nothing is allocated yet: what does not fit is refused here, unless the run was told to try."""
        capacity = usable_bytes(jax.local_devices()[0])
        try:
            executable = program.compile()
        except OutOfMemory as error:
            raise TooLarge(program.name, error.temporaries, capacity) from error
        self.metrics.event(
            0, "compiled", program=program.name, seconds=round(executable.compile_seconds, 2),
            peak_bytes=executable.peak_bytes, cached=executable.from_cache,
        )  # fmt: skip
        if 0 < capacity < executable.peak_bytes and not self.force:
            raise TooLarge(program.name, executable.peak_bytes, capacity)
        return executable

    def _recompiled(self, name: str, seconds: float) -> None:
        self.metrics.event(self.step, "recompiled", program=name, seconds=round(seconds, 2), count=self.watch.count)

    def _restore_or_start(self) -> None:
        """The newest whole checkpoint, or the beginning."""
        abstract = abstract_state(self.config, self.mesh)
        rest = {"step": abstract.step, "opt_state": abstract.opt_state, "rng": abstract.rng}
        found = self.checkpoints.restore(abstract.params, rest)
        extra: dict[str, Any] = {}
        if found is None:
            self.state, self.step = self._fresh_state(), 0
        else:
            self.state, self.step, extra = TrainState(params=found.params, **found.rest), found.step, found.extra
            if extra["data"] != self.data.fingerprint:
                raise UserError(
                    f"the text that {self.workdir} was trained on has changed since; restore it, or train in a new --workdir"
                )
            self.metrics.event(self.step, "resumed", batch=extra["next_batch"])
        self.judge = StepJudge(self.config.faults, extra.get("judge"))
        self.last_eval = extra.get("last_eval", {})
        self.window.tokens_seen = extra.get("tokens_seen", 0.0)
        self.window.loss = extra.get("loss", math.nan)
        self.batches.seek(int(extra.get("next_batch", 0)))

    def _fresh_state(self) -> TrainState:
        if not self.config.init_from:
            return self._compile(init_program(self.config, self.mesh))()
        params = opening.weights_of(opening.find(self.config.init_from), self.config.model, self.mesh)
        return self._compile(start_program(self.config, self.mesh))(params)

    def _stream(self) -> DevicePrefetch:
        """The training batches from the first one; nothing is read before one is asked for."""
        size = self.config.train.batch_size
        iterator = train_iterator(self.config, self.data, self.rows)
        return prefetch_to_device(iterator, lambda rows: put_batch(rows, self.mesh, size))

    def _dispatch(self) -> Dispatched:
        started = time.perf_counter()
        number = self.batches.state()["next_batch"]
        batch = next(self.batches)
        waited = time.perf_counter() - started
        self.state, metrics = self.program(self.state, batch)
        self.step += 1
        return Dispatched(self.step, number, metrics, started, waited)

    def _settle(self, done: Dispatched | None) -> bool:
        """Looks at a step's metrics (waiting for it), writes them down; False if the run went back because of it."""
        if done is None:
            return True
        values = {name: float(value) for name, value in done.metrics.items()}
        self.checkpoints.poll()
        verdict = self.judge.judge(values["loss"], bool(values.pop("applied")))
        self.window.add(done, values)
        if done.step % self.config.log.every == 0 or done.step in (1, self.config.train.steps) or verdict != "good":
            self.metrics.step(done.step, values | self.window.rates())
        if verdict == "skipped":
            self.metrics.event(
                done.step, "skipped_step", loss=values["loss"], grad_norm=values["grad_norm"], batch=done.batch
            )
        if verdict in ("spike", "too_many_bad"):
            self._rewind(done, verdict, values["loss"])
            return False
        return True

    def _rewind(self, bad: Dispatched, why: str, loss: float) -> None:
        """Back to the newest checkpoint; the data from there to the bad step is passed over."""
        self.rewinds += 1
        if self.rewinds > self.config.faults.max_rewinds:
            raise UserError(
                f"step {bad.step} went wrong ({why}, loss {loss:.3g}) after {self.rewinds - 1} rewinds; the run gives up. "
                f"Its checkpoints are whole; lower optimizer.learning_rate or look at the data from batch {bad.batch}, "
                "and train in a new --workdir"
            )
        self.checkpoints.wait()
        with self.watch.pause():
            self._restore_or_start()
        self.batches.seek(bad.batch + 1)
        self.judge.bad_in_a_row = 0
        self.metrics.event(self.step, "rewind", why=why, loss=loss, bad_step=bad.step, next_batch=bad.batch + 1)

    def _is_boundary(self, step: int, total: int) -> bool:
        """Whether to evaluate or save after `step`."""
        return step == total or step % self.config.checkpoint.every == 0 or self._is_eval(step, total)

    def _is_eval(self, step: int, total: int) -> bool:
        every = self.config.train.eval_every
        return self.evaluate is not None and (step == total or (every > 0 and step % every == 0))

    def _evaluate_and_save(self, step: int, total: int) -> None:
        self.watchdog.pause()
        fresh = self._is_eval(step, total)
        if fresh:
            self._evaluate(step)
        if step == total or step % self.config.checkpoint.every == 0:
            self._save({BEST_METRIC: self.last_eval[BEST_METRIC]} if fresh else None)
        self.window.restart()

    def _evaluate(self, step: int) -> None:
        """Measures the held-out rows, the same ones at every step and on every mesh."""
        if self.evaluate is None:
            return
        values = evaluate(self.config, self.data, self.rows, self.mesh, self.evaluate, self.state.params)
        self.last_eval = {"step": step, **values}
        self.metrics.evaluation(step, values)

    def _save(self, metrics: dict[str, float] | None = None) -> None:
        state = self.state
        extra = {
            "next_batch": self.batches.state()["next_batch"],
            "data": self.data.fingerprint,
            "judge": self.judge.state(),
            "last_eval": self.last_eval,
            "tokens_seen": self.window.tokens_seen,
            "loss": self.window.loss,
        }
        rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
        with self.watch.pause():  # of arrays that several devices hold, the parts to be written are cut out
            self.checkpoints.save(self.step, state.params, rest, extra, metrics)

    def _stop(self, pending: Dispatched | None) -> dict[str, Any]:
        self.watchdog.pause()
        with _grace(self.config.faults.grace_seconds, self.checkpoints):
            self._settle(pending)
            if self.checkpoints.latest_step() != self.step:
                self._save()
            self.checkpoints.wait()
        self.metrics.event(self.step, "stop_requested", signal=self.signal.name or "--stop-at")
        return self._summary(stopped=True)

    def _summary(self, stopped: bool) -> dict[str, Any]:
        return {
            "workdir": self.workdir,
            "step": self.step,
            "steps": self.config.train.steps,
            "stopped": stopped,
            "signal": self.signal.name,
            "loss": self.window.loss,
            "evaluation": self.last_eval,
            "report": f"{self.workdir.rstrip('/')}/report.html",
        }


def evaluate(config: RunConfig, data, rows: slice, mesh, program: Executable, params) -> dict[str, float]:
    """Mean loss (nats a token), perplexity and bits per byte over the held-out rows."""
    nll = tokens = 0.0
    for batch in eval_batches(config, data, rows):
        sums = program(params, put_batch(batch, mesh, config.train.batch_size))
        nll, tokens = nll + float(sums[0]), tokens + float(sums[1])
    loss = nll / max(tokens, 1.0)
    return {
        BEST_METRIC: loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) * data.eval_targets_per_byte,
    }


class Window:
    """Rates over the steps since they were last written down, evaluations and saves left out."""

    def __init__(self, config: RunConfig):
        self._flops = train_flops(config.model, config.train.seq_len) * config.train.batch_size
        self._dtype = config.model.dtype
        self._peak: float | None = None
        self.tokens_seen = 0.0
        self.loss = math.nan
        self.restart()

    def measure_peak(self) -> None:
        """What the devices can do, found out once, while they are idle; a window that is open leaves this time out."""
        if self._peak is not None:
            return
        started, device = time.perf_counter(), jax.local_devices()[0]
        peak = peak_flops(device.device_kind, device.platform, self._dtype)
        self._peak = peak * (jax.device_count() if device.platform != "cpu" else jax.process_count())
        if self._since is not None:
            self._since += time.perf_counter() - started

    def restart(self, since: float | None = None) -> None:
        """Begins a new window at `since`, or with the next step."""
        self._since = since
        self._steps, self._tokens, self._wait = 0, 0.0, 0.0

    def add(self, done: Dispatched, values: dict[str, float]) -> None:
        if self._since is None:
            self._since = done.started
        self._steps += 1
        self._tokens += values["tokens"]
        self._wait += done.data_wait
        self.tokens_seen += values["tokens"]
        self.loss = values["loss"]

    def rates(self) -> dict[str, float]:
        """Of the window, which ends here; the next one begins."""
        self.measure_peak()
        now = time.perf_counter()
        seconds = max(now - (now if self._since is None else self._since), 1e-9)
        step_seconds = seconds / self._steps
        rates = {
            "tokens_per_second": self._tokens / seconds,
            "step_seconds": step_seconds,
            "data_wait_seconds": self._wait / self._steps,
            "device_memory_bytes": _memory_in_use(),
            "tokens_seen": self.tokens_seen,
        }
        if self._peak:
            rates["mfu"] = self._flops / step_seconds / self._peak
        self.restart(now)
        return rates


def _memory_in_use() -> float:
    """Peak bytes of a device; on a CPU, whose memory is the host's, of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return float(stats.get("peak_bytes_in_use", 0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


class _grace:
    """Ends the process if the last save takes longer than the scheduler will wait; older checkpoints stay whole."""

    def __init__(self, seconds: float, checkpoints: Checkpoints):
        self._timer = threading.Timer(seconds, self._give_up, (seconds, checkpoints))
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_) -> None:
        self._timer.cancel()

    @staticmethod
    def _give_up(seconds: float, checkpoints: Checkpoints) -> None:
        print(
            f"llmos: the last save was not done within faults.grace_seconds={seconds:g}; "
            f"the newest whole checkpoint is that of step {checkpoints.latest_step()}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
