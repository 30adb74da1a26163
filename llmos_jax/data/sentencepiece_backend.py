"""SentencePiece models behind the same few methods as a `tokenizers` object, exact because the library itself runs.

A GGUF holds a SentencePiece vocabulary as lists; `build_model` writes them as the library's own model file.
"""

import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from llmos_jax.config import UserError

SPACE = "▁"


class SentencePieceBackend:
    """`added`: tokens beyond the model's own, id -> text; `special`: those of all that are control tokens."""

    def __init__(self, model: bytes, added: dict[int, str] | None = None, special: Iterable[int] = ()):
        self.model = model
        self.first = sentencepiece.SentencePieceProcessor(model_proto=model)
        # Only the first word of a text gets a space in front, not what follows a special token. A field appended to
        # a protobuf overrides the one before it: here normalizer_spec.add_dummy_prefix = false.
        no_prefix = _bytes_field(3, _varint_field(3, 0))
        self.rest = sentencepiece.SentencePieceProcessor(model_proto=model + no_prefix)
        self.added = added or {}
        num_pieces = self.first.vocab_size()
        controls = {i for i in range(num_pieces) if self.first.is_control(i)}
        self.special = controls | set(special)
        self.ids = {self.first.id_to_piece(i): i for i in self.special if i < num_pieces}
        self.ids |= {text: i for i, text in self.added.items()}
        names = sorted(self.ids, key=len, reverse=True)
        self.controls = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self.vocab_size = max([num_pieces, *(i + 1 for i in self.added)])

    def encode(self, text: str, special: bool) -> list[int]:
        if not special:
            return self.first.encode(text)
        ids: list[int] = []
        end = 0
        for match in self.controls.finditer(text):
            ids += self._plain(text[end : match.start()], end == 0)
            ids.append(self.ids[match[0]])
            end = match.end()
        return ids + self._plain(text[end:], end == 0)

    def _plain(self, text: str, is_first: bool) -> list[int]:
        return (self.first if is_first else self.rest).encode(text) if text else []

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.first.encode(texts)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        parts: list[str] = []
        run: list[int] = []
        for i in [*ids, None]:
            if i is not None and i not in self.special and i not in self.added:
                run.append(i)
                continue
            if run:
                parts.append((self.rest if parts else self.first).decode(run))
                run = []
            if i is not None and not (skip_special and i in self.special):
                parts.append(self.id_to_token(i) or "")
        return "".join(parts)

    def token_to_id(self, token: str) -> int | None:
        if token in self.ids:
            return self.ids[token]
        i = self.first.piece_to_id(token)
        return i if self.first.id_to_piece(i) == token else None

    def id_to_token(self, i: int) -> str | None:
        if i in self.added:
            return self.added[i]
        return self.first.id_to_piece(i) if 0 <= i < self.first.vocab_size() else None

    def identity(self) -> bytes:
        return self.model + repr(sorted(self.added.items())).encode()

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.model)


def read_model(path: Path, added: dict[int, str] | None = None, special: Iterable[int] = ()) -> SentencePieceBackend:
    """The backend of a SentencePiece model file; UserError where it is not one."""
    try:
        return SentencePieceBackend(path.read_bytes(), added, special)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a SentencePiece model ({error}); pull the model again") from error


def build_model(tokens: list[str], scores: list[float], types: list[int], add_space_prefix: bool) -> bytes:
    """A SentencePiece BPE model with byte fallback: the protobuf that sentencepiece_model.proto defines.

    `types` are those of GGUF, which are SentencePiece's own: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    6 byte.
    """
    model = b""
    for token, score, kind in zip(tokens, scores, types, strict=True):
        piece = token.replace(" ", SPACE) if kind == 4 else token
        fields = _bytes_field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _varint_field(3, kind)
        model += _bytes_field(1, fields)
    bpe, byte_fallback = _varint_field(3, 2), _varint_field(35, 1)
    # Ids that the library insists on; it has no use for the others.
    unknown = types.index(2) if 2 in types else 0
    trainer = bpe + byte_fallback + _varint_field(40, unknown)
    normalizer = (
        _bytes_field(1, b"identity")
        + _varint_field(3, int(add_space_prefix))
        + _varint_field(4, 0)
        + _varint_field(5, 1)
    )
    return model + _bytes_field(2, trainer) + _bytes_field(3, normalizer)


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value
