"""From a run's sources to batches on the device: split, global shuffle, mixture, batches, prefetch.

Everything is random access: the row at any place of the endless training stream follows from the seed alone, whatever
the number of processes and threads. So the state of an iterator is the number of its next batch, and nothing is
replayed to resume.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import numpy as np

from llmos_jax.config import DataConfig, RunConfig, SourceConfig, UserError
from llmos_jax.data.clean import Cleaner
from llmos_jax.data.hashing import derived_seed, permutation, text_hash
from llmos_jax.data.packing import PackedRows, empty_rows
from llmos_jax.data.sources import check_source, read_documents
from llmos_jax.data.store import Progress, TokenStore, build_store, chunk_cache, is_built, stores_directory
from llmos_jax.data.tokenizer import Tokenizer, check_fits

_OTHER_WAYS = 'name held-out text in data.eval_sources, or make each line a document with format="lines"'

Batch = dict[str, np.ndarray]  # the fields of packing.ROW_FIELDS, [B_local, T]


@dataclass(frozen=True)
class TrainData:
    """The rows a run reads; `eval` is empty where nothing is held out."""

    train: tuple[PackedRows, ...]  # a source each
    shares: tuple[float, ...]  # of the training rows that each source gives; they sum to 1
    eval: tuple[PackedRows, ...]
    seed: int

    @property
    def fingerprint(self) -> str:
        """sha256 that changes where the training rows or their order would; to be compared when a run resumes."""
        parts = [self.seed, self.shares]
        for rows in self.train:
            parts.append((rows.store.manifest["tokens_sha256"], rows.num_documents, rows.seq_len))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def eval_targets_per_byte(self) -> float:
        """Targets over UTF-8 bytes of the held-out text: bits a byte = loss / ln 2 x this. 0 without held-out text."""
        num_bytes = sum(rows.num_bytes for rows in self.eval)
        return sum(rows.num_targets for rows in self.eval) / num_bytes if num_bytes else 0.0

    def epochs(self, num_rows: int) -> list[float]:
        """How many times the first `num_rows` training rows go through each source."""
        return [num_rows * share / rows.num_rows for share, rows in zip(self.shares, self.train, strict=True)]


def build_data(config: RunConfig, tokenizer: Tokenizer, progress: Progress | None = None) -> TrainData:
    """Cleans and tokenizes the sources of `config`, as far as that is not done, and packs them into rows.

    All sources are looked at before the first is built. Duplicates are looked for within a source, not between two.
    Raises UserError for a source that is missing, empty or unreadable, for one too small to make a row, and for a
    tokenizer with more entries than the model.
    """
    data, seq_len = config.data, config.train.seq_len
    if not (data.sources or data.eval_sources):
        raise UserError("data.sources is empty; name at least one source, such as a folder of text")
    check_fits(tokenizer, config.model)
    directory = stores_directory(data)
    for source in (*data.sources, *data.eval_sources):
        if not is_built(source, data.clean, tokenizer, directory):
            check_source(source)
    cache = chunk_cache(data.cache_bytes)
    train, held_out = [], []
    for i, source in enumerate(data.sources):
        store = build_store(source, data.clean, tokenizer, directory, cache, progress)
        train_documents, eval_documents = _split(store, source, data.eval_fraction)
        order = permutation(len(train_documents), derived_seed("documents", config.seed, i))
        train.append(_training_rows(PackedRows(store, train_documents[order], seq_len), source))
        if data.eval_fraction:
            held_out.append(PackedRows(store, eval_documents, seq_len, pad_last=True))
    for source in data.eval_sources:
        store = build_store(source, data.clean, tokenizer, directory, cache, progress)
        held_out.append(PackedRows(store, np.arange(store.num_documents), seq_len, pad_last=True))
    if held_out and not any(rows.num_documents for rows in held_out):
        count = sum(rows.num_documents for rows in train)
        raise UserError(
            f"data.eval_fraction={data.eval_fraction} holds out none of {count} documents; raise it, {_OTHER_WAYS}"
        )
    total = sum(source.weight for source in data.sources)
    shares = tuple(source.weight / total for source in data.sources)
    return TrainData(tuple(train), shares, tuple(rows for rows in held_out if rows.num_documents), config.seed)


def training_texts(data: DataConfig) -> Iterator[str]:
    """The cleaned documents of every training source, without the held-out ones: what a tokenizer is trained on."""
    for source in data.sources:
        cleaner = Cleaner(data.clean)
        for document in read_documents(source):
            text = cleaner.clean(document)
            if text is not None and text_hash(text) >= _hash_limit(data.eval_fraction):
                yield text


def _hash_limit(fraction: float) -> int:
    """Documents whose hash is below this are held out: a document's side depends on its text and nothing else."""
    return int(fraction * 2**64)


