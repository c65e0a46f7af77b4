"""Forests to measure attention on: trees of equal branches, their plans, what they must move.

A `Tree` has one number of nodes and of tokens for each level; the last level is the samples' own
suffixes, every other a level of their prompts. Plans come from the engine's own forest, and the
layers of its cache are the input sets: one plan, other keys and values, as in a model.

`decode_cost` and `prefill_cost` count what has to happen: every key and value that some query sees
is read once, queries are read and results written once, and a query and a key that it sees cost
2 D + 2 Dv operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from bench.case import gradients, like
from bench.shapes import Shape
from bench.timing import DEVICE, Fill, empty, randn
from engine.forest import Forest, Node, decode_tiles, prefill_tiles
from engine.kv_cache import KVCache, round_up
from kernels.forest_attention import AttentionOptions, forest_attention_with_lse
from kernels.forest_attention.plan import MAX_SPLIT, ForestPlan, Suffixes, splits_of
from kernels.forest_attention.reference import dense_attention, visible_keys
from models.config import Latent, ModelConfig, Rope


@dataclass(frozen=True)
class Tree:
    """nodes[i] nodes of tokens[i] tokens on level i; each divides the next."""

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.nodes) == len(self.tokens) >= 1
        assert all(b % a == 0 for a, b in zip(self.nodes, self.nodes[1:], strict=False))

    @property
    def samples(self) -> int:
        """k."""
        return self.nodes[-1]

    @property
    def suffix(self) -> int:
        """Tokens that each sample has generated."""
        return self.tokens[-1]

    @property
    def prefix(self) -> int:
        """Tokens of a sample's prompt."""
        return sum(self.tokens[:-1])

    @property
    def num_tokens(self) -> int:
        """Distinct tokens."""
        return sum(n * t for n, t in zip(self.nodes, self.tokens, strict=True))

    def unshared(self) -> "Tree":
        """The same sequences, of which each has a prompt of its own."""
        return Tree((self.samples, self.samples), (self.prefix, self.suffix))

    def describe(self) -> str:
        """A decode step, for tables."""
        if self.nodes[0] == self.samples:
            return f"{self.samples} alone, prefix {self.prefix}, suffix {self.suffix}"
        if len(self.nodes) == 2:
            return f"k={self.samples}, prefix {self.prefix}, suffix {self.suffix}"
        sizes = "->".join(map(str, self.nodes)), "/".join(map(str, self.tokens))
        return f"{len(self.nodes)} levels {sizes[0]}, {sizes[1]}"


