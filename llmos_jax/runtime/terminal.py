"""What commands draw on a terminal: a bar for bytes, a table. Without a terminal they are plain lines."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table


@contextlib.contextmanager
def bytes_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A callable (name, bytes so far, bytes in all) that draws a bar a file on standard error; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)

        yield show


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = Console()
    drawn = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)