def _split(store: TokenStore, source: SourceConfig, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(documents to train on, documents held out), each in the order of the store."""
    if not fraction:
        return np.arange(store.num_documents), np.arange(0)
    held_out = store.hashes < np.uint64(_hash_limit(fraction))
    if held_out.all():
        raise UserError(
            f"data.eval_fraction={fraction} holds out all {store.num_documents} documents of {source.path!r}; "
            f"lower it, {_OTHER_WAYS}"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _training_rows(rows: PackedRows, source: SourceConfig) -> PackedRows:
    if not rows.num_rows:
        raise UserError(
            f"source {source.path!r} has {rows.num_tokens} tokens to train on, fewer than one row of "
            f"train.seq_len={rows.seq_len}; lower train.seq_len to at most {rows.num_tokens} or add text"
        )
    return rows


def row_order(num_rows: list[int], shares: tuple[float, ...], seed: int) -> grain.MapDataset:
    """The endless training stream: at place i, (source, row of the source).

    Each source's rows are shuffled anew every epoch; the sources are interleaved evenly by `shares`, exact to one
    hundredth of the smallest.
    """
    streams = []
    for i, count in enumerate(num_rows):
        rows = grain.MapDataset.range(count).shuffle(seed=derived_seed("rows", seed, i)).repeat()
        streams.append(rows.map(partial(_with_source, i)))
    return grain.MapDataset.mix(streams, shares)


def _with_source(source: int, row: int) -> tuple[int, int]:
    return source, row


class TrainingStream:
    """The rows of the endless training stream, by their place in it; safe to read from any thread."""

    def __init__(self, data: TrainData):
        self._sources = data.train
        self._order = row_order([rows.num_rows for rows in data.train], data.shares, data.seed)
        _ = self._order[0]  # Grain sets itself up at the first access, which must not happen in two threads at once

    def __len__(self) -> int:
        return len(self._order)

    def read(self, places: Iterable[int]) -> Batch:
        """The rows at `places` [R], as arrays [R, T] (see `PackedRows.read`)."""
        return _read_rows(self._sources, np.array([self._order[place] for place in places]))


def _read_rows(sources: tuple[PackedRows, ...], places: np.ndarray) -> Batch:
    """The rows at `places` [R, 2] (source, row), in that order."""
    batch = empty_rows(len(places), sources[0].seq_len)
    for i, rows in enumerate(sources):
        slots = np.flatnonzero(places[:, 0] == i)
        if slots.size:
            for name, values in rows.read(places[slots, 1]).items():
                batch[name][slots] = values
    return batch


class _Batches:
    """Random access to this process's part of every global batch; a source for Grain."""

    def __init__(self, data: TrainData, batch_size: int, row_slice: slice):
        self._stream = TrainingStream(data)
        self._batch_size = batch_size
        self._local = _local_rows(batch_size, row_slice)

    def __len__(self) -> int:
        return len(self._stream) // self._batch_size

    def __getitem__(self, number: int) -> Batch:
        first = number * self._batch_size
        return self._stream.read(first + row for row in self._local)


def _local_rows(batch_size: int, row_slice: slice) -> range:
    rows = range(batch_size)[row_slice]
    if not rows or rows.step != 1:
        raise UserError(
            f"rows {row_slice} of a batch of {batch_size} are none, or not side by side; use a smaller mesh"
        )
    return rows


class DataIterator:
    """This process's rows of one global batch after the other, read ahead by Grain's threads; it has no end."""

    def __init__(self, batches: _Batches, num_threads: int, prefetch: int, start_batch: int = 0):
        self._batches = grain.MapDataset.source(batches)
        ahead = max(prefetch, num_threads) if num_threads else 0
        self._options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
        self.seek(start_batch)

    def __iter__(self) -> "DataIterator":
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._iterator)
        except Exception:
            self.seek(self._next_batch)  # whoever tries again gets this batch, not the one after it
            raise
        self._next_batch += 1
        return batch

    def state(self) -> dict[str, int]:
        """JSON-able: where a new iterator would have to `seek` to go on from here."""
        return {"next_batch": self._next_batch}

    def seek(self, next_batch: int) -> None:
        """Makes `next_batch` the number of the batch that comes next."""
        self._next_batch = next_batch
        self._iterator = iter(self._batches[next_batch:].to_iter_dataset(self._options))


