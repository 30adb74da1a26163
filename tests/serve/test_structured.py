"""Masks for sampling: random answers under them are right, drafts are looked along, bad grammars are named."""

import json
import os
import re
import statistics
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.data.sentencepiece_backend import SentencePieceBackend
from llmos_jax.data.tokenizer import Tokenizer, train_bpe
from llmos_jax.serve.request import Grammar
from llmos_jax.serve.structured import Structure, Vocabulary, compiled
from llmos_jax.serve.text import token_bytes
from tests.serve.test_text import CORPUS, pieces  # noqa: F401

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["a", 'b\n"', None, 1.5]}, "maxItems": 3},
        "inner": {"type": "object", "properties": {"on": {"type": "boolean"}}, "additionalProperties": False},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}
GRAMMAR = Grammar("json_schema", json.dumps(SCHEMA))
VOCAB = 352  # wider than the tokenizers are, as embedding tables often are


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([*CORPUS, '{"name": "x", "count": 12, "tags": ["a", null], "on": true, "inner": {}}'], 330)


@pytest.fixture(scope="module", params=["bpe", "pieces", "real"])
def tokenizer(request) -> Tokenizer:
    if request.param != "real":
        return request.getfixturevalue(request.param)
    file = os.environ.get("LLMOS_TEST_MODEL", "")
    if not file:
        pytest.skip("LLMOS_TEST_MODEL names no GGUF of SmolLM2")
    from llmos_jax import opening

    return opening.tokenizer_of(opening.find(file))


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, max(VOCAB, tokenizer.vocab_size + 22))


def allowed(mask: np.ndarray) -> np.ndarray:
    return np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0]


def inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of text in the middle of an answer, where SentencePiece adds no space."""
    backend = tokenizer.backend
    return backend.rest.encode(text) if isinstance(backend, SentencePieceBackend) else tokenizer.encode(text)


def drive(structure: Structure, rng: np.random.Generator, most: int = 600) -> list[int]:
    """Tokens drawn by random logits until the grammar ends."""
    tokens: list[int] = []
    while not structure.is_complete and len(tokens) < most:
        tokens.append(int(rng.choice(allowed(structure.mask()))))
        structure.accept(tokens[-1])
    return tokens


def is_right(value) -> bool:
    tags = value["tags"]
    return (
        set(value) <= {"name", "count", "tags", "inner"}
        and isinstance(value["name"], str) and len(value["name"]) <= 12
        and type(value["count"]) is int and 0 <= value["count"] <= 999
        and len(tags) <= 3 and all(tag in ("a", 'b\n"', None, 1.5) for tag in tags)
        and value.get("inner", {}) in ({}, {"on": True}, {"on": False})
    )  # fmt: skip


def test_random_logits_end_in_what_the_schema_says(tokenizer, vocabulary):
    rng = np.random.default_rng(0)
    for _ in range(30):
        structure = Structure(vocabulary, GRAMMAR)
        tokens = drive(structure, rng)
        assert structure.is_complete and structure.may_end
        assert is_right(json.loads(tokenizer.decode(tokens)))


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"[a-f]{2,5}é?(-\d{3}){1,2}", r"[a-f]{2,5}é?(-[0-9]{3}){1,2}"),
        (
            "choice",
            json.dumps(['a"b\\c', "new\nline", "日本", "x"]),
            "|".join(map(re.escape, ['a"b\\c', "new\nline", "日本", "x"])),
        ),
        (
            "lark",
            'start: "if " cond " then " cond\ncond: ("x" | "y") [" and " ("x" | "y")]',
            r"if [xy]( and [xy])? then [xy]( and [xy])?",
        ),
    ],
)
def test_random_logits_follow_other_grammars(tokenizer, vocabulary, kind, text, pattern):
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(25):
        answer = tokenizer.decode(drive(Structure(vocabulary, Grammar(kind, text)), rng))
        assert re.fullmatch(pattern, answer)
        seen.add(answer)
    assert len(seen) >= 4


def test_a_json_object_is_any_object(tokenizer, vocabulary):
    for text in ("{}", '{"a": [1, {"b": null}], "c": "é"}'):
        structure = Structure(vocabulary, Grammar("json_object", ""), inside(tokenizer, text))
        assert structure.may_end
    with pytest.raises(ValueError, match="the answer cannot follow its grammar"):
        Structure(vocabulary, Grammar("json_object", ""), inside(tokenizer, "[1]"))


def test_white_space_ends(tokenizer, vocabulary):
    """A model that would write nothing but spaces must go on after some."""
    structure = Structure(vocabulary, GRAMMAR, inside(tokenizer, "{"))
    spaces = [i for i, spelled in enumerate(token_bytes(tokenizer)) if spelled and not spelled.strip()]
    for _ in range(100):
        possible = np.intersect1d(allowed(structure.mask()), spaces)
        if not len(possible):
            return
        structure.accept(int(possible[0]))
    pytest.fail("white space goes on for ever")


def test_the_mask_is_as_wide_as_the_logits_and_allows_no_token_that_is_not(tokenizer, vocabulary):
    structure = Structure(vocabulary, Grammar("regex", r"(.|\n)*"))
    mask = structure.mask()
    assert mask.dtype == np.uint32 and mask.shape == (-(-max(VOCAB, tokenizer.vocab_size + 22) // 32),)
    ids = allowed(mask)
    assert ids.max() < tokenizer.vocab_size
    assert set(tokenizer.eos_ids) <= set(ids.tolist())
    unfinished = allowed(Structure(vocabulary, Grammar("regex", "abc")).mask())
    assert not set(tokenizer.eos_ids) & set(unfinished.tolist())


def test_drafts_are_masked_as_they_would_be_one_by_one(tokenizer, vocabulary):
    rng = np.random.default_rng(2)
    for _ in range(10):
        whole = drive(Structure(vocabulary, GRAMMAR), rng)
        place = int(rng.integers(0, len(whole)))
        structure = Structure(vocabulary, GRAMMAR, whole[:place])
        before = structure.mask().copy()
        drafts = whole[place : place + 6]
        masks = structure.masks_along(drafts)
        assert len(masks) == len(drafts) + 1
        for i, mask in enumerate(masks):
            np.testing.assert_array_equal(mask, Structure(vocabulary, GRAMMAR, whole[: place + i]).mask())
        np.testing.assert_array_equal(structure.mask(), before)
        assert not structure.is_complete
        wrong = next(i for i in range(tokenizer.vocab_size) if i not in set(allowed(masks[1]).tolist()))
        assert len(structure.masks_along([drafts[0], wrong, *drafts])) == 2
        np.testing.assert_array_equal(structure.mask(), before)
        for token in whole[place:]:
            structure.accept(token)
        assert structure.is_complete


def test_a_drafted_end_is_undone(tokenizer, vocabulary):
    structure = Structure(vocabulary, Grammar("regex", "a*"), inside(tokenizer, "a"))
    masks = structure.masks_along([tokenizer.eos_id, tokenizer.eos_id])
    assert len(masks) == 2 and not structure.is_complete and structure.may_end
    structure.accept(tokenizer.eos_id)
    assert structure.is_complete
    structure.accept(tokenizer.eos_id)
    assert structure.is_complete


@given(st.integers(0, 10**6))
def test_an_answer_is_replayed_from_its_tokens(bpe, seed):
    vocabulary, rng = Vocabulary(bpe, VOCAB), np.random.default_rng(seed)
    structure = Structure(vocabulary, GRAMMAR)
    tokens: list[int] = []
    for _ in range(int(rng.integers(1, 20))):
        tokens.append(int(rng.choice(allowed(structure.mask()))))
        structure.accept(tokens[-1])
        again = Structure(vocabulary, GRAMMAR, tokens)
        assert again.is_complete == structure.is_complete
        np.testing.assert_array_equal(again.mask(), structure.mask())


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", '{"type"', "the JSON schema cannot be read: Expecting ':'"),
        ("json_schema", "[" * 100_000, "the JSON schema cannot be read"),
        ("json_schema", "3", "the JSON schema cannot be read: it must be a JSON object"),
        ("json_schema", '{"type": "nope"}', "the JSON schema cannot be followed: Invalid type: nope"),
        ("json_schema", '{"$ref": "#/missing"}', "the JSON schema cannot be followed"),
        ("json_schema", '{"const": "\\ud800"}', "the JSON schema cannot be"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ("regex", "a(b", "the regular expression cannot be followed: unclosed group"),
        ("lark", "start: other", 'the grammar cannot be followed: unknown name: "other"'),
        ("choice", "[]", "the list of choices cannot be read: it must be a JSON list"),
        ("choice", '["a", 3]', "the list of choices cannot be read: it must be a JSON list"),
        ("xml", "", "the grammar's kind is 'xml'; use one of json_schema"),
    ],
)
def test_what_cannot_be_followed_is_said_in_one_sentence(kind, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        compiled(Grammar(kind, text))
    assert "\n" not in str(found.value) and len(str(found.value)) < 300


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", '{"$ref": "#"}'), "the JSON schema cannot be followed: no answer fits it"),
        (Grammar("json_schema", json.dumps({"properties": {f"p{i}": {} for i in range(9000)}})), "too big"),
        (Grammar("regex", "(.*a.{200}){5}"), "too many states"),
        (Grammar("lark", 'start: e\ne: e e | "a" | "b" | "ab"'), "too ambiguous to be parsed in time"),
    ],
)
def test_a_grammar_that_takes_too_much_is_given_up(bpe, grammar, message):
    rng, vocabulary = np.random.default_rng(4), Vocabulary(bpe, VOCAB)
    started = time.thread_time()
    with pytest.raises(ValueError, match=message):
        structure = Structure(vocabulary, grammar)
        while True:
            ids = allowed(structure.mask())
            structure.accept(int(rng.choice(ids[ids != bpe.eos_id])))
    assert time.thread_time() - started < 10


def test_a_token_that_is_not_allowed_is_an_error_that_stays(bpe):
    structure = Structure(Vocabulary(bpe, VOCAB), Grammar("regex", "abc"))
    with pytest.raises(ValueError, match="cannot follow its grammar"):
        structure.accept(bpe.encode("x")[0])
    with pytest.raises(ValueError, match="cannot follow its grammar"):
        structure.mask()
    assert not structure.is_complete


def test_a_tokenizer_without_an_end_is_refused(bpe):
    with pytest.raises(ValueError, match="no token that ends an answer"):
        Vocabulary(Tokenizer(bpe.backend, {}), VOCAB)


@pytest.mark.timed
def test_a_mask_takes_less_than_a_millisecond(vocabulary):
    rng, times = np.random.default_rng(3), []
    for _ in range(10):
        structure = Structure(vocabulary, GRAMMAR)
        while not structure.is_complete:
            started = time.perf_counter()
            mask = structure.mask()
            times.append(time.perf_counter() - started)
            structure.accept(int(rng.choice(allowed(mask))))
    print(f"\nmask: median {statistics.median(times) * 1e6:.0f} us, worst {max(times) * 1e6:.0f} us of {len(times)}")
    assert statistics.median(times) < 1e-3
