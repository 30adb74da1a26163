"""Drafts from earlier text, against a search through all of it, and their cost."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.serve.speculate import Ngrams


def search(tokens: list[int], min_n: int, max_n: int, num_drafts: int) -> list[int]:
    """The same by looking everywhere, last place first; the text is continued by its own drafts as they come."""
    for n in range(max_n, min_n - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[len(tokens) - n :]:
                text = list(tokens)
                for i in range(num_drafts):
                    text.append(text[start + n + i])
                return text[len(tokens) :]
    return []


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=6),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 6),
)
def test_drafts_are_those_of_a_search(parts, min_n, more, num_drafts):
    ngrams, tokens = Ngrams(min_n, min_n + more, num_drafts), []
    assert ngrams.propose() == []
    for part in parts:
        ngrams.extend(part)
        tokens += part
        assert ngrams.propose() == search(tokens, min_n, min_n + more, num_drafts)


def test_a_quotation_is_guessed_and_a_repetition_goes_on():
    ngrams = Ngrams(2, 3, 4)
    ngrams.extend([10, 11, 12, 13, 14, 15, 99, 11, 12])
    assert ngrams.propose() == [13, 14, 15, 99]
    ngrams = Ngrams(1, 3, 5)
    ngrams.extend([1, 2, 3, 1, 2, 3])
    assert ngrams.propose() == [1, 2, 3, 1, 2]


def test_the_longer_run_decides_over_the_later_one():
    ngrams = Ngrams(1, 2, 1)
    ngrams.extend([1, 2, 7, 2, 8, 1, 2])
    assert ngrams.propose() == [7]


@pytest.mark.timed
def test_a_step_costs_the_same_in_a_long_text():
    def seconds(length: int) -> float:
        ngrams = Ngrams(2, 4, 4)
        ngrams.extend(i * i % 1009 for i in range(length))
        best = 1.0
        for _ in range(5):
            started = time.perf_counter()
            for i in range(200):
                ngrams.extend([i])
                ngrams.propose()
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds(100_000) < 5 * seconds(1_000)


def test_impossible_lengths_are_refused():
    with pytest.raises(ValueError, match="min_n=3 and max_n=2"):
        Ngrams(3, 2, 1)
