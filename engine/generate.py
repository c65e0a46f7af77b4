"""Sample the judgements of many rows: prefill what is new, decode all leaves, retire, join.

    admit   rows are pulled as slots come free; segments that are not yet in the cache are prefilled
            together; each new leaf gets its first token from the last token of its prompt
    decode  a few steps of all live leaves (`engine/decode.py`); the host looks at the finished
            flags after these steps only
    retire  finished leaves leave, their segments are let go of, the rest is put in order again

A sample depends on its own prompt, key and index only: the rows of a matmul are padded to a
multiple of 16, keys are partitioned by the sample's own segments, uniforms are keyed by row, sample
and position. So slots, batch size and neighbours change nothing, bit for bit in float32 on CPU.

Works on token ids; needs nothing of templates, requests or verdicts.
"""

import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from engine.decode import Decoder, Sampled
from engine.forest import Forest, Node, TokenIds, prefill_items
from engine.kv_cache import ALIGN, SCRATCH_CELLS, KVCache, cell_bytes, round_up
from engine.memory import cache_budget, is_out_of_memory
from kernels.extract_scores import Reason, ScoreAutomaton
from kernels.forest_plan import ForestPlan
from kernels.launch import to_device
from kernels.sample_token import SamplingOptions, uniforms
from kernels.take_token import LiveSamples
from models.config import ModelConfig
from models.transformer import Transformer

SYNC_STEPS = 8  # decode steps between two looks at the finished flags
PREFILL_TOKENS = 4096  # tokens of one prefill forward


@dataclass
class Group:
    """One row's samples. `prompts[j]` is sample j's prompt as non-empty segments; `key` the row's
    token stream; `num_scores` the scores a judgement must hold; `tag` is the caller's."""

    prompts: Sequence[Sequence[TokenIds]]
    key: tuple[int, int]
    num_scores: int
    tag: Any = None


@dataclass
class Generation:
    """One sample: its tokens (with the end token, if it came) and their log-probs, natural, under
    the model and under the distribution sampled from; scores in shown order where VALID."""

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finish: Literal["box", "eos", "length"]
    reason: Reason
    scores: tuple[int, ...] | None


@dataclass
class GroupResult:
    """All samples of a group, in order. `error` instead of samples when it could not be run."""

    group: Group
    generations: list[Generation]
    tree_tokens: int
    error: str | None = None


@dataclass
class Usage:
    """What was really computed: tokens run through the model, and seconds."""

    prefill_tokens: int = 0
    decode_tokens: int = 0  # kept tokens, one per live sample and step
    idle_tokens: int = 0  # steps of samples that had finished and were not yet retired
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass
class _Pending:
    """A group under way: its ends in the forest, those that it holds itself until all its samples
    have a slot (so that no prompt is computed twice), and the samples that are done."""

    group: Group
    ends: list[Node]
    tree_tokens: int
    held: set[Node] = field(default_factory=set)
    done: dict[int, Generation] = field(default_factory=dict)


@dataclass(eq=False)
class _Leaf:
    """A live sample: its group, its index in it, where its prompt ends, its slot, its limit; its
    tokens as `engine.decode` counts them, and as of the last look."""

    pending: _Pending
    sample: int
    end: Node
    slot: int
    limit: int
    count: int = 1
    kept: int = 1

    @property
    def key(self) -> tuple[int, int, int]:
        return (*self.pending.group.key, self.sample)

    @property
    def order(self) -> tuple[int, ...]:
        return (*(node.number for node in self.end.path()), self.sample)


