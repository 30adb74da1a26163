"""The pipeline: one order for any number of hosts and threads, exact resume, true shares, honest held-out text."""

import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest

from llmos_jax.config import CleanConfig, DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig, UserError
from llmos_jax.data.hashing import text_hash
from llmos_jax.data.pipeline import (
    build_data,
    eval_batches,
    prefetch_to_device,
    row_order,
    train_iterator,
    training_texts,
)


def sentence(source: str, i: int) -> str:
    return f"{source} {i} " + "word " * (i * 7 % 23)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    for name, count in (("a", 300), ("b", 120)):
        lines = [json.dumps({"text": sentence(name, i)}) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return str(folder)


def make_config(
    corpus: str, names: str = "ab", weights=(3.0, 1.0), seed: int = 0, threads: int = 0, **data
) -> RunConfig:
    sources = tuple(SourceConfig(f"{corpus}/{n}.jsonl", weight=w) for n, w in zip(names, weights, strict=False))
    return RunConfig(
        seed=seed,
        model=ModelConfig(vocab_size=300),
        train=TrainConfig(batch_size=8, seq_len=64, eval_batches=3),
        data=DataConfig(sources=sources, cache_dir=f"{corpus}/stores", num_threads=threads, prefetch=4, **data),
    )


@pytest.fixture
def config(corpus) -> RunConfig:
    return make_config(corpus)


def take(iterator, count: int) -> dict[str, np.ndarray]:
    batches = list(itertools.islice(iterator, count))
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_order_does_not_depend_on_the_number_of_hosts(config, tokenizer, hosts):
    data = build_data(config, tokenizer)
    alone = take(train_iterator(config, data), 20)
    assert alone["tokens"].shape == (20, 8, 64)
    size = 8 // hosts
    parts = [take(train_iterator(config, data, slice(h * size, (h + 1) * size)), 20) for h in range(hosts)]
    assert_equal(alone, {name: np.concatenate([part[name] for part in parts], axis=1) for name in alone})


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_order_does_not_depend_on_the_number_of_threads(corpus, config, tokenizer, threads):
    data = build_data(config, tokenizer)
    many = make_config(corpus, threads=threads)
    assert_equal(take(train_iterator(config, data), 60), take(train_iterator(many, data), 60))


def test_the_seed_decides_the_order(corpus, config, tokenizer):
    first, again, other = (
        take(train_iterator(c, build_data(c, tokenizer)), 5) for c in (config, config, make_config(corpus, seed=1))
    )
    assert_equal(first, again)
    assert (first["tokens"] != other["tokens"]).any()
    assert build_data(config, tokenizer).fingerprint == build_data(config, tokenizer).fingerprint
    assert build_data(config, tokenizer).fingerprint != build_data(make_config(corpus, seed=1), tokenizer).fingerprint


@pytest.mark.parametrize("threads", [0, 3])
def test_state_and_seek_resume_exactly(corpus, tokenizer, threads):
    config = make_config(corpus, threads=threads)
    data = build_data(config, tokenizer)
    whole = train_iterator(config, data)
    take(whole, 7)
    state = json.loads(json.dumps(whole.state()))
    assert state == {"next_batch": 7}
    rest = take(whole, 6)
    assert_equal(rest, take(train_iterator(config, data, start_batch=state["next_batch"]), 6))
    whole.seek(7)
    assert_equal(rest, take(whole, 6))
    whole.seek(9)  # skips two
    assert_equal({name: values[2:] for name, values in rest.items()}, take(whole, 4))
    assert whole.state() == {"next_batch": 13}


def test_an_epoch_holds_every_row_once_and_the_next_is_in_another_order():
    order = row_order([50], (1.0,), seed=3)
    epochs = [[order[e * 50 + i][1] for i in range(50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(50))


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (0.05, 0.95), (2.0, 1.0, 4.5)])
def test_mixture_shares_are_the_weights(weights):
    shares = tuple(w / sum(weights) for w in weights)
    counts = [400, 700, 300][: len(weights)]
    order = row_order(counts, shares, seed=0)
    places = [order[i] for i in range(15_000)]
    found = np.bincount([source for source, _ in places]) / len(places)
    np.testing.assert_allclose(found, shares, rtol=0.015)
    for source, count in enumerate(counts):  # each source in whole epochs
        rows = [row for s, row in places if s == source]
        assert sorted(rows[:count]) == list(range(count))
    again = row_order(counts, shares, seed=0)
    assert places[-100:] == [again[i] for i in range(14_900, 15_000)]


def test_a_source_of_one_row_repeats():
    assert [row_order([1], (1.0,), seed=0)[i] for i in range(3)] == [(0, 0)] * 3


def test_batches_hold_the_text_of_the_sources(config, tokenizer):
    data = build_data(config, tokenizer)
    batches = take(train_iterator(config, data), 40)
    texts = {sentence(name, i) for name, count in (("a", 300), ("b", 120)) for i in range(count)}
    whole = 0
    for tokens, segments in zip(batches["tokens"].reshape(-1, 64), batches["segment_ids"].reshape(-1, 64), strict=True):
        pieces = [tokenizer.decode(tokens[segments == s].tolist()) for s in range(1, segments.max() + 1)]
        assert all(piece in texts for piece in pieces[1:-1])
        whole += len(pieces[1:-1])
    assert whole > 50
    assert data.epochs(320) == [240 / data.train[0].num_rows, 80 / data.train[1].num_rows]


def test_held_out_documents_are_never_trained_on(corpus, tokenizer):
    config = make_config(corpus, eval_fraction=0.2)
    data = build_data(config, tokenizer)
    texts = [[sentence(name, i) for i in range(count)] for name, count in (("a", 300), ("b", 120))]
    held_out = [{t for t in part if text_hash(t) < 0.2 * 2**64} for part in texts]
    assert [rows.num_documents for rows in data.eval] == [len(part) for part in held_out]
    assert [rows.num_documents for rows in data.train] == [300 - len(held_out[0]), 120 - len(held_out[1])]
    assert 0.12 < len(held_out[0]) / 300 < 0.28
    assert sorted(training_texts(config.data)) == sorted({*texts[0], *texts[1]} - held_out[0] - held_out[1])
    for rows_train, rows_eval in zip(data.train, data.eval, strict=True):
        assert not set(rows_train.documents) & set(rows_eval.documents)


def test_the_split_needs_no_new_store_and_ignores_the_seed(corpus, tokenizer):
    build_data(make_config(corpus), tokenizer)
    calls = []
    splits = [
        build_data(make_config(corpus, eval_fraction=0.2, seed=seed), tokenizer, lambda *args: calls.append(args))
        for seed in (0, 1)
    ]
    assert calls == []
    assert splits[0].eval[0].documents.tolist() == splits[1].eval[0].documents.tolist()


def test_eval_covers_all_rows_and_pads_the_last_batch(corpus, tokenizer):
    config = make_config(corpus, eval_sources=(SourceConfig(f"{corpus}/b.jsonl"),))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=100))
    data = build_data(config, tokenizer)
    (rows,) = data.eval
    batches = take(eval_batches(config, data), 100)
    assert batches["tokens"].shape[:2] == (-(-rows.num_rows // 8), 8)
    flat = {name: values.reshape(-1, 64) for name, values in batches.items()}
    assert_equal({name: values[: rows.num_rows] for name, values in flat.items()}, rows.read(np.arange(rows.num_rows)))
    assert not any(values[rows.num_rows :].any() for values in flat.values())
    texts = [sentence("b", i) for i in range(120)]
    assert flat["loss_mask"].sum() == rows.num_targets == sum(len(text.encode()) for text in texts)
    assert data.eval_targets_per_byte == 1.0  # bytes are tokens here, and eos stands for the first one
    parts = [take(eval_batches(config, data, slice(h * 4, h * 4 + 4)), 100) for h in range(2)]
    assert_equal(batches, {name: np.concatenate([part[name] for part in parts], axis=1) for name in batches})


def test_eval_of_more_rows_than_batches_is_spread_over_all_sources(corpus, tokenizer):
    sources = tuple(SourceConfig(f"{corpus}/{name}.jsonl") for name in "ab")
    config = make_config(corpus, eval_sources=sources)
    data = build_data(config, tokenizer)
    first, again = (take(eval_batches(config, data), 100) for _ in range(2))
    assert_equal(first, again)
    assert first["tokens"].shape[:2] == (3, 8)
    rows = ["".join(map(chr, row)) for row in first["tokens"].reshape(-1, 64)]
    assert len(set(rows)) > 20
    assert any("a 1" in row for row in rows)
    assert any("b 1" in row for row in rows)


def test_no_eval(config, tokenizer):
    data = build_data(config, tokenizer)
    assert data.eval == ()
    assert data.eval_targets_per_byte == 0
    assert list(eval_batches(config, data)) == []


def test_a_store_that_is_there_is_used_without_its_hub(corpus, config, tokenizer, monkeypatch):
    build_data(config, tokenizer)
    monkeypatch.setattr("llmos_jax.data.pipeline.check_source", None)  # would be called for a store to build
    build_data(config, tokenizer)


def test_all_sources_are_looked_at_before_one_is_built(corpus, tokenizer, tmp_path):
    config = make_config(corpus, names="a!")
    data = dataclasses.replace(config.data, cache_dir=str(tmp_path / "new"))
    calls = []
    with pytest.raises(UserError, match=r"'.*!\.jsonl' does not exist"):
        build_data(dataclasses.replace(config, data=data), tokenizer, lambda *args: calls.append(args))
    assert calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, sources=())), "data.sources is empty"),
        (
            lambda c: dataclasses.replace(c, model=ModelConfig(vocab_size=256)),
            "model.vocab_size=257 or more",
        ),
        (
            lambda c: dataclasses.replace(c, train=TrainConfig(seq_len=10**6)),
            "fewer than one row of train.seq_len=1000000; lower train.seq_len to at most",
        ),
        (
            lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, eval_fraction=1e-9)),
            "eval_fraction=1e-09 holds out none of 420 documents",
        ),
        (
            lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, eval_fraction=1 - 1e-9)),
            "holds out all 300 documents",
        ),
        (
            lambda c: dataclasses.replace(
                c, data=dataclasses.replace(c.data, clean=CleanConfig(near_dedup=True, near_dedup_threshold=2.0))
            ),
            "near_dedup_threshold=2.0",
        ),
    ],
)
def test_what_cannot_work_is_refused(config, tokenizer, change, message):
    with pytest.raises(UserError) as error:
        build_data(change(config), tokenizer)
    assert message in str(error.value)


