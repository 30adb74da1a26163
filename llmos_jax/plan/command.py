"""`llmos plan`: reports on one or several targets, or a search. Exit code 0 if all fits, 3 if not."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from llmos_jax.compiler.report import Report
from llmos_jax.compiler.target import Target
from llmos_jax.config import RunConfig
from llmos_jax.plan import show
from llmos_jax.plan.advice import Advice, advise
from llmos_jax.plan.programs import Serving, for_target, plan
from llmos_jax.plan.search import Found, search
from llmos_jax.plan.serving import Load, plan_serving

DOES_NOT_FIT = 3
Say = Callable[[str], None]
Answer = Callable[[argparse.Namespace, dict[str, Any], Callable[[], None]], int]


def run_plan(config: RunConfig, targets: list[Target], args: argparse.Namespace, say: Say, answer: Answer) -> int:
    if args.search:
        return _search(config, targets[0], args, say, answer)
    if args.program == "serve":
        return _serve(config, targets, args, say, answer)
    given = {"batch": args.batch or 8, "prompt": args.prompt, "length": args.length}
    serving = Serving(**{name: value for name, value in given.items() if value})
    names = ("train", "prefill", "decode") if args.program == "all" else (args.program,)
    reports, advice = [], {}
    for target in targets:
        fitted = config if len(targets) == 1 else for_target(config, target)
        for name in names:
            reports.append(found := plan(fitted, target, name, serving, say))
            if name == "train" and not found.fits and not args.no_advice:
                advice[target.name] = advise(fitted, target, found.peak_bytes, found.capacity_bytes)
    value = {
        "reports": [one.as_dict() for one in reports],
        "advice": {name: [asdict(one) for one in found] for name, found in advice.items()},
    }
    answer(args, value, lambda: _show(reports, advice, len(targets)))
    return 0 if all(one.fits for one in reports) else DOES_NOT_FIT


def _show(reports: list[Report], advice: dict[str, list[Advice]], num_targets: int) -> None:
    if num_targets > 1:
        show.comparison(reports)
    else:
        show.pages(reports)
    for name, found in advice.items():
        show.advice(name, found)


def _serve(config: RunConfig, targets: list[Target], args: argparse.Namespace, say: Say, answer: Answer) -> int:
    serve = config.serve
    length = args.length or serve.max_model_len or config.model.max_seq_len
    prompt = args.prompt or max(1, length // 2)
    load = Load(args.batch or serve.max_sequences, prompt, length - prompt)
    found = [plan_serving(config, target, load, say) for target in targets]
    value = {
        "reports": [report.as_dict() for one in found for report in one.reports],
        "serving": [one.as_dict() for one in found],
    }
    answer(args, value, lambda: show.serving(found))
    return 0 if all(one.fits for one in found) else DOES_NOT_FIT


def _search(config: RunConfig, target: Target, args: argparse.Namespace, say: Say, answer: Answer) -> int:
    found: Found = search(config, args.config, args.set, target, args.compile, args.jobs, say)
    value = {
        "scored": found.scored,
        "possible": found.possible,
        "stopped": found.stopped,
        "tried": [
            {"settings": one.candidate.settings, "formula_seconds": one.candidate.seconds, "report": one.report}
            for one in found.tried
        ],
        "best": " ".join(found.best.candidate.settings) if found.best else None,
    }
    answer(args, value, lambda: show.ranking(found))
    return 0 if found.best else DOES_NOT_FIT
