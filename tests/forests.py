"""Forests of random keys and values in a cache that is NaN wherever no token was written.

Data belong to a name (a segment or a sample), so that a token has the same query, key and value in
whatever company it appears.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.forest import Forest, Node, decode_tiles, prefill_tiles
from engine.kv_cache import KVCache, round_up
from kernels.forest_attention import AttentionOptions, ForestPlan
from kernels.forest_attention.plan import MAX_SPLIT, Suffixes, splits_of
from models.config import Latent, ModelConfig, Rope

Array = NDArray[np.floating]
Segment = tuple[int, int]  # name, tokens
CPU = torch.device("cpu")


def make_config(
    kv_heads: int = 1, head_dim: int = 1, v_head_dim: int = 1, groups: int = 1, layers: int = 1,
    latent: Latent | None = None,
) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        architecture="qwen3", vocab_size=16, hidden_size=8, intermediate_size=8,
        num_layers=layers, num_heads=kv_heads * groups, num_kv_heads=kv_heads,
        head_dim=head_dim, v_head_dim=v_head_dim, max_position_embeddings=4096,
        rms_norm_eps=1e-6, rope=(Rope(1e4, None),) * layers,
        attention=(AttentionOptions(1.0),) * layers, experts=(None,) * layers,
        attention_bias=False, qk_norm=True, norm_plus_one=False, sandwich_norms=False,
        embedding_scale=None, activation="silu", final_softcap=None, tied=True,
        eos_token_ids=frozenset(), dtype=None, latent=latent,
    )  # fmt: skip


def make_cache(
    num_slots: int,
    block_cells: int,
    num_cells: int,
    config: ModelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> KVCache:
    """A cache that is NaN all over, but for its scratch cells."""
    cache = KVCache(
        config or make_config(),
        num_slots,
        block_cells,
        num_cells,
        dtype,
        device,
    )
    for cells in (*cache.k, *cache.v):
        cells[:, cache.base :] = float("nan")
    return cache


@dataclass(frozen=True)
class Shape:
    kv_heads: int = 1
    groups: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    dtype: torch.dtype = torch.float32
    aliased: bool = False  # values are the first channels of their keys, as of latent attention

    @cached_property
    def config(self) -> ModelConfig:
        sizes = self.kv_heads, self.head_dim, self.v_head_dim, self.groups
        latent = Latent(None, self.v_head_dim, 1, self.head_dim - self.v_head_dim)
        return make_config(*sizes, latent=latent if self.aliased else None)


@dataclass(frozen=True)
class Sample:
    """A prompt of segments and the tokens generated after it, whose data are those of `name`."""

    name: int
    prompt: tuple[Segment, ...]
    generated: int


def crowd() -> list[Sample]:
    """64 samples of three trees, in all lengths up to 288."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(64):
        if i < 40:
            prompt: tuple[Segment, ...] = ((0, 70), (1, 300), (2 + i % 3, 33 + 90 * (i % 3)))
        elif i < 60:
            prompt = ((0, 70), (5, 130))
        else:
            prompt = ((6, 17), (7 + i % 2, 20))
        samples.append(Sample(100 + i, prompt, 288 if i == 3 else int(rng.integers(1, 288))))
    return samples


@lru_cache(512)
def token_data(name: int, tokens: int, shape: Shape) -> tuple[Array, Array, Array]:
    """Queries (tokens, Hq, D), keys (tokens, Hkv, D) and values (tokens, Hkv, Dv); float32."""
    heads = shape.kv_heads * shape.groups
    sizes = [heads * shape.head_dim, shape.kv_heads * shape.head_dim]
    width = sum(sizes) + shape.kv_heads * shape.v_head_dim
    flat = np.random.default_rng(name).standard_normal((tokens, width), dtype=np.float32)
    q, k, v = np.split(flat, np.cumsum(sizes), axis=1)
    k, v = (x.reshape(tokens, shape.kv_heads, -1) for x in (k, v))
    values = k[..., : shape.v_head_dim] if shape.aliased else v
    return 3 * q.reshape(tokens, heads, -1), k, values


