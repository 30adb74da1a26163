"""One training step compiled ahead of time by MaxText and by us, with one compiler for both, and both counted alike.

    python -m venv peers && peers/bin/pip install "maxtext[tpu]==0.2.5"          # needs Python 3.12
    PYTHONPATH=. peers/bin/python scripts/beside_maxtext.py configs/llama3_8b.py v6e:16x16 --maxtext model_name=llama3-8b
    ... --set mesh.fsdp=64 mesh.tensor=8 train.batch_size=64      # of our configuration; MaxText gets the same

MaxText gets the configuration's batch, sequence length, mesh (fsdp, tensor, expert) and dtypes, full remat, flash attention
and AdamW; anything else of its base.yml by --maxtext KEY=VALUE. Each side compiles in a process of its own. Peak bytes are
the compiler's; FLOPs, traffic and seconds are read from both texts by our counting (compiler/hlo*.py, timing.py).
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llmos_jax.compiler import buffers, hlo, hlo_cost  # noqa: E402
from llmos_jax.compiler.target import Target  # noqa: E402
from llmos_jax.compiler.timing import timing  # noqa: E402
from llmos_jax.config import RunConfig, mesh_shape  # noqa: E402
from llmos_jax.overrides import load_config  # noqa: E402
from llmos_jax.plan.programs import Serving, build  # noqa: E402

AXES = ("data", "fsdp", "tensor", "expert")  # that mean the same in both
TEXT, FIGURES = "program.hlo.txt", "figures.json"


def maxtext_settings(config: RunConfig, target: Target, more: list[str]) -> list[str]:
    """What MaxText's command line takes for the same step. The chips' name there is looked up in its own process."""
    model, train, sizes = config.model, config.train, mesh_shape(config.mesh, target.num_devices)
    settings = {
        "per_device_batch_size": train.batch_size / train.accumulate / target.num_devices,
        "gradient_accumulation_steps": train.accumulate,
        "max_target_length": train.seq_len,
        "dtype": model.dtype,
        "weight_dtype": model.param_dtype,
        "remat_policy": "full",
        "attention": "flash",
        "opt_type": "adamw",
        "scan_layers": str(model.scan_layers).lower(),
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
        "compile_topology_num_slices": target.num_slices,
        **{f"ici_{axis}_parallelism": sizes[axis] for axis in AXES},
    }
    return [*(f"{name}={value}" for name, value in settings.items()), *more]


def compile_maxtext(folder: Path, target: Target, settings: list[str]) -> None:
    """Runs MaxText's own train_compile and keeps what it compiled."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    import maxtext
    from maxtext.trainers.pre_train import train_compile
    from maxtext.utils import accelerator_to_spec_map

    shape = "x".join(map(str, target.dims))
    names = accelerator_to_spec_map.UserFacingNameToSystemCharacteristics.items()
    same = [
        name
        for name, one in names
        if (one.topology_name or "").partition(":")[2] == shape and name.startswith(target.row.name)
    ]
    if not same:
        raise SystemExit(f"MaxText has no name for {target.name}")
    compiling = train_compile.jit_and_compile

    def kept(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        compiled = compiling(*args, **options)
        keep(folder, compiled.as_text(), compiled.memory_analysis(), time.perf_counter() - started)
        return compiled

    train_compile.jit_and_compile = kept
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    train_compile.main(["train_compile", str(base), f"compile_topology={same[0]}", *settings])


def compile_ours(folder: Path, target: Target, config: RunConfig) -> None:
    program, _ = build(config, target, "train", Serving())
    found = program.compile()
    keep(folder, found.hlo, found.memory, found.stored.compile_seconds if found.stored else found.compile_seconds)


def keep(folder: Path, text: str, memory: Any, seconds: float) -> None:
    """memory: of XLA's analysis, or ours of it."""
    peak, argument = (
        getattr(memory, ours, None) or getattr(memory, theirs)
        for ours, theirs in (("peak", "peak_memory_in_bytes"), ("argument", "argument_size_in_bytes"))
    )
    (folder / TEXT).write_text(text)
    (folder / FIGURES).write_text(json.dumps({"peak": peak, "argument": argument, "compile_seconds": seconds}))


def read(folder: Path, target: Target, config: RunConfig) -> dict[str, Any]:
    """What a kept program takes, by our counting, and its largest buffers."""
    module = hlo.parse((folder / TEXT).read_text())
    mesh = target.mesh(config.mesh)
    links, cost, worst = target.axis_links(mesh), hlo_cost.cost(module), buffers.peak(module)
    played = timing(module, target.chip, links, dict(mesh.shape))
    away = [axes for axes in played.busy if axes not in (("HBM",), ("host",))]
    return json.loads((folder / FIGURES).read_text()) | {
        "tflop": cost.flops / 1e12,
        "hbm_gb": cost.bytes / 1e9,
        "schedule_seconds": played.seconds,
        "collective_seconds": sum(played.busy[axes] for axes in away),
        "waited_seconds": sum(played.exposed[axes] for axes in away),
        "unknown": dict(cost.unknown),
        "at": worst.at,
        "buffers": [dataclasses.asdict(one) for one in worst.buffers[:20]],
    }


def show(name: str, one: dict[str, Any]) -> None:
    print(
        f"{name}: peak {one['peak'] / 2**30:.2f} GiB (arguments {one['argument'] / 2**30:.2f}), {one['tflop']:,.0f} TFLOP, "
        f"{one['hbm_gb']:,.0f} GB of HBM, schedule {one['schedule_seconds']:.2f} s, collectives "
        f"{one['collective_seconds']:.2f} s of which {one['waited_seconds']:.2f} are waited for, compiled in "
        f"{one['compile_seconds']:.0f} s; not counted: {one['unknown'] or 'nothing'}"
    )
    for each in one["buffers"]:
        print(f"    {each['bytes'] / 2**30:7.3f} GiB  {each['number']} x {each['shape']}  {each['label']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("target")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--maxtext", nargs="*", default=[], metavar="KEY=VALUE", help="of MaxText's base.yml")
    parser.add_argument("--only", choices=("maxtext", "llmos"))
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="texts and figures; those that are there are read again"
    )
    parser.add_argument("--compile-into", type=Path, help=argparse.SUPPRESS)  # of the processes that compile
    args = parser.parse_args()
    target, config = Target.parse(args.target), load_config(args.config, args.set)
    if args.compile_into and args.only == "maxtext":
        compile_maxtext(args.compile_into, target, maxtext_settings(config, target, args.maxtext))
        return 0
    target.prepare()
    if args.compile_into:
        compile_ours(args.compile_into, target, config)
        return 0
    print(", ".join(f"{package} {metadata.version(package)}" for package in ("maxtext", "jax", "libtpu")))
    with tempfile.TemporaryDirectory() as temporary:
        for name in (args.only,) if args.only else ("maxtext", "llmos"):
            folder = (args.keep or Path(temporary)) / name
            if not (folder / FIGURES).exists():
                folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--compile-into", str(folder)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            show(name, read(folder, target, config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
