"""Files that are there whole or not at all, and that can tell whether they are as they were written."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def draft_of(file: Path) -> Iterator[Path]:
    """A file beside `file` to write, which takes its place at the end: a reader sees the old file, the new one or none.

    Where the block raises, `file` stays as it was. Raises OSError.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def seal(magic: bytes, content: bytes) -> bytes:
    """The line that stands before `content`: what kind of file this is, and the content's sha256."""
    return magic + b" " + hashlib.sha256(content).hexdigest().encode() + b"\n"


def read_sealed(file: Path, magic: bytes) -> bytes | None:
    """The content below the seal; None where there is no such file, or it is not as it was written."""
    try:
        line, end, content = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    return content if line + end == seal(magic, content) else None


def digest_of_modules(folder: Path) -> str:
    """sha256 of the Python files of a folder: what they make is made anew when one of them changes."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
