"""Scheduler and block manager driven at random over a device that remembers exactly what was written where."""

import dataclasses
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmos_jax.serve.block_manager import BlockManager
from llmos_jax.serve.limits import Costs, Limits
from llmos_jax.serve.request import Request, Sampling
from llmos_jax.serve.runner import BlockTables
from llmos_jax.serve.scheduler import Scheduler
from llmos_jax.serve.step import Chunk, Step

VOCAB, STOP = 5, 4


class Device:
    """Runs steps in order. A page holds, for each position in it, everything that its keys and values depend on."""

    def __init__(self, num_blocks, block_size, num_host_blocks):
        self.size = block_size
        self.pages = [[None] * block_size for _ in range(num_blocks)]
        self.host = [None] * num_host_blocks
        self.last = {}  # slot -> the token drawn last

    def start(self, step: Step, tables):
        """Runs it and returns what each chunk drew. tables: the block tables as they were when the step was planned."""
        sources = {a for a, _ in step.copies}
        assert not sources & {b for _, b in step.copies}, "a copy reads what another one writes"
        assert len({b for _, b in step.copies} | {b for _, b in step.swap_in}) == len(step.copies) + len(step.swap_in)
        for block, host in step.swap_out:
            self.host[host] = self.pages[block][:]
        for host, block in step.swap_in:
            self.pages[block] = self.host[host][:]
        for source, block in step.copies:
            self.pages[block] = self.pages[source][:]
        written = [self._write(chunk, table, *rest) for chunk, (table, *rest) in zip(step.chunks, tables, strict=True)]
        return [
            self._draw(chunk, table, tokens)
            for chunk, (table, *_), tokens in zip(step.chunks, tables, written, strict=True)
        ]

    def _write(self, chunk, table, slot, known):
        request, start, size = chunk.sequence.request, chunk.start, self.size
        if not known:  # its token is only known to the device
            known = [self.last[slot]]
        tokens = [*known, *chunk.sequence.drafts[: chunk.num_drafts]]
        assert len(tokens) == chunk.num_tokens
        before = self._seen(table, start)
        context = (request.salt, request.adapter)
        history = [entry[1] for entry in before]
        assert all(entry == (context, history[i], i) for i, entry in enumerate(before)), "it reads another's pages"
        for i, token in enumerate(tokens, start):
            self.pages[table[i // size]][i % size] = (context, token, i)
        return history + tokens

    def _seen(self, table, length):
        size = self.size
        return [self.pages[table[i // size]][i % size] for i in range(length)]

    def _draw(self, chunk, table, tokens):
        """A token for each row, decided by the seed and what is seen through the block table."""
        end = chunk.start + chunk.num_tokens
        seen = [entry[1] for entry in self._seen(table, end)]
        assert seen == tokens, "what it wrote was written over within the step"
        sequence = chunk.sequence
        rows = [end - chunk.num_rows + i + 1 for i in range(chunk.num_rows)]
        drawn = [
            draw(sequence.request, sequence.index, tuple(seen[:row])) for row in rows if row >= sequence.num_prompt
        ]
        return drawn, seen


def draw(request, index, tokens):
    return random.Random(hash((request.sampling.seed + index, tokens))).randrange(VOCAB)


def expected(request, index):
    """The answer that a single sequence would give, with nobody else around."""
    tokens = [*request.prompt, *(request.outputs[index] if request.outputs else ())]
    most = 0 if request.embed else request.sampling.max_tokens
    while len(tokens) - len(request.prompt) < most:
        num_output = len(tokens) - len(request.prompt)
        if num_output > request.sampling.min_tokens and tokens[-1] in request.sampling.stop_ids:
            break
        tokens.append(draw(request, index, tuple(tokens)))
    return tokens


class World:
    """A scheduler, its device, up to two steps in flight, and every invariant that must hold between operations."""

    def __init__(self, num_blocks, block_size, num_host_blocks, limits, costs=None):
        self.blocks = BlockManager(num_blocks, block_size, num_host_blocks)
        self.now = 0.0
        self.scheduler = Scheduler(limits, self.blocks, costs, clock=lambda: self.now)
        self.device = Device(num_blocks, block_size, num_host_blocks)
        self.tables = BlockTables(limits.max_sequences, num_blocks)
        self.flying = []
        self.live = {}  # id -> sequences
        self.ended = self.operations = 0

    def add(self, request):
        try:
            sequences = self.scheduler.add(request)
        except ValueError:
            return
        self.live[request.id] = sequences
        self.collect()

    def abort(self, id):
        for sequence in self.scheduler.abort(id):
            assert sequence.finish == "abort"
        self.live.pop(id, None)

    def schedule(self, drafts=None):
        """Plans and starts a step. drafts: a random source of guesses."""
        for sequence in self.scheduler.running if drafts else ():
            if not sequence.pending and sequence.num_computed == len(sequence.tokens) - 1:
                right = expected(sequence.request, sequence.index)[len(sequence.tokens) :]
                sequence.drafts = [t if drafts.random() < 0.7 else drafts.randrange(VOCAB) for t in right[:4]]
        step = self.scheduler.schedule()
        for sequence in self.scheduler.take_expired():
            assert sequence.finish == "error"
        self.collect()
        if step is None:
            return False
        limits, chunks = self.scheduler.limits, step.chunks
        assert sum(chunk.num_tokens for chunk in chunks) <= limits.max_tokens
        assert sum(chunk.num_rows for chunk in chunks) <= limits.max_rows
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        tables = []
        for chunk in chunks:
            self.check_chunk(chunk)
            sequence = chunk.sequence
            known = sequence.tokens[chunk.start : chunk.start + chunk.num_tokens - chunk.num_drafts]
            moved = bool(step.copies or step.swap_in)
            self.tables.update(sequence, chunk.start, chunk.start + chunk.num_tokens, moved)
            given = self.tables.rows[sequence.slot, : len(sequence.blocks)].tolist()
            assert given == sequence.blocks, "the device is told of other pages"
            tables.append((sequence.blocks[:], sequence.slot, known))
        drawn = self.device.start(step, tables)
        for (tokens, _), (_, slot, _), chunk in zip(drawn, tables, chunks, strict=True):
            if tokens:
                self.device.last[slot] = tokens[-1]
            if chunk.sequence.request.sampling.prompt_logprobs is not None and chunk.sequence.index == 0:
                assert chunk.num_rows == chunk.num_tokens or chunk.start >= chunk.sequence.num_prompt
        self.flying.append((chunks, drawn))
        return True

    def check_chunk(self, chunk: Chunk):
        sequence, size = chunk.sequence, self.blocks.block_size
        assert sequence.slot >= 0 and sequence.finish is None and chunk.num_tokens > 0
        assert chunk.start + chunk.num_tokens <= max(sequence.end - 1, sequence.num_prompt)
        for i in range(chunk.start // size, (chunk.start + chunk.num_tokens - 1) // size + 1):
            block = sequence.blocks[i]
            assert self.blocks.references[block] == 1, "written while shared"
            assert (i + 1) * size <= chunk.start or self.blocks._digests[block] is None, "written while cached"

    def advance(self):
        """Takes in the step that was started first."""
        chunks, drawn = self.flying.pop(0)
        for chunk, (tokens, seen) in zip(chunks, drawn, strict=True):
            sequence = chunk.sequence
            finished, before = sequence.finish, len(sequence.tokens)
            new = self.scheduler.advance(chunk, tokens)
            assert not (finished and new) and sequence.tokens[before:] == new
            if finished is None:
                count = len(seen) - chunk.num_drafts + max(len(new) - 1, 0)
                assert sequence.tokens[:count] == seen[:count], "the pages hold other tokens than the sequence"
        self.collect()

    def collect(self):
        for id, sequences in list(self.live.items()):
            for sequence in sequences:
                if sequence.finish in ("stop", "length"):
                    given = sequence.request.outputs[sequence.index] if sequence.request.outputs else ()
                    most = max(sequence.end, sequence.num_prompt + len(given))
                    assert sequence.tokens == expected(sequence.request, sequence.index)[:most]
            if all(sequence.finish for sequence in sequences):
                self.ended += 1
                del self.live[id]

    def check(self):
        """No block is leaked, lost or held by fewer or more than its references say; the counts add up."""
        blocks, scheduler = self.blocks, self.scheduler
        counts = [0] * blocks.num_blocks
        host, tenants = list(blocks.free_host), {}
        sequences = [sequence for group in scheduler._requests.values() for sequence in group]
        for sequence in sequences:
            assert (sequence.slot >= 0) == (sequence in scheduler.running)
            assert sequence.slot >= 0 or not sequence.blocks
            assert sequence.slot < 0 or not sequence.swapped
            assert sequence.num_computed <= sequence.num_ahead + len(sequence.drafts)
            for block in sequence.blocks:
                counts[block] += 1
            host += sequence.swapped
            if sequence.blocks:
                tenant = sequence.request.tenant
                tenants[tenant] = tenants.get(tenant, 0) + len(sequence.blocks)
                assert sequence.request.max_pages is None or len(sequence.blocks) <= sequence.request.max_pages
        assert counts == blocks.references and tenants == blocks.pages
        assert sorted(host) == list(range(blocks.num_host_blocks))
        unused, free = list(blocks._unused), blocks._free
        assert sorted([*unused, *free, *(b for b, count in enumerate(counts) if count)]) == list(range(len(counts)))
        assert all(blocks._digests[b] is None for b in free) and all(
            blocks._cache[blocks._digests[b]] == b for b in unused
        )
        assert all(blocks._digests[block] == digest for digest, block in blocks._cache.items())
        stats = blocks.stats()
        assert stats["free"] + stats["cached"] + stats["used"] == stats["blocks"]
        waiting = [s for s in sequences if s.slot < 0]
        assert scheduler.num_waiting == len(waiting) and len(scheduler.running) <= scheduler.limits.max_sequences
        assert sorted([*scheduler._slots, *(s.slot for s in scheduler.running)]) == list(
            range(scheduler.limits.max_sequences)
        )
        assert {s for group in self.live.values() for s in group if not s.finish} == set(sequences)

    def drain(self):
        """Drives it until nothing is left; every request that was accepted ends, after a bounded number of steps."""
        bound = 200 + 40 * sum(s.end for group in self.live.values() for s in group)
        while self.scheduler.has_work or self.flying:
            bound -= 1
            assert bound, "no progress"
            if not self.flying and not self.schedule():
                assert not self.scheduler.has_work, "work is left and no step is planned"  # the last ones expired
                continue
            self.advance()
            self.check()
        assert not self.live and self.blocks.available == self.blocks.num_blocks and not self.blocks.pages


def random_world(rng):
    """Pools that hold one or two sequences and slots for more, so that most of what happens is for want of pages."""
    size, sequences = rng.choice([1, 2, 3, 4]), rng.randint(1, 6)
    num_blocks = rng.randint(12, 32) // size
    tokens = sequences + rng.randint(0, 8)
    limits = Limits(tokens, sequences + rng.randint(0, 6), sequences, rng.randint(8, 40), rng.choice([0, 1, 3]))
    costs = rng.choice([None, Costs(100, 100, 1), Costs(100, 1e9, 1)])
    return World(num_blocks, size, rng.choice([0, 2, 12]), limits, costs)


def random_request(rng, id, now=0.0):
    prompt = tuple(rng.choice([0, 0, 0, 1]) for _ in range(rng.randint(1, rng.choice([3, 12]))))
    n = rng.choice([1, 1, 1, 2, 3])
    sampling = Sampling(
        max_tokens=rng.choice([0, 1, 2, 5, 9, 20]),
        min_tokens=rng.choice([0, 0, 0, 2]),
        stop_ids=rng.choice([(), (), (STOP,)]),
        seed=rng.randint(0, 3),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        presence_penalty=rng.choice([0.0, 0.0, 0.0, 1.0]),
    )
    request = Request(
        str(id), prompt, sampling, n=n, tenant=rng.choice("ab"), salt=rng.choice("xy"), adapter=rng.choice(["", "z"]),
        priority=rng.choice([0, 0, 1]), deadline=rng.choice([None, None, now + 5]), arrival=now,
        max_pages=rng.choice([None, None, 8]), embed=rng.random() < 0.1,
    )  # fmt: skip
    if rng.random() < 0.2 and not request.embed:  # a lost engine had come so far
        given = []
        for index in range(n):
            whole = expected(request, index)[len(prompt) :]
            given.append(tuple(whole[: rng.randint(0, len(whole))]))
        request = dataclasses.replace(request, outputs=tuple(given))
    return request


def drive(world, rng, operations):
    """`operations` random operations, all invariants checked after each."""
    ids = 0
    for _ in range(operations):
        kind = rng.random()
        if kind < 0.2 and len(world.live) < 12:
            ids += 1
            world.add(random_request(rng, ids, world.now))
        elif kind < 0.22 and world.live:
            world.abort(rng.choice(list(world.live)))
        elif kind < 0.24:
            world.now += 1
        elif kind < 0.6 and len(world.flying) < 2:
            world.schedule(rng if rng.random() < 0.5 else None)
        elif world.flying:
            world.advance()
        world.check()
    world.drain()


class Machine(RuleBasedStateMachine):
    """The same operations, chosen and shrunk by hypothesis."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed):
        self.world, self.ids = random_world(random.Random(seed)), 0

    @rule(seed=st.integers(0, 2**32))
    def add(self, seed):
        self.ids += 1
        self.world.add(random_request(random.Random(seed), self.ids, self.world.now))

    @rule(which=st.integers(0, 100))
    def abort(self, which):
        if self.world.live:
            self.world.abort(sorted(self.world.live)[which % len(self.world.live)])

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds):
        self.world.now += seconds

    @precondition(lambda self: len(self.world.flying) < 2)
    @rule(seed=st.none() | st.integers(0, 100))
    def schedule(self, seed):
        self.world.schedule(None if seed is None else random.Random(seed))

    @precondition(lambda self: self.world.flying)
    @rule()
    def advance(self):
        self.world.advance()

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize("seed", range(40))
def test_random_drive(seed):
    rng = random.Random(seed)
    drive(random_world(rng), rng, 400)


@pytest.mark.slow
def test_two_million_operations():
    for seed in range(1000, 3000):
        rng = random.Random(seed)
        drive(random_world(rng), rng, 1000)
