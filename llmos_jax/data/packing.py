"""Packing: documents one after the other, cut into rows of `seq_len` tokens that can be read in any order.

The documents of a store, in a given order, make one stream of N tokens; row r is the tokens [r T, (r + 1) T) of it. A
document that crosses the edge of a row goes on in the next row as a piece of its own. Every pair (token, next token of
the same document) is a target of exactly one row, so all rows together have N - num_documents targets.
"""

import numpy as np

from llmos_jax.data.store import TokenStore

ROW_FIELDS = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_mask": np.float32,
}


def empty_rows(num_rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """Rows of padding: each of `ROW_FIELDS` as zeros [num_rows, seq_len]."""
    return {name: np.zeros((num_rows, seq_len), dtype) for name, dtype in ROW_FIELDS.items()}


class PackedRows:
    """The rows of `documents` (int64 [n], numbers of documents of `store`, in the order they are packed).

    pad_last: whether the last tokens, too few for a row, make one more row with padding, or are left out.
    Holds 24 bytes of host memory a document.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, seq_len: int, pad_last: bool = False):
        self.store = store
        self.documents = documents
        self.seq_len = seq_len
        lengths = store.offsets[documents + 1] - store.offsets[documents]
        self._starts = np.concatenate(([0], np.cumsum(lengths)))  # of each document in the stream; its end comes last
        self.num_tokens = int(self._starts[-1])
        self.num_rows = -(-self.num_tokens // seq_len) if pad_last else self.num_tokens // seq_len

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text of these documents."""
        return int(self.store.num_bytes[self.documents].sum(dtype=np.int64))

    @property
    def num_targets(self) -> int:
        """Tokens that have a token of the same document before them; all rows together predict these, bar a tail left
        out."""
        return self.num_tokens - self.num_documents

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The rows numbered `rows` [R], as arrays [R, seq_len]:

        tokens int32; targets int32, the token that follows each; segment_ids int32, 1 and up for each piece of a
        document in the row; positions int32, from 0 in each piece; loss_mask float32, 1 where the target belongs to
        the same document. Padding, and a target without loss, is 0 in all of them.
        """
        shape = (len(rows), self.seq_len + 1)  # the last token of a row needs the one after it as its target
        indices, segments, positions = (np.zeros(shape, np.int64) for _ in range(3))
        for i, row in enumerate(rows):
            self._lay_out(int(row), indices[i], segments[i], positions[i])
        tokens = np.zeros(shape, np.int32)
        used = segments > 0
        tokens[used] = self.store.take(indices[used])
        same_document = (segments[:, :-1] == segments[:, 1:]) & used[:, :-1]
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:] * same_document,
            "segment_ids": segments[:, :-1].astype(np.int32),
            "positions": positions[:, :-1].astype(np.int32),
            "loss_mask": same_document.astype(np.float32),
        }

    def _lay_out(self, row: int, indices: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> None:
        """Fills in, for the tokens of one row and the one after it, where they are in the store and in their piece."""
        begin = row * self.seq_len
        end = min(begin + self.seq_len + 1, self.num_tokens)
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left"))
        piece_starts = np.maximum(self._starts[first:last], begin)
        lengths = np.minimum(self._starts[first + 1 : last + 1], end) - piece_starts
        shifts = self.store.offsets[self.documents[first:last]] - self._starts[first:last]
        stream, count = np.arange(begin, end), end - begin
        indices[:count] = stream + np.repeat(shifts, lengths)
        segments[:count] = np.repeat(np.arange(1, last - first + 1), lengths)
        positions[:count] = stream - np.repeat(piece_starts, lengths)
