"""What the scheduler puts into a step, by hand."""

import pytest

from llmos_jax.serve.limits import Limits
from llmos_jax.serve.sequence import Sequence
from tests.serve.schedulers import request, run, scheduler, shape, take

# Steps.


def test_prefill_then_decode():
    s = scheduler()
    (a,) = s.add(request(5, "a", max_tokens=2))
    step = s.schedule()
    assert shape(step) == [("a", 0, 5, 0, 1)] and a.pending == 1 and a.num_computed == 5
    assert take(s, step) == [[7]] and a.tokens[-1] == 7 and not a.pending
    step = s.schedule()
    assert shape(step) == [("a", 5, 1, 0, 1)]
    assert take(s, step) == [[7]] and a.finish == "length"
    assert not s.has_work and s.schedule() is None and s.blocks.available == 64


def test_chunks_share_the_budget_behind_decodes():
    s = scheduler(max_tokens=6, chunk=4)
    s.add(request(2, "a"))
    take(s, s.schedule())
    s.add(request(9, "b"))
    s.add(request(9, "c"))
    assert shape(s.schedule()) == [("a", 2, 1, 0, 1), ("b", 0, 4, 0, 0), ("c", 0, 1, 0, 0)]


def test_a_prompt_moves_on_in_every_step_even_where_all_others_decode():
    s = scheduler(max_tokens=4, max_rows=4)
    for _ in range(3):
        s.add(request(1, max_tokens=40))
    take(s, s.schedule())
    (long,) = s.add(request(20, "long"))
    for _ in range(20):
        before = long.num_computed
        take(s, s.schedule())
        assert long.num_computed == before + 1


def test_a_prompt_may_be_cut_anywhere():
    for chunk in range(1, 12):
        s = scheduler(chunk=chunk)
        (a,) = s.add(request(11, max_tokens=1))
        starts = []
        while a.finish is None:
            step = s.schedule()
            starts += [c.start for c in step.chunks]
            take(s, step)
        assert starts == list(range(0, 11, chunk))


def test_a_chunk_stops_short_of_its_last_token_where_no_row_is_left():
    s = scheduler(max_rows=5, chunk=4)
    s.add(request(12, "logprobs", prompt_logprobs=0))
    s.add(request(6, "b"))
    s.add(request(1, "c"))
    take(s, s.schedule())
    step = s.schedule()
    assert shape(step) == [("c", 1, 1, 0, 1), ("logprobs", 4, 4, 0, 4), ("b", 4, 1, 0, 0)]
    take(s, step)
    run(s)


def test_limits_that_would_starve_are_refused():
    with pytest.raises(ValueError, match="gets a token in each step"):
        Limits(max_tokens=3, max_rows=4, max_sequences=4, max_model_len=8)


def test_stops():
    s = scheduler()
    (a,) = s.add(request(stop_ids=(9,)))
    take(s, s.schedule())
    take(s, s.schedule(), 9)
    assert a.finish == "stop" and a.tokens[-2:] == [7, 9]
    (b,) = s.add(request(stop_ids=(9,), min_tokens=2))
    take(s, s.schedule(), 9)
    take(s, s.schedule(), 9)
    assert b.finish is None
    take(s, s.schedule(), 9)
    assert b.finish == "stop" and b.num_output == 3


def test_ends_at_the_longest_sequence():
    s = scheduler(max_model_len=6)
    (a,) = s.add(request(4))
    run(s)
    assert a.finish == "length" and len(a.tokens) == 6


def test_an_embedding_draws_nothing():
    s = scheduler(max_model_len=4)
    (a,) = s.add(request(4, embed=True))
    assert take(s, s.schedule()) == [[]]
    assert a.finish == "stop" and a.num_output == 0 and not s.has_work


def test_the_engine_may_end_an_answer():
    s = scheduler()
    (a,) = s.add(request())
    take(s, s.schedule())
    s.finish(a, "stop")
    s.finish(a, "error")
    assert a.finish == "stop" and not s.has_work and s.blocks.stats()["used"] == 0


# Planning ahead.


def test_runs_ahead_of_the_host():
    s = scheduler()
    (a,) = s.add(request(4, max_tokens=3))
    first = s.schedule()
    assert s.runs_ahead
    second = s.schedule()
    assert shape(second)[0][1:] == (4, 1, 0, 1) and a.pending == 2 and a.num_ahead == 6
    take(s, first)
    third = s.schedule()
    assert s.schedule() is None  # as many are pending as may be drawn
    assert take(s, second) == [[7]] and take(s, third) == [[7]] and a.finish == "length"


