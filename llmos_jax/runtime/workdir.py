"""Small files of a workdir, which is a folder on a disk or an address in a bucket (gs://bucket/run, s3://bucket/run).

TensorStore, which stores the checkpoints, also reads and writes the files in a bucket; that needs no further package.
"""

from pathlib import Path

from llmos_jax.files import draft_of

TIMEOUT = 60.0  # seconds for one file in a bucket; TensorStore by itself tries again for many minutes


def is_remote(workdir: str | Path) -> bool:
    """Whether `workdir` is an address and not a path."""
    return "://" in str(workdir)


def read_file(workdir: str | Path, name: str) -> bytes | None:
    """What is in the file `name` of `workdir`, or None where there is none. Raises OSError."""
    if not is_remote(workdir):
        path = Path(workdir) / name
        return path.read_bytes() if path.exists() else None
    try:
        result = _open(workdir).read(name).result(timeout=TIMEOUT)
    except ValueError as error:
        raise OSError(str(error)) from error
    return None if result.state == "missing" else bytes(result.value)


def write_file(workdir: str | Path, name: str, data: bytes) -> None:
    """Writes the file `name` of `workdir`; a reader sees the old file or the new one, never a part. Raises OSError."""
    if is_remote(workdir):
        try:
            _open(workdir).write(name, data).result(timeout=TIMEOUT)
        except ValueError as error:
            raise OSError(str(error)) from error
        return
    with draft_of(Path(workdir) / name) as draft:
        draft.write_bytes(data)


def _open(workdir: str | Path):
    import tensorstore  # slow to import, and not needed for a workdir on a disk

    return tensorstore.KvStore.open(f"{str(workdir).rstrip('/')}/").result(timeout=TIMEOUT)
