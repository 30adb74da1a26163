"""Sources of documents: files, folders and globs of text, JSONL and Parquet, and Hugging Face datasets by name.

A document is a `str`. A source that is missing, empty or unreadable raises `UserError`: nothing is skipped in silence.
"""

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from llmos_jax.config import SourceConfig, UserError

HF_PREFIX = "hf:"
TABLE_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# What format="auto" takes from a folder; a file or glob that is named outright is read whatever its suffix.
TEXT_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("txt", "text", "md", "markdown", "rst", "org", "tex", "html", "htm", "xml", "csv", "tsv", "log", "srt"),
        *("json", "yaml", "yml", "toml", "ini", "cfg", "py", "pyi", "ipynb", "c", "h", "cc", "cpp", "hpp", "cu", "cs"),
        *("go", "rs", "java", "kt", "scala", "swift", "js", "jsx", "ts", "tsx", "css", "rb", "php", "pl", "lua", "r"),
        *(
            "jl",
            "hs",
            "ml",
            "ex",
            "erl",
            "clj",
            "lisp",
            "f90",
            "sh",
            "bat",
            "ps1",
            "sql",
            "proto",
            "cmake",
            "zig",
            "dart",
        ),
    )
)
GLOB_CHARACTERS = frozenset("*?[")


def read_documents(source: SourceConfig) -> Iterator[str]:
    """Yields the documents of `source`, always in the same order: files by path, then as they stand in the file.

    A text file is one document and is held in memory whole; the other formats stream. A null text field is an empty
    document, for the cleaner to count.

    Raises UserError at the first `next()`: nothing at `path`, or not one document with text. Raises UserError where it
    meets it: a file that cannot be read, bytes that are not UTF-8, a broken JSON line, a field that is missing.
    """
    documents = _huggingface_documents(source) if _is_huggingface(source) else _file_documents(source)
    blank: list[str] = []  # leading blank documents, held back until there is one with text
    for document in documents:
        if document.strip():
            yield from chain(blank, (document,), documents)
            return
        blank.append(document)
    raise UserError(f"source {source.path!r} holds no text ({len(blank)} blank documents); remove it or mend its path")


def check_source(source: SourceConfig) -> None:
    """Reads the first document with text; raises UserError where there is none."""
    next(read_documents(source))


def source_fingerprint(source: SourceConfig) -> str:
    """sha256 of what the source is: of each file its path, size and time of change; of a Hugging Face dataset its name.

    A Hugging Face dataset is taken never to change under its name. Raises UserError where there is nothing.
    """
    identity: list[Any] = [source.format, source.text_field]
    if _is_huggingface(source):
        identity += [source.path, source.split]
    else:
        for path in source_files(source)[0]:
            stat = path.stat()
            identity.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def source_files(source: SourceConfig) -> tuple[list[Path], int]:
    """(the files of a local source by path, how many other files of its folder are left out).

    Of a folder, hidden files and `__pycache__` are left out, and with format="auto" files without a suffix of text,
    JSONL or Parquet. Raises UserError where there is no file.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        return [path], 0
    if path.is_dir():
        everything = sorted(_walk(path), key=lambda file: file.relative_to(path).as_posix())
        files = [file for file in everything if source.format != "auto" or _known_suffix(file)]
        if not files:
            raise UserError(
                f"source folder {source.path!r} has no text files ({len(everything)} files of other kinds); "
                'name the files by a glob, or set the format to "text", "lines", "jsonl" or "parquet"'
            )
        return files, len(everything) - len(files)
    if GLOB_CHARACTERS & set(source.path):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if files := [file for file in found if file.is_file()]:
            return files, 0
        raise UserError(f"source glob {source.path!r} matches no file below {Path.cwd()}; check the pattern")
    raise UserError(f"source {source.path!r} does not exist (looked in {Path.cwd()}); check the path")


def _is_huggingface(source: SourceConfig) -> bool:
    return source.path.startswith(HF_PREFIX)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _suffix(path: Path) -> str:
    """The suffix that tells the format: `a.jsonl.gz` is `.jsonl`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _known_suffix(path: Path) -> bool:
    return _suffix(path) in TEXT_SUFFIXES or _suffix(path) in TABLE_SUFFIXES


def _file_documents(source: SourceConfig) -> Iterator[str]:
    for path in source_files(source)[0]:
        kind = TABLE_SUFFIXES.get(_suffix(path), "text") if source.format == "auto" else source.format
        with _unreadable_is_an_error(path):
            if kind == "text":
                yield _read_text(path)
            elif kind == "lines":
                yield from (line for _, line in _numbered_lines(path))
            elif kind == "jsonl":
                yield from _jsonl_documents(path, source.text_field)
            else:
                yield from _parquet_documents(path, source.text_field)


@contextmanager
def _unreadable_is_an_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"source file {path} cannot be read: {error}; mend it or leave it out") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"source file {path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start}; "
            "convert it to UTF-8 or leave it out"
        ) from error


def _read_text(path: Path) -> str:
    with _open(path) as file:
        return _decode(file.read(), path, 0).removeprefix("\ufeff")


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line that is not blank."""
    offset = 0
    with _open(path) as file:
        for number, data in enumerate(file, start=1):
            line = _decode(data, path, offset).rstrip("\r\n")
            offset += len(data)
            if number == 1:
                line = line.removeprefix("\ufeff")
            if line.strip():
                yield number, line


def _jsonl_documents(path: Path, field: str) -> Iterator[str]:
    for number, line in _numbered_lines(path):
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is not valid JSON ({error}); mend the line or remove it") from error
        if not isinstance(record, dict):
            raise UserError(f"{place} is a JSON {type(record).__name__}, not an object with a {field!r} field")
        yield _text_of(record, field, place)


def _parquet_documents(path: Path, field: str) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise UserError(_missing_field(str(path), field, names))
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0):
                try:
                    record = {field: value.as_py()}
                except UnicodeDecodeError as error:
                    raise UserError(f"{path} row {row} is not UTF-8 ({error}); mend it or leave it out") from error
                yield _text_of(record, field, f"{path} row {row}")
                row += 1


def _huggingface_documents(source: SourceConfig) -> Iterator[str]:
    """Streams `hf:org/name` or `hf:org/name:config` with the `datasets` library."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"source {source.path!r} needs the `datasets` library, which is not installed; "
            "run `pip install 'llmos-jax[hf-datasets]'`"
        ) from error
    name, _, config = source.path.removeprefix(HF_PREFIX).partition(":")
    try:
        records: Iterable[dict] = datasets.load_dataset(name, config or None, split=source.split, streaming=True)
        for row, record in enumerate(records):
            yield _text_of(record, source.text_field, f"{source.path} row {row}")
    except UserError:
        raise
    except Exception as error:  # the library raises its own, its file systems' and its network's exceptions
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"source {source.path!r} split {source.split!r} cannot be read: {reason}; "
            "check the name, the split and the connection"
        ) from error


def _text_of(record: dict[str, Any], field: str, place: str) -> str:
    if field not in record:
        raise UserError(_missing_field(place, field, list(record)))
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{place}: field {field!r} is {type(text).__name__}, not text; set text_field to another")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a JSON escape such as "\ud800" with no partner
        raise UserError(f"{place}: field {field!r} has half a surrogate pair at {error.start}; mend it") from error
    return text


def _missing_field(place: str, field: str, names: Iterable[str]) -> str:
    there = ", ".join(islice(map(str, names), 20)) or "none"
    return f"{place} has no field {field!r}; set text_field to one of those there: {there}"
