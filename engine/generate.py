"""Sample the judgements of many rows: prefill what is new, decode all leaves, retire, join.

    admit   rows are pulled as slots come free; segments that are not yet in the cache are prefilled
            together; each new leaf gets its first token from the last token of its prompt
    decode  a few steps of all live leaves: one forward, one `sample_token`, one `take_token`; the
            host looks at the finished flags after these steps only
    retire  finished leaves leave, their segments are let go of, the rest is put in order again

A sample depends on its own prompt, key and index only: the rows of a matmul are padded to a
multiple of 16, keys are partitioned by the sample's own segments, uniforms are keyed by row, sample
and position. So slots, batch size and neighbours change nothing, bit for bit in float32 on CPU, and
on a GPU with `deterministic`: matrix products in fixed tiles, one partial result for every split.

Works on token ids; needs nothing of templates, requests or verdicts.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from engine.forest import Forest, Node, TokenIds, decode_items, prefill_items
from engine.kv_cache import ALIGN, SCRATCH_CELLS, KVCache, cell_bytes, round_up
from kernels.extract_scores import Reason, ScoreAutomaton, scores_of
from kernels.forest_attention import forest_attention, keys_per_partial
from kernels.forest_plan import ForestPlan, SuffixTiles
from kernels.launch import runs_triton
from kernels.matmul import matmul
from kernels.sample_token import SamplingOptions, sample_token, uniforms
from kernels.take_token import LiveSamples, Moving, Records, take_token
from kernels.write_kv import write_kv
from models.transformer import Attend, Transformer, linear

SYNC_STEPS = 8  # decode steps between two looks at the finished flags
PREFILL_TOKENS = 4096  # tokens of one prefill forward
CACHE_BYTES = 8 << 30  # of keys and values, unless the caller says otherwise


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
    """A live sample: its group, its index in it, where its prompt ends, its slot, its limit."""

    pending: _Pending
    sample: int
    end: Node
    slot: int
    limit: int

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
        deterministic: bool = False,
        cache_bytes: int = CACHE_BYTES,
        usage: Usage | None = None,
    ) -> None:
        """max_batch: most samples decoded together. max_scores: most scores of any group. stop:
        "box" ends a sample as soon as its scores are decided, "eos" lets it end by itself.
        deterministic: results on a GPU have the same bits in any company; on CPU it changes
        nothing. cache_bytes bounds keys and values; a batch that does not fit is made smaller.
        Raises ValueError for limits below 1 or a cache that cannot hold one sample."""
        for name, value in (("max_new_tokens", max_new_tokens), ("max_batch", max_batch)):
            if value < 1:
                raise ValueError(f"{name} = {value} is less than 1")
        self.model = model
        self.config = model.config
        self.automaton = automaton
        self.options = options
        self.max_new_tokens = min(max_new_tokens, self.config.max_position_embeddings)
        self.max_scores = max_scores
        self.stop = stop
        self.usage = usage if usage is not None else Usage()
        weight = model.head_weight
        self.device = weight.device
        self.deterministic = deterministic
        self.product = matmul if deterministic and runs_triton(weight) else linear
        # Where every item is a partial result by itself, as in torch, inlining would save none.
        self.keys_per_partial = 0
        if runs_triton(weight) and not deterministic:
            config = self.config
            self.keys_per_partial = keys_per_partial(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                config.v_head_dim,
                weight.dtype,
            )
        per_cell = cell_bytes(self.config, weight.dtype)
        suffix = round_up(self.max_new_tokens)
        cells = cache_bytes // per_cell
        # Room for one prompt as long as the context comes before more samples.
        prompt = min(round_up(self.config.max_position_embeddings) + ALIGN, cells // 2)
        slots = min(max_batch, (cells - prompt - SCRATCH_CELLS) // suffix)
        shared = cells - slots * suffix - SCRATCH_CELLS
        if slots < 1 or shared < ALIGN:
            raise ValueError(
                f"{cache_bytes} bytes of cache hold {cells} tokens: not {suffix} of a sample and "
                "a prompt; allow fewer new tokens or more cache"
            )
        shared = min(shared, 4 * self.config.max_position_embeddings + slots * suffix)
        self.cache = KVCache(self.config, slots, suffix, shared, weight.dtype, self.device)
        self.forest = Forest(self.cache)
        ends = [] if ignore_eos else sorted(self.config.eos_token_ids)
        self.end_ids = torch.tensor(ends, dtype=torch.int64, device=self.device)
        self.leaves: list[_Leaf] = []
        self.live: LiveSamples | None = None  # one row for each leaf, in their order
        self.records = Records.empty(slots, self.max_new_tokens, self.device)

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
                rows = torch.tensor([*last.values(), *[0] * padding], device=self.device)
                for node, logits in zip(last, self._head_logits(hidden[rows]), strict=False):
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
        at = torch.tensor(positions + [0] * padding, device=self.device)
        return self._forward(
            torch.tensor(tokens + [0] * padding, device=self.device),
            at,
            torch.tensor(slots, device=self.device),
            ForestPlan(prefill_items(pieces), at, per_split=self.deterministic),
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
        self._draw(fresh, first, self._uniforms(joining, fresh.count, 1)[:, 0])
        self.live = fresh if self.live is None else self.live.concat(fresh)
        self.leaves += joining
        self._select(sorted(range(len(self.leaves)), key=lambda i: self.leaves[i].order))

    # -- decode ----------------------------------------------------------------------------------

    def _decode(self) -> None:
        """SYNC_STEPS steps of all live leaves, or fewer when the longest can only do fewer."""
        started = time.perf_counter()
        live = self.live
        assert live is not None
        counts = live.count.tolist()
        steps = min(
            SYNC_STEPS, max(leaf.limit - c for leaf, c in zip(self.leaves, counts, strict=True))
        )
        if steps > 0 and not bool(live.finished.all()):
            batch = len(self.leaves)
            rows = round_up(batch)
            plan, slots = self._decode_plan(counts, steps, rows)
            assert plan.suffix is not None
            moving = plan.positions, plan.suffix.length, slots
            drawn = self._uniforms(self.leaves, live.count, steps).T.contiguous()
            tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
            for step in range(steps):
                tokens[:batch] = live.token
                hidden = self._forward(tokens, plan.positions, slots, plan)
                logits = self._head_logits(hidden)[:batch]
                self._draw(live, logits, drawn[step], moving)
            made = int((live.count.sum() - sum(counts)).item())
            self.usage.decode_tokens += made
            self.usage.idle_tokens += steps * batch - made
        self.usage.decode_seconds += time.perf_counter() - started

    def _decode_plan(self, counts: list[int], steps: int, rows: int) -> tuple[ForestPlan, Tensor]:
        """The plan of the next `steps` steps, and the cache slot that each row writes."""
        padding = rows - len(self.leaves)
        capacity = self.cache.suffix_capacity
        prompts = [leaf.end.stop for leaf in self.leaves]
        # A leaf with c tokens has c - 1 of them in the cache and now writes the last.
        at = [stop + c - 1 for stop, c in zip(prompts, counts, strict=True)]
        first = [self.cache.suffix_base + leaf.slot * capacity for leaf in self.leaves]
        slots = [start + c - 1 for start, c in zip(first, counts, strict=True)]
        row_of_slot = [-1] * self.cache.num_slots
        for row, leaf in enumerate(self.leaves):
            row_of_slot[leaf.slot] = row
        used = 1 + max(leaf.slot for leaf in self.leaves)

        suffix = SuffixTiles(
            base=self.cache.suffix_base,
            capacity=capacity,
            row=self._tensor(row_of_slot[:used]),
            length=self._tensor(counts + [0] * padding),
            position=self._tensor(prompts + [0] * padding),
            max_length=min(max(counts) + steps, capacity),
        )
        items = decode_items([leaf.end for leaf in self.leaves], self.keys_per_partial)
        plan = ForestPlan(
            items,
            self._tensor(at + [0] * padding),
            suffix,
            moving=True,
            per_split=self.deterministic,
        )
        return plan, self._tensor(slots + list(range(padding)))

    def _draw(
        self, live: LiveSamples, logits: Tensor, uniform: Tensor, moving: Moving | None = None
    ) -> None:
        """Draw the next token of each live sample from the model's raw logits, and take it."""
        drawn = sample_token(logits, uniform, self.options, self.config.final_softcap)
        stop_at_box = self.stop == "box"
        take_token(live, self.records, *drawn, self.automaton, self.end_ids, stop_at_box, moving)

    def _uniforms(self, leaves: Sequence[_Leaf], count: Tensor, steps: int) -> Tensor:
        """(B, steps) uniforms for the next tokens of leaves that have `count` tokens."""
        table = [(*leaf.pending.group.key, leaf.sample) for leaf in leaves]
        keys = torch.tensor(table, dtype=torch.int64, device=self.device)
        positions = count[:, None] + torch.arange(steps, device=self.device)
        return uniforms(keys[:, :2], keys[:, 2], positions)

    # -- retirement ------------------------------------------------------------------------------

    def _retire(self) -> Iterator[GroupResult]:
        """Take finished leaves out; yields the groups that are complete by it."""
        live = self.live
        assert live is not None
        finished = live.finished.tolist()
        if not any(finished):
            return
        scores, reasons = scores_of(live.scores, live.ended)
        rows = [i for i, done in enumerate(finished) if done]
        leaving = [self.leaves[i] for i in rows]
        self._select([i for i, done in enumerate(finished) if not done])
        counts, ended = live.count.tolist(), live.ended.tolist()
        decided = live.scores.decided.tolist()
        results = []
        for i, leaf in zip(rows, leaving, strict=True):
            slot, length = leaf.slot, counts[i]
            logprobs, sampling_logprobs = self.records.logprobs[:, slot, :length].tolist()
            reason = Reason(int(reasons[i]))
            pending = leaf.pending
            stopped = self.stop == "box" and decided[i] and not ended[i]
            pending.done[leaf.sample] = Generation(
                self.records.tokens[slot, :length].tolist(),
                logprobs,
                sampling_logprobs,
                "box" if stopped else "eos" if ended[i] else "length",
                reason,
                tuple(scores[i, : pending.group.num_scores].tolist())
                if reason == Reason.VALID
                else None,
            )
            self.cache.free_slot(slot)
            self.forest.release(leaf.end)
            if len(pending.done) == len(pending.group.prompts):
                generations = [pending.done[j] for j in range(len(pending.done))]
                results.append(GroupResult(pending.group, generations, pending.tree_tokens))
        yield from results

    def _select(self, rows: Sequence[int]) -> None:
        """Keep the live leaves at `rows`, in that order."""
        assert self.live is not None
        self.leaves = [self.leaves[i] for i in rows]
        self.live = self.live.index_select(self._tensor(rows)) if rows else None

    # -- the model -------------------------------------------------------------------------------

    def _forward(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, plan: ForestPlan
    ) -> Tensor:
        return self.model(tokens, positions, self._attend(slots, plan), self.product)

    def _head_logits(self, hidden: Tensor) -> Tensor:
        return self.model.head_logits(hidden, self.product)

    def _attend(self, slots: Tensor, plan: ForestPlan) -> Attend:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
            write_kv(k, v, k_cache, v_cache, slots)
            spec = self.config.attention[layer]
            return forest_attention(
                q, k_cache, v_cache, plan, spec.scale, spec.softcap, spec.window
            )

        return attend

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _too_long(tokens: int, context: int) -> str:
    return f"the prompt has {tokens} tokens, the model's context is {context}"
