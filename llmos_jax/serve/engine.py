"""Engine: requests in, tokens out, step by step, in one process and one thread.

The scheduler says what a step holds, the runner starts it, and while the devices work the next one is planned: the
host reads token ids only. A step is planned ahead where no running answer's next draw depends on tokens that the host
has not seen.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmos_jax.compiler.watch import CompileWatch
from llmos_jax.config import UserError
from llmos_jax.serve.adapters import Adapter
from llmos_jax.serve.block_manager import BlockManager
from llmos_jax.serve.draft import DraftModel
from llmos_jax.serve.request import Output, Request, Token, TokenLogprobs
from llmos_jax.serve.runner import Drawn, Row, Runner
from llmos_jax.serve.sampling import Penalties
from llmos_jax.serve.scheduler import Scheduler
from llmos_jax.serve.sequence import Sequence
from llmos_jax.serve.speculate import Ngrams
from llmos_jax.serve.step import Chunk, Step
from llmos_jax.serve.structured import Structure, Vocabulary

MIN_NGRAM, MAX_NGRAM = 2, 4  # tokens that must recur before what followed them is guessed


@dataclass(slots=True)
class _Answer:
    """What the engine keeps of a running answer beside its sequence."""

    structure: Structure | None
    penalties: Penalties | None
    ngrams: Ngrams | None
    masks: list[np.ndarray] = field(default_factory=list)  # of the drafts of the step in flight
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    told: bool = False
    added: float = field(default_factory=time.monotonic)
    queued: float | None = None  # seconds until its first step


@dataclass(slots=True)
class _Flight:
    """A step on its way through the devices. spans: which rows belong to each of its chunks."""

    step: Step
    rows: list[Row]
    spans: list[range]
    drawn: Drawn


class Engine:
    """poison: token ids; a step with a request whose prompt contains them in a row raises. For tests of fault handling."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        vocabulary: Vocabulary | None = None,
        draft: DraftModel | None = None,
        poison: tuple[Token, ...] = (),
    ):
        """vocabulary: for answers that follow a grammar. draft: guesses tokens, in place of the look-up of n-grams."""
        self.runner, self._scheduler, self._vocabulary, self._poison = runner, scheduler, vocabulary, poison
        self._draft = draft
        self._answers: dict[Sequence, _Answer] = {}
        self._flight: _Flight | None = None
        self._last_steps: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        self._ready: list[Output] = []  # told without a step
        self.adapters: dict[str, int] = {}  # name -> slot
        self._generations: dict[str, int] = {}  # how many adapters of a name there have been
        self._watch = CompileWatch()
        self._counts = dict.fromkeys(
            ("steps", "prompt_tokens", "generated_tokens", "draft_tokens", "accepted_tokens"), 0
        )
        self.last_step = time.monotonic()
        self.announce: Callable[[frozenset[str]], None] = lambda ids: None  # of `in_step`, before a step begins

    @property
    def has_work(self) -> bool:
        return self._flight is not None or self._scheduler.has_work or bool(self._ready)

    @property
    def in_step(self) -> frozenset[str]:
        """Ids of the requests of the two steps that were planned last: one may be in flight."""
        return self._last_steps[0] | self._last_steps[1]

    def about(self) -> dict[str, Any]:
        """What a router needs to know: sizes, and what its memory is."""
        return {
            "page_size": self.runner.serve.page_size,
            "pages": self._scheduler.blocks.num_blocks,
        } | self.runner.memory

    def rebuilt(self) -> "Engine":
        """An engine without any request over the same programs and weights. Adapters stay loaded."""
        self.close()
        for runner in self._runners:
            runner.reset()
        scheduler = self._scheduler
        blocks = scheduler.blocks
        fresh = BlockManager(blocks.num_blocks, blocks.block_size, blocks.num_host_blocks)
        renewed = Scheduler(scheduler.limits, fresh, scheduler.costs)
        engine = Engine(self.runner, renewed, self._vocabulary, self._draft, self._poison)
        engine.adapters, engine._generations, engine._counts = self.adapters, self._generations, self._counts
        engine.announce = self.announce
        engine.start()
        return engine

    def start(self) -> None:
        """From here on a compilation is an event that is counted."""
        self._watch.start()

    def close(self) -> None:
        self._watch.stop()

    def check(self, request: Request) -> None:
        """Raises ValueError, one sentence, for a request that can never be answered."""
        if request.adapter and request.adapter not in self.adapters:
            raise ValueError(f"adapter {request.adapter} is not loaded; load it first")

    def add(self, request: Request) -> None:
        """Accepts a request. Raises ValueError, one sentence, for one that can never be answered."""
        self.check(request)
        if request.adapter:  # pages computed with an adapter of that name that was loaded before are not for this one
            generation = self._generations[request.adapter]
            request = dataclasses.replace(request, salt=f"{request.salt}/{generation}")
        structures = [self._structure(request, index) for index in range(request.n)]  # a schema may be refused
        for sequence in self._scheduler.add(request):
            if sequence.finish is not None:
                self._ready.append(Output(request.id, sequence.index, finish=sequence.finish))
            else:
                self._answers[sequence] = self._answer(sequence, structures[sequence.index])

    def abort(self, id: str) -> None:
        """Ends a request; its pages are free at once."""
        for sequence in self._scheduler.abort(id):
            self._answers.pop(sequence, None)

    def step(self) -> list[Output]:
        """Runs one step, or collects the one in flight, and returns what is new."""
        self.last_step = time.monotonic()
        told, self._ready = self._ready, []
        flight = self._flight or self._launch()
        self._flight = None
        for sequence in self._scheduler.take_expired():
            self._answers.pop(sequence, None)
            message = "the request was not begun before its deadline"
            told.append(Output(sequence.request.id, sequence.index, finish="error", error=message, status=504))
        if flight is None:
            return told
        if not self.runner.serve.num_drafts and self._scheduler.runs_ahead:
            self._flight = self._launch()
        return told + self._collect(flight)

    def load_adapter(self, adapter: Adapter) -> None:
        """Raises UserError where it does not fit or no slot is free. One of the same name is replaced."""
        slots = self.runner.serve.max_adapters
        free = set(range(slots)) - set(self.adapters.values())
        slot = self.adapters.get(adapter.name, min(free, default=None))
        if slot is None:
            raise UserError(
                f"{slots} adapters are loaded already; unload one"
                if slots
                else "this server takes no adapters; start it with --max-adapters"
            )
        self.runner.set_adapter(slot, adapter)
        self.adapters[adapter.name] = slot
        self._generations[adapter.name] = self._generations.get(adapter.name, 0) + 1

    def unload_adapter(self, name: str) -> None:
        """Raises UserError where there is none of that name, or it is in use."""
        if name not in self.adapters:
            raise UserError(f"no adapter {name} is loaded")
        if any(sequence.request.adapter == name for sequence in self._answers):
            raise UserError(f"the adapter {name} is in use; wait for its answers to end")
        self.runner.set_adapter(self.adapters.pop(name), None)

    def sleep(self) -> None:
        """Gives up the devices' memory. Nothing may be running."""
        assert not self.has_work, "an engine with work cannot sleep"
        self._scheduler.blocks.forget()
        for runner in self._runners:
            runner.sleep()

    def wake(self) -> None:
        for runner in self._runners:
            runner.wake()

    @property
    def bytes(self) -> int:
        """That it takes of all devices together while it is awake."""
        return sum(runner.bytes for runner in self._runners)

    @property
    def _runners(self) -> list[Runner]:
        return [self.runner, *([] if self._draft is None else [self._draft.runner])]

    def stats(self) -> dict[str, Any]:
        return (
            self._counts | self._scheduler.stats() | {"compilations": self._watch.count, "adapters": [*self.adapters]}
        )

    def _answer(self, sequence: Sequence, structure: Structure | None) -> _Answer:
        request, serve = sequence.request, self.runner.serve
        sampling = request.sampling
        given = sequence.tokens[sequence.num_prompt :]
        penalties = Penalties(sampling, request.prompt) if sampling.adjusts_logits or sampling.logit_bias else None
        if penalties is not None:
            penalties.extend(given)
        looks_up = serve.num_drafts > 0 and self._draft is None
        ngrams = Ngrams(MIN_NGRAM, MAX_NGRAM, serve.num_drafts) if looks_up else None
        if ngrams is not None:
            ngrams.extend(sequence.tokens)
        answer = _Answer(structure, penalties, ngrams, told=bool(given))
        if sampling.prompt_logprobs is not None and sequence.index == 0:
            answer.prompt_logprobs = [None] * sequence.num_prompt
        return answer

    def _structure(self, request: Request, index: int) -> Structure | None:
        if request.sampling.grammar is None:
            return None
        if self._vocabulary is None:
            raise ValueError("this model cannot follow a grammar: its tokenizer is not known to the engine")
        return Structure(self._vocabulary, request.sampling.grammar, request.outputs[index] if request.outputs else ())

    def _launch(self) -> _Flight | None:
        self._propose()
        step = self._scheduler.schedule()
        if step is None:
            return None
        ids = frozenset(chunk.sequence.request.id for chunk in step.chunks)
        self._last_steps = self._last_steps[1], ids
        self.announce(self.in_step)
        rows: list[Row] = []
        spans, at = [], 0
        for chunk in step.chunks:
            self._check_poison(chunk.sequence.request)
            at += chunk.num_tokens
            first = len(rows)
            rows += self._rows(chunk, at)
            spans.append(range(first, len(rows)))
        self._counts["steps"] += 1
        drawn = self.runner.run(step, rows, self.adapters)
        if self._draft is not None:
            self._draft.follow(step)
        return _Flight(step, rows, spans, drawn)

    def _propose(self) -> None:
        if not self.runner.serve.num_drafts:
            return
        deciding = [
            sequence
            for sequence in self._scheduler.running
            if sequence in self._answers and sequence.num_computed == len(sequence.tokens) - 1
        ]
        if self._draft is not None:
            self._draft.propose(deciding)
        for sequence in deciding:
            answer = self._answers[sequence]
            if answer.ngrams is not None:
                sequence.drafts = answer.ngrams.propose()
            if answer.structure is not None:
                with self._contained(sequence):
                    answer.masks = answer.structure.masks_along(sequence.drafts)
                sequence.drafts = sequence.drafts[: len(answer.masks) - 1]

    def _rows(self, chunk: Chunk, end: int) -> list[Row]:
        """The rows of a chunk whose last token is the step's token `end` - 1."""
        sequence = chunk.sequence
        request, answer = sequence.request, self._answers[sequence]
        answer.queued = answer.queued or time.monotonic() - answer.added
        sampling = request.sampling
        seed = (sampling.seed + sequence.index) & 0xFFFFFFFF
        rows = []
        for offset in range(chunk.num_rows - 1, -1, -1):
            position = chunk.start + chunk.num_tokens - offset  # of the token that this row tells
            row = Row(end - 1 - offset, sampling, seed, position, wants_logprobs=sampling.logprobs is not None)
            if position < len(sequence.tokens):  # of the prompt, or of what an engine before this one drew
                row.given, row.wants_logprobs = sequence.tokens[position], True
            else:
                draft = chunk.num_drafts - offset
                if draft == 0 and chunk.num_drafts == 0:
                    row.slot = sequence.slot
                if answer.penalties is not None:
                    row.adjust = answer.penalties.lists(sequence.drafts[:draft])
                if answer.structure is not None:
                    row.mask = answer.masks[draft] if chunk.num_drafts else self._mask(sequence, answer.structure)
            rows.append(row)
        return rows

    def _mask(self, sequence: Sequence, structure: Structure) -> np.ndarray | None:
        with self._contained(sequence):
            return structure.mask()
        return None  # the answer has ended; what is drawn is dropped

    def _collect(self, flight: _Flight) -> list[Output]:
        tokens = flight.drawn.tokens()
        logprobs = flight.drawn.logprobs() if any(row.wants_logprobs for row in flight.rows) else None
        told: list[Output] = []
        for chunk, span in zip(flight.step.chunks, flight.spans, strict=True):
            answer = self._answers.get(chunk.sequence)
            if answer is None:  # aborted while the step ran
                self._scheduler.advance(chunk, [])
                continue
            drawing = [i for i in span if flight.rows[i].given < 0]
            if logprobs is not None and answer.prompt_logprobs is not None:
                # By position: after a preemption they are computed once more.
                for i in span:
                    position = flight.rows[i].position
                    if position < chunk.sequence.num_prompt:
                        answer.prompt_logprobs[position] = _logprob(flight.rows[i], i, logprobs)
            accepted = self._scheduler.advance(chunk, [tokens[i] for i in drawing])
            self._counts["prompt_tokens"] += max(
                min(chunk.start + chunk.num_tokens, chunk.sequence.num_prompt) - chunk.start, 0
            )
            self._counts["draft_tokens"] += chunk.num_drafts
            if not drawing:
                continue
            if chunk.sequence.request.embed:
                told.append(self._embedded(chunk.sequence, flight.drawn.hidden()[drawing[-1]]))
                continue
            self._counts["accepted_tokens"] += max(len(accepted) - 1, 0)
            told.append(self._tell(chunk.sequence, answer, accepted, drawing, flight.rows, logprobs))
        return told

    def _tell(
        self, sequence: Sequence, answer: _Answer, accepted: list[Token], drawing: list[int], rows: list[Row], logprobs
    ) -> Output:
        self._counts["generated_tokens"] += len(accepted)
        if answer.ngrams is not None:
            answer.ngrams.extend(accepted)
        if answer.penalties is not None:
            answer.penalties.extend(accepted)
        error = ""
        if answer.structure is not None and sequence.finish is None:
            try:
                for token in accepted:
                    answer.structure.accept(token)
            except ValueError as problem:
                error = str(problem)
            if error or answer.structure.is_complete:
                self._scheduler.finish(sequence, "error" if error else "stop")
        entries = ()
        if logprobs is not None and sequence.request.sampling.logprobs is not None:
            told = zip(accepted, drawing, strict=False)
            entries = tuple(_logprob(rows[i], i, logprobs, token) for token, i in told)
        first, answer.told = not answer.told, True
        if sequence.finish is not None:
            self._answers.pop(sequence)
        return Output(
            sequence.request.id,
            sequence.index,
            tuple(accepted),
            entries,
            sequence.finish,
            error,
            400 if error else 500,
            cached_tokens=sequence.cached_tokens if first else 0,
            prompt_logprobs=tuple(answer.prompt_logprobs) if first and answer.prompt_logprobs is not None else None,
            queued=answer.queued if first and not sequence.index else None,
        )

    def _embedded(self, sequence: Sequence, hidden: np.ndarray) -> Output:
        """The last token's hidden state, scaled to length one."""
        if sequence.finish is None:
            self._scheduler.finish(sequence, "stop")
        queued = self._answers.pop(sequence).queued
        vector = hidden / max(float(np.linalg.norm(hidden)), 1e-12)
        return Output(*sequence.id, finish="stop", embedding=tuple(vector.tolist()), queued=queued)

    @contextlib.contextmanager
    def _contained(self, sequence: Sequence) -> Iterator[None]:
        """What goes wrong with one answer's grammar ends that answer alone."""
        try:
            yield
        except ValueError as problem:
            self._scheduler.finish(sequence, "error")
            self._answers.pop(sequence, None)
            self._ready.append(
                Output(sequence.request.id, sequence.index, finish="error", error=str(problem), status=400)
            )

    def _check_poison(self, request: Request) -> None:
        size = len(self._poison)
        if size and any(request.prompt[i : i + size] == self._poison for i in range(len(request.prompt) - size + 1)):
            raise RuntimeError("a poisoned request reached the engine")


def _logprob(row: Row, i: int, logprobs: tuple[np.ndarray, np.ndarray, np.ndarray], token: Token | None = None):
    chosen, top, values = logprobs
    wanted = row.sampling.prompt_logprobs if row.given >= 0 else row.sampling.logprobs
    pairs = tuple(zip(top[i, :wanted].tolist(), values[i, :wanted].tolist(), strict=True))
    return TokenLogprobs(row.given if token is None else token, float(chosen[i]), pairs)