class Grove:
    """Samples in depth-first order over one cache, their prompts written unless told not to.
    `names` are the nodes' segments, `fresh` the nodes in the order of a prefill."""

    def __init__(
        self,
        samples: Sequence[Sample],
        shape: Shape,
        *,
        capacity: int = 16,
        seed: int = 0,
        written: bool = True,
        device: torch.device = CPU,
    ) -> None:
        """capacity: the most tokens of a sample. seed: of the order in which samples got their
        blocks, of which there are some to spare."""
        self.shape = shape
        self.device = device
        splits, block = splits_of(capacity), round_up(min(MAX_SPLIT, capacity))
        dealt = (len(samples) + 2) * splits
        cells = sum(tokens + 16 for sample in samples for _, tokens in sample.prompt)
        cells += dealt * block
        self.cache = make_cache(0, block, cells, shape.config, shape.dtype, device)
        taken = [self.cache.take_block() for _ in range(dealt)]
        random.Random(seed).shuffle(taken)
        self.forest = Forest(self.cache)
        self.names: dict[Node, Segment] = {}
        prompts = [[(name,) * tokens for name, tokens in sample.prompt] for sample in samples]
        ends, self.tree_tokens = self.forest.grow(prompts)
        self.fresh: list[Node] = []
        for sample, end in zip(samples, ends, strict=True):
            self.names.update(zip(end.path(), sample.prompt, strict=True))
            fresh = self.forest.allocate(end)
            assert fresh is not None
            self.fresh += fresh
        order = sorted(
            range(len(samples)), key=lambda i: (*(node.number for node in ends[i].path()), i)
        )
        self.samples = [samples[i] for i in order]
        self.ends = [ends[i] for i in order]
        chains = iter(block for block in taken if block is not None)
        self.blocks = [[next(chains) for _ in range(splits)] for _ in samples]
        if written:
            for node in self.fresh:
                self.write(node, 0, len(node.token_ids))

    def own_cells(self, i: int) -> Tensor:
        """All cells of sample i's blocks."""
        cells = torch.arange(self.cache.block_cells)
        return torch.cat([block + cells for block in self.blocks[i]])

    def _put(self, at: Tensor, k: Array, v: Array) -> None:
        for cells, data in ((self.cache.k[0], k), (self.cache.v[0], v)):
            cells[:, at.to(self.device)] = torch.from_numpy(data).transpose(0, 1).to(cells)

    def write(self, node: Node, first: int, stop: int) -> None:
        """Put some of a node's keys and values into its slab."""
        assert node.slab is not None
        _, k, v = token_data(*self.names[node], self.shape)
        at = node.slab.start + torch.arange(first, stop)
        self._put(at, k[first:stop], v[first:stop])

    def cells_to(self, node: Node, stop: int) -> Tensor:
        """Cache indices of the sequence that ends with the first `stop` tokens of a node."""
        parts = []
        for each in node.path():
            assert each.slab is not None
            tokens = stop if each is node else len(each.token_ids)
            parts.append(torch.arange(each.slab.start, each.slab.start + tokens))
        return torch.cat(parts)

    def cells_of(self, i: int, less: int = 0) -> Tensor:
        """Those of all that sample i's last token sees, or the one `less` tokens earlier."""
        end = self.ends[i]
        own = self.own_cells(i)[: max(self.samples[i].generated - less, 0)]
        return torch.cat([self.cells_to(end, len(end.token_ids)), own])

    def prefill(
        self, pieces: Sequence[tuple[Node, int, int]], per_split: bool = False
    ) -> tuple[Tensor, ForestPlan]:
        """Write tokens [first, stop) of nodes; their queries (T, Hq, D) and plan."""
        queries: list[Array] = []
        positions: list[int] = []
        for node, first, stop in pieces:
            self.write(node, first, stop)
            queries.append(token_data(*self.names[node], self.shape)[0][first:stop])
            positions += range(node.start + first, node.start + stop)
        q = torch.from_numpy(np.concatenate(queries)).to(self.shape.dtype).to(self.device)
        return q, ForestPlan(
            prefill_tiles(pieces), torch.tensor(positions, device=self.device), per_split=per_split
        )

    def whole(self) -> list[tuple[Node, int, int]]:
        """All that is to be prefilled, in one piece."""
        return [(node, 0, len(node.token_ids)) for node in self.fresh]

    def queries(self, less: int = 0) -> Tensor:
        """Those of each sample's last token, or of the one `less` tokens earlier."""
        rows = [
            token_data(sample.name, max(sample.generated - less, 1), self.shape)[0][-1]
            for sample in self.samples
        ]
        return torch.from_numpy(np.stack(rows)).to(self.shape.dtype).to(self.device)

    def decode(
        self,
        less: int = 0,
        max_length: int | None = None,
        advancing: bool = True,
        per_split: bool = False,
        keys_per_partial: int = 0,
    ) -> tuple[Tensor, ForestPlan]:
        """Queries and plan of each sample's last token, or of the one `less` tokens earlier."""
        lengths = [max(sample.generated - less, 0) for sample in self.samples]
        for i, sample in enumerate(self.samples):
            _, k, v = token_data(sample.name, max(lengths[i], 1), self.shape)
            self._put(self.own_cells(i)[: lengths[i]], k[: lengths[i]], v[: lengths[i]])
        stops = torch.tensor([end.stop for end in self.ends], device=self.device)
        suffix = Suffixes(
            torch.tensor(self.blocks, device=self.device),
            torch.tensor(lengths, device=self.device),
            stops,
            max(lengths) if max_length is None else max_length,
        )
        at = stops + suffix.length - 1
        tiles = decode_tiles(self.ends, keys_per_partial)
        return self.queries(less), ForestPlan(tiles, at, suffix, advancing, per_split)

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        return self.cache.k[0], self.cache.v[0]
