"""Answers that must follow a grammar: which tokens may come next, by llguidance. No jax.

llguidance runs an Earley parser over a lexer of regular-expression derivatives, token by token of the model's own
vocabulary, so that it needs no precomputed automaton (https://github.com/guidance-ai/llguidance).
"""

import contextlib
import functools
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import llguidance
import numpy as np

from llmos_jax.data.json_backend import JsonBackend
from llmos_jax.data.sentencepiece_backend import SentencePieceBackend
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.serve.request import Grammar, Token
from llmos_jax.serve.text import token_bytes

# Between two JSON tokens. Without a bound, a model that is unsure can write white space until its tokens are used up.
WHITE_SPACE = r"[ \t\n\r]{0,40}"
SECONDS, SECONDS_MORE = 0.5, 0.002  # of the parser's work: for one answer, and for each mask and token; 20 us are usual
KINDS = {
    "json_schema": "the JSON schema",
    "json_object": "any JSON object",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "lark": "the grammar",
}


class Vocabulary:
    """A model's tokens as llguidance wants them. One serves all sequences of a model, in any thread.

    vocab_size: the width of the logits, which may be more than the tokenizer has tokens; the rest is never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        eos_ids = list(tokenizer.eos_ids)
        if not eos_ids:
            raise ValueError("the tokenizer has no token that ends an answer, without which no grammar can be followed")
        backend = tokenizer.backend
        source: Any = backend.plain.to_str() if isinstance(backend, JsonBackend) else _Pieces(tokenizer, vocab_size)
        self.num_words = -(-vocab_size // 32)
        self._tokenizer = llguidance.LLTokenizer(source, n_vocab=vocab_size, eos_token=eos_ids)
        # A large schema takes 15 ms to prepare and 0.04 ms to copy.
        self._prepared = functools.lru_cache(maxsize=64)(self._prepare)

    def matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        """A parser at the beginning of `grammar`. Raises ValueError as `compiled` does."""
        return self._prepared(grammar).deep_copy()

    def _prepare(self, grammar: Grammar) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, compiled(grammar), log_level=0, limits=_limits())
        matcher.compute_bitmask()  # without which it does not see that nothing fits the grammar
        if matcher.is_error():
            raise ValueError(f"{KINDS[grammar.kind]} cannot be followed: {_sentence(matcher.get_error())}")
        return matcher


class _Pieces:
    """A SentencePiece tokenizer under the names by which llguidance looks at it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        assert isinstance(tokenizer.backend, SentencePieceBackend)
        self._backend = tokenizer.backend
        pieces = token_bytes(tokenizer)
        missing = range(len(pieces), vocab_size)
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = [i for i, piece in enumerate(pieces) if piece is None] + list(missing)
        names = (tokenizer.token(i) or f"<unused{i}>" for i in range(vocab_size))
        given = [*pieces, *(None for _ in missing)]
        self.tokens = [name.encode() if piece is None else piece for piece, name in zip(given, names, strict=True)]

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of text inside an answer: without the space that SentencePiece puts before a first word."""
        return self._backend.rest.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def compiled(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises ValueError with one sentence where it cannot be followed.

    It needs no tokenizer, so that a request can be refused before it reaches an engine.
    """
    kind, text = grammar.kind, grammar.text
    if kind not in KINDS:
        raise ValueError(f"the grammar's kind is {kind!r}; use one of {', '.join(KINDS)}")
    try:
        source = _source(kind, text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{KINDS[grammar.kind]} cannot be read: {error}") from error
    problem = llguidance.LLMatcher.validate_grammar(source, limits=_limits())
    if problem:
        raise ValueError(f"{KINDS[grammar.kind]} cannot be followed: {_sentence(problem)}")
    return source


def _source(kind: str, text: str) -> str:
    matcher = llguidance.LLMatcher
    if kind in ("json_schema", "json_object"):
        schema = json.loads(text) if kind == "json_schema" else {"type": "object"}
        if not isinstance(schema, dict):
            raise ValueError("it must be a JSON object")
        return matcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": WHITE_SPACE})
    if kind == "regex":
        # \d, \w and \s are of ASCII, as most regular expressions of answers mean them.
        return matcher.grammar_from_lark(f"start: /{llguidance.regex_to_lark(text, 'dws')}/")
    if kind == "lark":
        return matcher.grammar_from_lark(text)
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise ValueError("it must be a JSON list of texts that are not empty")
    return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in choices))


def _limits() -> llguidance.LLParserLimits:
    """llguidance's own, but for one answer's memory and start: a state of the lexer takes 1 to 2 KiB, 20,000 symbols
    (about a thousand properties of a schema) 0.1 s."""
    return llguidance.LLParserLimits(max_lexer_states=30_000, max_grammar_size=20_000, verbose_errors=False)


def _sentence(problem: str) -> str:
    """The point of llguidance's message, which may show the place in several lines."""
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    if lines[0].startswith("NoExtension"):
        return "no answer fits it"
    told = next((line.removeprefix("error:") for line in lines if line.startswith("error:")), lines[0])
    return re.sub(r"^(at )?\d+\(\d+\):", "", told).strip()


class Structure:
    """How far one answer has come in its grammar.

    tokens: what the answer has already, which is replayed. Raises ValueError, as all methods do, with one sentence for
    the user: where the grammar cannot be followed, where the tokens do not follow it, and where it takes more work than
    is granted to one answer, so that none can hold up the others.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: Grammar, tokens: Iterable[Token] = ()):
        self._num_words = vocabulary.num_words
        self._matcher = vocabulary.matcher(grammar)
        self._seconds_left = SECONDS
        for token in tokens:
            self.accept(token)

    def mask(self) -> np.ndarray:
        """uint32 [ceil(V / 32)], read-only: bit i % 32 of word i // 32 says whether token i may come next.

        At the end of the grammar, and wherever the answer may end, the tokens that end an answer are among them.
        """
        with self._work():
            words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        return words[: self._num_words]

    def accept(self, token: Token) -> None:
        """Goes on by one token of the answer. What follows a token that ended it counts for nothing."""
        with self._work():
            if not self.is_complete:
                self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow, or the end has come."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def may_end(self) -> bool:
        """Whether what there is follows the grammar as a whole."""
        return self._matcher.is_accepting()

    def masks_along(self, drafts: Sequence[Token]) -> list[np.ndarray]:
        """The mask before each draft and after the last. It stops at the first draft that may not come: n masks mean
        that n - 1 drafts may. The state stays as it was."""
        masks = [self.mask()]
        for draft in drafts:
            if self.is_complete or self._matcher.validate_tokens([draft]) != 1:
                break
            self.accept(draft)
            masks.append(self.mask())
        if len(masks) > 1:
            self._matcher.rollback(len(masks) - 1)
        return masks

    @contextlib.contextmanager
    def _work(self) -> Iterator[None]:
        """What the parser does is checked for errors, and counted: an ambiguous grammar takes ever more a token.

        Time of this thread is what counts, so that a machine that is busy makes no difference.
        """
        started = time.thread_time()
        yield
        self._seconds_left += SECONDS_MORE - (time.thread_time() - started)
        if self._matcher.is_error():
            raise ValueError(f"the answer cannot follow its grammar: {_sentence(self._matcher.get_error())}")
        if self._seconds_left < 0:
            raise ValueError("the answer cannot follow its grammar: it is too ambiguous to be parsed in time")