@dataclass(frozen=True)
class Heads:
    """What attention sees of a model. values: channels of a value, 0 for as many as a key has.
    latent: they are the first channels of the keys."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    softcap: float | None = None
    window: int | None = None
    values: int = 0
    latent: bool = False

    @staticmethod
    def of(shape: Shape, window: int | None = None) -> "Heads":
        """Those over a model's cache, with its soft-cap; with a window if it is given."""
        latent = shape.latent
        if latent is None:
            return Heads.without_cache(shape, window)
        dim = latent.kv_rank + latent.rope_dim
        return Heads(shape.num_heads, 1, dim, shape.dtype, values=latent.kv_rank, latent=True)

    @staticmethod
    def without_cache(shape: Shape, window: int | None = None) -> "Heads":
        """Those of a training step."""
        return Heads(
            shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype, shape.softcap, window,
            values=shape.v_head_dim,
        )  # fmt: skip

    @property
    def value_dim(self) -> int:
        """Channels of a value."""
        return self.values or self.head_dim

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5

    @property
    def options(self) -> AttentionOptions:
        """Scale, soft-cap and window."""
        return AttentionOptions(self.scale, self.softcap, self.window)

    @property
    def cell_bytes(self) -> int:
        """Bytes of a token's key and value."""
        width = self.head_dim + (0 if self.latent else self.value_dim)
        return self.num_kv_heads * width * self.dtype.itemsize

    @property
    def query_bytes(self) -> int:
        """Bytes of a token's queries and results."""
        return self.num_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize

    def describe(self) -> str:
        """For tables."""
        extra = [
            f"{name} {value:g}"
            for name, value in (("soft-cap", self.softcap), ("window", self.window))
            if value is not None
        ]
        extra += [f"values {self.value_dim}"] if self.value_dim != self.head_dim else []
        dtype = [] if self.dtype == torch.bfloat16 else [str(self.dtype).removeprefix("torch.")]
        heads = f"{self.num_heads}/{self.num_kv_heads} heads d {self.head_dim}"
        return ", ".join([heads, *dtype, *extra])

    def config(self, layers: int) -> ModelConfig:
        """A model of nothing else."""
        latent = Latent(None, self.value_dim, 1, self.head_dim - self.value_dim)
        return ModelConfig(
            architecture="qwen3", vocab_size=16, hidden_size=16, intermediate_size=16,
            num_layers=layers, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim, v_head_dim=self.value_dim, max_position_embeddings=1 << 20,
            rms_norm_eps=1e-6, rope=(Rope(1e4, None),) * layers,
            attention=(self.options,) * layers, experts=(None,) * layers,
            attention_bias=False, qk_norm=True, norm_plus_one=False, sandwich_norms=False,
            embedding_scale=None, activation="silu", final_softcap=None, tied=True,
            eos_token_ids=frozenset(), dtype=None,
            latent=latent if self.latent else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Consecutive keys in consecutive cache slots, from a logical position, and the consecutive
    queries that may see them."""

    slot: int
    keys: int
    position: int
    query: int
    num_queries: int


@dataclass
class Workload:
    """Queries of one step (T, Hq, D) for each layer, the layers' caches and the plan."""

    heads: Heads
    queries: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    plan: ForestPlan
    spans: list[Span]

    def attend(self, layer: int) -> tuple[Tensor, Tensor]:
        """Attention of a layer, with its log-sum-exps."""
        return forest_attention_with_lse(*self.arguments(layer))

    def arguments(self, layer: int) -> tuple[Any, ...]:
        """Of `forest_attention`."""
        tensors = self.queries[layer], self.k[layer], self.v[layer]
        return *tensors, self.plan, self.heads.options

    def _seen(self, span: Span, at: int, window: int | None = None) -> tuple[int, int]:
        """The positions [start, stop) of a span that a query at a position sees."""
        window = self.heads.window if window is None else window
        start = span.position if window is None else max(span.position, at - window + 1)
        return start, max(start, min(span.position + span.keys, at + 1))

    def slots_of(self, query: int, window: int | None = None) -> Tensor:
        """Cache slots of the keys that a query sees, in the order of its sequence; through a given
        window, if it is to be another."""
        at = int(self.plan.positions[query])
        runs = []
        for span in self.spans:
            if span.query <= query < span.query + span.num_queries:
                start, stop = self._seen(span, at, window)
                first = span.slot - span.position
                runs.append(torch.arange(first + start, first + stop, device=DEVICE))
        return torch.cat(runs)

    def check(self, out: Tensor, factor: float) -> None:
        """Hold the first, a middle and the last query's results to dense attention."""
        rows = torch.tensor(sorted({0, len(out) // 2, len(out) - 1}), device=DEVICE)
        inputs = self.queries[0][rows], self.k[0], self.v[0], self.visible()[rows]
        like("attention", lambda *x: self.dense(*x)[0])(inputs, out[rows], factor)

    def check_backward(
        self, outs: Sequence[Tensor], d_o: Tensor, d_lse: Tensor | None, factor: float
    ) -> None:
        """Hold the gradients of the first key/value head, and of its queries, to dense attention's
        from d_o (T, Hq, D) and d_lse (T, Hq)."""
        groups, seen = self.heads.num_heads // self.heads.num_kv_heads, self.visible()
        d_lse = torch.zeros_like(d_o[..., 0]) if d_lse is None else d_lse

        def reference(*tensors: Tensor) -> tuple[Tensor, ...]:
            return gradients(lambda q, k, v: self.dense(q, k, v, seen), tensors[:3], tensors[3:])

        q, k, v = self.queries[0][:, :groups], self.k[0][:1], self.v[0][:1]
        inputs = q, k, v, d_o[:, :groups], d_lse[:, :groups]
        found = outs[0][:, :groups], outs[1][:1], outs[2][:1]
        like("attention backward", reference)(inputs, found, factor)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Plain attention of (R, Hq, D) over (Hkv, N, D), of which (R, N) bool are seen, and its
        log-sum-exps."""
        return dense_attention(q, k.transpose(0, 1), v.transpose(0, 1), self.heads.options, seen)

    def visible(self) -> Tensor:
        """(T, N) bool: which cells every query sees."""
        seen = torch.zeros(len(self.plan.positions), self.k[0].shape[1], dtype=torch.bool)
        seen = seen.to(DEVICE)
        for span in self.spans:
            rows = slice(span.query, span.query + span.num_queries)
            k_pos = torch.arange(span.position, span.position + span.keys, device=DEVICE)
            mine = visible_keys(self.plan.positions[rows], k_pos, self.heads.window)
            seen[rows, span.slot : span.slot + span.keys] = mine
        return seen


def decode_cost(tree: Tree, heads: Heads) -> tuple[int, int]:
    """Bytes to move and operations to do in one decode step."""
    stop = tree.prefix + max(tree.suffix, 1)  # of the keys that a query sees
    first = 0 if heads.window is None else max(0, stop - heads.window)
    keys, pairs, start = 0, 0, 0
    for nodes, tokens in zip(tree.nodes, tree.tokens, strict=True):
        seen = max(0, start + tokens - max(start, first))
        keys, pairs, start = keys + nodes * seen, pairs + tree.samples * seen, start + tokens
    return _cost(heads, keys, tree.samples, pairs)


def prefill_cost(tree: Tree, heads: Heads) -> tuple[int, int]:
    """Bytes to move and operations to do in the prefill of a tree."""
    window = heads.window or 1 << 60
    pairs, start = 0, 0
    for nodes, tokens in zip(tree.nodes, tree.tokens, strict=True):
        pairs += nodes * sum(min(at + 1, window) for at in range(start, start + tokens))
        start += tokens
    return _cost(heads, tree.num_tokens, tree.num_tokens, pairs)


def _cost(heads: Heads, keys: int, queries: int, pairs: int) -> tuple[int, int]:
    moved = keys * heads.cell_bytes + queries * heads.query_bytes
    return moved, 2 * heads.num_heads * (heads.head_dim + heads.value_dim) * pairs


def _ends(tree: Tree, heads: Heads, layers: int) -> tuple[KVCache, list[Node]]:
    """A cache with room for the tree, and the node above each sample; nothing is written yet."""
    # Segments of other tokens are other nodes.
    numbers = count()
    levels = [
        [(next(numbers),) * tokens for _ in range(nodes)]
        for nodes, tokens in zip(tree.nodes[:-1], tree.tokens[:-1], strict=True)
    ]
    prompts = [
        [level[sample * len(level) // tree.samples] for level in levels]
        for sample in range(tree.samples)
    ]
    room = sum(
        nodes * round_up(tokens)
        for nodes, tokens in zip(tree.nodes[:-1], tree.tokens[:-1], strict=True)
    )
    block = round_up(min(MAX_SPLIT, tree.suffix))
    room += tree.samples * splits_of(tree.suffix) * block
    cache = KVCache(heads.config(layers), tree.samples, block, room, heads.dtype, DEVICE)
    forest = Forest(cache)
    ends, _ = forest.grow(prompts)
    for end in ends:
        assert forest.allocate(end) is not None
    return cache, ends


def _node_spans(ends: Sequence[Node]) -> dict[Node, Span]:
    """A span for each node, seen by the samples below it."""
    spans: dict[Node, Span] = {}
    for i, end in enumerate(ends):
        for node in end.path():
            assert node.slab is not None
            first = spans.get(node)
            if first is None:
                spans[node] = Span(node.slab.start, len(node.token_ids), node.start, i, 1)
            else:
                spans[node] = replace(first, num_queries=i + 1 - first.query)
    return spans


def _blocks(cache: KVCache, rows: int, count: int) -> Tensor:
    """(rows, count) int64: the blocks of suffixes that have grown side by side."""
    chains: list[list[int]] = [[] for _ in range(rows)]
    for i in range(rows * count):
        block = cache.take_block()
        assert block is not None
        chains[i % rows].append(block)
    return torch.tensor(chains)


def make_decode(tree: Tree, heads: Heads, layers: int, tensor: Fill = randn) -> Workload:
    """One decode step of the tree's samples. A suffix of 0 tokens: the prompts alone, without
    suffixes. tensor: what queries, keys and values are."""
    cache, ends = _ends(tree, heads, layers)
    k, suffix_length = tree.samples, tree.suffix
    stops = torch.tensor([end.stop for end in ends], device=DEVICE)
    suffix = None
    spans = list(_node_spans(ends).values())
    if suffix_length:
        blocks = _blocks(cache, k, splits_of(suffix_length))
        lengths = torch.full((k,), suffix_length, device=DEVICE)
        suffix = Suffixes(blocks.to(DEVICE), lengths, stops, suffix_length)
        spans += [
            Span(
                block,
                min(MAX_SPLIT, suffix_length - j * MAX_SPLIT),
                end.stop + j * MAX_SPLIT,
                i,
                1,
            )
            for i, (end, chain) in enumerate(zip(ends, blocks.tolist(), strict=True))
            for j, block in enumerate(chain)
        ]
    at = stops + max(suffix_length, 1) - 1
    plan = ForestPlan(decode_tiles(ends), at, suffix, advancing=True)
    return _workload(heads, cache, k, plan, spans, tensor)


def make_prefill(tree: Tree, heads: Heads, layers: int, tensor: Fill = randn) -> Workload:
    """The prefill of all nodes of the tree, its last level included (as segments, not suffixes)."""
    whole = Tree((*tree.nodes, tree.samples), (*tree.tokens, 0))
    cache, ends = _ends(whole, heads, layers)
    nodes = list(dict.fromkeys(node for end in ends for node in end.path()))
    pieces = [(node, 0, len(node.token_ids)) for node in nodes]
    positions = [at for node in nodes for at in range(node.start, node.stop)]
    spans = []
    row = 0
    for node in nodes:
        for above in node.path():
            assert above.slab is not None
            spans.append(
                Span(above.slab.start, len(above.token_ids), above.start, row, len(node.token_ids))
            )
        row += len(node.token_ids)
    plan = ForestPlan(prefill_tiles(pieces), torch.tensor(positions, device=DEVICE))
    return _workload(heads, cache, row, plan, spans, tensor)


def _workload(
    heads: Heads,
    cache: KVCache,
    num_queries: int,
    plan: ForestPlan,
    spans: list[Span],
    tensor: Fill,
) -> Workload:
    shape = (num_queries, heads.num_heads, heads.head_dim)
    queries = [tensor(*shape, dtype=heads.dtype) for _ in cache.k]
    if tensor is not empty:
        for cells in cache.stored:
            cells.copy_(tensor(*cells.shape, dtype=cells.dtype))
    return Workload(heads, queries, cache.k, cache.v, plan, spans)
