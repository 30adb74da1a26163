"""Runner: the compiled programs of one served model, its weights and pages, and one step of them.

Everything is compiled before the first request, and its memory is known then; afterwards nothing is compiled.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from collections.abc import Sequence as Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmos_jax.compiler.program import Executable, Program
from llmos_jax.config import ModelConfig, ServeConfig, UserError
from llmos_jax.models.decoder import Unstacked
from llmos_jax.serve import cache, forward, sampling
from llmos_jax.serve.adapter_slots import Adapters
from llmos_jax.serve.adapters import Adapter
from llmos_jax.serve.request import Sampling
from llmos_jax.serve.sequence import Sequence
from llmos_jax.serve.step import Step
from llmos_jax.serve.weights import abstract_served_params
from llmos_jax.sharding import replicated

Say = Callable[[str], None]
COMPILE_THREADS = max(2, min(8, os.cpu_count() or 2))
KV_MARGIN = 2.0  # keys and values of a channel may exceed those of the text that sets its scale by this factor
MAX_BIAS = 512  # tokens of a logit_bias, beside those of the sequence itself


@dataclass(slots=True)
class Row:
    """One token to draw: which of the step's tokens gives the logits, and how.

    slot: where the token goes for a next step that is planned before the host sees it; -1 for nowhere. given: the token
    whose log-probability is wanted in place of the drawn one's, -1 for none. adjust: (ids, add, factor) of logits.
    mask: bits of the allowed tokens.
    """

    token: int
    sampling: Sampling
    seed: int
    position: int
    slot: int = -1
    given: int = -1
    adjust: tuple[Any, Any, Any] | None = None
    mask: np.ndarray | None = None
    wants_logprobs: bool = False

    @property
    def is_full(self) -> bool:
        return self.adjust is not None or self.mask is not None or self.wants_logprobs or self.given >= 0


class Drawn:
    """The result of a step, perhaps still being computed."""

    def __init__(self, found: sampling.Sampled, hidden: jax.Array, num_rows: int):
        self._found, self._hidden, self._num_rows = found, hidden, num_rows

    def tokens(self) -> list[int]:
        """Waits for the device."""
        return np.asarray(self._found.tokens)[: self._num_rows].tolist()

    def logprobs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each row: the token's [Q], the likeliest tokens [Q, k], theirs [Q, k]."""
        return (
            np.asarray(self._found.logprobs),
            np.asarray(self._found.top_tokens),
            np.asarray(self._found.top_logprobs),
        )

    def hidden(self) -> np.ndarray:
        return np.asarray(self._hidden)


