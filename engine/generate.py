"""Sample the judgements of many rows: prefill what is new, decode all leaves, retire, join.

    admit   rows are pulled as slots come free; segments that are not yet in the cache are prefilled
            together, in pieces between which others decode; each new leaf gets its first token from
            the last token of its prompt
    decode  a few steps of all live leaves (`engine/decode.py`); the host polls the finished flags
            after these steps only, and on a GPU while the next ones run. Leaves get blocks of cells
            as they grow; where there are no more, the youngest is set aside: its keys and values go
            to the host, and come back before anything new is admitted
    retire  finished leaves leave, their segments are released, the rest is put in order again

A sample depends on its own prompt, key and index only: keys are partitioned by the sample's own
segments, uniforms are keyed by row, sample and position. So slots, batch size, neighbours and the
size of the cache change nothing: bit for bit in C++ in float32 on a CPU, and in torch up to
rounding.

Works on token ids; needs nothing of templates, requests or verdicts.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from engine.decode import DeviceEvent, Sampled, StatusPoll, make_decoder
from engine.expected import expected_scores
from engine.forced import ForcedScores, ScoreForm
from engine.forest import Forest, Node, TokenIds, tree_tokens
from engine.forward import Piece, last_rows, take_pieces
from engine.kv_cache import ALIGN, KVCache, cell_bytes, round_up, scratch_cells
from engine.memory import cache_budget, is_out_of_memory
from kernels.accept_token import LiveSamples
from kernels.device import to_device
from kernels.expected_score import NumberEdges, expected_score
from kernels.extract_scores import ScoreAutomaton
from kernels.forest_attention.plan import MAX_SPLIT, splits_of
from kernels.sample_token import SamplingOptions, sample_token, uniforms
from kernels.score_grammar import Reason
from kernels.segment_attention import Backend
from models.config import DTYPES, ModelConfig
from models.transformer import Transformer

SYNC_STEPS = 8  # decode steps between two polls of the finished flags
PREFILL_TOKENS = 4096  # tokens of one prefill forward
INTERLEAVED_TOKENS = 2048  # of one between two blocks of decode steps, on a GPU


@dataclass
class Group:
    """One row's samples. `prompts[j]` is sample j's prompt as non-empty segments; `key` the row's
    token stream; `num_scores[j]` the scores that sample j must hold; `tag` is the caller's.

    `next_round`, where there is one, is given all samples so far, in order, when every one of them
    is done (at first none), and says how many to draw next: 0 ends the group. It must depend on
    nothing else. Without it all samples are drawn at once. `opening` is the text at the end of the
    prompt that a sample goes on with, and `nonce` the row's, as `ScoreAutomaton.start` takes them.
    `is_over`, where there is one, is asked from time to time: once it says True the group ends with
    the samples that are done by then.
    """

    prompts: Sequence[Sequence[TokenIds]]
    key: tuple[int, int]
    num_scores: Sequence[int]
    tag: Any = None
    next_round: Callable[[Sequence["Generation"]], int] | None = None
    opening: bytes = b""
    nonce: str | None = None
    is_over: Callable[[], bool] | None = None


@dataclass
class Generation:
    """One sample: its tokens (with the end token, if it came) and their log-probs, natural, under
    the model and under the distribution sampled from; scores in shown order where VALID. forced: it
    was made to write its scores (`engine/forced.py`); tokens that were not drawn have 0 for a
    log-prob. expected: where it is read, the expected score of each token, NaN for most, and
    expected_scores those of `scores`, in thousandths (`engine/expected.py`)."""

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finish: Literal["box", "eos", "length"]
    reason: Reason
    scores: tuple[int, ...] | None
    forced: bool = False
    expected: list[float] | None = None
    expected_scores: tuple[int, ...] | None = None


@dataclass
class GroupResult:
    """The samples of a group that were drawn, in order, and the distinct tokens of their prompts.
    `error` instead of samples when it could not be run. `drawn`, of a group that was over before
    all its samples were done: which samples these are."""

    group: Group
    generations: list[Generation]
    tree_tokens: int
    error: str | None = None
    drawn: list[int] | None = None


@dataclass
class Usage:
    """What was really computed: tokens run through the model, and seconds; `meta`: through the
    meta model."""

    prefill_tokens: int = 0
    decode_tokens: int = 0  # kept tokens, one per live sample and step
    idle_tokens: int = 0  # steps of samples that had finished and were not yet retired
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    meta_tokens: int = 0
    meta_seconds: float = 0.0


@dataclass(eq=False)
class _Pending:
    """A group under way: its ends in the forest, the ends that it retains until its last sample has
    a slot (so that no prompt is computed twice), how many samples it has requested, the samples
    that are done, those that are made to write their scores, and those that were set aside."""

    group: Group
    ends: list[Node]
    retained: set[Node] = field(default_factory=set)
    num_requested: int = 0
    done: dict[int, Generation] = field(default_factory=dict)
    forced: "dict[int, _Forced]" = field(default_factory=dict)
    aside: "dict[int, _Leaf]" = field(default_factory=dict)

    def end(self, sample: int) -> Node:
        """Where a sample's next token is to be drawn."""
        return self.forced[sample].end if sample in self.forced else self.ends[sample]

    def has_begun(self, sample: int) -> bool:
        """Whether a sample that waits has been live before: it has a slot, or needs none."""
        return sample in self.forced or sample in self.aside

    @property
    def holds(self) -> bool:
        """Whether it holds room in the cache beside its live samples'."""
        return bool(self.retained) or any(f.held is not None for f in self.forced.values())

    def next_round(self) -> list[tuple["_Pending", int]]:
        """Request the samples to draw next, when all earlier ones are done."""
        first, left = self.num_requested, len(self.group.prompts) - self.num_requested
        if left and self.group.next_round is not None:
            left = min(left, self.group.next_round([self.done[j] for j in range(first)]))
        self.num_requested += left
        return [(self, sample) for sample in range(first, self.num_requested)]


