"""A tokenizer is trained once for a corpus and its settings, and comes back as it was."""

import dataclasses
import os
from pathlib import Path

import pytest

from llmos_jax.config import CleanConfig, DataConfig, SourceConfig
from llmos_jax.data import trained_tokenizer as module
from llmos_jax.data.pipeline import training_texts
from llmos_jax.data.tokenizer import train_bpe
from llmos_jax.data.trained_tokenizer import trained_tokenizer

SIZE = 300
TEXT = "the quick brown fox jumps over the lazy dog, 12 times; naïve café 日本語 <|endoftext|>"


@pytest.fixture
def data(tmp_path) -> DataConfig:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"{TEXT} {i}")
    return DataConfig(sources=(SourceConfig(f"{tmp_path}/*.txt"),), eval_fraction=0.2, cache_dir=str(tmp_path / "data"))


@pytest.fixture
def trainings(monkeypatch) -> list[int]:
    """The vocabulary sizes that were trained, as it happens."""
    seen: list[int] = []

    def train(texts, vocab_size):
        seen.append(vocab_size)
        return train_bpe(texts, vocab_size)

    monkeypatch.setattr(module, "train_bpe", train)
    return seen


def kept(data: DataConfig) -> list[Path]:
    return sorted((Path(data.cache_dir) / "tokenizers").iterdir())


def test_it_is_trained_once_and_comes_back_bit_for_bit(data, trainings, tmp_path):
    said: list[str] = []
    trained, again = (trained_tokenizer(data, SIZE, said.append) for _ in range(2))
    assert trainings == [SIZE] and said == [f"training a tokenizer of {SIZE} entries on the corpus"]
    plain = train_bpe(training_texts(data), SIZE)
    for name, tokenizer in ("trained", trained), ("again", again), ("plain", plain):
        tokenizer.save(tmp_path / name)
    for one in (trained, again):
        assert one.backend.identity() == plain.backend.identity() and one.fingerprint == plain.fingerprint
        assert one.encode(TEXT) == plain.encode(TEXT) and one.encode(TEXT, special=True) == plain.encode(TEXT, True)
        assert (one.eos_ids, one.pad_id, one.vocab_size) == (plain.eos_ids, plain.pad_id, plain.vocab_size)
    for file in (tmp_path / "plain").iterdir():
        assert {(tmp_path / name / file.name).read_bytes() for name in ("trained", "again")} == {file.read_bytes()}


def test_another_corpus_or_setting_trains_another(data, trainings, tmp_path):
    trained_tokenizer(data, SIZE)
    changes = (
        {"eval_fraction": 0.5},
        {"clean": CleanConfig(min_chars=3)},
        {"sources": (SourceConfig(f"{tmp_path}/1*.txt"),)},
        {"sources": (*data.sources, SourceConfig(f"{tmp_path}/1.txt"))},
    )
    for number, change in enumerate(changes, start=2):
        trained_tokenizer(dataclasses.replace(data, **change), SIZE)
        assert len(trainings) == len(kept(data)) == number
    trained_tokenizer(data, SIZE + 1)
    assert trainings[-1] == SIZE + 1
    # What the training text does not depend on is no reason.
    trained_tokenizer(dataclasses.replace(data, num_threads=1, eval_sources=data.sources), SIZE)
    assert len(trainings) == 6
    file = tmp_path / "3.txt"
    before = trained_tokenizer(data, SIZE).fingerprint
    file.write_text(file.read_text().replace("fox", "zyx zyx"))
    assert trained_tokenizer(data, SIZE).fingerprint != before and len(trainings) == 7


def test_a_damaged_file_is_made_again(data, trainings):
    whole = trained_tokenizer(data, SIZE)
    (file,) = kept(data)
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for bad in (b"", b"x", b"a line\n{}", content[:-1], bytes(flipped)):
        file.write_bytes(bad)
        trainings.clear()
        assert trained_tokenizer(data, SIZE).fingerprint == whole.fingerprint
        assert trainings == [SIZE] and file.read_bytes() == content and kept(data) == [file]


def test_a_corpus_that_changes_meanwhile_keeps_nothing(data, monkeypatch, tmp_path):
    def train(texts, vocab_size):
        tokenizer = train_bpe(texts, vocab_size)
        os.utime(tmp_path / "3.txt", ns=(0, 0))
        return tokenizer

    monkeypatch.setattr(module, "train_bpe", train)
    trained_tokenizer(data, SIZE)
    assert not (Path(data.cache_dir) / "tokenizers").exists()


def test_a_folder_that_cannot_be_written_does_not_stop_it(data, trainings, tmp_path):
    (tmp_path / "data").write_text("in the way")
    assert trained_tokenizer(data, SIZE).fingerprint == trained_tokenizer(data, SIZE).fingerprint
    assert trainings == [SIZE] * 2
