"""Models that share one process and its devices: which are awake, and which sleep in the host's memory meanwhile.

A sleeping model keeps its executables; its weights lie on the host, and its pages are given back. A request for one
wakes it: where memory does not allow all of them, the model that is cheapest to bring back goes to sleep, after its
running answers are done. New requests for it wait, so none fails because of a swap.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llmos_jax.serve.engine import Engine
from llmos_jax.serve.request import Output, Request


@dataclass(slots=True)
class Resident:
    """A model's engine. held: requests that wait for it to wake, or for another one to have its turn."""

    engine: Engine
    bytes: int  # on the devices, awake
    asleep: bool = False
    yielding: bool = False  # it goes to sleep when its running answers are done
    used: float = field(default_factory=time.monotonic)
    held: list[Request] = field(default_factory=list)

    @property
    def cost(self) -> tuple[float, float]:
        """Of putting it to sleep now: the work that has to end first and the bytes to bring back; then how recent."""
        return (float(self.engine.has_work) * 1e18 + self.bytes, self.used)


class Residents:
    """The models of one process. capacity: bytes that those awake may take together."""

    def __init__(self, capacity: float, say: Callable[[str], None] = lambda _: None):
        self.models: dict[str, Resident] = {}
        self._capacity, self._say = capacity, say

    @property
    def has_work(self) -> bool:
        return any(one.held or one.engine.has_work for one in self.models.values())

    def put(self, name: str, engine: Engine) -> None:
        """Adds a model that is awake; others go to sleep for it."""
        self.models[name] = Resident(engine, engine.bytes)
        while self._awake_bytes() > self._capacity and (victim := self._victim(but=name)) is not None:
            self.sleep(victim)

    def add(self, request: Request) -> None:
        """Raises ValueError as Engine.add; a model that sleeps will be woken."""
        one = self.models[request.model]
        one.used = time.monotonic()
        if one.asleep or one.yielding:
            one.engine.check(request)
            one.held.append(request)
        else:
            one.engine.add(request)

    def abort(self, id: str) -> None:
        for one in self.models.values():
            one.held = [request for request in one.held if request.id != id]
            one.engine.abort(id)

    def step(self) -> list[Output]:
        """One step of each awake model that has work, after the swaps that are due."""
        told = self._swap()
        for one in self.models.values():
            if not one.asleep and one.engine.has_work:
                told += one.engine.step()
        return told

    def sleep(self, name: str) -> None:
        """Puts a model to sleep; its answers are done already, or wait to go on."""
        one = self.models[name]
        if one.asleep:
            return
        if one.engine.has_work:
            one.yielding = True
            return
        one.engine.sleep()
        one.asleep, one.yielding = True, False
        self._say(f"{name} sleeps")

    def wake(self, name: str) -> bool:
        """Wakes a model, or asks others to make room for it; whether it is awake now."""
        one = self.models[name]
        one.yielding = False
        if not one.asleep:
            return True
        while self._awake_bytes() + one.bytes > self._capacity:
            victim = self._victim(but=name)
            if victim is None:
                break  # it is alone and takes more than there is by our account: it fitted when it was built
            self.sleep(victim)
            if not self.models[victim].asleep:
                return False
        one.engine.wake()
        one.asleep, one.used = False, time.monotonic()
        self._say(f"{name} is awake")
        return True

    def _swap(self) -> list[Output]:
        told: list[Output] = []
        for name, one in self.models.items():
            if one.yielding and not one.engine.has_work:
                self.sleep(name)
        for name, one in sorted(self.models.items(), key=lambda item: item[1].held[0].arrival if item[1].held else 0.0):
            if one.held and not one.yielding and self.wake(name):
                for request in one.held:
                    try:
                        one.engine.add(request)
                    except ValueError as error:
                        told += refusals(request, str(error))
                one.held = []
        return told

    def _victim(self, but: str) -> str | None:
        awake = {name: one for name, one in self.models.items() if name != but and not one.asleep}
        return min(awake, key=lambda name: awake[name].cost, default=None)

    def _awake_bytes(self) -> int:
        return sum(one.bytes for one in self.models.values() if not one.asleep)


def refusals(request: Request, error: str, status: int = 400) -> list[Output]:
    """What a request that is not taken is told, for each of its answers."""
    return [Output(request.id, i, finish="error", error=error, status=status) for i in range(request.n)]
