"""The token store: a source, cleaned and tokenized once, kept on disk as compressed, sharded zarr arrays.

A store is a folder named after the sha256 of everything that decides its content:

    tokens/     uint16 or uint32 [num_tokens]: the documents one after the other, each ended by the tokenizer's eos
    offsets/    int64 [num_documents + 1]: where each document begins in `tokens`
    num_bytes/  int32 [num_documents]: UTF-8 bytes of the cleaned text
    hashes/     uint64 [num_documents]: hash of the cleaned text, which decides what is held out
    manifest.json  counts and identities

It is written under another name and renamed when it is whole, so a build that was killed is never read. One process
builds a store while others of the same machine wait for it; processes that cannot see each other's lock both build, and
the first to finish is used.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from llmos_jax.config import CleanConfig, DataConfig, SourceConfig, UserError, home
from llmos_jax.data.clean import DROP_REASONS, Cleaner
from llmos_jax.data.hashing import text_hash
from llmos_jax.data.sources import HF_PREFIX, read_documents, source_files, source_fingerprint
from llmos_jax.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
CHUNK = 2**14  # values compressed together: the least that is read from disk
SHARD = 2**23  # values a file
BATCH_CHARACTERS = 2**22  # of text tokenized at once

Progress = Callable[[str, int, int], None]  # (source path, documents read, tokens written) so far


class TokenStore:
    """A complete token store, open for reading from any thread."""

    def __init__(self, directory: Path, cache: ts.Context | None = None):
        """Opens the store with the chunk cache of `cache` (none: no cache); raises UserError where it is damaged."""
        self.directory = directory
        self._context = cache or chunk_cache(0)
        with self._damage_is_an_error():
            self.manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
            self._tokens = self._open("tokens")
            self.offsets: np.ndarray = self._open("offsets").read().result()
            sizes = (self._tokens.shape[0], int(self.offsets[-1]))
            if sizes != (self.num_tokens, self.num_tokens) or len(self.offsets) != self.num_documents + 1:
                raise ValueError(f"the manifest counts {self.num_tokens} tokens, the arrays {sizes[0]} and {sizes[1]}")

    @property
    def num_tokens(self) -> int:
        return self.manifest["num_tokens"]

    @property
    def num_documents(self) -> int:
        return self.manifest["num_documents"]

    @property
    def counts(self) -> dict[str, int]:
        """What the cleaner counted (see `Cleaner.counts`)."""
        return self.manifest["counts"]

    @cached_property
    def num_bytes(self) -> np.ndarray:
        with self._damage_is_an_error():
            return self._open("num_bytes").read().result()

    @cached_property
    def hashes(self) -> np.ndarray:
        with self._damage_is_an_error():
            return self._open("hashes").read().result()

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: the tokens from `start` to before `stop`."""
        with self._damage_is_an_error():
            return self._tokens[start:stop].read().result().astype(np.int32)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """int32 [n]: the tokens at `indices` [n], in one read that takes each chunk once."""
        with self._damage_is_an_error():
            return self._tokens[indices].read().result().astype(np.int32)

    def _open(self, name: str) -> ts.TensorStore:
        spec = {"driver": "zarr3", "kvstore": _files(self.directory / name), "fill_missing_data_reads": False}
        # A finished store never changes, so what is cached need not be compared with the disk.
        return ts.open(spec, read=True, context=self._context, recheck_cached=False).result()

    @contextlib.contextmanager
    def _damage_is_an_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"the token store {self.directory} is damaged ({_first_line(error)}); delete it and run again"
            ) from error


def stores_directory(data: DataConfig) -> Path:
    """Where the token stores of a run are kept: data.cache_dir, or $LLMOS_HOME/data."""
    return Path(data.cache_dir).expanduser() if data.cache_dir else home() / "data"


def chunk_cache(num_bytes: int) -> ts.Context:
    """A cache of decoded chunks of at most `num_bytes`, which the stores opened with it share."""
    return ts.Context({"cache_pool": {"total_bytes_limit": num_bytes}})