def test_results_after_the_end_are_dropped():
    s = scheduler()
    (a,) = s.add(request(4, stop_ids=(9,)))
    first, second = s.schedule(), s.schedule()
    take(s, first, 9)
    assert a.finish == "stop" and s.blocks.stats()["used"] == 0
    assert take(s, second) == [[]] and a.tokens[-1] == 9


def test_waits_for_the_token_where_the_next_draw_depends_on_it():
    s = scheduler()
    s.add(request(presence_penalty=1.0))
    step = s.schedule()
    assert not s.runs_ahead and s.schedule() is None
    take(s, step)
    assert s.schedule()


# Drafts.


def drafted(drafts, **given):
    s = scheduler(**given)
    (a,) = s.add(request(4, max_tokens=6))
    take(s, s.schedule())
    a.drafts = list(drafts)
    return s, a


def test_drafts_are_accepted_while_equal():
    s, a = drafted([1, 2, 3])
    step = s.schedule()
    assert shape(step)[0][1:] == (4, 4, 3, 4) and not s.runs_ahead and s.schedule() is None
    assert s.advance(step.chunks[0], [1, 2, 8, 9]) == [1, 2, 8]
    assert a.num_computed == len(a.tokens) - 1 == 7 and a.drafts == []


def test_all_drafts_and_the_token_after_them():
    s, a = drafted([1, 2])
    assert s.advance(s.schedule().chunks[0], [1, 2, 3]) == [1, 2, 3]
    assert a.num_computed == len(a.tokens) - 1


def test_drafts_stop_at_the_end_of_the_answer():
    s, a = drafted([1, 2, 3, 4, 5, 6, 7])
    step = s.schedule()
    assert step.chunks[0].num_drafts == 4 == len(a.drafts)  # with the token after them, 6 in all
    assert s.advance(step.chunks[0], [1, 2, 3, 4, 5]) == [1, 2, 3, 4, 5] and a.finish == "length"


def test_drafts_leave_a_token_for_each_running_sequence():
    s, _ = drafted([1, 2, 3, 4], max_tokens=5, max_rows=5)
    s.add(request(9, "b"))
    s.schedule()
    assert len(s.running) == 1  # all went to drafts and nothing waited in a slot
    s, a = drafted([], max_tokens=5, max_rows=5)
    s.add(request(9, "b"))
    take(s, s.schedule())
    a.drafts = [1, 2, 3, 4]
    assert shape(s.schedule())[1] == ("b", 4, 1, 0, 0)


def test_drafts_take_no_page_from_others():
    s, a = drafted([1, 2, 3, 4, 5], num_blocks=3)
    s.blocks.extend(Sequence(request()), 1)  # somebody else's
    step = s.schedule()
    assert step.chunks[0].num_drafts == 3 == len(a.drafts) and not s.stats()["preemptions"]


# The prefix cache.


def test_a_full_hit_computes_the_last_token_again():
    s = scheduler()
    tokens = range(8)
    s.add(request(tokens, max_tokens=1))
    run(s)
    (a,) = s.add(request(tokens))
    step = s.schedule()
    assert shape(step)[0][1:] == (4, 4, 0, 1) and a.cached_tokens == 4
    assert s.stats()["hits"] == 4


def test_answers_are_found_again_too():
    s = scheduler()
    (a,) = s.add(request(4, max_tokens=8))
    run(s)
    (b,) = s.add(request(a.tokens))
    s.schedule()
    assert b.cached_tokens == 8  # of 12 tokens the last one is drawn only


def test_prompt_logprobs_compute_everything_in_chunks_of_rows():
    s = scheduler(max_rows=5)
    s.add(request(range(8), max_tokens=1))
    run(s)
    s.add(request(range(8), "a", prompt_logprobs=0))
    step = s.schedule()
    assert shape(step) == [("a", 0, 5, 0, 5)]
    take(s, step)
    step = s.schedule()
    assert shape(step) == [("a", 5, 3, 0, 3)] and take(s, step) == [[7]]


# Many answers.


