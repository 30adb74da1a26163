"""What `llmos data` shows: sources, counts, what each filter dropped, tokens, and packed rows as text."""

from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmos_jax.config import RunConfig
from llmos_jax.data.clean import COUNTS, DROP_REASONS
from llmos_jax.data.packing import PackedRows
from llmos_jax.data.pipeline import TrainData, TrainingStream
from llmos_jax.data.tokenizer import Tokenizer

PREVIEW_CHARACTERS = 240  # of a piece of a row; a longer one loses its middle


def data_report(config: RunConfig, data: TrainData, tokenizer: Tokenizer, num_rows: int = 3) -> dict[str, Any]:
    """JSON-able facts about the data of a run, with the first `num_rows` training rows decoded.

    sources: of each, its path, share of the rows, files read and left out, what cleaning counted (`Cleaner.counts`),
    and documents, bytes, tokens, rows and epochs of training. eval: the same of the held-out text. rows: of each piece
    of a document in the row, its segment number, tokens and text.
    """
    run_rows = config.train.steps * config.train.batch_size
    sources = zip(data.train, data.shares, data.epochs(run_rows), strict=True)
    batch = TrainingStream(data).read(range(num_rows))
    return {
        "name": config.name,
        "seq_len": config.train.seq_len,
        "tokens_of_run": run_rows * config.train.seq_len,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": data.fingerprint,
        "sources": [_source_facts(rows) | {"share": share, "epochs": epochs} for rows, share, epochs in sources],
        "eval": [_source_facts(rows) for rows in data.eval],
        "eval_targets_per_byte": data.eval_targets_per_byte,
        "rows": [
            _pieces(tokens, segments, tokenizer)
            for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
        ],
    }


def _source_facts(rows: PackedRows) -> dict[str, Any]:
    manifest = rows.store.manifest
    return {
        "path": manifest["source"],
        "files": manifest["files"],
        "files_left_out": manifest["files_left_out"],
        "counts": rows.store.counts,
        "documents": rows.num_documents,
        "bytes": rows.num_bytes,
        "tokens": rows.num_tokens,
        "rows": rows.num_rows,
    }


def _pieces(tokens: np.ndarray, segments: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    pieces = []
    for segment in range(1, int(segments.max(initial=0)) + 1):
        ids = tokens[segments == segment].tolist()
        pieces.append({"segment": segment, "tokens": len(ids), "text": tokenizer.decode(ids)})
    return pieces


def print_data_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Prints a `data_report` for a person."""
    console = console or Console()
    console.print(_sources_table(report))
    console.print(_cleaning_table(report))
    for source in report["sources"]:
        if source["files_left_out"]:
            console.print(Text(f"{source['path']}: {source['files_left_out']} files of other kinds left out"))
    console.print(
        f"The run reads {report['tokens_of_run']:,} tokens in rows of {report['seq_len']:,}; "
        f"the tokenizer has {report['vocab_size']:,} entries."
    )
    for number, pieces in enumerate(report["rows"]):
        console.print(Text(f"\nrow {number}: {len(pieces)} pieces", style="bold"))
        for piece in pieces:
            console.print(Text(f"[{piece['segment']}: {piece['tokens']} tokens] ", style="cyan"), end="")
            console.print(Text(_preview(piece["text"])))


def _sources_table(report: dict[str, Any]) -> Table:
    table = Table(title=f"Data of {report['name']}", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("source", overflow="fold")
    for name in ("use", "share", "documents", "tokens", "bytes/token", "rows", "epochs"):
        table.add_column(name, justify="right", no_wrap=True)
    for use, sources in (("train", report["sources"]), ("eval", report["eval"])):
        for source in sources:
            share = f"{source['share']:.1%}" if "share" in source else ""
            epochs = f"{source['epochs']:.2f}" if "epochs" in source else ""
            documents, tokens, rows = (f"{source[name]:,}" for name in ("documents", "tokens", "rows"))
            per_token = f"{source['bytes'] / source['tokens']:.2f}"
            table.add_row(Text(source["path"]), use, share, documents, tokens, per_token, rows, epochs)
    return table


def _cleaning_table(report: dict[str, Any]) -> Table:
    """A row for each count, a column for each source; counts that are 0 everywhere are left out."""
    sources = {source["path"]: source["counts"] for source in (*report["sources"], *report["eval"])}
    table = Table(title="Cleaning", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("count", no_wrap=True)
    for path in sources:
        table.add_column(Text(path, overflow="fold"), justify="right")
    for name in COUNTS:
        if any(counts[name] for counts in sources.values()):
            label = f"dropped: {name}" if name in DROP_REASONS else name
            table.add_row(label.replace("_", " "), *(f"{counts[name]:,}" for counts in sources.values()))
    return table


def _preview(text: str) -> str:
    if len(text) <= PREVIEW_CHARACTERS:
        return text
    half = PREVIEW_CHARACTERS // 2
    return f"{text[:half]} […] {text[-half:]}"
