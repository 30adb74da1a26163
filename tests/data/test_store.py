"""The token store: what is written is read back, builds are whole or absent, and damage is an error."""

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorstore as ts

from llmos_jax.config import CleanConfig, SourceConfig, UserError
from llmos_jax.data import store as store_module
from llmos_jax.data.hashing import text_hash
from llmos_jax.data.store import build_store, chunk_cache, is_built

DOCUMENTS = [f"document {i} " * (i % 7 + 1) + "é" for i in range(50)]


@pytest.fixture
def source(tmp_path) -> SourceConfig:
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*DOCUMENTS, "", DOCUMENTS[0]]))
    return SourceConfig(str(path))


def folders(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def test_what_is_written_is_read_back(tmp_path, source, tokenizer):
    store = build_store(source, CleanConfig(), tokenizer, tmp_path / "stores", chunk_cache(2**20))
    expected = [[*text.encode(), 256] for text in DOCUMENTS]
    stream = np.concatenate(expected)
    assert store.num_documents == 50
    assert store.num_tokens == len(stream)
    assert store.offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert store.read(0, store.num_tokens).tolist() == stream.tolist()
    assert store.read(17, 101).tolist() == stream[17:101].tolist()
    indices = np.array([5, 400, 3, 3])
    assert store.take(indices).tolist() == stream[indices].tolist()
    assert store.num_bytes.tolist() == [len(text.encode()) for text in DOCUMENTS]
    assert store.hashes.tolist() == [text_hash(text) for text in DOCUMENTS]
    assert {name: store.counts[name] for name in ("documents", "kept", "too_short", "exact_duplicate")} == {
        "documents": 52,
        "kept": 50,
        "too_short": 1,
        "exact_duplicate": 1,
    }


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_files_are_sharded_compressed_zarr3(tmp_path, source, make_tokenizer, vocab_size, dtype):
    tokenizer = make_tokenizer(vocab_size=vocab_size)
    highest = vocab_size - 1
    tokenizer.encode_batch = lambda texts: [[0, highest, *text.encode()] for text in texts]
    store = build_store(source, CleanConfig(), tokenizer, tmp_path / "stores")
    assert store.read(0, 2).tolist() == [0, highest]
    metadata = json.loads((store.directory / "tokens" / "zarr.json").read_text())
    assert (metadata["zarr_format"], metadata["data_type"]) == (3, dtype)
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "zstd", "crc32c"]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store.directory}/tokens"}}
    assert ts.open(spec).result()[:2].read().result().tolist() == [0, highest]  # a plain zarr reader reads it


