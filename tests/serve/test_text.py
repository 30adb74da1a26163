"""Text from tokens against the naive answer: all of it, cut where a stop string is first complete."""

import json

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.data.json_backend import JsonBackend
from llmos_jax.data.sentencepiece_backend import SentencePieceBackend
from llmos_jax.data.tokenizer import Tokenizer, train_bpe
from llmos_jax.serve.text import Text, token_bytes

CORPUS = [
    "the cat sat on the mat, and that was that",
    "naïve café 😀 日本語 über 12 + 34",
    "stop.\n\nUser: stop the",
] * 5


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(CORPUS, 330, special_tokens=("<|end|>",))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Tokenizer:
    prefix = tmp_path_factory.mktemp("pieces") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    backend = SentencePieceBackend(prefix.with_suffix(".model").read_bytes(), {400: "<tool>"})
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


def cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(
    st.text(alphabet="abt h😀é\n", max_size=30),
    st.lists(st.integers(0, 420), max_size=12),  # some are beyond the vocabulary
    st.lists(st.text(alphabet="abt h😀é\n\ufffd", max_size=4), max_size=3),
    st.lists(st.integers(1, 4), max_size=20),
    st.integers(0, 60),
    st.booleans(),
)
@pytest.mark.parametrize("kind", ["bpe", "pieces"])
def test_it_is_the_whole_text_cut_at_the_first_stop(request, kind, text, strange, stops, sizes, length, include):
    tokenizer = request.getfixturevalue(kind)
    # What follows a broken character is the decoder's choice; here one is broken only where the text ends.
    strange = [
        token
        for token in strange
        if "\ufffd" not in tokenizer.decode([token] if tokenizer.token(token) is not None else [])
    ]
    tokens = [*strange, *tokenizer.encode(text)][: len(strange) + length]
    known = [token for token in tokens if tokenizer.token(token) is not None]
    wanted, stop = cut(tokenizer.decode(known), stops, include)
    answer, given_out, place = Text(tokenizer, tuple(stops), include), "", 0
    for size in [*sizes, len(tokens)]:
        given_out += answer.add(tokens[place : place + size])
        assert wanted.startswith(given_out)
        place += size
    assert given_out + answer.finish() == wanted
    assert answer.stopped == stop and answer.finish() == ""


@given(st.lists(st.integers(0, 420), max_size=20), st.lists(st.integers(1, 4), max_size=20))
def test_broken_characters_come_out_the_same_however_they_arrive(bpe, tokens, sizes):
    at_once, answer, place = Text(bpe, ("a ", "\ufffd\ufffd")), Text(bpe, ("a ", "\ufffd\ufffd")), 0
    given_out = ""
    for size in [*sizes, len(tokens)]:
        given_out += answer.add(tokens[place : place + size])
        place += size
    assert given_out + answer.finish() == at_once.add(tokens) + at_once.finish()


def test_stops_are_found_in_every_way_to_cut_a_text_into_tokens(bpe):
    text = "aab aabaab b"
    letters = [bpe.encode(letter)[0] for letter in text]
    for stops in (["aabaab"], ["abaa", "baab"], ["aa"], ["b b"], [" b", "ab b"], ["x"], ["aab b"]):
        for tokens in (letters, bpe.encode(text)):
            answer = Text(bpe, stops)
            parts = [answer.add([token]) for token in tokens]
            assert "".join(parts) + answer.finish() == cut(text, stops, False)[0]


def test_text_is_held_back_only_as_long_as_it_may_begin_a_stop(bpe):
    answer = Text(bpe, ("stop",))
    letters = {letter: bpe.encode(letter)[0] for letter in "stop !"}
    out = [answer.add([letters[letter]]) for letter in "st sto"]
    assert out == ["", "", "st ", "", "", ""]
    assert answer.add([letters["!"]]) == "sto!"
    assert [answer.add([letters[letter]]) for letter in "stop!"] == [""] * 5
    assert (answer.stopped, answer.num_tokens) == ("stop", 11)


def test_half_a_character_is_held_back(bpe):
    answer = Text(bpe, ())
    halves = [bpe.token(i) for i in range(bpe.vocab_size)].index
    alphabet = [halves(c) for c in ("ð", "Ł", "ĺ", "Ģ")]  # F0 9F 98 80 as byte-level BPE writes them
    assert [answer.add([token]) for token in alphabet] == ["", "", "", "😀"]
    assert answer.add(alphabet[:2]) == ""
    assert answer.finish() == "\ufffd"


def test_the_bytes_of_tokens_joined_are_the_text(bpe, pieces):
    for tokenizer in (bpe, pieces):
        table = token_bytes(tokenizer)
        assert len(table) == tokenizer.vocab_size
        for text in CORPUS:
            joined = b"".join(table[token] or b"" for token in tokenizer.encode(text))
            assert joined.decode().removeprefix(" ") == text
    assert token_bytes(bpe)[bpe.eos_id] is None
    table = token_bytes(pieces)
    assert [table[i] for i in (pieces.bos_id, pieces.eos_id)] == [None, None]
    assert table[400] == b"<tool>" and table[399] is None  # an added token, and an id that no token has


def test_the_bytes_of_a_tokenizer_json_made_from_sentencepiece():
    vocabulary = {"<unk>": 0, "▁the": 1, "<0xF0>": 2, "é": 3, "▁": 4}
    state = {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False},
            {"id": 5, "content": "▁tool", "special": False, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False},
        ],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>", "byte_fallback": True},
    }  # fmt: skip
    from tokenizers import Tokenizer as Library

    tokenizer = Tokenizer(JsonBackend(Library.from_str(json.dumps(state))), {})
    assert token_bytes(tokenizer) == [None, b" the", b"\xf0", "é".encode(), b" ", "▁tool".encode()]
