"""Tokens to the text that may be given out: whole characters, and nothing that might belong to a stop string. No jax."""

import json
import re
from collections.abc import Iterable, Sequence

from llmos_jax.data.json_backend import JsonBackend
from llmos_jax.data.sentencepiece_backend import SPACE
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.serve.request import Token


class Text:
    """The text of one answer as its tokens arrive, up to the first place at which one of `stop` is complete.

    Of stop strings that are complete at the same character, the longest counts. include_stop: the text ends with the
    stop string, not before it. What `add` and `finish` return, joined, does not depend on how the tokens arrived.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), include_stop: bool = False, skip_special: bool = True
    ):
        self._tokenizer, self._decoder = tokenizer, tokenizer.stream(skip_special)
        self._stops = [_Search(one) for one in dict.fromkeys(stop) if one]
        self._include_stop = include_stop
        self._held = ""  # the text that may be the beginning of a stop string
        self.stopped: str | None = None  # the stop string that ended the text
        self.num_tokens = 0  # up to the one that completed the stop string

    def add(self, tokens: Iterable[Token]) -> str:
        """The text that may be given out after `tokens`: "" once it has stopped."""
        parts = []
        for token in tokens:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            if self._tokenizer.token(token) is not None:  # logits may be wider than the tokenizer is
                parts.append(self._feed(self._decoder.add(token)))
        return "".join(parts)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped is not None:
            return ""
        text = self._feed(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _feed(self, text: str) -> str:
        if not self._stops:
            return text
        seen = len(self._held)
        self._held += text
        for place, character in enumerate(text, seen + 1):
            found = [search.stop for search in self._stops if search.step(character)]
            if found:
                self.stopped = max(found, key=len)
                out = self._held[: place if self._include_stop else place - len(self.stopped)]
                self._held = ""
                return out
        keep = max(search.matched for search in self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out


class _Search:
    """One stop string looked for character by character (Knuth, Morris and Pratt, SIAM J. Computing 6, 1977).

    matched: how many characters at the end of the text are the beginning of the stop string.
    """

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0
        self._shorter = [0] * len(stop)  # the longest beginning that also ends stop[: i + 1], and is shorter than it
        for i in range(1, len(stop)):
            length = self._shorter[i - 1]
            while length and stop[i] != stop[length]:
                length = self._shorter[length - 1]
            self._shorter[i] = length + (stop[i] == stop[length])

    def step(self, character: str) -> bool:
        """Whether the stop string is complete with this character. Not to be called after it was."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.stop[self.matched] == character
        return self.matched == len(self.stop)


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes that each token stands for inside a text; None for a control token or an id without a token."""
    special = _special_ids(tokenizer)
    spell = _from_byte_level if _is_byte_level(tokenizer) else _from_piece
    added = _added(tokenizer)

    def of(i: int) -> bytes | None:
        text = tokenizer.token(i)
        if text is None or i in special:
            return None
        return text.encode() if i in added else spell(text)

    return [of(i) for i in range(tokenizer.vocab_size)]


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    backend = tokenizer.backend
    if isinstance(backend, JsonBackend):
        return {i for i, token in backend.plain.get_added_tokens_decoder().items() if token.special}
    unknown = tokenizer.backend.token_to_id("<unk>")
    return set(getattr(backend, "special", ())) | ({unknown} if unknown is not None else set())


def _added(tokenizer: Tokenizer) -> set[int]:
    """Tokens that the vocabulary writes as plain text."""
    backend = tokenizer.backend
    if isinstance(backend, JsonBackend):
        return set(backend.plain.get_added_tokens_decoder())
    return set(getattr(backend, "added", ()))


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    backend = tokenizer.backend
    return isinstance(backend, JsonBackend) and "ByteLevel" in json.dumps(
        json.loads(backend.plain.to_str()).get("decoder")
    )


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes bytes as characters: printable ones as they are, the others from U+0100 on (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _from_byte_level(text: str) -> bytes:
    return b"".join(bytes([_ALPHABET[c]]) if c in _ALPHABET else c.encode() for c in text)


def _from_piece(text: str) -> bytes:
    """A piece of SentencePiece or of a tokenizer.json made from one: "▁" is a space, "<0x0A>" a byte."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
    return bytes.fromhex(byte[1]) if byte else text.replace(SPACE, " ").encode()
