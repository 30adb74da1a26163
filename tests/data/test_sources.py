"""Reading sources: every format, the order of documents, and an error for whatever cannot be read."""

import gzip
import json
import os
import sys
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmos_jax.config import SourceConfig, UserError
from llmos_jax.data.sources import check_source, read_documents, source_files, source_fingerprint


def read(path, **options) -> list[str]:
    return list(read_documents(SourceConfig(str(path), **options)))


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo é\n".encode())
    assert read(tmp_path / "a.txt") == ["one\r\n\r\ntwo é\n"]


def test_a_file_of_unknown_suffix_that_is_named_is_text(tmp_path):
    (tmp_path / "corpus").write_text("words")
    assert read(tmp_path / "corpus") == ["words"]


def test_lines_are_documents_and_blank_ones_are_not(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo\nthree")
    assert read(tmp_path / "a.txt", format="lines") == ["one", "two", "three"]


def test_jsonl_plain_and_compressed(tmp_path):
    lines = "\n".join(json.dumps({"id": i, "body": f"text {i}"}) for i in range(3)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    expected = ["text 0", "text 1", "text 2"]
    assert read(tmp_path / "a.jsonl", text_field="body") == expected
    assert read(tmp_path / "b.jsonl.gz", text_field="body") == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_over_many_row_groups(tmp_path, kind):
    texts = [f"text {i}" for i in range(2500)]
    table = pa.table({"text": pa.array(texts).cast(kind), "n": range(2500)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert read(tmp_path / "a.parquet") == texts


def test_a_null_is_an_empty_document(tmp_path):
    pq.write_table(pa.table({"text": [None, "a", None]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    assert read(tmp_path / "a.parquet") == ["", "a", ""]
    assert read(tmp_path / "a.jsonl") == ["", "a"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", "B.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl").write_text('{"text": "from jsonl"}\n')
    assert read(tmp_path) == ["B.txt", "a.txt", "a/b/c.py", "a/z.md", "b.txt", "from jsonl"]


def test_a_folder_says_how_many_files_it_leaves_out(tmp_path):
    for name in ("a.txt", "picture.png", ".hidden.txt", "__pycache__/x.py", ".git/config.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, left_out = source_files(SourceConfig(str(tmp_path)))
    assert ([file.name for file in files], left_out) == (["a.txt"], 1)


def test_a_glob_is_sorted_and_recursive(tmp_path):
    for name in ("2.txt", "1.txt", "deep/3.txt", "4.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["1.txt", "2.txt"]
    assert read(tmp_path / "**/*.txt") == ["1.txt", "2.txt", "deep/3.txt"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("missing.txt", None, {}, "does not exist"),
        ("*.text", None, {}, "matches no file"),
        ("empty.txt", b"", {}, "holds no text"),
        ("blank.txt", b" \n\n", {"format": "lines"}, "holds no text"),
        ("latin.txt", b"caf\xe9", {}, "not UTF-8: byte 0xe9 at offset 3"),
        ("latin.txt", b"fine\ncaf\xe9\n", {"format": "lines"}, "not UTF-8: byte 0xe9 at offset 8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', {}, "a.jsonl:2 is a JSON list"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', {}, "no field 'text'; set text_field to one of those there: body, id"),
        ("a.jsonl", b'{"text": 3}\n', {}, "field 'text' is int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', {}, "half a surrogate pair"),
        ("a.parquet", b"not parquet", {}, "cannot be read"),
        ("a.txt.gz", b"not gzip", {}, "cannot be read"),
        ("a.txt.gz", gzip.compress(b"words " * 100, mtime=0)[:20], {}, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path, name, content, options, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name, **options)
    assert message in str(error.value)
    assert name.split("*")[-1] in str(error.value)


def test_a_parquet_file_without_the_field_names_those_there(tmp_path):
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no field 'text'.*content, url"):
        read(tmp_path / "a.parquet")


def test_parquet_bytes_that_are_not_utf8_are_an_error(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 0 is not UTF-8"):
        read(tmp_path / "a.parquet")


def test_a_folder_without_text_is_an_error(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no text files \(1 files of other kinds\)"):
        read(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)


def test_check_source_reads_only_up_to_the_first_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "a"}\nbroken\n')
    check_source(SourceConfig(str(tmp_path / "a.jsonl")))
    (tmp_path / "a.jsonl").write_text('{"text": ""}\nbroken\n')
    with pytest.raises(UserError):
        check_source(SourceConfig(str(tmp_path / "a.jsonl")))


def test_the_fingerprint_changes_with_the_files_and_only_with_them(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    source = SourceConfig(str(tmp_path))
    first = source_fingerprint(source)
    assert source_fingerprint(SourceConfig(str(tmp_path), weight=3.0)) == first
    assert source_fingerprint(SourceConfig(str(tmp_path), format="lines")) != first
    (tmp_path / "b.txt").write_text("b")
    assert source_fingerprint(source) != first
    (tmp_path / "b.txt").unlink()
    assert source_fingerprint(source) == first
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert source_fingerprint(source) != first


@pytest.fixture
def hub(monkeypatch) -> dict:
    """A stand-in for the `datasets` library; what it was asked for is in the returned dictionary."""
    asked: dict = {"records": [{"text": "one"}, {"text": "two"}]}

    def load_dataset(name, config=None, *, split, streaming):
        asked["call"] = (name, config, split, streaming)
        if isinstance(asked["records"], Exception):
            raise asked["records"]
        return iter(asked["records"])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_hugging_face_dataset_streams(hub):
    assert read("hf:org/name", split="validation") == ["one", "two"]
    assert hub["call"] == ("org/name", None, "validation", True)
    assert read("hf:org/name:en") == ["one", "two"]
    assert hub["call"] == ("org/name", "en", "train", True)


def test_a_hugging_face_dataset_that_fails_is_an_error(hub):
    hub["records"] = ConnectionError("no route\nand much more")
    with pytest.raises(UserError, match="'hf:org/name' split 'train' cannot be read: no route; check the name"):
        read("hf:org/name")
    hub["records"] = [{"content": "x"}]
    with pytest.raises(UserError, match=r"no field 'text'.*content"):
        read("hf:org/name")


def test_without_the_datasets_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install 'llmos-jax"):
        read("hf:org/name")
