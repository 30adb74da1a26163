"""Pages: who holds them, what of them is found again, and what is overwritten first."""

import dataclasses

import pytest

from llmos_jax.serve.block_manager import BlockManager
from llmos_jax.serve.request import Request, Sampling
from llmos_jax.serve.sequence import Sequence


def sequence(*tokens, **given):
    return Sequence(Request("r", tokens, Sampling(max_tokens=9), **given))


def computed(blocks, s):
    """Gives it pages of its own, as if all its tokens were computed on them."""
    blocks.extend(s, blocks.blocks_for(len(s.tokens)))
    blocks.register(s, len(s.tokens))
    return s


def test_counts():
    blocks = BlockManager(4, 2, num_host_blocks=3)
    s = computed(blocks, sequence(1, 2, 3, tenant="a"))
    assert len(set(s.blocks)) == 2 and blocks.pages == {"a": 2} and blocks.available == 2
    blocks.release(s)
    stats = blocks.stats()
    assert (stats["free"], stats["cached"], stats["used"]) == (3, 1, 0)  # the full block is kept, the other not
    assert s.blocks == [] and blocks.pages == {} and blocks.available == 4
    assert [blocks.blocks_for(n) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]


def test_a_pool_needs_a_block():
    with pytest.raises(ValueError, match="at least 1"):
        BlockManager(0, 16)


def test_finds_the_longest_prefix_but_never_all_tokens():
    blocks = BlockManager(8, 2)
    s = computed(blocks, sequence(1, 2, 3, 4, 5, 6))
    assert blocks.lookup(sequence(1, 2, 3, 4, 5, 6, 7)) == s.blocks
    assert blocks.lookup(sequence(1, 2, 3, 4, 5, 6)) == s.blocks[:2]
    assert blocks.lookup(sequence(1, 2, 3, 9, 5, 6, 7)) == s.blocks[:1]
    assert blocks.lookup(sequence(3, 4, 5)) == []  # the same tokens elsewhere: another prefix
    assert blocks.lookup(sequence(1, 2)) == []


@pytest.mark.parametrize("field", ["salt", "adapter", "model"])
def test_a_prefix_is_shared_within_salt_adapter_and_model_only(field):
    blocks = BlockManager(8, 2)
    s = computed(blocks, sequence(1, 2, 3))
    assert blocks.lookup(sequence(1, 2, 3)) == s.blocks[:1]
    assert blocks.lookup(sequence(1, 2, 3, **{field: "other"})) == []


def test_names_that_run_into_each_other_differ():
    blocks = BlockManager(8, 2)
    computed(blocks, sequence(1, 2, 3, salt="ab", adapter="c"))
    assert blocks.lookup(sequence(1, 2, 3, salt="a", adapter="bc")) == []


def test_shared_blocks_are_given_back_by_the_last_holder():
    blocks = BlockManager(4, 2)
    first, second = computed(blocks, sequence(1, 2, 3, tenant="a")), sequence(1, 2, 4, tenant="b")
    found = blocks.lookup(second)
    assert blocks.num_unused(found) == 0
    blocks.share(second, found)
    assert blocks.references[found[0]] == 2 and blocks.pages == {"a": 2, "b": 1}
    blocks.release(first)
    assert blocks.references[found[0]] == 1 and blocks.available == 3
    blocks.release(second)
    assert blocks.available == 4 and blocks.num_unused(found) == 1


def test_overwrites_the_least_recently_used_and_of_a_prefix_its_end_first():
    blocks = BlockManager(4, 1)
    old, new = computed(blocks, sequence(1, 2)), computed(blocks, sequence(3, 4))
    blocks.release(old)
    blocks.release(new)
    taker = sequence(*range(10, 13))
    blocks.extend(taker, 1)
    assert len(blocks.lookup(sequence(1, 2, 0))) == 1 and blocks.stats()["evictions"] == 1
    blocks.extend(taker, 1)
    assert blocks.lookup(sequence(1, 2, 0)) == [] and len(blocks.lookup(sequence(3, 4, 0))) == 2
    blocks.extend(taker, 1)
    assert len(blocks.lookup(sequence(3, 4, 0))) == 1


