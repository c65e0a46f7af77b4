"""The decode step of all live samples: a forward, a draw and an `accept_token`, and nothing else.

    load    make samples the live set: copy their state and their cursors into fixed buffers
    run     some steps of all rows; cursors (position, suffix length, cache index) advance on the
            device, from block to block of a table that the host has filled in before
    poll    start a copy of the samples' counts and finished flags to the host
    fetch   the results of finished samples

Attention's plan is made anew when the live set changes, and when a suffix needs another split
(every MAX_SPLIT tokens). In between the host counts steps: an unfinished sample gains one token per
step, so its length is known without waiting for the device.

On CPU the host launches every step; in C++ the steps between two polls are one list of calls, made
once and replayed. On a GPU a step is captured as a CUDA graph and replayed: it reads tensors at
fixed addresses only, and its grids have room to spare. A step that cannot be captured is an error.

Letters: B live samples, R >= B rows of a step; rows past the samples write scratch cells. Which
samples are live, the tokens of prompts, and blocks are up to the caller (`engine/generate.py`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.forest import Node, decode_tiles
from engine.forward import CachedForward
from engine.kv_cache import ALIGN, KVCache
from kernels import cpp
from kernels.accept_token import Cursor, LiveSamples, Records, accept_token
from kernels.expected_score import NumberEdges, expected_score
from kernels.extract_scores import ScoreAutomaton, scores_of
from kernels.forest_attention.plan import MAX_SPLIT, ForestPlan, Suffixes, splits_of
from kernels.forest_attention.schedule import HeadShape, StaticPlan, keys_per_partial
from kernels.launch import runs_triton
from kernels.sample_token import SamplingOptions, sample_token, uniforms
from kernels.score_grammar import Reason
from kernels.segment_attention import Backend
from kernels.target import power_of_two, target_of
from models.transformer import Transformer

# Rows of a buffer of int64, (4, R).
_PROMPT, _KEY, _SAMPLE = 0, slice(1, 3), 3


class Leaf(Protocol):
    """What the host knows of a live sample: the node above it, its slot, the first cells of its
    blocks, the key of its uniforms (row and index), its limit of tokens, and its tokens so far.
    `count` is too high between the sample's end and the next poll."""

    end: Node
    slot: int
    blocks: list[int]
    limit: int
    count: int

    @property
    def key(self) -> tuple[int, int, int]: ...


@dataclass
class Sampled:
    """The result of a finished sample; `scores` in shown order, 0 where not valid; `expected`, if
    it is read, the expected score of each token."""

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    expected: list[float] | None
    ended: bool
    decided: bool
    reason: Reason
    scores: list[int]