@dataclass
class _Forced:
    """A sample that is made to write its scores: what it has written, the form, where in the forest
    its text ends, and the node above that, while it is held until the end is in the cache."""

    generation: Generation
    scores: ForcedScores
    end: Node
    held: Node | None


@dataclass
class _Aside:
    """A sample that was set aside: its state (one row), and its own keys and values on the host, as
    `KVCache.read` gives them."""

    live: LiveSamples
    contents: list[Tensor]


@dataclass(eq=False)
class _Leaf:
    """A live sample: its group, its index in it, where its prompt ends, its slot, its limit, its
    number in the order of admission; the first cells of its blocks; its tokens as `engine.decode`
    counts them, and as of the last poll. While it is `aside` it has no blocks and holds no
    prompt."""

    pending: _Pending
    sample: int
    end: Node
    slot: int
    limit: int
    number: int
    blocks: list[int] = field(default_factory=list)
    count: int = 1
    kept: int = 1
    aside: _Aside | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        return (*self.pending.group.key, self.sample)

    @property
    def order(self) -> tuple[int, ...]:
        return (*(node.number for node in self.end.path()), self.sample)

    @property
    def cells(self) -> list[int]:
        """The cells of its own keys in the cache; those of its last token are not there yet."""
        chain = (range(block, block + MAX_SPLIT) for block in self.blocks)
        return [cell for block in chain for cell in block][: self.count - 1]

    def lacks_blocks(self, steps: int) -> bool:
        """Whether it must have more blocks before so many steps."""
        return len(self.blocks) < splits_of(min(self.count + steps, self.limit))

    @property
    def may_grow(self) -> bool:
        """Whether it may come to need more blocks."""
        return len(self.blocks) < splits_of(self.limit)


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
        prefill_backend: Backend | None = None,
        cache_bytes: int | None = None,
        usage: Usage | None = None,
        form: ScoreForm | None = None,
        edges: NumberEdges | None = None,
    ) -> None:
        """max_batch: most samples decoded together. max_scores: most scores of any group. stop:
        "box" ends a sample as soon as its scores are decided, "eos" lets it end by itself.
        deterministic: results on a GPU have the same bits in any company; on CPU it changes
        nothing. prefill_backend: whose attention a prefill runs, None for `forest_attention`.
        cache_bytes bounds the cache (default: what memory allows, `engine/memory.py`); samples that
        do not fit wait, some of them in the host's memory, beside it. form: a sample without valid
        scores is made to write them (`engine/forced.py`). edges: expected scores are read along
        these (`engine/expected.py`). Raises ValueError for limits below 1, a cache that cannot hold
        one sample, a backend that cannot prefill for this model, or a model in float64."""
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
        self.form = form
        self.edges = edges
        self._options = options
        weight = model.head_weight
        if weight.dtype not in DTYPES.values():
            raise ValueError(f"{weight.dtype} cannot be sampled in: load the model in float32")
        self.device = weight.device
        self.deterministic = deterministic
        per_cell = cell_bytes(self.config, weight.dtype)
        block = round_up(min(MAX_SPLIT, self.max_new_tokens))
        suffix = splits_of(self.max_new_tokens) * block
        budget = cache_bytes
        if budget is None:
            budget = cache_budget(self.config, weight.dtype, self.device, max_batch, PREFILL_TOKENS)
        cells = max(budget // per_cell // ALIGN * ALIGN - scratch_cells(max_batch), 0)
        least = suffix + ALIGN
        if cells < least:
            raise ValueError(
                f"{budget} bytes of cache hold {cells} tokens: not {suffix} of a sample "
                "and a prompt; allow fewer new tokens or more cache"
            )
        most = 4 * self.config.max_position_embeddings + 2 * max_batch * suffix
        cells = min(cells, most)
        self.cache = _allocate(
            self.config, max_batch, block, cells, least, weight.dtype, self.device
        )
        self.forest = Forest(self.cache)
        ends = [] if ignore_eos else sorted(self.config.eos_token_ids)
        self._ended = False  # the source of groups
        self.leaves: list[_Leaf] = []
        self._admitted = 0  # leaves so far
        self._joining: list[_Leaf] = []  # those whose prompts are being prefilled
        self._filling: list[tuple[_Pending, int]] = []  # forced samples that are, beside them
        self._queue: deque[tuple[Node, int]] = deque()  # what is left of that, from which token on
        # How many polls the host leaves unread while it prepares the device's next work. A sample
        # that has finished meanwhile idles; on CPU there is nothing to gain.
        self.ahead = 1 if self.device.type == "cuda" else 0
        self._polls: deque[tuple[tuple[_Leaf, ...], StatusPoll]] = deque()
        self._spans: deque[tuple[str, DeviceEvent, DeviceEvent]] = deque()
        self.decoder = make_decoder(
            model,
            automaton,
            self.cache,
            options=options,
            end_ids=torch.tensor(ends, dtype=torch.int64, device=self.device),
            stop_at_box=stop == "box",
            max_new_tokens=self.max_new_tokens,
            max_scores=max_scores,
            deterministic=deterministic,
            prefill_backend=prefill_backend,
            edges=edges,
        )

    @torch.inference_mode()
    def run(self, groups: Iterable[Group | None]) -> Iterator[GroupResult]:
        """Run groups, pulled as there is room for them; yields them as they are done. A group
        without samples is done at once. None stands for none at present: others run meanwhile."""
        source = iter(groups)
        # Samples that are not live, those that were before first.
        waiting: deque[tuple[_Pending, int]] = deque()
        self._ended = False
        while True:
            yield from self._end_early(waiting)
            yield from self._admit(source, waiting)
            yield from self._prefill(waiting)
            if not self.leaves and not self._joining and not self._filling:
                if waiting or not self._ended:
                    continue
                # Polls that are left are of leaves that have been taken out since.
                yield from self._retire(0, waiting)
                return
            yield from self._retire(self._decode(waiting), waiting)

    # -- admission -------------------------------------------------------------------------------

    def _admit(
        self, source: Iterator[Group | None], waiting: deque[tuple[_Pending, int]]
    ) -> Iterator[GroupResult]:
        """Fill the free slots with leaves that are to join, once those before them have."""
        if self._joining or self._filling:
            return
        joining: list[_Leaf] = []
        fresh: list[Node] = []
        growing = sum(leaf.may_grow for leaf in self.leaves)
        while self.cache.idle_slots or (waiting and waiting[0][0].has_begun(waiting[0][1])):
            if not waiting:
                try:
                    group = next(source)
                except StopIteration:
                    self._ended = True
                    break
                if group is None:
                    break
                if not group.prompts:
                    yield GroupResult(group, [], 0)
                    continue
                longest = max(sum(map(len, prompt)) for prompt in group.prompts)
                if longest >= self._context(group):
                    context, kept = self.config.max_position_embeddings, self._kept(group)
                    yield GroupResult(group, [], 0, too_long(longest, context, kept))
                    continue
                needed = max(self._most_cells(prompt, group) for prompt in group.prompts)
                room = self.cache.size - self.cache.base
                if needed > room:
                    error = f"a sample needs up to {needed} cells of cache, there are {room}"
                    yield GroupResult(group, [], 0, error)
                    continue
                waiting.extend(_Pending(group, self.forest.grow(group.prompts)[0]).next_round())
                assert waiting, "a group that wants none of its samples"
            pending, sample = waiting[0]
            end = pending.end(sample)
            leaf, forced = pending.aside.get(sample), pending.forced.get(sample)
            limit = min(self.max_new_tokens, self._context(pending.group) - end.stop)
            blocks = spare = 0
            if forced is None:
                blocks = splits_of(1 if leaf is None else leaf.count)
                grows = splits_of(limit) > blocks
                # Every leaf that may grow has to find one more, or samples would be set aside soon.
                spare = growing + grows if self.leaves or joining else 0
            nodes = self.forest.allocate(end, blocks + spare)
            if nodes is None:
                if self.leaves or joining or self._filling:
                    break  # room comes when others retire
                holder = self._holder(waiting)
                if holder is not None:  # nothing is live: whoever holds room, waits here
                    self._let_go(holder)
                    continue
                self._forgo(pending, waiting)
                room = self.cache.size - self.cache.base
                error = f"no scores can be forced after {end.stop} tokens in {room} cells of cache"
                yield GroupResult(pending.group, [], 0, error)
                continue
            waiting.popleft()
            fresh += nodes
            if forced is not None:
                self._release_held(forced)
                self._filling.append((pending, sample))
                continue
            if leaf is None:
                slot, number = self.cache.take_slot(), self._admitted
                leaf = _Leaf(pending, sample, end, slot, limit, number)
                self._admitted += 1
                if sample == len(pending.ends) - 1:
                    self._let_go(pending)
                elif end not in pending.retained:
                    self.forest.allocate(end)
                    pending.retained.add(end)
            for _ in range(blocks):
                block = self.cache.take_block()
                assert block is not None, "a block that was there is gone"
                leaf.blocks.append(block)
            if leaf.aside is not None:
                del pending.aside[sample]
                self.cache.write(self._tensor(leaf.cells), leaf.aside.contents)
            growing += leaf.may_grow
            joining.append(leaf)
        self._joining = joining
        self._queue.extend((node, 0) for node in fresh)
        # An end that came into the cache as part of a longer prompt has no logits yet: its last
        # token is run again, which writes the same keys and values.
        ends = {leaf.end for leaf in joining if leaf.aside is None}
        ends |= {pending.end(sample) for pending, sample in self._filling}
        old = ends.difference(fresh)
        self._queue.extend((end, len(end.token_ids) - 1) for end in old if end.logits is None)

    def _end_early(self, waiting: deque[tuple[_Pending, int]]) -> Iterator[GroupResult]:
        """End the groups that are over, with the samples that are done. Those whose prompts are
        being prefilled are asked once they have joined."""
        if self._joining or self._filling:
            return
        under_way = [leaf.pending for leaf in self.leaves] + [pending for pending, _ in waiting]
        over = [
            pending
            for pending in dict.fromkeys(under_way)
            if pending.group.is_over is not None and pending.group.is_over()
        ]
        leaving = [leaf for leaf in self.leaves if leaf.pending in over]
        if leaving:
            staying = [i for i, leaf in enumerate(self.leaves) if leaf.pending not in over]
            self._select(self.decoder.live, staying)
        for leaf in leaving:
            self.cache.free_slot(leaf.slot)
            self._free_blocks(leaf)
            self.forest.release(leaf.end)
        for pending in over:
            self._forgo(pending, waiting)
            drawn = sorted(pending.done)
            tokens = tree_tokens([pending.ends[j] for j in drawn])
            yield GroupResult(pending.group, [pending.done[j] for j in drawn], tokens, drawn=drawn)

    def _forgo(self, pending: _Pending, waiting: deque[tuple[_Pending, int]]) -> None:
        """Draw none of a group's samples that wait, and give up what they hold."""
        others = [entry for entry in waiting if entry[0] is not pending]
        waiting.clear()
        waiting.extend(others)
        for leaf in pending.aside.values():
            self.cache.free_slot(leaf.slot)
        self._let_go(pending)

    def forget(self) -> None:
        """Between two runs: compute anew what prompts begin with, since the model has changed."""
        assert not self.leaves, "samples are under way"
        self.forest.forget()

    def _context(self, group: Group) -> int:
        """The most tokens of a prompt and what follows it, but for what may be forced."""
        return self.config.max_position_embeddings - self._kept(group)

    def _most_cells(self, prompt: Sequence[TokenIds], group: Group) -> int:
        """The cells of a prompt and of a sample that is as long as it may be."""
        limit = min(self.max_new_tokens, self._context(group) - sum(map(len, prompt)))
        return sum(map(round_up, map(len, prompt))) + splits_of(limit) * self.cache.block_cells

    def _kept(self, group: Group) -> int:
        """Tokens of the context that are kept for scores that may be forced."""
        return 0 if self.form is None else self.form.most_tokens(max(group.num_scores))

    def _let_go(self, pending: _Pending) -> None:
        for end in pending.retained:
            self.forest.release(end)
        pending.retained.clear()
        for forced in pending.forced.values():
            self._release_held(forced)

    def _holder(self, entries: Sequence[tuple[_Pending, int]]) -> _Pending | None:
        """The last of these that holds room beside its live samples'."""
        return next((pending for pending, _ in reversed(entries) if pending.holds), None)

    def _release_held(self, forced: _Forced) -> None:
        if forced.held is not None:
            self.forest.release(forced.held)
            forced.held = None

    def _prefill(self, waiting: deque[tuple[_Pending, int]]) -> Iterator[GroupResult]:
        """Run what the joining leaves need, parents first, and let them join when all of it is in
        the cache; forced samples write what follows. While others decode it is one piece at a time,
        and on a GPU a small one: they stand still meanwhile. Yields the groups that this
        completes."""
        if not self._joining and not self._filling:
            return
        start = DeviceEvent(self.device)
        others_decode = bool(self.leaves)
        small = others_decode and self.device.type == "cuda"
        while self._queue:
            self._prefill_piece(INTERLEAVED_TOKENS if small else PREFILL_TOKENS)
            if others_decode:
                break
        results: list[GroupResult] = []
        if not self._queue:
            filling, self._filling = self._filling, []
            for pending, sample in filling:
                results += self._fill_in(pending, sample, waiting)
            joining, self._joining = self._joining, []
            if joining:
                self._join(joining)
        self._spans.append(("prefill_seconds", start, DeviceEvent(self.device)))
        yield from results

    def _prefill_piece(self, room: int) -> None:
        """Run the next `room` tokens that are to be prefilled, and keep the logits after ends."""
        ends = {leaf.end for leaf in self._joining}
        ends |= {pending.end(sample) for pending, sample in self._filling}
        pieces = take_pieces(self._queue, room)
        last = last_rows(pieces, ends)
        hidden = self._forward_prefill(pieces)
        if last:
            padding = self.decoder.padded(len(last)) - len(last)
            hidden = hidden[self._tensor([*last.values(), *[0] * padding])]
            for node, logits in zip(last, self.decoder.head_logits(hidden), strict=False):
                node.logits = logits.clone()  # a view would keep all rows alive

    def _forward_prefill(self, pieces: Sequence[Piece]) -> Tensor:
        self.usage.prefill_tokens += sum(stop - first for _, first, stop in pieces)
        return self.decoder.prefill(pieces)

    def _join(self, joining: list[_Leaf]) -> None:
        """Put leaves among the live ones, depth-first; new ones with their first tokens, those that
        were set aside as they were."""
        live = self.decoder.live
        if new := [leaf for leaf in joining if leaf.aside is None]:
            live = live.concat(self._start(new))
        self.leaves += new
        for leaf in joining:
            if leaf.aside is not None:
                live = live.concat(leaf.aside.live)
                self.leaves.append(leaf)
                leaf.aside = None
        order = sorted(range(len(self.leaves)), key=lambda i: self.leaves[i].order)
        self._select(live, order)

    def _start(self, new: list[_Leaf]) -> LiveSamples:
        """The state of new leaves, with their first tokens."""
        groups = [leaf.pending.group for leaf in new]
        nonces = [int(group.nonce) for group in groups if group.nonce is not None]
        fresh = LiveSamples.start(
            limit=self._tensor([leaf.limit for leaf in new]),
            slot=self._tensor([leaf.slot for leaf in new]),
            scores=self.automaton.start(
                torch.tensor([leaf.pending.group.num_scores[leaf.sample] for leaf in new]),
                self.max_scores,
                nonces if self.automaton.rules.nonce else None,
                [group.opening for group in groups],
            ),
        )
        logits = [leaf.end.logits for leaf in new]
        first = torch.stack([row for row in logits if row is not None])
        assert len(first) == len(new), "an end without logits"
        keys = torch.tensor([leaf.key for leaf in new])
        uniform = uniforms(keys[:, :2], keys[:, 2], torch.zeros_like(keys[:, 2]))
        self.decoder.draw(fresh, first, to_device(uniform, self.device))
        return fresh

    # -- decode ----------------------------------------------------------------------------------

    def _decode(self, waiting: deque[tuple[_Pending, int]]) -> int:
        """SYNC_STEPS steps of all live leaves, or fewer when the longest can only do fewer, and a
        poll. Returns how many polls may stay unread: none if there was no step to run."""
        if not self.leaves:
            return 0
        start = DeviceEvent(self.device)
        steps = min(SYNC_STEPS, self._most_steps())
        if not self.ahead and bool(self.decoder.live.finished.all()):
            steps = 0
        if steps and not self._grow(steps, waiting):
            return 0
        if steps:
            steps = min(steps, self._most_steps())
            self.decoder.run(steps)
            self.usage.idle_tokens += steps * len(self.leaves)  # until it is known who was
        poll = self.decoder.poll()
        self._polls.append((tuple(self.leaves), poll))
        self._spans.append(("decode_seconds", start, poll.event))
        return self.ahead if steps else 0

    def _most_steps(self) -> int:
        return max(leaf.limit - leaf.count for leaf in self.leaves)

    def _grow(self, steps: int, waiting: deque[tuple[_Pending, int]]) -> bool:
        """Give every leaf the blocks that it must have before so many steps, the oldest first; the
        youngest are set aside where there are too few. Returns whether the steps can be run: not
        before polls that may free blocks are read, nor before others, who hold some, have joined.
        """
        lacking = [leaf for leaf in self.leaves if leaf.lacks_blocks(steps)]
        for leaf in sorted(lacking, key=lambda leaf: leaf.number):
            while leaf.aside is None and leaf.lacks_blocks(steps):
                block = self.forest.take_block()
                if block is not None:
                    leaf.blocks.append(block)
                elif self._polls or self._joining or self._filling:
                    return False
                elif len(self.leaves) > 1:
                    self._set_aside(max(self.leaves, key=lambda leaf: leaf.number), waiting)
                elif (holder := self._holder([*waiting, (leaf.pending, leaf.sample)])) is not None:
                    self._let_go(holder)
                else:  # all that is left is in the way of itself: it comes back in one piece
                    self._set_aside(leaf, waiting)
        return bool(self.leaves)

    def _set_aside(self, leaf: _Leaf, waiting: deque[tuple[_Pending, int]]) -> None:
        """Take a leaf that has not finished out of the live ones and out of the cache."""
        row = self.leaves.index(leaf)
        live = self.decoder.live.index_select(self._tensor([row]))
        leaf.aside = _Aside(live, self.cache.read(self._tensor(leaf.cells)))
        self._select(self.decoder.live, [i for i in range(len(self.leaves)) if i != row])
        self._free_blocks(leaf)
        self.forest.release(leaf.end)
        leaf.pending.aside[leaf.sample] = leaf
        waiting.appendleft((leaf.pending, leaf.sample))

    def _free_blocks(self, leaf: _Leaf) -> None:
        for block in leaf.blocks:
            self.cache.free_block(block)
        leaf.blocks.clear()

    # -- retirement ------------------------------------------------------------------------------

    def _retire(self, ahead: int, waiting: deque[tuple[_Pending, int]]) -> Iterator[GroupResult]:
        """Read all polls but the last `ahead`, and take out the leaves that had finished. A group
        whose round is complete by it asks for its next one, ahead of new groups; yields those that
        ask for no more."""
        while len(self._polls) > ahead:
            leaves, poll = self._polls.popleft()
            counts, finished = poll.read()
            self._take_times()
            for leaf, count in zip(leaves, counts, strict=True):
                self.usage.decode_tokens += count - leaf.kept
                self.usage.idle_tokens -= count - leaf.kept
                leaf.kept = count
            done = {leaf for leaf, flag in zip(leaves, finished, strict=True) if flag}
            yield from self._take_out(
                [i for i, leaf in enumerate(self.leaves) if leaf in done], poll, waiting
            )

    def _take_out(
        self, rows: Sequence[int], poll: StatusPoll, waiting: deque[tuple[_Pending, int]]
    ) -> list[GroupResult]:
        """Take out the leaves at `rows`, which `poll` found finished. Returns the groups that this
        completes."""
        if not rows:
            return []
        leaving = [self.leaves[i] for i in rows]
        outcomes = self.decoder.fetch(rows, [leaf.kept for leaf in leaving], poll)
        staying = set(range(len(self.leaves))).difference(rows)
        self._select(self.decoder.live, sorted(staying))
        results = []
        for leaf, sampled in zip(leaving, outcomes, strict=True):
            pending, generation = leaf.pending, self._generation(leaf, sampled)
            self.cache.free_slot(leaf.slot)
            self._free_blocks(leaf)
            if self.form is not None and generation.scores is None:
                self._force(leaf, generation, waiting)
                continue
            self.forest.release(leaf.end)
            results += self._complete(pending, leaf.sample, generation, waiting)
        return results

    def _complete(
        self,
        pending: _Pending,
        sample: int,
        generation: Generation,
        waiting: deque[tuple[_Pending, int]],
    ) -> list[GroupResult]:
        """A sample is done; so may be its group."""
        pending.done[sample] = generation
        if len(pending.done) < pending.num_requested:
            return []
        if further := pending.next_round():
            begun = sum(other.has_begun(j) for other, j in waiting)
            for entry in reversed(further):
                waiting.insert(begun, entry)  # ahead of new groups
            return []
        self._let_go(pending)
        generations = [pending.done[j] for j in range(pending.num_requested)]
        tokens = tree_tokens(pending.ends[: pending.num_requested])
        return [GroupResult(pending.group, generations, tokens)]

    # -- forced scores ---------------------------------------------------------------------------

    def _force(
        self, leaf: _Leaf, generation: Generation, waiting: deque[tuple[_Pending, int]]
    ) -> None:
        """Let a sample without valid scores go on with the form of its scores."""
        assert self.form is not None
        group = leaf.pending.group
        kept = len(generation.token_ids) - (generation.finish == "eos")  # without the end token
        generation = replace(
            generation,
            token_ids=generation.token_ids[:kept],
            logprobs=generation.logprobs[:kept],
            sampling_logprobs=generation.sampling_logprobs[:kept],
            expected=None if generation.expected is None else generation.expected[:kept],
            forced=True,
        )
        opening = self.form.opening(generation.token_ids, group.opening, group.nonce)
        scores = ForcedScores(self.form, group.num_scores[leaf.sample])
        forced = _Forced(generation, scores, leaf.end, None)
        leaf.pending.forced[leaf.sample] = forced
        self._write(forced, opening)
        forced.end = self.forest.below(leaf.end, tuple(forced.generation.token_ids))
        forced.held = leaf.end  # as the leaf held it
        waiting.appendleft((leaf.pending, leaf.sample))

    def _fill_in(
        self, pending: _Pending, sample: int, waiting: deque[tuple[_Pending, int]]
    ) -> list[GroupResult]:
        """Draw a forced sample's next token of those that its form allows, and write what must
        follow it. Returns the group if that completes it."""
        forced = pending.forced[sample]
        logits, choices = forced.end.logits, forced.scores.choices()
        assert logits is not None, "an end without logits"
        place = len(forced.generation.token_ids)
        uniform = uniforms(*(torch.tensor([x]) for x in (pending.group.key, sample, place)))
        drawn = sample_token(
            logits[None, self._tensor(choices)],
            to_device(uniform, self.device),
            self._options,
            self.config.final_softcap,
        )
        index, logprob, sampling_logprob = (value.item() for value in drawn)
        expected = self._expected_choice(forced, logits, *drawn[:2])
        taken = forced.scores.take(choices[int(index)])
        self._write(forced, taken, logprob, sampling_logprob, expected)
        if not forced.scores.is_full:
            forced.held, forced.end = forced.end, self.forest.below(forced.end, tuple(taken))
            waiting.appendleft((pending, sample))
            return []
        self.forest.release(forced.end)
        del pending.forced[sample]
        scores = tuple(forced.scores.scores)
        generation = replace(forced.generation, reason=Reason.VALID, scores=scores)
        generation = self._with_expected(pending.group, generation)
        return self._complete(pending, sample, generation, waiting)

    def _write(
        self,
        forced: _Forced,
        tokens: Sequence[int],
        logprob: float = 0.0,
        sampling_logprob: float = 0.0,
        expected: float = math.nan,
    ) -> None:
        """Append tokens, of which the first was drawn if any was."""
        written, rest = forced.generation, len(tokens) - 1
        written.token_ids += tokens
        written.logprobs += [logprob, *[0.0] * rest]
        written.sampling_logprobs += [sampling_logprob, *[0.0] * rest]
        if written.expected is not None:
            written.expected += [expected, *[math.nan] * rest]

    def _expected_choice(
        self, forced: _Forced, logits: Tensor, index: Tensor, logprob: Tensor
    ) -> float:
        """The expected score where one of a form's choices was drawn, by their chances alone."""
        if self.edges is None:
            return math.nan
        choices = self._tensor(forced.scores.choices())
        allowed = torch.isin(self.edges.token, choices)
        place, value = forced.scores.place
        rules = self.automaton.rules
        expected = expected_score(
            logits[None], choices[index], logprob, self._tensor([0]), self._tensor([value]),
            self._tensor([place]), NumberEdges(*(each[allowed] for each in self.edges)),
            rules.score_min, rules.score_max, self.config.final_softcap,
        )  # fmt: skip
        return expected.item()

    def _with_expected(self, group: Group, generation: Generation) -> Generation:
        """With the expected scores of valid ones, where they are read."""
        if generation.expected is None or generation.scores is None:
            return generation
        kept = len(generation.token_ids) - (generation.finish == "eos" and not generation.forced)
        found = expected_scores(
            self.automaton,
            generation.token_ids[:kept],
            generation.expected,
            generation.scores,
            group.opening,
            None if group.nonce is None else int(group.nonce),
        )
        return replace(generation, expected_scores=found)

    def _take_times(self) -> None:
        """Count the seconds of what is over."""
        while self._spans and self._spans[0][2].is_over:
            name, start, stop = self._spans.popleft()
            setattr(self.usage, name, getattr(self.usage, name) + stop.seconds_since(start))

    def _generation(self, leaf: _Leaf, sampled: Sampled) -> Generation:
        stopped = self.stop == "box" and sampled.decided and not sampled.ended
        scores = sampled.scores[: leaf.pending.group.num_scores[leaf.sample]]
        generation = Generation(
            sampled.token_ids,
            sampled.logprobs,
            sampled.sampling_logprobs,
            "box" if stopped else "eos" if sampled.ended else "length",
            sampled.reason,
            tuple(scores) if sampled.reason == Reason.VALID else None,
            expected=sampled.expected,
        )
        return self._with_expected(leaf.pending.group, generation)

    def _select(self, live: LiveSamples, rows: Sequence[int]) -> None:
        """Keep of `leaves`, whose state `live` is, those at `rows`, in that order."""
        self.leaves = [self.leaves[i] for i in rows]
        self.decoder.load(live.index_select(self._tensor(rows)), self.leaves)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self.device)


def _allocate(
    config: ModelConfig,
    slots: int,
    block: int,
    cells: int,
    least: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """A cache; where memory runs out, one of half the cells, and so on down to `least`, with a
    warning."""
    while True:
        try:
            return KVCache(config, slots, block, cells, dtype, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        size = cells * cell_bytes(config, dtype)
        if cells == least:
            raise ValueError(f"no memory for {size} bytes of cache for one sample: {reason}")
        cells = max(round_up(cells // 2), least)
        warnings.warn(
            f"no memory for {size} bytes of cache: trying {cells * cell_bytes(config, dtype)}",
            RuntimeWarning,
            stacklevel=3,
        )


def too_long(tokens: int, context: int, kept: int = 0) -> str:
    """Why a prompt cannot be judged. kept: tokens of the context that forced scores may need."""
    less = f", {kept} of them kept for forced scores" if kept else ""
    return f"the prompt has {tokens} tokens, the model's context is {context}{less}"