def is_built(source: SourceConfig, clean: CleanConfig, tokenizer: Tokenizer, directory: str | Path) -> bool:
    """Whether `build_store` finds the store there. Raises UserError for a local source that is missing."""
    return _is_complete(Path(directory).expanduser() / store_key(source, clean, tokenizer))


def store_key(source: SourceConfig, clean: CleanConfig, tokenizer: Tokenizer) -> str:
    """sha256 of everything that decides the content of a store."""
    parts = (FORMAT_VERSION, source_fingerprint(source), dataclasses.asdict(clean), *_tokenizer_identity(tokenizer))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build_store(
    source: SourceConfig,
    clean: CleanConfig,
    tokenizer: Tokenizer,
    directory: str | Path,
    cache: ts.Context | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """The token store of `source` in the folder `directory`, built unless it is there already.

    Host memory stays bounded: about `BATCH_CHARACTERS` of text, `SHARD` tokens and 20 bytes a document, beside what the
    cleaner's duplicate filters remember. Documents without a token are left out.

    Raises UserError for a source that cannot be read, for one of which the filters leave nothing, and for a folder that
    cannot be written.
    """
    directory = Path(directory).expanduser()
    key = store_key(source, clean, tokenizer)
    place = directory / key
    if not _is_complete(place):
        with _locked(directory, key):
            if not _is_complete(place):
                _build(source, clean, tokenizer, place, progress)
    return TokenStore(place, cache)


def _is_complete(place: Path) -> bool:
    return (place / "manifest.json").is_file()


@contextlib.contextmanager
def _unwritable_is_an_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write the token store in {directory} ({_first_line(error)}); free space or set data.cache_dir"
        ) from error