class Generator:
    """Runs groups of samples on one model with one set of options."""

    def __init__(
        self,
        model: Transformer,
        automaton: ScoreAutomaton,
        *,
        options: SamplingOptions,
        max_new_tokens: int,
        max_batch: int,
        max_scores: int,
        stop: Literal["box", "eos"] = "box",
        ignore_eos: bool = False,
        cache_bytes: int | None = None,
        usage: Usage | None = None,
    ) -> None:
        """max_batch: most samples decoded together. max_scores: most scores of any group. stop:
        "box" ends a sample as soon as its scores are decided, "eos" lets it end by itself.
        cache_bytes bounds keys and values (default: what memory allows, `engine/memory.py`); a
        batch that does not fit is made smaller. Raises ValueError for limits below 1 or a cache
        that cannot hold one sample."""
        for name, value in (("max_new_tokens", max_new_tokens), ("max_batch", max_batch)):
            if value < 1:
                raise ValueError(f"{name} = {value} is less than 1")
        self.model = model
        self.config = model.config
        self.automaton = automaton
        self.max_new_tokens = min(max_new_tokens, self.config.max_position_embeddings)
        self.max_scores = max_scores
        self.stop = stop
        self.usage = usage if usage is not None else Usage()
        weight = model.head_weight
        self.device = weight.device
        per_cell = cell_bytes(self.config, weight.dtype)
        suffix = round_up(self.max_new_tokens)
        budget = cache_bytes
        if budget is None:
            budget = cache_budget(self.config, weight.dtype, self.device, max_batch, PREFILL_TOKENS)
        cells = budget // per_cell // ALIGN * ALIGN
        # Room for one prompt as long as the context comes before more samples.
        prompt = min(round_up(self.config.max_position_embeddings) + ALIGN, cells // 2)
        slots = min(max_batch, (cells - prompt - SCRATCH_CELLS) // suffix)
        shared = cells - slots * suffix - SCRATCH_CELLS
        if slots < 1 or shared < ALIGN:
            raise ValueError(
                f"{budget} bytes of cache hold {cells} tokens: not {suffix} of a sample and "
                "a prompt; allow fewer new tokens or more cache"
            )
        shared = min(shared, 4 * self.config.max_position_embeddings + slots * suffix)
        self.cache = _allocate(self.config, slots, suffix, shared, weight.dtype, self.device)
        self.forest = Forest(self.cache)
        ends = [] if ignore_eos else sorted(self.config.eos_token_ids)
        self.leaves: list[_Leaf] = []
        self.decoder = Decoder(
            model,
            automaton,
            self.cache,
            options=options,
            end_ids=torch.tensor(ends, dtype=torch.int64, device=self.device),
            stop_at_box=stop == "box",
            max_new_tokens=self.max_new_tokens,
            max_scores=max_scores,
        )

    @torch.inference_mode()
    def run(self, groups: Iterable[Group]) -> Iterator[GroupResult]:
        """Run groups, pulled as there is room for them; yields them as they are done. A group
        without samples is done at once."""
        source = iter(groups)
        waiting: deque[tuple[_Pending, int]] = deque()  # samples without a slot
        while True:
            yield from self._admit(source, waiting)
            if not self.leaves:
                assert not waiting
                return
            self._decode()
            yield from self._retire()

    # -- admission -------------------------------------------------------------------------------

    def _admit(
        self, source: Iterator[Group], waiting: deque[tuple[_Pending, int]]
    ) -> Iterator[GroupResult]:
        """Fill the free slots, prefill what is new, and draw the new leaves' first tokens."""
        joining: list[_Leaf] = []
        fresh: list[Node] = []
        while self.cache.idle_slots:
            if not waiting:
                group = next(source, None)
                if group is None:
                    break
                if not group.prompts:
                    yield GroupResult(group, [], 0)
                    continue
                longest = max(sum(map(len, prompt)) for prompt in group.prompts)
                if longest >= self.config.max_position_embeddings:
                    yield GroupResult(
                        group, [], 0, _too_long(longest, self.config.max_position_embeddings)
                    )
                    continue
                pending = _Pending(group, *self.forest.grow(group.prompts))
                waiting.extend((pending, sample) for sample in range(len(group.prompts)))
            pending, sample = waiting[0]
            end = pending.ends[sample]
            nodes = self.forest.allocate(end)
            if nodes is None:
                if self.leaves or joining:
                    break  # room comes when others retire
                if pending.held:
                    self._let_go(pending)
                    continue
                while waiting and waiting[0][0] is pending:
                    waiting.popleft()
                size = self.cache.size - self.cache.shared_base
                error = f"the prompt needs {end.stop} tokens of cache, there are {size}"
                yield GroupResult(pending.group, [], pending.tree_tokens, error)
                continue
            waiting.popleft()
            fresh += nodes
            if not waiting or waiting[0][0] is not pending:
                self._let_go(pending)
            elif end not in pending.held:
                self.forest.allocate(end)
                pending.held.add(end)
            limit = min(self.max_new_tokens, self.config.max_position_embeddings - end.stop)
            joining.append(_Leaf(pending, sample, end, self.cache.take_slot(), limit))
        if joining:
            started = time.perf_counter()
            self._prefill(fresh, {leaf.end for leaf in joining})
            self._join(joining)
            self.usage.prefill_seconds += time.perf_counter() - started

    def _let_go(self, pending: _Pending) -> None:
        for end in pending.held:
            self.forest.release(end)
        pending.held.clear()

    def _prefill(self, fresh: Sequence[Node], ends: set[Node]) -> None:
        """Run the tokens of fresh nodes, parents first, and keep the logits after each end.

        An end that came into the cache as part of a longer prompt has no logits yet: its last
        token is run again, which writes the same keys and values.
        """
        queue = deque((node, 0) for node in fresh)
        old = ends.difference(fresh)
        queue.extend((end, len(end.token_ids) - 1) for end in old if end.logits is None)
        while queue:
            pieces: list[tuple[Node, int, int]] = []
            room = PREFILL_TOKENS
            while queue and room:
                node, first = queue.popleft()
                stop = min(len(node.token_ids), first + room)
                pieces.append((node, first, stop))
                room -= stop - first
                if stop < len(node.token_ids):
                    queue.appendleft((node, stop))
            hidden = self._forward_prefill(pieces)
            row = -1
            last: dict[Node, int] = {}
            for node, first, stop in pieces:
                row += stop - first
                if node in ends and stop == len(node.token_ids):
                    last[node] = row
            if last:
                padding = -len(last) % ALIGN
                rows = self._tensor([*last.values(), *[0] * padding])
                for node, logits in zip(last, self.model.head_logits(hidden[rows]), strict=False):
                    node.logits = logits.clone()  # a view would keep all rows alive

    def _forward_prefill(self, pieces: Sequence[tuple[Node, int, int]]) -> Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for node, first, stop in pieces:
            assert node.slab is not None
            tokens += node.token_ids[first:stop]
            positions += range(node.start + first, node.start + stop)
            slots += range(node.slab.start + first, node.slab.start + stop)
        self.usage.prefill_tokens += len(tokens)
        padding = -len(tokens) % ALIGN
        slots += range(padding)
        positions += [0] * padding
        at = self._tensor(positions)
        return self.decoder.forward(
            self._tensor(tokens + [0] * padding),
            at,
            self._tensor(slots),
            ForestPlan(prefill_items(pieces), at, host_positions=positions),
        )

    def _join(self, joining: list[_Leaf]) -> None:
        """Draw first tokens and put the new leaves among the live ones, depth-first."""
        num_scores = torch.tensor([leaf.pending.group.num_scores for leaf in joining])
        fresh = LiveSamples.start(
            limit=self._tensor([leaf.limit for leaf in joining]),
            slot=self._tensor([leaf.slot for leaf in joining]),
            scores=self.automaton.start(num_scores, self.max_scores),
        )
        logits = [leaf.end.logits for leaf in joining]
        first = torch.stack([row for row in logits if row is not None])
        assert len(first) == len(joining), "an end without logits"
        keys = torch.tensor([leaf.key for leaf in joining])
        uniform = uniforms(keys[:, :2], keys[:, 2], torch.zeros_like(keys[:, 2]))
        self.decoder.draw(fresh, first, to_device(uniform, self.device))
        self.leaves += joining
        order = sorted(range(len(self.leaves)), key=lambda i: self.leaves[i].order)
        self._select(self.decoder.live.concat(fresh), order)

    # -- decode ----------------------------------------------------------------------------------

    def _decode(self) -> None:
        """SYNC_STEPS steps of all live leaves, or fewer when the longest can only do fewer."""
        started = time.perf_counter()
        steps = min(SYNC_STEPS, max(leaf.limit - leaf.count for leaf in self.leaves))
        if steps > 0 and not bool(self.decoder.live.finished.all()):
            self.decoder.run(steps)
            self.usage.idle_tokens += steps * len(self.leaves)
        self.usage.decode_seconds += time.perf_counter() - started

    # -- retirement ------------------------------------------------------------------------------

    def _retire(self) -> Iterator[GroupResult]:
        """Take finished leaves out; yields the groups that are complete by it."""
        counts, finished = self.decoder.look().read()
        for leaf, count in zip(self.leaves, counts, strict=True):
            self.usage.decode_tokens += count - leaf.kept
            self.usage.idle_tokens -= count - leaf.kept
            leaf.kept = count
        rows = [i for i, done in enumerate(finished) if done]
        if not rows:
            return
        leaving = [self.leaves[i] for i in rows]
        found = self.decoder.fetch(rows, [leaf.kept for leaf in leaving])
        self._select(self.decoder.live, [i for i, done in enumerate(finished) if not done])
        results = []
        for leaf, sampled in zip(leaving, found, strict=True):
            pending = leaf.pending
            pending.done[leaf.sample] = self._generation(leaf, sampled)
            self.cache.free_slot(leaf.slot)
            self.forest.release(leaf.end)
            if len(pending.done) == len(pending.group.prompts):
                generations = [pending.done[j] for j in range(len(pending.done))]
                results.append(GroupResult(pending.group, generations, pending.tree_tokens))
        yield from results

    def _generation(self, leaf: _Leaf, sampled: Sampled) -> Generation:
        stopped = self.stop == "box" and sampled.decided and not sampled.ended
        scores = sampled.scores[: leaf.pending.group.num_scores]
        return Generation(
            sampled.token_ids,
            sampled.logprobs,
            sampled.sampling_logprobs,
            "box" if stopped else "eos" if sampled.ended else "length",
            sampled.reason,
            tuple(scores) if sampled.reason == Reason.VALID else None,
        )

    def _select(self, live: LiveSamples, rows: Sequence[int]) -> None:
        """Keep of `leaves`, whose state `live` is, those at `rows`, in that order."""
        self.leaves = [self.leaves[i] for i in rows]
        self.decoder.load(live.index_select(self._tensor(rows)), self.leaves)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self.device)


def _allocate(
    config: ModelConfig,
    slots: int,
    suffix: int,
    shared: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """A cache; where memory runs out, one of half the slots, and so on, with a warning."""
    while True:
        try:
            return KVCache(config, slots, suffix, shared, dtype, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        size = (slots * suffix + shared) * cell_bytes(config, dtype)
        if slots == 1:
            raise ValueError(f"no memory for {size} bytes of cache for one sample: {reason}")
        warnings.warn(
            f"no memory for {size} bytes of cache for {slots} samples: trying {slots // 2}",
            RuntimeWarning,
            stacklevel=3,
        )
        slots, shared = slots // 2, round_up(shared // 2)


def _too_long(tokens: int, context: int) -> str:
    return f"the prompt has {tokens} tokens, the model's context is {context}"