class DeviceEvent:
    """A point in a device's stream of work; on CPU, in time."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    @property
    def is_over(self) -> bool:
        """Whether the device has passed it."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Let the host wait for it."""
        if self._event is not None:
            self._event.synchronize()

    def precedes(self, stream: torch.cuda.Stream) -> None:
        """Let later work on a stream wait for it."""
        if self._event is not None:
            stream.wait_event(self._event)

    def seconds_since(self, earlier: "DeviceEvent") -> float:
        """Seconds between two events that are over."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time


class StatusPoll:
    """How many tokens each sample has, and whether it has finished, at one point in time: a copy on
    its way to the host, which need not wait for it."""

    def __init__(self, live: LiveSamples) -> None:
        state = torch.stack([live.count, live.finished.long()])
        if state.is_cuda:
            self._state = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
            self._state.copy_(state, non_blocking=True)
        else:
            self._state = state
        self.event = DeviceEvent(state.device)

    def read(self) -> tuple[list[int], list[bool]]:
        """Counts and finished flags, when they have arrived."""
        self.event.wait()
        counts, finished = self._state.tolist()
        return counts, [bool(flag) for flag in finished]


class Decoder(CachedForward):
    """Decode steps of the live samples over one cache, each launched by the host."""

    def __init__(
        self,
        model: Transformer,
        automaton: ScoreAutomaton,
        cache: KVCache,
        *,
        options: SamplingOptions,
        end_ids: Tensor,
        stop_at_box: bool,
        max_new_tokens: int,
        max_scores: int,
        deterministic: bool = False,
        prefill_backend: Backend | None = None,
        edges: NumberEdges | None = None,
    ) -> None:
        """deterministic: fixed tiles in matrix products and one partial per split of keys, so that
        on a GPU too a sample's bits do not depend on the rest of the batch. prefill_backend: see
        `CachedForward`. edges: expected scores are read along these."""
        super().__init__(model, cache, deterministic, prefill_backend)
        self.automaton, self.edges = automaton, edges
        self.options = options
        self.end_ids = end_ids
        self.stop_at_box = stop_at_box
        # Where every work tile is a partial result by itself, inlining would save none.
        self.keys_per_partial = 0
        if runs_triton(model.head_weight) and not deterministic:
            config = self.config
            self.keys_per_partial = keys_per_partial(
                config.num_heads,
                config.cached_value_dim,
                config.cell_width,
                model.head_weight.dtype,
            )
        self.records = Records.empty(
            cache.num_slots, max_new_tokens, self.device, expects=edges is not None
        )
        self.leaves: tuple[Leaf, ...] = ()
        rows = self._rows(cache.num_slots)
        zeros = torch.zeros(rows, dtype=torch.int64)
        self._live = LiveSamples.start(
            zeros.to(self.device),
            zeros.to(self.device, copy=True),
            automaton.start(zeros, max_scores),
        )
        position, length, cache_index = (
            torch.zeros(rows, dtype=torch.int64, device=self.device) for _ in range(3)
        )
        blocks = torch.full((rows, splits_of(max_new_tokens)), -1, device=self.device)
        self._cursor = Cursor(position, length, cache_index, blocks)
        self._num_blocks = 0  # of live leaves, in that table
        self._table = torch.zeros(4, rows, dtype=torch.int64, device=self.device)
        self._plan: ForestPlan | None = None
        self._reader = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._loaded_at = DeviceEvent(self.device)

    @property
    def live(self) -> LiveSamples:
        """The live samples, in the order of `leaves`; valid until the next `load`."""
        return self._live.first(len(self.leaves))

    def load(self, live: LiveSamples, leaves: Sequence[Leaf]) -> None:
        """Make these the live samples, in depth-first order."""
        self.leaves = tuple(leaves)
        self._plan = None
        batch, rows = len(leaves), self._rows(len(leaves))
        self._live.first(batch).copy_(live)
        idle = slice(batch, rows)
        self._live.token[idle].zero_()
        self._live.count[idle].zero_()
        self._live.finished[idle].fill_(True)
        table = [[leaf.end.stop, *leaf.key] for leaf in leaves]
        # With count 0 the cursors of idle rows are one less: position 0.
        table += [[1, 0, 0, 0]] * (rows - batch)
        self._table[:, :rows] = self._tensor(table).view(rows, 4).T
        position, length, cache_index, blocks = self._cursor
        self._num_blocks = 0
        self._write_blocks()
        blocks[idle, 0] = torch.arange(rows - batch, device=self.device)  # scratch cells
        # Of a leaf's c tokens c - 1 are in the cache; the next step writes the last.
        count = self._live.count[:rows]
        length[:rows] = count
        position[:rows] = self._table[_PROMPT, :rows] + (count - 1)
        cache_index[:rows] = self._cursor.cells((count - 1).clamp_min(0))
        self._loaded_at = DeviceEvent(self.device)

    def run(self, steps: int) -> None:
        """Some steps of all live samples; finished ones do not change, and the host does not wait.
        At least one sample must be short of its limit by `steps`, and every leaf must have blocks
        for all tokens that it may have after them."""
        self._write_blocks()
        longest = max(leaf.count for leaf in self.leaves)
        max_length = min(longest + steps, self._cursor.blocks.shape[1] * MAX_SPLIT)
        plan = self._plan
        if plan is None or plan.suffix is None or not plan.suffix.grow_to(max_length):
            plan = self._plan = self._make_plan(max_length)
        self._steps(plan, steps)
        for leaf in self.leaves:
            leaf.count = min(leaf.count + steps, leaf.limit)

    def poll(self) -> StatusPoll:
        """The live samples' counts and flags after all steps so far."""
        return StatusPoll(self.live)

    def fetch(self, rows: Sequence[int], counts: Sequence[int], poll: StatusPoll) -> list[Sampled]:
        """The results of the samples at `rows` of the live ones, which `poll` found finished with
        `counts` tokens. Later steps need not be over: they do not change a finished sample."""
        with self._reading_after(poll):
            live = self.live.index_select(self._tensor(rows))
            scores, reasons = scores_of(live.scores, live.ended)
            longest = max(counts)
            tokens = self.records.tokens[live.slot, :longest].cpu()
            logprobs = self.records.logprobs[:, live.slot, :longest].cpu()
            expected = self.records.expected
            if expected is not None:
                expected = expected[live.slot, :longest].cpu()
            flags = torch.stack([live.ended.long(), live.scores.decided.long(), reasons], 1)
            all_flags, all_scores = flags.tolist(), scores.tolist()
        results = []
        for i, ((ended, decided, reason), shown) in enumerate(
            zip(all_flags, all_scores, strict=True)
        ):
            logprob, sampling_logprob = logprobs[:, i, : counts[i]].tolist()
            results.append(
                Sampled(
                    token_ids=tokens[i, : counts[i]].tolist(),
                    logprobs=logprob,
                    sampling_logprobs=sampling_logprob,
                    expected=None if expected is None else expected[i, : counts[i]].tolist(),
                    ended=bool(ended),
                    decided=bool(decided),
                    reason=Reason(reason),
                    scores=shown,
                )
            )
        return results

    @contextmanager
    def _reading_after(self, poll: StatusPoll) -> Iterator[None]:
        """On a GPU a stream of its own, which waits only for a poll and for the last `load`."""
        if self._reader is None:
            yield
            return
        with torch.cuda.stream(self._reader):
            poll.event.precedes(self._reader)
            self._loaded_at.precedes(self._reader)
            yield

    def draw(
        self, live: LiveSamples, logits: Tensor, uniform: Tensor, cursor: Cursor | None = None
    ) -> None:
        """Draw the next token of each sample from the model's raw logits, and accept it."""
        softcap, expected = self.config.final_softcap, None
        token, logprob, sampling_logprob = sample_token(logits, uniform, self.options, softcap)
        if self.edges is not None:
            scores, rules = live.scores, self.automaton.rules
            expected = expected_score(
                logits, token, logprob, scores.control, scores.value, self.automaton.place,
                self.edges, rules.score_min, rules.score_max, softcap,
            )  # fmt: skip
        accept_token(
            live, self.records, token, logprob, sampling_logprob, self.automaton, self.end_ids,
            self.stop_at_box, cursor, expected,
        )  # fmt: skip

    # -- one step ----------------------------------------------------------------------------------

    def _rows(self, batch: int) -> int:
        """Rows of a step of `batch` samples."""
        return self.padded(batch)

    def _write_blocks(self) -> None:
        """Copy the leaves' blocks into the table, where they have got any since the last time."""
        count = sum(len(leaf.blocks) for leaf in self.leaves)
        if count == self._num_blocks:
            return
        self._num_blocks, most = count, self._cursor.blocks.shape[1]
        table = [leaf.blocks + [-1] * (most - len(leaf.blocks)) for leaf in self.leaves]
        self._cursor.blocks[: len(table)] = self._tensor(table)

    def _steps(self, plan: ForestPlan, steps: int) -> None:
        batch = len(self.leaves)
        keys = self._table[:, :batch]
        positions = self._live.count[:batch, None] + torch.arange(steps, device=self.device)
        drawn = uniforms(keys[_KEY].T, keys[_SAMPLE], positions).T.contiguous()
        if self._cpp is None:
            for uniform in drawn:
                self._step(plan, batch, uniform)
            return
        uniform = torch.empty_like(drawn[0])
        step = partial(self._step, plan, batch, uniform)
        for i, _ in enumerate(cpp.replayed(step, steps)):
            uniform.copy_(drawn[i])

    def _step(self, plan: ForestPlan, batch: int, uniform: Tensor) -> None:
        """One step of the first `batch` of the plan's rows. Everything that differs from step to
        step is on the device."""
        assert plan.suffix is not None
        rows = len(plan.positions)
        cache_index = self._cursor.cache_index[:rows]
        hidden = self.forward(self._live.token[:rows], plan.positions, cache_index, plan)
        live = self._live.first(batch)
        logits = self.head_logits(hidden)[:batch]
        self.draw(live, logits, uniform, self._cursor)

    def _make_plan(self, max_length: int) -> ForestPlan:
        """A plan for all steps until the live set changes or a suffix outgrows the splits of
        `max_length` tokens."""
        rows = self._rows(len(self.leaves))
        at = [leaf.end.stop + leaf.count - 1 for leaf in self.leaves]
        return ForestPlan(
            decode_tiles([leaf.end for leaf in self.leaves], self.keys_per_partial),
            self._cursor.position[:rows],
            self._suffix(rows, max_length),
            advancing=True,
            per_split=self.deterministic,
            host_positions=at + [0] * (rows - len(at)),
        )

    def _suffix(self, rows: int, max_length: int) -> Suffixes:
        blocks, length = self._cursor.blocks[:rows], self._cursor.length[:rows]
        return Suffixes(blocks, length, self._table[_PROMPT, :rows], max_length)


