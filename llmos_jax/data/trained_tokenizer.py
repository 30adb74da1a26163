"""A tokenizer that is trained on a run's own corpus: trained once, and kept beside the token stores.

    $LLMOS_HOME/data/tokenizers/KEY.json     a line with the sha256 of all that follows (files.py), then the tokenizer.json

KEY is the sha256 of everything that decides the tokenizer, the text of our own modules included, so that another corpus,
setting or version has another file. One that is damaged is as good as none: the tokenizer is trained again.
"""

import contextlib
import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path

import tokenizers

from llmos_jax.config import DataConfig
from llmos_jax.data import json_backend
from llmos_jax.data.pipeline import training_texts
from llmos_jax.data.sources import source_fingerprint
from llmos_jax.data.store import stores_directory
from llmos_jax.data.tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from llmos_jax.files import digest_of_modules, draft_of, read_sealed, seal

MAGIC = b"llmos-tokenizer-1"  # changes with the format


def trained_tokenizer(data: DataConfig, vocab_size: int, say: Callable[[str], None] = lambda _: None) -> Tokenizer:
    """The byte-level BPE of at most `vocab_size` tokens that the training text of `data` gives.

    Raises UserError for a source that cannot be read, and as `train_bpe`.
    """
    key = _key(data, vocab_size)
    file = stores_directory(data) / "tokenizers" / f"{key}.json"
    kept = _read(file)
    if kept is not None:
        return kept
    say(f"training a tokenizer of {vocab_size} entries on the corpus")
    tokenizer = train_bpe(training_texts(data), vocab_size)
    if _key(data, vocab_size) == key:  # else the corpus changed while it was read
        _write(file, tokenizer.backend.identity())
    return tokenizer


def _key(data: DataConfig, vocab_size: int) -> str:
    code = digest_of_modules(Path(__file__).parent)
    sources = [source_fingerprint(source) for source in data.sources]
    versions = (code, tokenizers.__version__, platform.python_version())  # Python's: of Unicode's tables
    parts = (versions, sources, dataclasses.asdict(data.clean), data.eval_fraction, vocab_size)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(file: Path) -> Tokenizer | None:
    """None where there is no such file, or it is not as it was written."""
    content = read_sealed(file, MAGIC)
    if content is None:
        return None
    return Tokenizer(json_backend.parse(content.decode()), {"eos_token": END_OF_TEXT})


def _write(file: Path, content: bytes) -> None:
    """Where it cannot be written, the next run trains again, and the token store says what is wrong with the folder."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(file) as draft:
            draft.write_bytes(seal(MAGIC, content) + content)
