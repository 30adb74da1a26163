"""The choice of block sizes: tuned, forced, or the model's."""

from typing import NamedTuple

import pytest

from pallas_kernels import blocks


class Sizes(NamedTuple):
    q: int
    kv: int


CANDIDATES = [Sizes(512, 512), Sizes(256, 512), Sizes(128, 128)]
KEY = {"head_dim": 128, "dtype": "bfloat16"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "FOLDER", tmp_path)
    blocks.tuned.cache_clear()
    yield tmp_path
    blocks.tuned.cache_clear()


def pick():
    return blocks.pick("attention.forward", KEY, CANDIDATES)


def test_the_models_first_without_tuning(folder):
    assert pick() == Sizes(512, 512)


@pytest.mark.compat
def test_the_tuned_ones(folder):
    written = blocks.write("cpu", "attention.forward", blocks.key_text(KEY), {"q": 128, "kv": 128})
    assert written == folder / "cpu.json"
    assert pick() == Sizes(128, 128)
    assert blocks.pick("attention.forward", {**KEY, "head_dim": 64}, CANDIDATES) == Sizes(512, 512)


def test_tuned_ones_that_no_longer_fit_are_not_taken(folder):
    blocks.write("cpu", "attention.forward", blocks.key_text(KEY), {"q": 4096, "kv": 4096})
    assert pick() == Sizes(512, 512)


def test_writing_keeps_what_is_there(folder):
    for head_dim in (64, 128):
        blocks.write("cpu", "attention.forward", f"head_dim={head_dim}", {"q": head_dim, "kv": 128})
    assert blocks.tuned("cpu") == {
        "attention.forward": {"head_dim=128": {"q": 128, "kv": 128}, "head_dim=64": {"q": 64, "kv": 128}}
    }


@pytest.mark.compat
def test_forced_ones_come_first_and_only_inside(folder):
    with blocks.forced("attention.forward", {"q": 256, "kv": 512}):
        assert pick() == Sizes(256, 512)
        with blocks.forced({"attention.forward": {"q": 128, "kv": 128}, "other": {}}):
            assert pick() == Sizes(128, 128)
        assert pick() == Sizes(256, 512)
    assert pick() == Sizes(512, 512)


def test_forced_ones_have_to_be_candidates():
    with (
        blocks.forced("attention.forward", {"q": 7, "kv": 7}),
        pytest.raises(ValueError, match=r"attention.forward has no blocks \{'q': 7, 'kv': 7\} among its candidates"),
    ):
        pick()


def test_choices_are_recorded_only_inside(folder):
    with blocks.recorded() as outer:
        pick()
        with blocks.recorded() as inner:
            pick()
    pick()
    assert (len(outer), len(inner)) == (2, 1)
    assert inner[0] == blocks.Asked(
        "attention.forward",
        "dtype=bfloat16,head_dim=128",
        [one._asdict() for one in CANDIDATES],
        {"q": 512, "kv": 512},
    )
