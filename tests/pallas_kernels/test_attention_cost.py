"""The cost estimates of the TPU kernels: pairs counted one by one."""

import itertools

import pytest

from pallas_kernels.attention.reference import visible_pairs


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "window", "offset"),
    itertools.product((1, 5, 8), (8, 11), (True, False), (None, 3), (0, 2)),
)
def test_pairs_are_those_that_the_masks_leave(queries, keys, causal, window, offset):
    window = window if causal else None
    seen = sum(
        not causal or (key <= query + offset and (window is None or query + offset - key < window))
        for query in range(queries)
        for key in range(keys)
    )
    assert visible_pairs(queries, keys, causal, window, offset) == seen


def test_an_unknown_offset_counts_its_mean():
    known = [visible_pairs(4, 16, True, None, offset) for offset in range(0, 13, 4)]
    assert visible_pairs(4, 16, True, None, None) == sum(known) / len(known)