def test_answers_share_the_pages_of_the_prompt():
    s = scheduler()
    first, second, third = s.add(request(6, "a", n=3))
    assert s.num_waiting == 3
    step = s.schedule()
    assert [c.sequence for c in step.chunks] == [first]
    take(s, step)
    step = s.schedule()
    assert shape(step) == [("a", 6, 1, 0, 1), ("a", 5, 1, 0, 1), ("a", 5, 1, 0, 1)]
    assert second.blocks[0] == third.blocks[0] == first.blocks[0]
    assert step.copies == [(first.blocks[1], second.blocks[1]), (first.blocks[1], third.blocks[1])]
    assert s.stats()["used"] == 4
    take(s, step)
    run(s)
    assert {x.finish for x in (first, second, third)} == {"length"}


def test_nothing_is_copied_where_the_prompt_ends_with_a_block_and_one_token():
    s = scheduler()
    s.add(request(5, n=2))
    take(s, s.schedule())
    step = s.schedule()
    assert step.copies == [] and [c.start for c in step.chunks] == [5, 4]


def test_answers_go_on_where_the_first_one_ended():
    s = scheduler()
    sequences = s.add(request(6, n=3, max_tokens=1))
    run(s)
    assert [x.finish for x in sequences] == ["length"] * 3


def test_abort_ends_all_answers():
    for steps in range(3):
        s = scheduler()
        sequences = s.add(request(6, "a", n=3))
        for _ in range(steps):
            take(s, s.schedule())
        assert set(s.abort("a")) == set(sequences) and s.abort("a") == []
        assert not s.has_work and s.num_waiting == 0 and s.blocks.stats()["used"] == 0


# Replay.


def test_replay_goes_on_from_the_tokens_given():
    s = scheduler()
    (a,) = s.add(request(4, outputs=((1, 2),), max_tokens=4))
    assert shape(s.schedule())[0][1:] == (0, 6, 0, 1)
    assert a.num_output == 2
    s = scheduler()
    (a,) = s.add(request(4, outputs=((1, 2),), max_tokens=4))
    run(s)
    assert a.tokens[4:] == [1, 2, 7, 7] and a.finish == "length"


def test_a_replayed_answer_that_was_complete_ends_at_once():
    s = scheduler()
    done, cut, open_ = s.add(request(4, outputs=((1, 9), (1, 2, 3), ()), n=3, max_tokens=3, stop_ids=(9,)))
    assert (done.finish, cut.finish, open_.finish) == ("stop", "length", None)
    run(s)
    assert open_.finish == "length" and open_.num_output == 3


# What can never be answered.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": 0}, "empty prompt"),
        ({"prompt": 64}, "has 64 tokens, and with its answer at most 64 fit"),
        ({"prompt": 30, "max_tokens": 4}, "need 9 pages of 4 tokens, and at most 8 may be held"),
        ({"prompt": 8, "max_tokens": 6, "max_pages": 3}, "need 4 pages of 4 tokens, and at most 3 may be held"),
    ],
)
def test_refuses_what_never_fits(given, message):
    s = scheduler(num_blocks=8)
    with pytest.raises(ValueError, match=message):
        s.add(request(**given))
    assert not s.has_work


def test_refuses_an_id_that_lives():
    s = scheduler()
    s.add(request(id="a"))
    with pytest.raises(ValueError, match="answered already"):
        s.add(request(id="a"))
    s.abort("a")
    s.add(request(id="a"))


def test_fits_with_just_enough_pages():
    s = scheduler(num_blocks=3)
    (a,) = s.add(request(4, max_tokens=9))  # 13 tokens, the last of which needs no page
    run(s)
    assert a.finish == "length" and not s.stats()["preemptions"]


# Deadlines.


def test_not_begun_after_the_deadline():
    now = [0.0]
    s = scheduler(max_sequences=1, clock=lambda: now[0])
    (runs,) = s.add(request(deadline=5.0))
    take(s, s.schedule())
    late = s.add(request(deadline=6.0, n=2))
    (soon,) = s.add(request(deadline=9.0))
    now[0] = 6.5
    take(s, s.schedule())
    assert {x.finish for x in late} == {"error"} and set(s.take_expired()) == set(late) and s.take_expired() == []
    assert runs.finish is soon.finish is None  # one had begun, the other has time
    run(s)
    assert runs.finish == soon.finish == "length" and s.num_waiting == 0


def test_stats():
    s = scheduler()
    s.add(request(6, tenant="a"))
    s.add(request(6, tenant="b", priority=1))
    s.schedule()
    stats = s.stats()
    assert (stats["running"], stats["waiting"], stats["used"]) == (2, 0, 4)
    assert stats["tenant_pages"] == {"a": 2, "b": 2} and stats["tenant_service"] == {"a": 6, "b": 6}