@pytest.mark.parametrize("batch", [1, 200, 10**6])
def test_many_shards_and_batches_make_the_same_stream(tmp_path, source, tokenizer, monkeypatch, batch):
    monkeypatch.setattr(store_module, "CHUNK", 16)
    monkeypatch.setattr(store_module, "SHARD", 64)
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", batch)
    store = build_store(source, CleanConfig(), tokenizer, tmp_path / "stores")
    stream = np.concatenate([[*text.encode(), 256] for text in DOCUMENTS])
    assert store.read(0, store.num_tokens).tolist() == stream.tolist()
    assert len(list((store.directory / "tokens" / "c").iterdir())) == -(-len(stream) // 64)


def test_without_eos_documents_are_not_ended(tmp_path, source, make_tokenizer):
    store = build_store(source, CleanConfig(), make_tokenizer(eos_id=None), tmp_path / "stores")
    assert store.num_tokens == sum(len(text.encode()) for text in DOCUMENTS)


def test_documents_without_tokens_are_left_out(tmp_path, source, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.encode_batch = lambda texts: [list(t.encode()) if "3" in t else [] for t in texts]
    store = build_store(source, CleanConfig(), tokenizer, tmp_path / "stores")
    assert store.num_documents == sum("3" in text for text in DOCUMENTS)
    tokenizer.fingerprint = "another"
    tokenizer.encode_batch = lambda texts: [[] for _ in texts]
    with pytest.raises(UserError, match="leaves none of the 52 documents"):
        build_store(source, CleanConfig(), tokenizer, tmp_path / "stores")


def test_a_store_is_built_once(tmp_path, source, tokenizer):
    calls = []
    for _ in range(2):
        build_store(source, CleanConfig(), tokenizer, tmp_path / "stores", progress=lambda *args: calls.append(args))
    assert calls == [(source.path, 52, sum(len(t.encode()) + 1 for t in DOCUMENTS))]


def test_the_key_holds_all_that_matters(tmp_path, source, tokenizer, make_tokenizer):
    directory = tmp_path / "stores"
    build_store(source, CleanConfig(), tokenizer, directory)
    assert is_built(SourceConfig(source.path, weight=9.0), CleanConfig(), tokenizer, directory)
    assert not is_built(source, CleanConfig(min_chars=2), tokenizer, directory)
    assert not is_built(SourceConfig(source.path, format="lines"), CleanConfig(), tokenizer, directory)
    assert not is_built(source, CleanConfig(), make_tokenizer(fingerprint="other"), directory)
    assert not is_built(source, CleanConfig(), make_tokenizer(eos_id=None), directory)
    with open(source.path, "a") as file:
        file.write('{"text": "one more"}\n')
    assert not is_built(source, CleanConfig(), tokenizer, directory)


def test_a_build_that_fails_leaves_nothing(tmp_path, source, tokenizer):
    with open(source.path, "a") as file:
        file.write("broken\n")
    with pytest.raises(UserError, match=r"source\.jsonl:53 is not valid JSON"):
        build_store(source, CleanConfig(), tokenizer, tmp_path / "stores")
    assert folders(tmp_path / "stores") == []


def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path, source, tokenizer):
    def grow(*_):
        with open(source.path, "a") as file:
            file.write('{"text": "late"}\n')

    with pytest.raises(UserError, match="changed while it was read"):
        build_store(source, CleanConfig(), tokenizer, tmp_path / "stores", progress=grow)
    assert folders(tmp_path / "stores") == []


def test_cleaning_that_leaves_nothing_is_an_error(tmp_path, source, tokenizer):
    with pytest.raises(UserError, match=r"none of the 52 documents .*too_short 52"):
        build_store(source, CleanConfig(min_chars=10**6), tokenizer, tmp_path / "stores")


def test_a_token_beyond_the_vocabulary_is_an_error(tmp_path, source, make_tokenizer):
    with pytest.raises(UserError, match="gives token 256, but says its vocabulary has 200"):
        build_store(source, CleanConfig(), make_tokenizer(vocab_size=200), tmp_path / "stores")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, source, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the token store in .*file.*set data.cache_dir"):
        build_store(source, CleanConfig(), tokenizer, tmp_path / "file" / "stores")


def lose_a_shard(place):
    (place / "tokens" / "c" / "0").unlink()


def flip_bytes(place):
    path = place / "tokens" / "c" / "0"
    data = bytearray(path.read_bytes())
    data[20:40] = b"x" * 20
    path.write_bytes(data)


def cut_the_manifest(place):
    path = place / "manifest.json"
    path.write_text(path.read_text()[:50])


def lie_about_the_size(place):
    path = place / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_tokens": 7}))


def lose_the_offsets(place):
    shutil.rmtree(place / "offsets")


@pytest.mark.parametrize("damage", [lose_a_shard, flip_bytes, cut_the_manifest, lie_about_the_size, lose_the_offsets])
def test_damage_is_an_error_that_says_what_to_delete(tmp_path, source, tokenizer, damage):
    place = build_store(source, CleanConfig(), tokenizer, tmp_path / "stores").directory
    damage(place)
    with pytest.raises(UserError, match=f"{place} is damaged .*delete it and run again"):
        build_store(source, CleanConfig(), tokenizer, tmp_path / "stores").read(0, 100)
    shutil.rmtree(place)
    build_store(source, CleanConfig(), tokenizer, tmp_path / "stores").read(0, 100)


def test_the_remains_of_a_store_without_a_manifest_are_replaced(tmp_path, source, tokenizer):
    place = build_store(source, CleanConfig(), tokenizer, tmp_path / "stores").directory
    (place / "manifest.json").unlink()
    assert build_store(source, CleanConfig(), tokenizer, tmp_path / "stores").num_documents == 50


BUILD = textwrap.dedent("""
    import os, sys, time
    from llmos_jax.config import CleanConfig, SourceConfig
    from llmos_jax.data.store import build_store

    class ByteTokenizer:
        vocab_size, eos_id, fingerprint = 257, 256, "bytes"

        def encode_batch(self, texts):
            print("building", flush=True)
            time.sleep(float(sys.argv[3]))
            return [list(text.encode()) for text in texts]

    store = build_store(SourceConfig(sys.argv[1]), CleanConfig(), ByteTokenizer(), sys.argv[2])
    print(store.num_tokens, flush=True)
""")


def start_build(source, directory, seconds) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, source.path, str(directory), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_not_taken_for_a_store(tmp_path, source, tokenizer):
    directory = tmp_path / "stores"
    with start_build(source, directory, seconds=60) as process:
        assert process.stdout.readline() == "building\n"
        process.kill()
    assert len(folders(directory)) == 1  # what it left
    assert not is_built(source, CleanConfig(), tokenizer, directory)
    store = build_store(source, CleanConfig(), tokenizer, directory)
    assert store.num_documents == 50
    assert folders(directory) == [store.directory.name]  # and what it left is gone


def test_two_processes_may_build_the_same_store(tmp_path, source):
    directory = tmp_path / "stores"
    with start_build(source, directory, 0.3) as first, start_build(source, directory, 0.3) as second:
        outputs = [process.communicate()[0].split() for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    assert sum(len(output) for output in outputs) == 3  # one built, the other waited and read
    assert len(folders(directory)) == 1


def test_builds_that_do_not_see_each_others_lock_do_no_harm(tmp_path, source, tokenizer, make_tokenizer, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(store_module.fcntl, "flock", no_locks)
    slow = make_tokenizer()

    def overtaken(texts):  # another process finishes the same store first
        build_store(source, CleanConfig(), tokenizer, tmp_path / "stores")
        return tokenizer.encode_batch(texts)

    slow.encode_batch = overtaken
    store = build_store(source, CleanConfig(), slow, tmp_path / "stores")
    assert store.num_documents == 50
    assert folders(tmp_path / "stores") == [store.directory.name]
