"""What a run does about trouble: stop signals, bad steps, steps that hang."""

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from llmos_jax.config import FaultConfig


class StopSignal:
    """A context that turns SIGTERM and Ctrl-C into a question asked between two steps.

    A second Ctrl-C interrupts at once. With several processes a signal to any of them stops all at the same step,
    through the preemption service of `jax.distributed`, which listens to SIGTERM itself.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal that came
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        several = jax.process_count() > 1
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._forward if several else self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether the run is to stop before `step`; every process must ask for every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = self.name or "SIGTERM"
        return bool(self.name)

    def _note(self, number: int, _frame) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def _forward(self, _number: int, _frame) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class StepJudge:
    """Judges each step by its loss; its state belongs in the checkpoint, so that a resumed run judges alike.

    A skipped step (non-finite loss or gradient) is "skipped", `max_bad_steps` of them in a row are "rewind", and so
    is a loss above `spike_factor` times the running mean of the good ones.
    """

    WARM_UP = 20  # good steps before spikes are looked for
    MEMORY = 0.95  # of the running mean

    def __init__(self, config: FaultConfig, state: dict[str, float] | None = None):
        self._config = config
        state = state or {}
        self.mean = float(state.get("mean", 0.0))
        self.good = int(state.get("good", 0))
        self.bad_in_a_row = int(state.get("bad_in_a_row", 0))

    def state(self) -> dict[str, float]:
        return {"mean": self.mean, "good": self.good, "bad_in_a_row": self.bad_in_a_row}

    def judge(self, loss: float, applied: bool) -> str:
        """ "good", "skipped", "spike" or "too_many_bad"; the last two ask for a rewind."""
        if not applied or not math.isfinite(loss):
            self.bad_in_a_row += 1
            return "too_many_bad" if self.bad_in_a_row >= self._config.max_bad_steps else "skipped"
        factor = self._config.spike_factor
        if factor and self.good >= self.WARM_UP and loss > factor * self.mean:
            return "spike"
        self.bad_in_a_row = 0
        self.mean = loss if not self.good else self.MEMORY * self.mean + (1 - self.MEMORY) * loss
        self.good += 1
        return "good"


class Watchdog:
    """Reports a step that takes longer than `seconds`, once a step: the stacks of all threads go to `workdir`/hangs.txt.

    It cannot free a device that hangs; it tells whoever watches, while a signal can still save the last checkpoint.
    """

    def __init__(self, seconds: float, workdir: str | Path, say: Callable[[int, float], None]):
        self._seconds, self._say = seconds, say
        self._file = Path(workdir) / "hangs.txt" if "://" not in str(workdir) else None
        self._step, self._since, self._reported = 0, time.monotonic(), True
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="llmos-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """A step begins."""
        self._step, self._since, self._reported = step, time.monotonic(), False

    def pause(self) -> None:
        """What comes now may take any time (an evaluation, a compilation)."""
        self._reported = True

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._seconds / 4, 1.0)):
            waited = time.monotonic() - self._since
            if not self._reported and waited > self._seconds:
                self._reported = True
                self._dump()
                self._say(self._step, waited)

    def _dump(self) -> None:
        if self._file is None:
            faulthandler.dump_traceback(sys.stderr)
            return
        with self._file.open("a") as file:
            print(f"step {self._step}, {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file, flush=True)
            faulthandler.dump_traceback(file)
