"""Plans published training runs and compares: predicted against published step time and MFU.

    python scripts/calibrate.py                       # compiles each row for its described chips: an hour on 2 cores
    python scripts/calibrate.py --formula             # the analytic estimate alone: seconds
    python scripts/calibrate.py --only v5p --write docs/planning.md     # the other rows keep the lines they have there

The rows, their sources and what had to be assumed are in docs/planning_published.json. Nothing is fitted per row: a
row's chip, mesh, batch, dtypes and what its backward pass keeps go in, and the planner's answer comes out. Left out are
rows that our models do not express (dropped tokens, parallel blocks, other attention) and GPUs.
"""

import argparse
import dataclasses
import datetime
import json
import re
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llmos_jax.compiler.roofline import train_flops  # noqa: E402
from llmos_jax.compiler.target import Target  # noqa: E402
from llmos_jax.config import MeshConfig, OptimizerConfig, RopeConfig, RunConfig, TrainConfig  # noqa: E402
from llmos_jax.models.presets import PRESETS  # noqa: E402
from llmos_jax.plan.candidates import evaluate  # noqa: E402
from llmos_jax.plan.programs import Serving, plan  # noqa: E402
from scripts.compile_matrix import write  # noqa: E402

MARKERS = ("<!-- calibration: begin -->", "<!-- calibration: end -->")
ROWS = (
    *("llama3.1-8b v6e-8", "llama3.1-8b v6e-64", "llama3.1-8b v6e-256", "mistral-7b v6e-8"),
    *("llama3.1-70b v6e-32", "llama3.1-70b v6e-256", "llama2-70b v6e-256", "llama3.1-405b 2x v6e-256"),
    *("llama2-70b v5p-512", "llama3.1-405b v5p-1024 (512 chips)", "mixtral-8x7b v5p-256"),
    *("llama3.1-70b tpu7x-64", "llama3.1-70b tpu7x-256", "llama3.1-405b tpu7x-256", "qwen3-235b-a22b tpu7x-256"),
)
LLAMA2_70B = dataclasses.replace(PRESETS["llama3-70b"], vocab_size=32_000, max_seq_len=4_096, rope=RopeConfig())
MODELS = {"llama2-70b": LLAMA2_70B, "mistral-7b": PRESETS["mistral-7b"]}
# What MaxText's remat policies call an activation, and what it is called here.
NAMES = {
    "decoder_layer_input": ("input",),
    "query_proj": ("q",),
    "key_proj": ("k",),
    "value_proj": ("v",),
    "qkv_proj": ("q", "k", "v"),
    "context": ("attention",),
    "out_proj": ("attention_out",),
    "mlpwi": ("gate", "up"),
    "mlpwo": ("mlp_out",),
}
AXES = {"fsdp": "fsdp", "fsdp_transpose": "fsdp", "tensor": "tensor", "data": "data", "context": "context"}


class Line(NamedTuple):
    """One row's outcome. Seconds of a step; MFU counts causal attention, as we do."""

    row: str
    target: str
    published: float
    predicted: float
    formula: float
    published_mfu: float
    predicted_mfu: float
    peak: float  # bytes a device; 0 where it was not compiled
    compiled: float  # seconds
    note: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def run_config(row: dict[str, Any], target: Target) -> RunConfig:
    """A published row as a configuration of ours."""
    model = PRESETS[row["preset"]] if row["preset"] else MODELS[row["model"]]
    keep, offload = (
        tuple(dict.fromkeys(name for theirs in row["remat"][where] for name in NAMES[theirs]))
        for where in ("saved_on_device", "offloaded_to_host")
    )
    full = keep == ("input",) and not offload
    model = dataclasses.replace(
        model,
        dtype=row["compute_dtype"],
        param_dtype=row["param_dtype"],
        remat="full" if full else "names",
        remat_save=() if full else keep,
        remat_offload=() if full else offload,
        max_seq_len=max(model.max_seq_len, row["seq_len"]),
    )
    sizes = {"fsdp": 1}
    for stated in (row["mesh_ici"], row["mesh_dcn"]):
        for axis, size in stated.items():
            sizes[AXES[axis]] = sizes.get(AXES[axis], 1) * size
    train = TrainConfig(
        steps=1_000,
        batch_size=row["global_batch"],
        seq_len=row["seq_len"],
        accumulate=row["gradient_accumulation"] or 1,
    )
    return RunConfig(model=model, mesh=MeshConfig(**sizes), train=train, optimizer=OptimizerConfig(name="adamw"))