# capture(step) gives what runs the same step again, on the same tensors, without the host's work.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class CudaGraphs:
    """Captures steps as CUDA graphs, which share their memory since one runs after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """A step that has run before, so that its kernels are compiled. Raises RuntimeError for
        what cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            raise RuntimeError("the decode step cannot be captured as a CUDA graph") from error
        return graph.replay


@dataclass
class _Bucket:
    """All live sets of up to so many rows and splits: their plan, and the captured step."""

    static: StaticPlan
    replay: Callable[[], None] | None = None


class GraphDecoder(Decoder):
    """Decode steps that the device replays. Rows are rounded up to a power of two, and so is what
    attention's plans take (`StaticPlan`): the captured step of such a bucket serves all live sets
    that fit. Its first step is run by the host, which compiles the kernels; it is captured again
    where a plan outgrows the room of those before."""

    def __init__(
        self, model: Transformer, automaton: ScoreAutomaton, cache: KVCache, *,
        capture: Capture, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, automaton, cache, **options)
        config, weight = self.config, model.head_weight
        self._capture = capture
        self._windows = {spec.window for spec in config.attention}
        self._shape = HeadShape.of(
            config.num_heads,
            config.cached_heads,
            config.cached_key_dim,
            config.cached_value_dim,
            weight.dtype,
            target_of(weight),
            decode=True,
        )
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._loaded: ForestPlan | None = None  # the plan that its bucket holds

    def _rows(self, batch: int) -> int:
        return power_of_two(batch, ALIGN)

    def _make_plan(self, max_length: int) -> ForestPlan:
        """With room for a power of two of splits."""
        splits = power_of_two(splits_of(max_length))
        return super()._make_plan(min(splits, self._cursor.blocks.shape[1]) * MAX_SPLIT)

    def _steps(self, plan: ForestPlan, steps: int) -> None:
        assert plan.suffix is not None
        rows = len(plan.positions)
        key = rows, plan.suffix.max_length
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(
                StaticPlan(
                    plan.positions, self._suffix(*key), self._windows, self._shape, plan.per_split
                )
            )
        grown = False
        if self._loaded is not plan:
            grown = bucket.static.load(plan)
            self._loaded = plan
        if bucket.replay is None or grown:
            step = partial(self._drawing_step, bucket.static.plan)
            step()
            bucket.replay = self._capture(step)  # waits for replays of the one that goes
            steps -= 1
        for _ in range(steps):
            bucket.replay()

    def _drawing_step(self, plan: ForestPlan) -> None:
        """A step of all rows, live or not, with its uniforms."""
        rows = len(plan.positions)
        keys = self._table[:, :rows]
        uniform = uniforms(keys[_KEY].T, keys[_SAMPLE], self._live.count[:rows])
        self._step(plan, rows, uniform)


def make_decoder(
    model: Transformer, automaton: ScoreAutomaton, cache: KVCache, **options: Any
) -> Decoder:
    """The decoder of a device: on a GPU the one that replays, never another."""
    if cache.k[0].is_cuda:
        return GraphDecoder(model, automaton, cache, capture=CudaGraphs(), **options)
    return Decoder(model, automaton, cache, **options)
