"""What the next step computes: which sequences, how many tokens of each, on which pages. No jax.

A step mixes decodes (one token, and drafts) and chunks of prompts under one budget of tokens. Decodes go first, and a
sequence that runs always gets a token, so neither starves the other. A step may be planned while the one before it is
in flight. Where pages run out a running sequence is preempted: it gives up its pages and waits to go on.
"""

import time
from collections.abc import Callable
from typing import Any

from llmos_jax.serve.block_manager import BlockManager
from llmos_jax.serve.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue
from llmos_jax.serve.limits import Costs, Limits, check_size, end_of, finish_of
from llmos_jax.serve.request import Request, Token
from llmos_jax.serve.sequence import Sequence
from llmos_jax.serve.step import Chunk, Step


class Scheduler:
    """Decides and reserves. The engine runs each Step in order and calls `advance` for each of its chunks in order.

    running: the sequences that hold a slot and pages, in the order they were admitted. Costs of a step grow with these
    only. clock: seconds since the epoch.
    """

    def __init__(
        self, limits: Limits, blocks: BlockManager, costs: Costs | None = None, clock: Callable[[], float] = time.time
    ):
        self.limits, self.blocks, self.costs, self._clock = limits, blocks, costs, clock
        self.running: dict[Sequence, None] = {}
        self._waiting = FairQueue()
        self._requests: dict[str, list[Sequence]] = {}  # by id, while one of its answers is unfinished
        self._siblings: dict[str, list[Sequence]] = {}  # answers that wait for the first one's prompt to be computed
        self._expired: list[Sequence] = []
        self._slots = list(range(limits.max_sequences - 1, -1, -1))
        self._chunk = limits.chunk or limits.max_tokens
        self._tokens = self._rows = 0  # of the step being planned, still to be given out
        self._preempted = self._swapped = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._siblings.values()))

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self._waiting) > 0

    @property
    def runs_ahead(self) -> bool:
        """Whether every running sequence can be planned further while a step is in flight."""
        return all(sequence.runs_ahead and not sequence.drafts for sequence in self.running)

    def stats(self) -> dict[str, Any]:
        """Counts, those of the blocks, and for each tenant the pages it holds and its virtual counter of service."""
        counts = {"running": len(self.running), "waiting": self.num_waiting}
        counts |= {"preemptions": self._preempted, "swaps": self._swapped, **self.blocks.stats()}
        return counts | {"tenant_pages": dict(self.blocks.pages), "tenant_service": dict(self._waiting.served)}

    # Requests.

    def add(self, request: Request) -> list[Sequence]:
        """Queues a request; its answers, of which some may be finished by the outputs that were given.

        Raises ValueError, one sentence, for one that could never be answered.
        """
        if request.id in self._requests:
            raise ValueError(f"request {request.id} is being answered already; use another id")
        check_size(request, self.limits, self.blocks)
        sequences = [Sequence(request, index) for index in range(request.n)]
        for sequence in sequences:
            sequence.end = end_of(request, self.limits)
            sequence.finish = finish_of(sequence)
        unfinished = [sequence for sequence in sequences if sequence.finish is None]
        if unfinished:
            self._requests[request.id] = unfinished
            self._waiting.push(unfinished[0])
        if len(unfinished) > 1:
            self._siblings[request.id] = unfinished[1:]
        if self._waiting.is_crowded:
            self._waiting.forget({sequence.request.tenant for sequence in self.running})
        return sequences

    def abort(self, id: str) -> list[Sequence]:
        """Ends the answers of a request that are not finished and frees what they hold; those answers."""
        return self._end_all(id, "abort")

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends an answer, waiting or running. Steps in flight may still write its pages: they run before later ones."""
        if sequence.finish is not None:
            return
        sequence.finish = reason
        id = sequence.request.id
        self._queue_siblings(sequence)
        if sequence.slot >= 0:
            self._leave(sequence)
        elif sequence in self._siblings.get(id, ()):
            self._siblings[id].remove(sequence)
        else:
            self._waiting.discard(sequence)
        self.blocks.release(sequence)
        self._requests[id].remove(sequence)
        if not self._requests[id]:
            del self._requests[id]

    def _end_all(self, id: str, reason: str) -> list[Sequence]:
        ended = self._requests.get(id, [])[:]
        for sequence in reversed(ended):  # the first one last: its end would let the others begin
            self.finish(sequence, reason)
        return ended

    def take_expired(self) -> list[Sequence]:
        """Those that were not begun before their deadline, since the last call; their finish is "error"."""
        expired, self._expired = self._expired, []
        return expired

    # Planning a step.

    def schedule(self) -> Step | None:
        """Plans the next step, None where there is nothing to do. A step may consist of swaps alone."""
        for sequence in self._waiting.expired(self._clock()):
            self._expired += self._end_all(sequence.request.id, "error")
        step = Step()
        self._tokens, self._rows = self.limits.max_tokens, self.limits.max_rows
        preempted = self._preempted
        self._continue(step)
        if self._preempted == preempted:  # else pages are short
            self._admit(step)
        return step if step.chunks or step.swap_out else None

    def _continue(self, step: Step) -> None:
        """A chunk for each running sequence, decodes first. What is left of the budget goes to prompts, in turn."""
        prefilling, chunks, size = [], step.chunks, self.blocks.block_size
        spare = min(self._tokens, self._rows) - len(self.running)  # for drafts: a token is kept for each that runs
        for sequence in list(self.running):
            pending, start = sequence.pending, sequence.num_computed
            ahead = len(sequence.tokens) + pending
            if start < ahead - 1:
                prefilling.append(sequence)
                continue
            if sequence.slot < 0 or (pending and (ahead >= sequence.end or not sequence.runs_ahead or sequence.drafts)):
                continue
            if start >= len(sequence.blocks) * size and not self._grow(sequence, step):
                continue
            drafts = 0
            if sequence.drafts:
                drafts = self._fit_drafts(sequence, min(spare, sequence.end - ahead - 1))
                spare -= drafts
            chunks.append(Chunk(sequence, start, 1 + drafts, drafts, 1 + drafts))
            sequence.num_computed = start + 1 + drafts
            sequence.pending = pending + 1
        used = sum([chunk.num_tokens for chunk in chunks])  # each of them gets logits
        self._tokens, self._rows = self.limits.max_tokens - used, self.limits.max_rows - used
        for sequence in prefilling:
            if sequence.slot >= 0:
                self._prefill(sequence, step)

    def _fit_drafts(self, sequence: Sequence, most: int) -> int:
        """Cuts its drafts to `most` and to the pages that are to be had without taking them from others."""
        del sequence.drafts[max(most, 0) :]
        size, room = self.blocks.block_size, sequence.request.max_pages
        while len(sequence.blocks) * size < sequence.num_computed + 1 + len(sequence.drafts):
            if not self.blocks.available or (room is not None and self._held(sequence) >= room):
                del sequence.drafts[len(sequence.blocks) * size - sequence.num_computed - 1 :]
                break
            self.blocks.extend(sequence, 1)
        return len(sequence.drafts)

    def _prefill(self, sequence: Sequence, step: Step) -> None:
        """The next chunk of its known tokens, as the budget allows. Its pages were reserved when it was admitted."""
        start = sequence.num_computed
        remaining = len(sequence.tokens) - start
        num = min(remaining, self._chunk, self._tokens)
        if self._tells_prompt(sequence) and start < sequence.num_prompt:
            num = rows = min(num, self._rows)
        else:
            rows = int(num == remaining)
            if rows > self._rows:
                num, rows = num - 1, 0
        if num <= 0:
            return
        sequence.drafts.clear()
        step.chunks.append(Chunk(sequence, start, num, 0, rows))
        sequence.num_computed += num
        sequence.pending += num == remaining
        self._tokens -= num
        self._rows -= rows

    def _tells_prompt(self, sequence: Sequence) -> bool:
        return sequence.request.sampling.prompt_logprobs is not None and not sequence.index

    # Admission.

    def _admit(self, step: Step) -> None:
        """Starts waiting sequences in their order while slots, pages and budget last.

        All pages of its known tokens are reserved at once, so that prompts half computed never wait for each other.
        """
        waiting, blocks = self._waiting, self.blocks
        while self._tokens > 0 and self._rows > 0 and (sequence := waiting.peek()) is not None:
            need, room = blocks.blocks_for(len(sequence.tokens)), sequence.request.max_pages
            if sequence.pending or (room is not None and self._held(sequence) + need > room):
                waiting.set_aside(sequence)
                continue
            shared, source, start = self._reusable(sequence, step) if self._slots else ([], None, 0)
            spare = blocks.num_blocks // 100 if self.running else 0  # for those that run to grow
            if not self._slots or need - len(shared) + blocks.num_unused(shared) + spare > blocks.available:
                victim = self._victim(step, worse_than=sequence.request.priority)
                if victim is None:
                    break
                self._preempt(victim, step)
                continue
            waiting.pop(sequence)
            blocks.share(sequence, shared)
            blocks.extend(sequence, need - len(shared))
            self._start(sequence, step, source, start)
        waiting.restore()

    def _reusable(self, sequence: Sequence, step: Step) -> tuple[list[int], int | None, int]:
        """What it need not compute: blocks to share, a block to copy after them, and how many tokens they hold."""
        size = self.blocks.block_size
        if sequence.swapped:
            return [], None, sequence.num_computed
        start = min(sequence.num_prompt, len(sequence.tokens) - 1)
        donor = None if sequence.preemptions or not sequence.index else self._donor(sequence, start, step)
        if donor is not None:
            full, rest = divmod(start, size)
            return donor.blocks[:full], donor.blocks[full] if rest else None, start
        if self._tells_prompt(sequence):
            return [], None, 0
        shared = self.blocks.lookup(sequence)
        return shared, None, len(shared) * size

    def _donor(self, sequence: Sequence, start: int, step: Step) -> Sequence | None:
        """Another answer to its request whose first `start` tokens were computed before this step."""
        for other in self._requests[sequence.request.id]:
            if other.slot >= 0 and other.num_computed >= start:
                now = next((chunk for chunk in step.chunks if chunk.sequence is other), None)
                if now is None or now.start >= start:
                    return other
        return None

    def _start(self, sequence: Sequence, step: Step, source: int | None, start: int) -> None:
        size = self.blocks.block_size
        if source is not None:
            step.copies.append((source, sequence.blocks[start // size]))
        if not sequence.swapped:
            self.blocks.count_lookup(len(sequence.tokens), start)
        step.swap_in += self.blocks.swap_in(sequence)
        if not sequence.preemptions:
            sequence.cached_tokens = min(start, sequence.num_prompt)
            if not sequence.index:  # the answers to one request share the service of its prompt
                self._waiting.charge(sequence.request.tenant, PROMPT_WEIGHT * sequence.num_prompt)
        sequence.num_computed = start
        sequence.slot = self._slots.pop()
        self.running[sequence] = None
        self._prefill(sequence, step)

    # Preemption.

    def _grow(self, sequence: Sequence, step: Step) -> bool:
        """Gets it one more page, by preemption where need be; False where it has to wait or was itself preempted."""
        room = sequence.request.max_pages
        while sequence.slot >= 0:
            full = room is not None and self._held(sequence) >= room
            if not full and self.blocks.available:
                self.blocks.extend(sequence, 1)
                return True
            victim = self._victim(step, tenant=sequence.request.tenant if full else None)
            if victim is None:
                return False
            self._preempt(victim, step)
        return False

    def _held(self, sequence: Sequence) -> int:
        return self.blocks.pages.get(sequence.request.tenant, 0)

    def _victim(self, step: Step, tenant: str | None = None, worse_than: int | None = None) -> Sequence | None:
        """Who has to go: of the lowest priority, of the tenant most ahead of its share, the latest.

        Not those with drafts in an earlier step: what of their pages is valid is not known yet.
        """
        candidates = [
            sequence
            for sequence in self.running
            if (tenant is None or sequence.request.tenant == tenant)
            and (worse_than is None or sequence.request.priority > worse_than)
        ]
        if any(sequence.drafts for sequence in candidates):
            planned = {chunk.sequence for chunk in step.chunks}
            candidates = [s for s in candidates if not (s.pending and s.drafts) or s in planned]
        return max(candidates, key=self._lateness, default=None)

    def _lateness(self, sequence: Sequence) -> tuple[int, int, float, int]:
        request = sequence.request
        return request.priority, self._waiting.served[request.tenant], request.arrival, sequence.index

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """Takes its pages and its part in this step; it waits at the front of its class."""
        for at, chunk in enumerate(step.chunks):
            if chunk.sequence is sequence:
                del step.chunks[at]
                sequence.num_computed -= chunk.num_tokens
                sequence.pending = max(
                    sequence.pending - 1, 0
                )  # it draws, or is part of a prompt and nothing is pending
                self._tokens += chunk.num_tokens
                self._rows += chunk.num_rows
                break
        blocks, num_computed = self.blocks, sequence.num_computed
        filled = blocks.blocks_for(num_computed)
        # Swaps out run before swaps in: a host block that this step empties cannot be filled by it.
        fits = 0 < filled <= len(blocks.free_host) and not step.swap_in
        if fits and self.costs is not None and self.costs.prefers_swap(num_computed, filled):
            step.swap_out += blocks.swap_out(sequence, filled)
            self._swapped += 1
        else:
            blocks.release(sequence)
            sequence.num_computed = 0
        sequence.drafts.clear()
        self._leave(sequence)
        sequence.preemptions += 1
        self._preempted += 1
        self._waiting.push(sequence, front=True)

    def _leave(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._slots.append(sequence.slot)
        sequence.slot = -1

    # Results.

    def advance(self, chunk: Chunk, drawn: list[Token]) -> list[Token]:
        """Takes in what a step drew: `drawn` has the token of each row that drew one. Returns the tokens that count.

        Drafts are accepted while they equal what was drawn; the token drawn after the last of them counts as well.
        """
        sequence = chunk.sequence
        if sequence.finish is not None:
            return []
        new: list[Token] = []
        tokens, num_drafts = sequence.tokens, chunk.num_drafts
        computed = chunk.start + chunk.num_tokens - num_drafts
        reason = None
        if computed == len(tokens):
            sequence.pending -= 1
            if sequence.end == sequence.num_prompt:  # nothing is to be drawn: an embedding, or logprobs of the prompt
                reason = "stop" if sequence.request.embed else "length"
            else:
                stop_ids = sequence.request.sampling.stop_ids
                for i, token in enumerate(drawn[-1 - num_drafts :]):
                    tokens.append(token)
                    new.append(token)
                    if token in stop_ids or len(tokens) >= sequence.end:
                        reason = finish_of(sequence)
                    if reason is not None or i == num_drafts or sequence.drafts[i] != token:
                        break
                if num_drafts:
                    computed += len(new) - 1
                    sequence.num_computed -= num_drafts - len(new) + 1
                    sequence.drafts = []
                self._waiting.served[sequence.request.tenant] += OUTPUT_WEIGHT * len(new)
        size = self.blocks.block_size
        if computed // size > chunk.start // size and sequence.blocks:
            self.blocks.register(sequence, min(computed, sequence.num_computed))
        if self._siblings and sequence.request.id in self._siblings and computed >= sequence.num_prompt:
            self._queue_siblings(sequence)
        if reason is not None:
            self.finish(sequence, reason)
        return new

    def _queue_siblings(self, sequence: Sequence) -> None:
        """Lets the other answers begin: this one has its prompt computed, or ends without."""
        if sequence is self._requests[sequence.request.id][0]:
            for sibling in self._siblings.pop(sequence.request.id, ()):
                self._waiting.push(sibling, front=True)