def line(row: dict[str, Any], formula_only: bool) -> Line:
    target = Target.parse(row["target"])
    config = run_config(row, target)
    published = row["derived"]["step_s"]
    formula = evaluate(config, target, ())
    if formula is None:
        raise SystemExit(f"{row['id']}: the configuration breaks a rule of ours")
    peak, compiled, predicted, note = 0.0, 0.0, formula.seconds, ""
    if not formula_only:
        found = plan(config, target, "train", Serving(), lambda message: print(message, file=sys.stderr, flush=True))
        predicted, peak, compiled = found.main.seconds, found.peak_bytes, found.compile_seconds
        note = "" if found.fits else "does not fit here"
    useful = train_flops(config.model, config.train.seq_len) * config.train.batch_size
    rate = useful / target.num_devices / target.chip.peak_flops(config.model.dtype)
    return Line(
        row["id"], row["target"], published, predicted, formula.seconds, rate / published, rate / predicted, peak,
        compiled, note,
    )  # fmt: skip


HEAD = (
    "| run | target | published s | predicted s | error | formula s | MFU published | predicted | GiB a device | compiled |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def cells(one: Line) -> str:
    """A line of the table."""
    return (
        f"| {one.row} | {one.target} | {one.published:.2f} | {one.predicted:.2f} | {one.error:+.0%} | "
        f"{one.formula:.2f} | {one.published_mfu:.1%} | {one.predicted_mfu:.1%} | "
        f"{one.peak / 2**30:.1f}{' (' + one.note + ')' if one.note else ''} | "
        f"libtpu {metadata.version('libtpu')}, {datetime.date.today()} |"
    )


def standing(text: str) -> dict[str, str]:
    """The lines that the table in `text` has, by row: what a row says that is not planned this time."""
    between = re.search(f"{re.escape(MARKERS[0])}(.*?){re.escape(MARKERS[1])}", text, re.DOTALL)
    lines = between[1].splitlines() if between else []
    return {row: one for one in lines if (row := one.strip("| ").split(" | ")[0]) in ROWS}


def table(lines: dict[str, str]) -> str:
    """Of the lines by row: the table, and what its errors come to, from the seconds that it shows."""
    ordered = [lines[row] for row in ROWS if row in lines]
    seconds = [[float(cell) for cell in one.strip("| ").split(" | ")[2:4]] for one in ordered]
    return "\n".join([*HEAD, *ordered]) + f"\n\n{verdict([after / before - 1 for before, after in seconds])}."


def verdict(errors: list[float]) -> str:
    sizes = [abs(error) for error in errors]
    return f"median error {statistics.median(sizes):.1%} of {len(sizes)} rows, largest {max(sizes):.0%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts of row names, with commas")
    parser.add_argument("--formula", action="store_true", help="the analytic estimate alone; compiles nothing")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of this file")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.formula and args.write:
        parser.error("the table is of compiled programs: --write and --formula do not go together")
    published = {row["id"]: row for row in json.loads((ROOT / "docs" / "planning_published.json").read_text())}
    wanted = [part for part in args.only.split(",") if part]
    lines = []
    for name in ROWS:
        if wanted and not any(part in name for part in wanted):
            continue
        lines.append(one := line(published[name], args.formula))
        print(
            f"{one.row}: {one.predicted:.2f} s against {one.published:.2f} ({one.error:+.0%}), formula {one.formula:.2f}, "
            f"{one.peak / 2**30:.1f} GiB, compiled in {one.compiled:.0f} s {one.note}",
            flush=True,
        )
    print(verdict([one.error for one in lines]))
    if args.json:
        args.json.write_text(json.dumps([one._asdict() | {"error": one.error} for one in lines], indent=1))
    if args.write:
        kept = standing(args.write.read_text())
        write(args.write, table(kept | {one.row: cells(one) for one in lines}), MARKERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
