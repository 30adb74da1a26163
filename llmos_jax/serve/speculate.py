"""Guesses at the next tokens: what followed the last time the text ended like this (prompt lookup decoding).

Answers that quote their prompt or repeat themselves are guessed well, and a guess costs no model (arXiv:2304.04487,
"Inference with Reference", is the idea). No jax.
"""

from collections.abc import Iterable

from llmos_jax.serve.request import Token


class Ngrams:
    """Where each run of min_n .. max_n tokens was last followed by another token; O(max_n) for a new one.

    Of the runs at the end of the text, the longest that was there before decides.
    """

    def __init__(self, min_n: int, max_n: int, num_drafts: int):
        if not 1 <= min_n <= max_n:
            raise ValueError(f"min_n={min_n} and max_n={max_n}; 1 <= min_n <= max_n is needed")
        self._num_drafts = num_drafts
        self._tokens: list[Token] = []
        self._after: dict[int, dict[tuple[Token, ...], int]] = {n: {} for n in range(max_n, min_n - 1, -1)}

    def extend(self, tokens: Iterable[Token]) -> None:
        """Tells the next tokens of the text: the prompt first, then what was drawn. Drafts are told when accepted."""
        for token in tokens:
            end = len(self._tokens)
            for n, after in self._after.items():
                if n <= end:
                    after[tuple(self._tokens[end - n :])] = end
            self._tokens.append(token)

    def propose(self) -> list[Token]:
        """`num_drafts` tokens, or none where the text never ended like this.

        Where what followed is not so long, it is taken to repeat itself.
        """
        end = len(self._tokens)
        for n, after in self._after.items():
            start = after.get(tuple(self._tokens[end - n :])) if n <= end else None
            if start is not None:
                return [self._tokens[start + i % (end - start)] for i in range(self._num_drafts)]
        return []
