"""The name map: layouts invert, and a slice of ours is read as a slice of the file."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.config import UserError
from llmos_jax.models.decoder import abstract_params
from llmos_jax.models.registry import model_from_hf
from llmos_jax.models.weights.names import FAMILY_NAMES, parse_layout, sizes, slots
from tests.models import golden

SIZES = {"D": 6, "N": 4, "K": 2, "H": 3, "F": 5, "M": 7, "E": 2, "V": 8, "P": 9}
LAYOUTS = sorted({entry.layout_text for names in FAMILY_NAMES.values() for entry in names.entries})


def whole(text):
    layout = parse_layout(text)
    file = np.arange(np.prod(layout.shape(SIZES))).reshape(layout.shape(SIZES))
    everything = (slice(None),) * len(layout.ours)
    return layout, file, layout.read(lambda parts: file[parts], everything, SIZES)


def test_heads_are_outermost_in_the_file():
    _, file, ours = whole("(N H) D -> D N H")
    assert ours.shape == (6, 4, 3)
    assert ours[5, 2, 1] == file[2 * 3 + 1, 5]


@pytest.mark.parametrize("text", LAYOUTS)
def test_to_file_is_the_inverse(text):
    layout, file, ours = whole(text)
    np.testing.assert_array_equal(layout.to_file(ours), file)


@given(st.sampled_from(LAYOUTS), st.data())
def test_a_part_is_that_part_of_the_whole(text, data):
    layout, file, ours = whole(text)
    index = []
    for letter in layout.ours:
        start = data.draw(st.integers(0, SIZES[letter] - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, SIZES[letter]))))
    reads = []

    def read(parts):
        reads.append(file[parts].size)
        return file[parts]

    part = layout.read(read, tuple(index), SIZES)
    np.testing.assert_array_equal(part, ours[tuple(index)])
    if "H" not in layout.ours or index[layout.ours.index("H")] == slice(0, SIZES["H"]):
        assert sum(reads) == part.size  # nothing is read that is not wanted


@pytest.mark.parametrize("name", golden.names())
def test_the_map_names_exactly_what_transformers_saves(name):
    stored = golden.load(name)
    model = model_from_hf(stored.config)
    named = {}
    for slot in slots(model, abstract_params(model)):
        named |= {name: list(slot.entry.file_shape(sizes(model))) for name in slot.file_names(model)}
    assert named == stored.tensors


def test_a_parameter_without_a_place_is_refused():
    model = model_from_hf(golden.load("llama").config)
    with pytest.raises(UserError, match=r"no place for the parameter embed.positions"):
        slots(model, ["embed.positions"])
