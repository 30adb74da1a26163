"""Cleaning: what is done to a document before it is tokenized, and the count of what every filter dropped."""

import hashlib
import math
import re
import unicodedata
import zlib
from collections import Counter
from html.parser import HTMLParser

import numpy as np

from llmos_jax.config import CleanConfig, UserError
from llmos_jax.data.hashing import mix64

DROP_REASONS = ("too_short", "too_long", "repetitive", "exact_duplicate", "near_duplicate")
COUNTS = (
    *("documents", "characters", "kept", "kept_characters"),
    *DROP_REASONS,
    *("changed_html", "changed_nfc", "changed_control"),
)

# Unicode's category Cc without tab and newline, and the byte order mark.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")


class Cleaner:
    """Cleans the documents of one source, one after the other, and counts.

    The duplicate filters compare a document with the ones kept before it, so of duplicates the first stays. They
    remember 16 bytes a document (exact) and 512 bytes a document (near) in host memory.

    counts: documents, characters (as read); kept, kept_characters; how many documents each of `DROP_REASONS` dropped
    (the first that applies, in that order); changed_html, changed_nfc, changed_control: documents each step changed.

    Raises UserError for a threshold outside its range.
    """

    def __init__(self, config: CleanConfig):
        threshold = config.near_dedup_threshold
        if not 0 < threshold <= 1:
            raise UserError(f"data.clean.near_dedup_threshold={threshold} must be above 0 and at most 1")
        if not 0 <= config.max_repetition <= 1:
            raise UserError(f"data.clean.max_repetition={config.max_repetition} must be in [0, 1]")
        if 0 < config.max_chars < config.min_chars:
            raise UserError(
                f"data.clean.max_chars={config.max_chars} is below data.clean.min_chars={config.min_chars}, "
                "so every document would be dropped; raise max_chars, or set it to 0 for no limit"
            )
        self.config = config
        self.counts = dict.fromkeys(COUNTS, 0)
        self._seen: set[bytes] = set()
        self._near = NearDuplicates(threshold)

    def clean(self, text: str) -> str | None:
        """The cleaned document, or None where a filter drops it."""
        self.counts["documents"] += 1
        self.counts["characters"] += len(text)
        text = self._normalize(text)
        if reason := self._drop_reason(text):
            self.counts[reason] += 1
            return None
        self.counts["kept"] += 1
        self.counts["kept_characters"] += len(text)
        return text

    def _normalize(self, text: str) -> str:
        config = self.config
        if config.strip_html:
            text = self._changed("html", text, html_to_text(text))
        if config.normalize_nfc:
            text = self._changed("nfc", text, unicodedata.normalize("NFC", text))
        if config.strip_control:
            text = self._changed("control", text, strip_control(text))
        return text

    def _changed(self, step: str, before: str, after: str) -> str:
        self.counts[f"changed_{step}"] += before != after
        return after

    def _drop_reason(self, text: str) -> str | None:
        config = self.config
        length = len(text.strip())
        if length < max(config.min_chars, 1):
            return "too_short"
        if config.max_chars and length > config.max_chars:
            return "too_long"
        if config.max_repetition < 1 and repeated_share(text) > config.max_repetition:
            return "repetitive"
        if config.exact_dedup and self._is_exact_duplicate(text):
            return "exact_duplicate"
        if config.near_dedup and self._near.seen_or_add(text):
            return "near_duplicate"
        return None

    def _is_exact_duplicate(self, text: str) -> bool:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in self._seen:
            return True
        self._seen.add(digest)
        return False