def train_iterator(
    config: RunConfig, data: TrainData, row_slice: slice = slice(None), start_batch: int = 0
) -> DataIterator:
    """Iterates over the training batches; `row_slice` names this process's rows of the global batch."""
    batches = _Batches(data, config.train.batch_size, row_slice)
    return DataIterator(batches, config.data.num_threads, config.data.prefetch, start_batch)


def eval_batches(config: RunConfig, data: TrainData, row_slice: slice = slice(None)) -> Iterator[Batch]:
    """At most train.eval_batches batches of held-out rows, the same ones every time; the last may end in padding rows.

    Where there are more rows than that, rows spread evenly over the held-out text are taken.
    """
    local = _local_rows(config.train.batch_size, row_slice)
    ends = np.cumsum([0, *(rows.num_rows for rows in data.eval)])
    count = min(int(ends[-1]), config.train.eval_batches * config.train.batch_size)
    numbers = np.arange(count) * ends[-1] // max(count, 1)
    sources = np.searchsorted(ends, numbers, side="right") - 1
    places = np.stack([sources, numbers - ends[sources]], axis=1)
    for first in range(0, count, config.train.batch_size):
        mine = [first + row for row in local if first + row < count]
        batch = empty_rows(len(local), data.eval[0].seq_len)
        for name, values in _read_rows(data.eval, places[mine]).items():
            batch[name][: len(mine)] = values
        yield batch


class DevicePrefetch:
    """Hands out the batches of `iterator` after `put`, with `depth` of them already on the way to the device.

    `state` is that of the batch handed out last: batches on the way are not counted, and are read again after a resume.
    An exception of `iterator` or `put` is raised in the place of its batch, which the next call tries again.
    """

    def __init__(self, iterator: DataIterator, put: Callable[[Batch], Any], depth: int = 2):
        self._iterator = iterator
        self._put = put
        self._depth = depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmos-prefetch")  # one: batches stay in order
        self._ahead: deque[Future[tuple[Any, dict[str, int]]]] = deque()
        self._state = iterator.state()

    def __iter__(self) -> "DevicePrefetch":
        return self

    def __next__(self) -> Any:
        while len(self._ahead) <= self._depth:
            self._ahead.append(self._thread.submit(self._load))
        try:
            batch, self._state = self._ahead.popleft().result()
        except Exception:
            self.seek(self._state["next_batch"])
            raise
        return batch

    def state(self) -> dict[str, int]:
        return self._state

    def seek(self, next_batch: int) -> None:
        """Makes `next_batch` the batch that comes next, and drops those on the way."""
        self._cancel()
        self._iterator.seek(next_batch)
        self._state = self._iterator.state()

    def close(self) -> None:
        """Stops reading ahead; call it when no more batches are wanted."""
        self._cancel()
        self._thread.shutdown()

    def _load(self) -> tuple[Any, dict[str, int]]:
        batch = self._put(next(self._iterator))
        return batch, self._iterator.state()

    def _cancel(self) -> None:
        for future in self._ahead:
            future.cancel()
        if self._ahead:
            self._thread.submit(lambda: None).result()  # the batch being read now is done with
        self._ahead.clear()


def prefetch_to_device(iterator: DataIterator, put: Callable[[Batch], Any], depth: int = 2) -> DevicePrefetch:
    """`DevicePrefetch` of `iterator`: `put` moves one batch to the device, `depth` batches are kept ahead."""
    return DevicePrefetch(iterator, put, depth)