def test_use_saves_a_cached_block_from_being_overwritten():
    blocks = BlockManager(2, 1)
    old, new = computed(blocks, sequence(1)), computed(blocks, sequence(2))
    blocks.release(old)
    blocks.release(new)
    user = sequence(1, 0)
    blocks.share(user, blocks.lookup(user))
    blocks.release(user)
    blocks.extend(sequence(9), 1)
    assert blocks.lookup(sequence(1, 0)) and not blocks.lookup(sequence(2, 0))


def test_free_blocks_go_before_cached_ones():
    blocks = BlockManager(2, 1)
    blocks.release(computed(blocks, sequence(1)))
    blocks.extend(sequence(9), 1)
    assert blocks.lookup(sequence(1, 0)) and not blocks.stats()["evictions"]


def test_of_equal_content_one_block_is_kept():
    blocks = BlockManager(4, 1)
    first, second = computed(blocks, sequence(1)), computed(blocks, sequence(1))
    assert blocks.lookup(sequence(1, 0)) == first.blocks
    kept = first.blocks[:]
    blocks.release(second)
    blocks.release(first)
    assert blocks.stats()["cached"] == 1 and blocks.lookup(sequence(1, 0)) == kept


def test_equal_content_takes_the_place_of_what_was_overwritten():
    blocks = BlockManager(2, 1)
    first, second = computed(blocks, sequence(1)), computed(blocks, sequence(1))
    blocks.release(first)
    blocks.extend(sequence(9), 1)  # overwrites it
    kept = second.blocks[:]
    blocks.release(second)
    assert blocks.lookup(sequence(1, 0)) == kept


def test_registers_as_tokens_come():
    blocks = BlockManager(4, 2)
    s = sequence(1, 2, 3)
    blocks.extend(s, 2)
    blocks.register(s, 3)
    s.tokens += [4, 5]
    assert len(blocks.lookup(sequence(1, 2, 3, 4, 5))) == 1
    blocks.register(s, 4)
    assert blocks.lookup(sequence(1, 2, 3, 4, 5)) == s.blocks


def test_swapping_brings_the_content_back_to_new_blocks():
    blocks = BlockManager(4, 2, num_host_blocks=2)
    s = sequence(1, 2, 3, 4, 5)
    blocks.extend(s, 3)
    before = s.blocks[:]
    out = blocks.swap_out(s, 2)
    assert [block for block, _ in out] == before[:2] and s.swapped == [host for _, host in out]
    assert s.blocks == [] and blocks.available == 4 and blocks.stats()["host_used"] == 2
    blocks.extend(s, 3)
    assert blocks.swap_in(s) == list(zip([host for _, host in out], s.blocks[:2], strict=True))
    assert s.swapped == [] and blocks.stats()["host_used"] == 0


def test_giving_back_a_swapped_sequence_frees_the_host():
    blocks = BlockManager(2, 2, num_host_blocks=2)
    s = sequence(1, 2)
    blocks.extend(s, 1)
    blocks.swap_out(s, 1)
    blocks.release(s)
    assert blocks.stats()["host_used"] == 0 and s.swapped == []


def test_counts_hits_in_tokens():
    blocks = BlockManager(2, 2)
    blocks.count_lookup(10, 4)
    blocks.count_lookup(5, 0)
    assert (blocks.stats()["queries"], blocks.stats()["hits"]) == (15, 4)


def test_an_operation_costs_the_same_in_a_large_pool():
    """Counted, not timed: taking and giving back touches the blocks concerned only."""

    class Counting(list):
        touched = 0

        def __getitem__(self, i):
            Counting.touched += 1
            return super().__getitem__(i)

        def __setitem__(self, i, value):
            Counting.touched += 1
            super().__setitem__(i, value)

    touched = []
    for num_blocks in (100, 100_000):
        blocks = BlockManager(num_blocks, 2)
        blocks.references = Counting(blocks.references)
        Counting.touched = 0
        for _ in range(3):
            blocks.release(computed(blocks, sequence(*range(20))))
        touched.append(Counting.touched)
    assert touched[0] == touched[1]


def test_requests_are_data():
    """What decides sharing is in the request, so that a replayed one finds the same pages."""
    request = Request("r", (1, 2, 3), Sampling(max_tokens=1), salt="s")
    blocks = BlockManager(4, 2)
    computed(blocks, Sequence(request))
    assert blocks.lookup(Sequence(dataclasses.replace(request, id="again", tenant="other")))