@contextlib.contextmanager
def _locked(directory: Path, key: str) -> Iterator[None]:
    """Holds the lock of this store, which ends with its process, and removes what killed builds of it left."""
    with _unwritable_is_an_error(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / f".{key}.lock").open("w")
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: both build, the first rename wins
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in directory.glob(_building_prefix(key) + "*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _building_prefix(key: str) -> str:
    return f".{key}.building-{os.uname().nodename}-"


def _build(
    source: SourceConfig, clean: CleanConfig, tokenizer: Tokenizer, place: Path, progress: Progress | None
) -> None:
    with _unwritable_is_an_error(place.parent):
        building = Path(tempfile.mkdtemp(prefix=_building_prefix(place.name), dir=place.parent))
    try:
        writer = _Writer(building, tokenizer)
        cleaner = Cleaner(clean)
        for texts in _batches(source, cleaner):
            writer.add(texts)
            if progress:
                progress(source.path, cleaner.counts["documents"], writer.num_tokens)
        if not writer.num_documents:
            raise UserError(_nothing_left(source, cleaner.counts))
        if store_key(source, clean, tokenizer) != place.name:
            raise UserError(f"source {source.path!r} changed while it was read; run again when it is still")
        writer.finish(_manifest(source, clean, tokenizer, cleaner))
        with _unwritable_is_an_error(place.parent):
            _rename_unless_complete(building, place)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _rename_unless_complete(building: Path, place: Path) -> None:
    try:
        building.rename(place)
    except OSError:  # something is there: the same store by another process, or the remains of one
        if not _is_complete(place):
            shutil.rmtree(place)
            building.rename(place)


def _batches(source: SourceConfig, cleaner: Cleaner) -> Iterator[list[str]]:
    """The cleaned documents in lists of about `BATCH_CHARACTERS`."""
    texts: list[str] = []
    characters = 0
    for document in read_documents(source):
        text = cleaner.clean(document)
        if text is None:
            continue
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


class _Writer:
    """Appends tokenized documents to a new store, whole shards at a time."""

    def __init__(self, directory: Path, tokenizer: Tokenizer):
        self.directory = directory
        self.tokenizer = tokenizer
        self.num_tokens = 0
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self._written = 0
        self._pending: list[np.ndarray] = []
        self._hash = hashlib.sha256()
        self._ends, self._bytes, self._hashes = array("q", [0]), array("i"), array("Q")
        with _unwritable_is_an_error(directory.parent):
            self._tokens = _create(directory / "tokens", self.dtype, SHARD)

    @property
    def num_documents(self) -> int:
        return len(self._bytes)

    def add(self, texts: list[str]) -> None:
        eos = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            if not ids:
                continue
            tokens = np.array(ids + eos, np.int64)
            if tokens.max() >= self.tokenizer.vocab_size:
                raise UserError(
                    f"the tokenizer gives token {tokens.max()}, but says its vocabulary has "
                    f"{self.tokenizer.vocab_size} entries; its files do not belong together"
                )
            self._pending.append(tokens.astype(self.dtype))
            self.num_tokens += len(tokens)
            self._ends.append(self.num_tokens)
            self._bytes.append(len(text.encode()))
            self._hashes.append(text_hash(text))
        self._flush(SHARD)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Writes what is left, then the manifest, which makes the store complete."""
        self._flush(1)
        numbers = {"num_tokens": self.num_tokens, "num_documents": self.num_documents, "num_bytes": sum(self._bytes)}
        manifest |= numbers | {"dtype": str(self.dtype), "tokens_sha256": self._hash.hexdigest()}
        with _unwritable_is_an_error(self.directory.parent):
            for name, values in (("offsets", self._ends), ("num_bytes", self._bytes), ("hashes", self._hashes)):
                data = np.array(values)
                _append(_create(self.directory / name, data.dtype, SHARD), 0, data)
            with (self.directory / "manifest.json").open("w") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())

    def _flush(self, multiple: int) -> None:
        """Writes the pending tokens, as many as make a multiple of `multiple`: a shard is never written twice."""
        count = (self.num_tokens - self._written) // multiple * multiple
        if not count:
            return
        data = np.concatenate(self._pending)
        self._pending = [data[count:].copy()]
        self._hash.update(data[:count].astype(data.dtype.newbyteorder("<")).tobytes())
        with _unwritable_is_an_error(self.directory.parent):
            self._tokens = _append(self._tokens, self._written, data[:count])
        self._written += count


def _create(directory: Path, dtype: np.dtype, shard: int) -> ts.TensorStore:
    """A new, empty, one-dimensional array that grows."""
    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 3}},
        {"name": "crc32c"},
    ]
    sharding = {"name": "sharding_indexed", "configuration": {"chunk_shape": [CHUNK], "codecs": codecs}}
    metadata = {
        "shape": [0],
        "data_type": str(dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
        "codecs": [sharding],
    }
    spec = {"driver": "zarr3", "kvstore": _files(directory), "metadata": metadata}
    # A chunk of zeros is stored like any other, so that a missing one is known to be lost.
    return ts.open(spec | {"store_data_equal_to_fill_value": True}, create=True).result()


def _append(store: ts.TensorStore, size: int, data: np.ndarray) -> ts.TensorStore:
    """Appends `data` to `store`, which holds `size` values; returns it grown."""
    store = store.resize(exclusive_max=[size + len(data)], expand_only=True).result()
    store[size:].write(data).result()
    return store


def _files(directory: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{directory}/"}


def _tokenizer_identity(tokenizer: Tokenizer) -> tuple[str, int, int | None]:
    return tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id


def _manifest(source: SourceConfig, clean: CleanConfig, tokenizer: Tokenizer, cleaner: Cleaner) -> dict[str, Any]:
    files, left_out = ([], 0) if source.path.startswith(HF_PREFIX) else source_files(source)
    fingerprint, vocab_size, eos_id = _tokenizer_identity(tokenizer)
    return {
        "version": FORMAT_VERSION,
        "source": source.path,
        "files": len(files),
        "files_left_out": left_out,
        "clean": dataclasses.asdict(clean),
        "counts": dict(cleaner.counts),
        "tokenizer_fingerprint": fingerprint,
        "vocab_size": vocab_size,
        "eos_id": eos_id,
    }


def _nothing_left(source: SourceConfig, counts: dict[str, int]) -> str:
    dropped = ", ".join(f"{reason} {counts[reason]}" for reason in DROP_REASONS if counts[reason]) or "without a token"
    return (
        f"cleaning leaves none of the {counts['documents']} documents of source {source.path!r} ({dropped}); "
        "loosen data.clean or choose another source"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
