"""How often the loops of a compiled program run.

CPU and GPU compilers write a known trip count into the text; the TPU compiler does not, so the loop's counter is run.
"""

import re
from collections.abc import Callable

from llmos_jax.compiler.hlo import Computation, Instruction, Module

_MAX_TRIPS = 1 << 16
State = Callable[[int], int] | None  # element i of the parameter of the computation at hand


class _Unknown(Exception):  # not an error, an answer
    """A value follows from data."""


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None where that follows from data, or is above 65,536."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    return int(known[1]) if known else _Counter(module).trips(loop)


class _Counter:
    """Counts a loop's trips by running its counter: whatever feeds the condition is evaluated, nothing else.

    So the form does not matter: up or down, any step, fused or cloned conditions, a bound carried in the state.
    """

    def __init__(self, module: Module):
        self.module = module

    def trips(self, loop: Instruction) -> int | None:
        condition, body = self.module.condition(loop), self.module.body(loop)
        initial: dict[int, int] = {}

        def start(index: int) -> int:
            if index not in initial:
                initial[index] = self._element(self._home(loop), loop.operands[0], index)
            return initial[index]

        try:
            self._value(condition, condition.root.name, start)
            before = -1
            while len(initial) > before:  # what the counter itself is computed from
                before = len(initial)
                for index in list(initial):
                    self._element(body, body.root.name, index, start)
            state = dict(initial)
            for trip in range(_MAX_TRIPS):
                if not self._value(condition, condition.root.name, state.__getitem__):
                    return trip
                before_trip, state = (
                    state,
                    {i: self._element(body, body.root.name, i, state.__getitem__) for i in state},
                )
                if state == before_trip:
                    return None  # never ends
        except _Unknown:
            return None
        return None

    def _home(self, loop: Instruction) -> Computation:
        return next(c for c in self.module.computations.values() if c.instructions.get(loop.name) is loop)

    def _element(self, where: Computation, name: str, index: int, state: State = None) -> int:
        """Element `index` of the tuple `name`. state: what element i of the parameter is; None looks outside."""
        at = where[name]
        if at.opcode == "tuple":
            return self._value(where, at.operands[index], state)
        if at.opcode in ("copy", "opt-barrier", "bitcast", "copy-done"):
            return self._element(where, at.operands[0], index, state)
        if at.opcode == "copy-start":
            return self._value(where, at.operands[0], state)
        if at.opcode == "parameter" and at.text == "0":
            return state(index) if state else self._outside(where, index)
        if at.opcode in ("fusion", "call"):
            inner = self.module.computations[at.calls[0]]
            return self._element(inner, inner.root.name, index, self._arguments(where, at, state))
        if at.opcode == "while" and self._passes(self.module.body(at), index):
            return self._element(where, at.operands[0], index, state)
        raise _Unknown

    def _arguments(self, where: Computation, call: Instruction, state: State) -> "_Arguments":
        return _Arguments(lambda number: self._value(where, call.operands[number], state))

    def _outside(self, where: Computation, index: int) -> int:
        """Element `index` of the state of the loop whose body `where` is, if the loop never changes it."""
        if where.name not in self.module.callers:
            raise _Unknown
        home, caller = self.module.callers[where.name]
        if caller.opcode != "while" or not self._passes(self.module.body(caller), index):
            raise _Unknown
        return self._element(home, caller.operands[0], index)

    def _passes(self, body: Computation, index: int) -> bool:
        """Whether a loop's body hands element `index` of its state on as it is."""
        if body.root.opcode != "tuple":
            return False
        at = body[body.root.operands[index]]
        while at.opcode in ("copy", "bitcast"):
            at = body[at.operands[0]]
        is_element = at.opcode == "get-tuple-element" and at.attribute("index") == str(index)
        return is_element and body[at.operands[0]].opcode == "parameter"

    def _value(self, where: Computation, name: str, state: State = None) -> int:
        """The integer (or truth) that `name` is, alone or in every place of an array."""
        at = where[name]
        match at.opcode:
            case "constant":
                if found := re.fullmatch(r"\{*(-?\d+|true|false)\}*", at.text.strip()):
                    return int(found[1] == "true") if found[1][0] in "tf" else int(found[1])
                raise _Unknown
            case "get-tuple-element":
                return self._element(where, at.operands[0], int(at.attribute("index")), state)
            case "parameter" if isinstance(state, _Arguments):
                return state.value(int(at.text))
            case "fusion" | "call":
                inner = self.module.computations[at.calls[0]]
                return self._value(inner, inner.root.name, self._arguments(where, at, state))
            case "copy" | "bitcast" | "convert" | "reshape" | "broadcast" | "slice" | "opt-barrier":
                return self._value(where, at.operands[0], state)
            case "copy-done":
                return self._value(where, where[at.operands[0]].operands[0], state)
            case "compare":
                left, right = (self._value(where, operand, state) for operand in at.operands)
                return int(_COMPARE[at.attribute("direction")](left, right))
            case opcode if opcode in _ARITHMETIC:
                return _ARITHMETIC[opcode](*(self._value(where, operand, state) for operand in at.operands))
        raise _Unknown


class _Arguments:
    """The parameters of a called computation."""

    def __init__(self, value: Callable[[int], int]):
        self.value = value

    def __call__(self, index: int) -> int:
        raise _Unknown


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": int.__lt__,
    "LE": int.__le__,
    "GT": int.__gt__,
    "GE": int.__ge__,
    "EQ": int.__eq__,
    "NE": int.__ne__,
}
_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": int.__add__,
    "subtract": int.__sub__,
    "multiply": int.__mul__,
    "minimum": min,
    "maximum": max,
    "and": int.__and__,
    "or": int.__or__,
    "not": lambda value: int(not value),
    "negate": int.__neg__,
    "select": lambda which, yes, no: yes if which else no,
}
