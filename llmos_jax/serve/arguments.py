"""The arguments of `llmos serve` and what belongs to it. Standard library only: every command reads them."""

import argparse
from collections.abc import Callable

Number = Callable[[str], int]
Command = Callable[[str, str], argparse.ArgumentParser]  # name, summary


def add_commands(command: Command, positive: Number) -> None:
    _serve(command("serve", "answer OpenAI's API with a model"), positive)
    _keys(command("keys", "make, list and revoke the API keys of the server"), positive)
    sub = command("audit", "check the server's log of requests for changes")
    sub.add_argument("action", choices=("verify",))
    _database(sub)
    _replay(command("replay", "run a logged request again and compare"), positive)
    _bench(command("bench", "measure a server that speaks OpenAI's API"), positive)


def _database(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--db", metavar="FILE", help="keys and log (default: $LLMOS_HOME/serve.sqlite)")


def _serve(sub: argparse.ArgumentParser, positive: Number) -> None:
    sub.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a pulled model, a folder, a file, or a workdir; several share memory",
    )
    sub.add_argument("--name", help="what clients call the model (default: its own name)")
    sub.add_argument("--host", default="127.0.0.1")
    sub.add_argument("--port", type=int, default=8000)

    group = sub.add_argument_group("model")
    group.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"), help="default: the platform's")
    group.add_argument("--quantize", default="none", choices=("none", "int8", "int4"), help="weights, when read")
    group.add_argument("--kv-dtype", choices=("auto", "float32", "bfloat16", "int8", "float8_e4m3fn"))
    group.add_argument("--max-model-len", type=positive, help="tokens of a prompt with its answer")
    group.add_argument("--max-sequences", type=positive, help="answers being generated at once (default 16)")
    group.add_argument("--max-step-tokens", type=positive, help="new tokens of a step, prompts included (default 512)")
    group.add_argument("--chunk", type=positive, help="most tokens of one prompt in a step")
    group.add_argument("--page-size", type=positive, help="tokens of a page (default 32)")
    group.add_argument("--num-pages", type=positive, help="default: as many as memory has room for")
    group.add_argument("--host-pages", type=positive, help="pages in host memory, to which sequences are swapped")
    group.add_argument("--memory-share", type=float, help="of a device's memory (default 0.9)")
    group.add_argument("--num-drafts", type=positive, help="tokens guessed ahead by looking up n-grams of the text")
    group.add_argument(
        "--draft-model", metavar="MODEL", help="a small model of the same vocabulary that guesses instead"
    )
    group.add_argument("--max-adapters", type=positive, help="LoRA adapters loaded at once")
    group.add_argument("--adapter-rank", type=positive, help="largest rank of an adapter (default 16)")
    group.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="load it at the start")

    group = sub.add_argument_group("devices")
    group.add_argument("--tensor", type=positive, default=1, help="devices that split each layer")
    group.add_argument("--expert", type=positive, default=1, help="devices that split the experts")
    group.add_argument("--replicas", type=positive, default=1, help="engines behind one router")
    group.add_argument("--awake-gb", type=float, default=0.0, help="that models may take together; others sleep")

    group = sub.add_argument_group("access")
    group.add_argument("--require-keys", action="store_true", help="also on localhost")
    _database(group)  # type: ignore[arg-type]
    group.add_argument("--no-audit", action="store_true", help="keep no log of requests")
    group.add_argument("--store-text", action="store_true", help="log the tokens of prompts and answers too")
    group.add_argument("--tls-certificate", metavar="FILE")
    group.add_argument("--tls-key", metavar="FILE")
    group.add_argument("--max-body-mb", type=positive, default=8)
    group.add_argument("--max-requests", type=positive, default=4096, help="open at once; more get 429")
    group.add_argument("--drain-seconds", type=float, default=60.0, help="that running answers have after SIGTERM")
    group.add_argument(
        "--hang-seconds", type=float, default=120.0, help="of silence after which an engine is restarted"
    )
    group.add_argument("--poison", type=int, nargs="+", default=[], help=argparse.SUPPRESS)  # tests of fault handling


def _keys(sub: argparse.ArgumentParser, positive: Number) -> None:
    sub.add_argument("action", choices=("create", "list", "revoke"))
    sub.add_argument(
        "key", nargs="?", default="", metavar="NAME", help="of the new key, or the id of the one to revoke"
    )
    _database(sub)
    sub.add_argument("--tenant", default="", help="whose share it counts against (default: its name)")
    sub.add_argument("--scope", action="append", choices=("infer", "admin", "metrics"), help="default: infer")
    sub.add_argument("--model", action="append", help="it may use; default: all")
    sub.add_argument("--expires-days", type=float)
    sub.add_argument("--priority", type=int, default=0, help="lower goes first")
    for name, text in (
        ("requests-per-minute", None),
        ("tokens-per-minute", None),
        ("tokens", "in all"),
        ("concurrent", "requests at once"),
        ("kv-bytes", "of the cache at once"),
    ):
        sub.add_argument(f"--{name}", type=positive, help=text)


def _replay(sub: argparse.ArgumentParser, positive: Number) -> None:
    sub.add_argument("id", metavar="ID", help="of a request that was logged with --store-text")
    _database(sub)
    sub.add_argument("--model", help="where the model is (default: the name it was served under)")
    sub.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"))
    sub.add_argument("--quantize", default="none", choices=("none", "int8", "int4"))
    sub.add_argument("--max-model-len", type=positive)


def _bench(sub: argparse.ArgumentParser, positive: Number) -> None:
    sub.add_argument("what", choices=("serve",))
    sub.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the API, with /v1")
    sub.add_argument("--model", required=True)
    sub.add_argument("--key", default="", help="API key")
    sub.add_argument("--requests", type=positive, default=100)
    sub.add_argument(
        "--rate", type=float, default=float("inf"), help="arrivals a second (Poisson); default: all at once"
    )
    sub.add_argument("--concurrency", type=positive, help="a closed loop of so many users instead")
    sub.add_argument(
        "--prompt", default="lognormal:256:0.8", help="tokens: fixed:N, uniform:A:B, lognormal:MEDIAN:SIGMA"
    )
    sub.add_argument("--output", default="fixed:128", help="tokens, likewise")
    sub.add_argument("--prompts", default="text", choices=("text", "random"))
    sub.add_argument("--endpoint", default="completions", choices=("completions", "chat"))
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--slo-ttft", type=float, default=1.0, help="seconds to the first token that are good enough")
    sub.add_argument("--slo-itl", type=float, default=0.1, help="seconds between tokens that are good enough")
    sub.add_argument("--out", metavar="DIR", help="where to write the report and its plots")