class Runner:
    """serve.num_pages is set. read: gives the weights (`weights.served_params`), while programs are being compiled."""

    def __init__(
        self,
        model: ModelConfig,
        serve: ServeConfig,
        mesh: Mesh,
        read: Callable[[], Unstacked],
        say: Say = lambda _: None,
    ):
        self.model, self.serve, self.mesh = model, serve, mesh
        self._shapes = forward.shapes(model, serve, mesh.devices.flat[0].platform)
        self._num_adjusted = min(model.vocab_size, self.max_model_len + MAX_BIAS)
        self._adapters = Adapters(model, serve, mesh) if serve.max_adapters else None
        self._layers = None if self._adapters is None else self._adapters.layers()
        with ThreadPoolExecutor(COMPILE_THREADS) as threads:
            compiling = self._compile(threads, say)
            self._params: Any = read()
            self._programs = {key: program.result() for key, program in compiling.items()}
        self._weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._params))
        self._pool: cache.Pool = ()
        self._scales: list[np.ndarray] | None = None
        self._resting: Any = None  # weights on the host while it sleeps
        self._mover = cache.Mover({k: self._programs[k] for k in ("copy", "read", "write")}, serve.num_pages)
        self._whole = replicated(mesh)
        self._last = jax.device_put(np.zeros(serve.max_sequences, np.int32), self._whole)
        self._tables = BlockTables(serve.max_sequences, self._shapes[0].table)

    @property
    def max_model_len(self) -> int:
        return self.serve.max_model_len or self.model.max_seq_len

    @property
    def max_rows(self) -> int:
        return self._shapes[-1].rows

    @property
    def memory(self) -> dict[str, int]:
        """Bytes a device: weights, pages, temporaries of the largest program."""
        pages = cache.page_bytes(self.model, self.serve) * self.serve.num_pages
        temporary = max(e.memory.temp for k, e in self._programs.items() if isinstance(k, forward.Shape))
        weights = self._weight_bytes
        return {"weights": weights, "pages": pages, "temporaries": temporary}

    def _compile(self, threads: ThreadPoolExecutor, say: Say) -> dict[Any, Future[Executable]]:
        params = abstract_served_params(self.model, self.mesh)
        pool = cache.abstract_pool(self.model, self.serve, self.mesh)
        programs: dict[Any, Program] = dict(cache.move_programs(pool, self.mesh))
        for shape in reversed(self._shapes):
            programs[shape] = forward.forward_program(
                self.model, shape, self.mesh, params, pool, abstract(self._layers), self.serve.adapter_rank
            )
        for rows in {shape.rows for shape in self._shapes}:
            for full in (False, True):
                programs[rows, full] = forward.draw_program(
                    self.model, self.serve, rows, self.mesh, full, self._num_adjusted
                )
        done = 0

        def compile_one(program: Program) -> Executable:
            nonlocal done
            executable = program.compile()
            done += 1
            how = "found" if executable.from_cache else "compiled"
            say(f"{how} {program.name} in {executable.compile_seconds:.1f} s ({done} of {len(programs)})")
            return executable

        return {key: threads.submit(compile_one, program) for key, program in programs.items()}

    def allocate(self, scales: list[np.ndarray] | None = None) -> None:
        """Takes the memory of the pages."""
        self._scales = scales
        self._pool = cache.empty_pool(cache.abstract_pool(self.model, self.serve, self.mesh), scales)

    @property
    def bytes(self) -> int:
        """Of all devices together, weights and pages."""
        return self.memory["weights"] + self.memory["pages"]

    def set_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Puts an adapter into a slot, or empties it. Raises UserError where its rank is too large."""
        assert self._adapters is not None, "there are no adapter slots"
        self._adapters.put(slot, adapter)
        self._layers = self._adapters.layers()

    def reset(self) -> None:
        """New pages, after a step that failed may have lost the old ones."""
        if self._resting is None:
            self._pool = ()
            self.allocate(self._scales)
        self._last = jax.device_put(np.zeros(self.serve.max_sequences, np.int32), self._whole)

    def sleep(self) -> None:
        """Gives up the devices' memory: weights go to the host, pages are dropped. The programs stay."""
        places = jax.tree.map(lambda x: x.sharding, self._params)
        self._resting = jax.tree.map(np.asarray, self._params), places
        self._params, self._pool = None, ()

    def wake(self) -> None:
        weights, places = self._resting
        self._params = jax.tree.map(jax.device_put, weights, places)
        self._resting = None
        self.allocate(self._scales)

    def calibrate(self, tokens: list[int]) -> list[np.ndarray]:
        """The scales of pages in int8 or float8, [K, 2, H] a layer, from the largest keys and values of a text."""
        dtype = cache.page_dtype(self.serve)
        most = float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)
        ids = jax.ShapeDtypeStruct((1, len(tokens)), jnp.int32, sharding=replicated(self.mesh))
        args = (abstract(self._params), ids)
        program = Program("calibrate", forward.largest_kv, (self.model,), args, self.mesh).compile()
        found = np.asarray(program(self._params, np.array([tokens], np.int32)))
        return list(np.maximum(found, 1e-6) * (KV_MARGIN / most))

    def warm_up(self) -> float:
        """Runs every program once on nothing; the seconds that the largest one takes."""
        seconds = 0.0
        for shape in self._shapes:
            for full in (True, False) if shape == self._shapes[-1] else (True,):
                row = Row(0, Sampling(1, temperature=0.0), 0, 0, wants_logprobs=full)
                started = time.perf_counter()
                self._start(shape, np.zeros(shape.num_integers, np.int32), [row]).tokens()
                seconds = time.perf_counter() - started
        one: list[tuple[int, int]] = [(0, 0)]
        for swap_out, swap_in, copies in ((one, [], []), ([], one, []), ([], [], one)):
            self._pool = self._mover(self._pool, swap_out, swap_in, copies)
        jax.block_until_ready(self._pool)
        return seconds

    def run(self, step: Step, rows: Sized[Row], adapters: dict[str, int] | None = None) -> Drawn:
        """Starts a step on the devices and returns at once."""
        self._pool = self._mover(self._pool, step.swap_out, step.swap_in, step.copies)
        shape = self._bucket(sum(chunk.num_tokens for chunk in step.chunks), len(rows))
        return self._start(shape, self._integers(step, rows, shape, adapters or {}), rows)

    def _start(self, shape: forward.Shape, flat: np.ndarray, rows: Sized[Row]) -> Drawn:
        logits, hidden, self._pool = self._programs[shape](self._params, self._pool, self._last, flat, self._layers)
        full = any(row.is_full for row in rows)
        self._last, found = self._programs[shape.rows, full](self._last, logits, *self._draws(rows, shape.rows, full))
        return Drawn(found, hidden, len(rows))

    def _bucket(self, tokens: int, rows: int) -> forward.Shape:
        return next(shape for shape in self._shapes if shape.tokens >= tokens and shape.rows >= rows)

    def _integers(self, step: Step, rows: Sized[Row], shape: forward.Shape, adapters: dict[str, int]) -> np.ndarray:
        flat = np.zeros(shape.num_integers, np.int32)
        given = forward.split(shape, flat)
        given.adapter[:] = -1
        moved = bool(step.copies or step.swap_in)
        at = 0
        slots = []
        for index, chunk in enumerate(step.chunks):
            sequence, end = chunk.sequence, at + chunk.num_tokens
            known = sequence.tokens[chunk.start : chunk.start + chunk.num_tokens - chunk.num_drafts]
            if len(known) < chunk.num_tokens - chunk.num_drafts:
                known = [*known, -1 - sequence.slot]  # drawn by the step before this one
            given.tokens[at:end] = [*known, *sequence.drafts[: chunk.num_drafts]] if chunk.num_drafts else known
            given.positions[at:end] = np.arange(chunk.start, chunk.start + chunk.num_tokens)
            if sequence.request.adapter:
                given.adapter[at:end] = adapters.get(sequence.request.adapter, -1)
            given.lengths[index] = chunk.start + chunk.num_tokens
            given.starts[index + 1] = at = end
            self._tables.update(sequence, chunk.start, chunk.start + chunk.num_tokens, moved)
            slots.append(sequence.slot)
        given.starts[len(slots) + 1 :] = at
        given.num_sequences[:] = len(slots)
        given.block_tables[: len(slots)] = self._tables.rows[slots]
        given.rows[: len(rows)] = [row.token for row in rows]
        return flat

    def _draws(self, rows: Sized[Row], size: int, full: bool) -> tuple[Any, ...]:
        draw = sampling.draw_arrays([(row.sampling, row.seed, row.position) for row in rows], size)
        slots, given = np.full(size, self.serve.max_sequences, np.int32), np.full(size, -1, np.int32)
        for i, row in enumerate(rows):
            slots[i] = row.slot if row.slot >= 0 else self.serve.max_sequences
            given[i] = row.given
        if not full:
            return draw, slots, None, None, given
        adjust = sampling.adjust_arrays([row.adjust for row in rows], size, self._num_adjusted)
        mask = np.full((size, -(-self.model.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for i, row in enumerate(rows):
            if row.mask is not None:
                mask[i] = row.mask
        return draw, slots, adjust, mask, given


class BlockTables:
    """The block tables of the running sequences as rows of one array, brought up to date by what is new in them."""

    def __init__(self, num_slots: int, width: int):
        self.rows = np.zeros((num_slots, width), np.int32)
        self._owner: list[Any] = [None] * num_slots
        self._end = [0] * num_slots  # tokens after the last step
        self._filled = [0] * num_slots

    def update(self, sequence: Sequence, start: int, end: int, moved: bool) -> None:
        slot = sequence.slot
        # After a preemption its pages are others, even where it goes on at the same place in the same slot; one that
        # took drafts back begins elsewhere than it ended.
        owner = sequence, sequence.preemptions
        same = self._owner[slot] == owner and self._end[slot] == start and not moved
        first = self._filled[slot] if same else 0
        blocks = sequence.blocks
        if first < len(blocks):
            self.rows[slot, first : len(blocks)] = blocks[first:]
        self._owner[slot], self._end[slot], self._filled[slot] = owner, end, len(blocks)


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def fit_pages(model: ModelConfig, serve: ServeConfig, mesh: Mesh, weights: float, capacity: float) -> ServeConfig:
    """`serve` with num_pages: those that the sequences can use, or fewer where memory ends.

    weights, capacity: bytes of one device. Raises UserError where not even one sequence of full length fits.
    """
    useful = cache.useful_pages(model, serve)
    if serve.num_pages:
        return serve
    rows = serve.max_sequences * (1 + serve.num_drafts)
    # Temporaries: logits of all rows, and the widest activations of a step some times over; checked after compiling.
    width = max(model.mlp_dim, model.expert_mlp_dim * model.num_experts_per_token, model.embed_dim * 4)
    temporary = 12.0 * rows * model.vocab_size + 16.0 * serve.max_step_tokens * width
    pages = min(useful, cache.room(model, serve, mesh, weights, temporary, capacity))
    least = -(-(serve.max_model_len or model.max_seq_len) // serve.page_size) + 1
    if pages < least:
        raise UserError(
            f"beside {weights / 2**30:.1f} GiB of weights there is room for {pages} pages of "
            f"{serve.page_size} tokens, and one sequence of {serve.max_model_len or model.max_seq_len} tokens takes "
            f"{least}; lower --max-model-len, or use --kv-dtype int8 or --quantize int8"
        )
    return dataclasses.replace(serve, num_pages=pages)
