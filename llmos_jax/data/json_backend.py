"""`tokenizers` objects (`tokenizer.json`), built from a file, from a GGUF's lists, or by training."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmos_jax.config import UserError

# How text is split before merging: the published expressions of each vocabulary.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class JsonBackend:
    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None, *, cuts_at_special: bool = False):
        """Takes `tokenizer` over: to it, special tokens in a text are plain text. vocab_size: where it is known.

        cuts_at_special: what stands between special tokens is encoded as it would be by itself.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self.plain, self.cuts_at_special = tokenizer, cuts_at_special
        added = tokenizer.get_added_tokens_decoder().items()
        self.special = {token.content: i for i, token in added if token.special and token.content}
        special = sorted(self.special, key=len, reverse=True)
        self.controls = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        if vocab_size is None:
            vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = vocab_size

    @cached_property
    def with_special(self) -> Tokenizer:
        """A copy, made when a text first asks for it: `tokenizers` cannot choose for one call how to take its tokens."""
        return Tokenizer.from_str(self.plain.to_str())  # which does not tell how special tokens are taken

    def encode(self, text: str, special: bool) -> list[int]:
        if special and self.cuts_at_special:
            return self._cut(text)
        return (self.with_special if special else self.plain).encode(text, add_special_tokens=False).ids

    def _cut(self, text: str) -> list[int]:
        """As `with_special` encodes it, which takes a quarter of a second to make."""
        ids: list[int] = []
        at = 0
        for found in self.controls.finditer(text):
            ids += [*self.encode(text[at : found.start()], special=False), self.special[found.group()]]
            at = found.end()
        ids += self.encode(text[at:], special=False)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self.plain.decode(ids, skip_special_tokens=skip_special)

    def token_to_id(self, token: str) -> int | None:
        return self.plain.token_to_id(token)

    def id_to_token(self, i: int) -> str | None:
        return self.plain.id_to_token(i)

    def starts_with(self, i: int | None) -> bool:
        """Whether the file's own post-processor puts token `i` in front of a text."""
        return i is not None and self.plain.encode("a").ids[:1] == [i]

    def identity(self) -> bytes:
        return self.plain.to_str().encode()

    def save(self, folder: Path) -> None:
        self.plain.save(str(folder / "tokenizer.json"))


def parse(text: str) -> JsonBackend:
    """The backend of the text of a `tokenizer.json`, as `JsonBackend.identity` gives it."""
    return JsonBackend(Tokenizer.from_str(text))


def read_json_tokenizer(path: Path) -> JsonBackend:
    """The backend of a `tokenizer.json`; UserError where it is not one."""
    try:
        return JsonBackend(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer.json ({error}); pull the model again") from error


def _splits(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2_splits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_splits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_splits()])


# tokenizer.ggml.pre -> (splits, whether whole words in the vocabulary skip the merges, normalizer).
GGUF_PRE_TOKENIZERS = {
    "default": (_gpt2_splits, False, None),
    "gpt-2": (_gpt2_splits, False, None),
    "smollm": (_smollm_splits, False, None),
    "llama-bpe": (lambda: _splits(LLAMA3_SPLIT), True, None),
    "qwen2": (lambda: _splits(QWEN2_SPLIT), False, normalizers.NFC),
    "deepseek-r1-qwen": (lambda: _splits(QWEN2_SPLIT), False, normalizers.NFC),
    "tekken": (lambda: _splits(TEKKEN_SPLIT), True, None),
}
GGUF_PRE_TOKENIZERS |= dict.fromkeys(("llama3", "llama-v3"), GGUF_PRE_TOKENIZERS["llama-bpe"])


def from_gguf_lists(tokens: list[str], merges: list[str], types: list[int], pre: str) -> JsonBackend:
    """Byte-level BPE from what a GGUF holds; UserError for a pre-tokenizer llmos does not know."""
    if pre not in GGUF_PRE_TOKENIZERS:
        known = ", ".join(GGUF_PRE_TOKENIZERS)
        raise UserError(f"the GGUF splits text by {pre!r}, which llmos does not know; it knows {known}")
    splits, ignore_merges, normalizer = GGUF_PRE_TOKENIZERS[pre]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splits()
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer()
    control, user_defined = 3, 4
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, kind in zip(tokens, types, strict=True)
            if kind == control
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == user_defined]
    )
    return JsonBackend(tokenizer, len(tokens), cuts_at_special=user_defined not in types)


def train(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> JsonBackend:
    """Byte-level BPE learned from `texts`: every text can be encoded, digits one by one."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(special_tokens)
    if vocab_size < least:
        raise UserError(f"a byte-level vocabulary of {vocab_size} is too small; use at least {least}")
    tokenizer = Tokenizer(models.BPE())  # without a normalizer: decoding gives every text back as it was
    tokenizer.pre_tokenizer = _splits(QWEN2_SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JsonBackend(tokenizer)