def test_rows_that_are_not_in_the_batch_are_refused(config, tokenizer):
    data = build_data(config, tokenizer)
    for rows in (slice(8, 9), slice(0, 8, 2)):
        with pytest.raises(UserError, match="of a batch of 8"):
            train_iterator(config, data, rows)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_changes_neither_batches_nor_state(config, tokenizer, depth):
    data = build_data(config, tokenizer)
    plain = train_iterator(config, data)
    ahead = prefetch_to_device(train_iterator(config, data), put=lambda batch: batch, depth=depth)
    for _ in range(5):
        assert_equal(next(plain), next(ahead))
        assert ahead.state() == plain.state()
    plain.seek(2)
    ahead.seek(2)
    assert ahead.state() == {"next_batch": 2}
    assert_equal(next(plain), next(ahead))
    assert ahead.state() == {"next_batch": 3}
    ahead.close()


def test_prefetch_works_ahead_in_another_thread(config, tokenizer):
    data = build_data(config, tokenizer)
    done, threads = threading.Semaphore(0), set()

    def put(batch):
        threads.add(threading.current_thread())
        done.release()
        return batch

    ahead = prefetch_to_device(train_iterator(config, data), put, depth=2)
    next(ahead)
    for _ in range(3):  # the batch handed out and two more, without another call
        assert done.acquire(timeout=10)
    assert threading.current_thread() not in threads
    ahead.close()


