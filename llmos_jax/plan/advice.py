"""What would make a plan fit: single changes, then pairs of them, each with what it costs in time.

By formula, measured against the compiled program: a change's memory is scaled by how far the formula was from what the
compiler reported for the configuration as it stands.
"""

import itertools
from dataclasses import dataclass

from llmos_jax.compiler.target import Target
from llmos_jax.config import RunConfig, mesh_shape
from llmos_jax.plan.candidates import Candidate, evaluate, remats

MOST = 6  # pieces of advice


@dataclass(frozen=True)
class Advice:
    """settings: what to `--set`. peak: bytes a device to be expected. slower: time of a token over the present one."""

    settings: tuple[str, ...]
    peak: float
    slower: float

    @property
    def cost(self) -> str:
        return "no slower" if self.slower < 1.005 else f"{self.slower - 1:.0%} slower"


def advise(config: RunConfig, target: Target, peak: float, capacity: float) -> list[Advice]:
    """Changes after which the training program, which takes `peak` bytes of a device's `capacity`, is expected to fit:
    the fastest first; empty if none is known."""
    now = evaluate(config, target, ())
    if now is None:
        return []
    scale = peak / now.memory
    singles = list(_singles(config, target))
    found = _fitting(config, target, [(one,) for one in singles], now, scale, capacity)
    if len(found) < 2:
        pairs = [pair for pair in itertools.combinations(singles, 2) if not _clash(*pair)]
        found += _fitting(config, target, pairs, now, scale, capacity)
    # The batch is what the run is about: a smaller one comes last.
    return sorted(found, key=lambda one: ("batch_size" in str(one.settings), round(one.slower, 3), one.peak))[:MOST]


def advise_here(config: RunConfig, peak: float, capacity: float) -> str:
    """The advice for this machine's devices, in lines of text."""
    found = advise(config, Target.parse("local"), peak, capacity)
    if not found:
        return "nothing that is known makes it fit here; take more devices, or a smaller model"
    lines = [f"  --set {' '.join(one.settings)}  ({one.peak / 2**30:.1f} GiB, {one.cost})" for one in found]
    return "\n".join(["what would make it fit, by formula:", *lines])


def _fitting(config, target, combinations, now: Candidate, scale: float, capacity: float) -> list[Advice]:
    answer = []
    for parts in combinations:
        settings = tuple(itertools.chain.from_iterable(parts))
        one = evaluate(config, target, settings)
        if one and one.memory * scale <= capacity:
            answer.append(Advice(settings, one.memory * scale, now.tokens_per_second / one.tokens_per_second))
    return answer


def _singles(config: RunConfig, target: Target):
    """One change each: remat, micro-batches, mesh, optimizer, stored dtype, a smaller batch."""
    train, model = config.train, config.model
    for remat in remats(config):
        if f"model.remat={model.remat}" != remat[0] or model.remat == "names":
            yield remat
    for times in (2, 4, 8, 16):
        if train.batch_size % (train.accumulate * times) == 0:
            yield (f"train.accumulate={train.accumulate * times}",)
    sizes = mesh_shape(config.mesh, target.num_devices)
    for axis, other in itertools.product(("fsdp", "tensor", "context", "expert"), ("data", "fsdp")):
        for times in (2, 4, 8):
            if axis != other and sizes[other] % times == 0:
                changed = sizes | {axis: sizes[axis] * times, other: sizes[other] // times}
                yield tuple(f"mesh.{name}={size}" for name, size in changed.items() if size != sizes[name])
    if config.optimizer.name == "adamw":
        yield ("optimizer.name=adafactor",)
        yield ("optimizer.name=lion",)
    if model.param_dtype == "float32":
        yield ("model.param_dtype=bfloat16",)
    for times in (2, 4, 8):
        if train.batch_size % times == 0:
            yield (f"train.batch_size={train.batch_size // times}",)


def _clash(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether two changes set the same field, or both the mesh."""
    names = [{setting.partition("=")[0] for setting in one} for one in (a, b)]
    groups = [{name.split(".")[0] for name in one} & {"mesh"} for one in names]
    return bool(names[0] & names[1]) or (bool(groups[0]) and bool(groups[1])) or _both_remat(*names)


def _both_remat(a: set[str], b: set[str]) -> bool:
    return any("remat" in name for name in a) and any("remat" in name for name in b)
