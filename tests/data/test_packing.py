"""Packing against a plain reference that goes through the stream token by token."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.data.packing import ROW_FIELDS, PackedRows, empty_rows


def fake_store(documents: list[list[int]]) -> SimpleNamespace:
    """A store in memory."""
    tokens = np.array([token for document in documents for token in document], np.int32)
    sizes = [len(document) for document in documents]
    return SimpleNamespace(
        offsets=np.cumsum([0, *sizes]), num_bytes=np.array([2 * size for size in sizes]), take=lambda i: tokens[i]
    )


def reference_rows(documents: list[list[int]], seq_len: int, pad_last: bool) -> list[dict[str, list]]:
    stream = [(d, i, token) for d, document in enumerate(documents) for i, token in enumerate(document)]
    rows = []
    for begin in range(0, len(stream), seq_len):
        row = {name: [0] * seq_len for name in ROW_FIELDS}
        part = stream[begin : begin + seq_len]
        if len(part) < seq_len and not pad_last:
            break
        segment, previous, start = 0, None, 0
        for slot, (document, i, token) in enumerate(part):
            if document != previous:
                segment, previous, start = segment + 1, document, slot
            row["tokens"][slot] = token
            row["segment_ids"][slot] = segment
            row["positions"][slot] = slot - start
            if i + 1 < len(documents[document]):
                row["targets"][slot] = documents[document][i + 1]
                row["loss_mask"][slot] = 1
        rows.append(row)
    return rows


DOCUMENTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=12)


@given(documents=DOCUMENTS, seq_len=st.integers(1, 16), pad_last=st.booleans(), data=st.data())
def test_rows_equal_the_reference(documents, seq_len, pad_last, data):
    order = data.draw(st.permutations(range(len(documents))))
    rows = PackedRows(fake_store(documents), np.array(order), seq_len, pad_last)
    expected = reference_rows([documents[i] for i in order], seq_len, pad_last)
    assert rows.num_rows == len(expected)
    if not expected:
        return
    numbers = np.array(data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=5)))
    read = rows.read(numbers)
    assert {name: values.dtype for name, values in read.items()} == ROW_FIELDS
    for i, number in enumerate(numbers):
        for name in ROW_FIELDS:
            assert read[name][i].tolist() == expected[number][name], name


@given(documents=DOCUMENTS, seq_len=st.integers(1, 16))
def test_every_target_is_in_exactly_one_row(documents, seq_len):
    rows = PackedRows(fake_store(documents), np.arange(len(documents)), seq_len, pad_last=True)
    read = rows.read(np.arange(rows.num_rows))
    found = read["targets"][read["loss_mask"] > 0].tolist()
    assert found == [token for document in documents for token in document[1:]]
    assert len(found) == rows.num_targets
    assert read["tokens"][read["segment_ids"] > 0].tolist() == [token for document in documents for token in document]


def test_a_row_shorter_than_the_data_leaves_the_tail_out():
    rows = PackedRows(fake_store([[1, 2, 3], [4, 5, 6, 7]]), np.array([1]), 3)
    assert (rows.num_rows, rows.num_tokens, rows.num_documents, rows.num_bytes) == (1, 4, 1, 8)
    read = rows.read(np.array([0]))
    assert read["tokens"].tolist() == [[4, 5, 6]]
    assert read["targets"].tolist() == [[5, 6, 7]]  # the token after the row is its last target


def test_empty_rows_are_padding():
    rows = empty_rows(2, 3)
    assert set(rows) == set(ROW_FIELDS)
    assert all(values.shape == (2, 3) and not values.any() for values in rows.values())


def test_a_selection_of_no_documents_has_no_rows():
    rows = PackedRows(fake_store([[1, 2]]), np.arange(0), 4, pad_last=True)
    assert (rows.num_rows, rows.num_tokens, rows.num_targets, rows.num_bytes) == (0, 0, 0, 0)


@pytest.mark.parametrize("seq_len", [1, 7, 64])
def test_a_document_longer_than_a_row_goes_on_in_the_next(seq_len):
    document = list(range(1, 51))
    rows = PackedRows(fake_store([document]), np.arange(1), seq_len)
    read = rows.read(np.arange(rows.num_rows))
    assert read["tokens"].ravel().tolist() == document[: rows.num_rows * seq_len]
    assert (read["segment_ids"] == 1).all()
    assert (read["positions"] == np.arange(seq_len)).all()