def test_an_error_while_reading_ahead_comes_in_the_place_of_its_batch_and_may_be_tried_again(config, tokenizer):
    data = build_data(config, tokenizer)
    expected = take(train_iterator(config, data), 6)
    failures = iter([False, False, True])

    def put(batch):
        if next(failures, False):
            raise UserError("device is full")
        return batch

    ahead = prefetch_to_device(train_iterator(config, data), put, depth=2)
    first = [next(ahead), next(ahead)]
    with pytest.raises(UserError, match="device is full"):
        next(ahead)
    assert ahead.state() == {"next_batch": 2}
    rest = [next(ahead) for _ in range(4)]
    got = {name: np.stack([batch[name] for batch in first + rest]) for name in expected}
    assert_equal(got, expected)
    ahead.close()


def test_a_read_that_fails_may_be_tried_again(corpus, tokenizer, monkeypatch):
    config = make_config(corpus, threads=2)
    data = build_data(config, tokenizer)
    expected = take(train_iterator(config, data), 4)
    iterator = train_iterator(config, data)
    next(iterator)
    take_tokens = data.train[0].store.take

    def broken(indices):
        raise UserError("the disk is gone")

    monkeypatch.setattr(data.train[0].store, "take", broken)
    iterator.seek(1)
    with pytest.raises(UserError, match="the disk is gone"):
        next(iterator)
    monkeypatch.setattr(data.train[0].store, "take", take_tokens)
    iterator.seek(1)
    assert_equal(take(iterator, 3), {name: values[1:] for name, values in expected.items()})
