"""`llmos serve`, `keys`, `audit`, `replay` and `bench`: arguments to settings, results to answers."""

import argparse
import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmos_jax.config import MeshConfig, ServeConfig, UserError
from llmos_jax.serve.models import ServedModel
from llmos_jax.serve.worker import Job

Say = Callable[[str], None]


def run_serve(args: argparse.Namespace, say: Say) -> int:
    from llmos_jax.serve.http.server import Settings, serve

    fields = {field.name for field in dataclasses.fields(ServeConfig)}
    options = ServeConfig(**{name: value for name, value in vars(args).items() if name in fields and value is not None})
    names = _names(args.models, args.name)
    models = tuple(
        ServedModel(name, reference, options, args.dtype, args.quantize)
        for name, reference in zip(names, args.models, strict=True)
    )
    mesh = MeshConfig(fsdp=1, tensor=args.tensor, expert=args.expert)
    size = args.tensor * args.expert
    adapters = tuple(_adapter(text, names) for text in args.adapter)
    jobs = tuple(
        Job(
            models,
            mesh,
            args.awake_gb * 1e9,
            tuple(range(i * size, (i + 1) * size)) if args.replicas > 1 else (),
            adapters,
            tuple(args.poison),
        )
        for i in range(args.replicas)
    )
    if (args.tls_certificate is None) != (args.tls_key is None):
        raise UserError("TLS needs both --tls-certificate and --tls-key")
    settings = Settings(
        jobs,
        args.host,
        args.port,
        args.require_keys,
        Path(args.db) if args.db else None,
        not args.no_audit,
        args.store_text,
        args.tls_certificate,
        args.tls_key,
        args.max_body_mb << 20,
        args.max_requests,
        args.drain_seconds,
        args.hang_seconds,
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(settings, say))
    return 0


def _names(references: list[str], name: str | None) -> list[str]:
    if name is not None and len(references) > 1:
        raise UserError("--name names one model; several are called by their own names")
    names = [name] if name else [Path(reference).name for reference in references]
    if len(set(names)) < len(names):
        raise UserError(f"two models have the same name: {', '.join(names)}")
    return names


def _adapter(text: str, models: list[str]) -> tuple[str, str, str]:
    name, _, path = text.partition("=")
    if not path:
        raise UserError(f"--adapter {text} is not NAME=FOLDER")
    return models[0], name, path


def run_keys(args: argparse.Namespace) -> dict[str, Any]:
    from llmos_jax.serve.http import accounts

    path = Path(args.db) if args.db else None
    if args.action == "list":
        return {"keys": accounts.list_keys(path=path)}
    if args.action == "revoke":
        return accounts.revoke_key(args.key, path=path)
    quota = accounts.Quota(
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        tokens=args.tokens,
        concurrent=args.concurrent,
        kv_bytes=args.kv_bytes,
    )
    return accounts.create_key(
        args.key,
        path=path,
        tenant=args.tenant,
        scopes=args.scope or ["infer"],
        models=args.model or None,
        expires_in=None if args.expires_days is None else args.expires_days * 86_400.0,
        priority=args.priority,
        quota=quota,
    )


def run_audit(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """(what was found, whether the log is intact)."""
    from llmos_jax.serve.http import audit
    from llmos_jax.serve.http.database import default_path

    path = Path(args.db) if args.db else default_path()
    broken = audit.verify(path)
    if broken is not None:
        return {"intact": False, "row": broken.sequence, "reason": broken.reason}, False
    head = audit.head(path)
    return {"intact": True, "rows": head.sequence, "head": head.hash}, True


def run_replay(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Runs a stored request again, alone, and compares its tokens."""
    from llmos_jax.serve.http import audit
    from llmos_jax.serve.http.database import default_path
    from llmos_jax.serve.models import build_engine

    request, stored = audit.replay_record(Path(args.db) if args.db else default_path(), args.id)
    options = ServeConfig(max_sequences=max(request.n, 1), max_model_len=args.max_model_len or 0)
    wanted = ServedModel(request.model, args.model or request.model, options, args.dtype, args.quantize)
    engine = build_engine(wanted, MeshConfig(fsdp=1), say)
    engine.add(dataclasses.replace(request, outputs=(), deadline=None, max_pages=None))
    drawn: list[list[int]] = [[] for _ in range(request.n)]
    while engine.has_work:
        for output in engine.step():
            drawn[output.index] += output.tokens
    same = [list(one) == again[: len(one)] for one, again in zip(stored, drawn, strict=True)]
    return {
        "id": args.id,
        "same": all(same),
        "answers": [{"same": one, "tokens": d} for one, d in zip(same, drawn, strict=True)],
    }


def run_bench(args: argparse.Namespace, say: Say) -> tuple[dict[str, Any], Callable[[], None]]:
    """The report, and what prints it."""
    from rich.console import Console

    from llmos_jax.serve import bench

    names = {field.name for field in dataclasses.fields(bench.Load)}
    load = bench.Load(**{name: value for name, value in vars(args).items() if name in names})
    samples = asyncio.run(bench.measure(load))
    report = bench.summarize(load, samples)
    if args.out:
        for file in bench.write(load, samples, Path(args.out)):
            say(f"wrote {file}")
    return report, lambda: Console().print(bench.table(report))