def strip_control(text: str) -> str:
    """`text` with every line ending as a newline and without control characters other than newline and tab."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def repeated_share(text: str) -> float:
    """Share of the characters that stand in a line which has come before in the same text, blank lines left out."""
    lines = Counter(stripped for line in text.split("\n") if (stripped := line.strip()))
    total = sum(len(line) * count for line, count in lines.items())
    return sum(len(line) * (count - 1) for line, count in lines.items()) / total if total else 0.0


class _HtmlText(HTMLParser):
    HIDDEN = frozenset(("script", "style", "template", "noscript"))
    BLOCKS = frozenset((
        *("p", "div", "br", "li", "ul", "ol", "tr", "table", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article"),
        *("header", "footer", "blockquote", "pre", "hr", "title", "dd", "dt"),
    ))  # fmt: skip

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self.HIDDEN:
            self._hidden.append(tag)
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)

    def parse_html_declaration(self, i: int) -> int:
        try:
            return super().parse_html_declaration(i)
        except AssertionError:  # `<![` with no name, where some Python versions fail; browsers read a comment
            return self.parse_bogus_comment(i)


def html_to_text(text: str) -> str:
    """The text of HTML: tags, comments, scripts and styles go, entities become characters, blocks end in one newline.

    Whatever looks like a tag goes, so this is for web pages and not for source code.
    """
    if "<" not in text and "&" not in text:
        return text
    parser = _HtmlText()
    parser.feed(text)
    parser.close()
    return re.sub(r"\n\s*\n", "\n", "".join(parser.parts)).strip()


# A word, or one character of Chinese and Japanese, which put no spaces between words.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
SHINGLE_WORDS = 5
NUM_HASHES = 128


def shingles(text: str) -> np.ndarray:
    """uint64 [n]: the distinct hashes of every 5 words in a row, case and punctuation aside.

    A shorter text is one shingle, of all its words (or of itself where it has none).
    """
    words = _WORD.findall(text.lower()) or [text]
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    width = min(SHINGLE_WORDS, len(codes))
    hashes = np.zeros(len(codes) - width + 1, np.uint64)
    for i in range(width):
        hashes = mix64(hashes ^ codes[i : len(codes) - width + 1 + i])
    return np.unique(hashes)


def choose_bands(threshold: float, recall: float = 0.98) -> tuple[int, int]:
    """(bands, rows a band) for `NUM_HASHES` hashes: the most rows with which a pair at `threshold` is found so surely.

    A pair of Jaccard similarity s shares a band with probability 1 - (1 - s^rows)^bands (doi:10.1017/CBO9781139058452,
    section 3.4). More rows mean fewer false candidates.
    """
    for rows in range(NUM_HASHES, 0, -1):
        bands = NUM_HASHES // rows
        if 1 - (1 - threshold**rows) ** bands >= recall:
            return bands, rows
    return NUM_HASHES, 1


class NearDuplicates:
    """MinHash with locality-sensitive hashing (doi:10.1109/SEQUEN.1997.666900) over 5-word shingles.

    A text is a near duplicate where its estimated Jaccard similarity with a text added before is at least `threshold`.
    The estimate has a standard deviation of sqrt(s (1 - s) / 128), at most 0.045.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.bands, self.rows = choose_bands(threshold)
        draws = mix64(np.arange(2 * NUM_HASHES, dtype=np.uint64))
        self._multipliers, self._offsets = draws[:NUM_HASHES] | np.uint64(1), draws[NUM_HASHES:]
        self._signatures = np.empty((0, NUM_HASHES), np.uint32)
        self._count = 0
        self._buckets: dict[tuple[int, bytes], list[int]] = {}

    def signature(self, text: str) -> np.ndarray:
        """uint32 [128]: of each hash function, the smallest value over the shingles."""
        hashes = shingles(text)
        smallest = np.full(NUM_HASHES, np.iinfo(np.uint64).max)
        for start in range(0, len(hashes), 256):  # the table of hashes x functions stays in the processor's cache
            table = hashes[start : start + 256, None] * self._multipliers + self._offsets
            smallest = np.minimum(smallest, table.min(axis=0))
        return (smallest >> np.uint64(32)).astype(np.uint32)  # the low bits of a product are the weak ones

    def seen_or_add(self, text: str) -> bool:
        """True where a text like this one was added before; otherwise adds it."""
        signature = self.signature(text)
        rows = self.rows
        keys = [(band, signature[band * rows : (band + 1) * rows].tobytes()) for band in range(self.bands)]
        candidates = sorted({i for key in keys for i in self._buckets.get(key, ())})
        if candidates:
            agreement = (self._signatures[candidates] == signature).mean(axis=1)
            if agreement.max() >= self.threshold:
                return True
        for key in keys:
            self._buckets.setdefault(key, []).append(self._count)
        self._append(signature)
        return False

    def _append(self, signature: np.ndarray) -> None:
        if self._count == len(self._signatures):
            grown = np.empty((max(1024, math.ceil(1.5 * self._count)), NUM_HASHES), np.uint32)
            grown[: self._count] = self._signatures[: self._count]
            self._signatures = grown
        self._signatures[self._count] = signature
        self._count += 1
