"""A decoder over a cache: tokens in, keys and values into the cache, hidden states out.

What prefill, decode and the scoring of finished samples have in common. On CPU the forward runs in
C++ where it can; on a GPU a deterministic one takes fixed tiles in matrix products and one partial
for every split of keys. Outside C++ rows are padded to a multiple of 16; padding writes the first
cells of the cache, which are scratch.

It does not choose what is computed, allocate cells, or read anything out of hidden states.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from engine.forest import Node, prefill_tiles
from engine.kv_cache import KVCache, round_up
from engine.segment_prefill import SegmentPrefill
from kernels.device import to_device
from kernels.forest_attention import AttentionOptions, ForestPlan, forest_attention
from kernels.launch import runs_triton
from kernels.matmul import matmul
from kernels.norm_rope_write import HeadNorms, norm_rope_write
from kernels.segment_attention import Backend, check_backend
from models.decoder import CppDecoder, runs_cpp
from models.layers import linear
from models.transformer import Transformer

Piece = tuple[Node, int, int]  # tokens [first, stop) of a node
# attention(q, k_cache, v_cache, options) of a forward whose keys are in the cache
CachedAttention = Callable[[Tensor, Tensor, Tensor, AttentionOptions], Tensor]


class CachedForward:
    """The forward of one decoder over one cache."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        deterministic: bool = False,
        prefill_backend: Backend | None = None,
    ) -> None:
        """deterministic: the same bits in any batch on a GPU too. prefill_backend: computes the
        attention of a prefill, None for `forest_attention`; raises ValueError where it cannot."""
        if prefill_backend is not None:
            _check_prefill(model, prefill_backend)
        self.model = model
        self.prefill_backend = prefill_backend
        self.config = model.config
        self.cache = cache
        self.deterministic = deterministic
        self.device = model.head_weight.device
        on_triton = runs_triton(model.head_weight)
        self.product = matmul if deterministic and on_triton else linear
        self._cpp = CppDecoder(model, cache.k, cache.v) if runs_cpp(model) else None

    def forward(
        self, tokens: Tensor, positions: Tensor, cache_index: Tensor, plan: ForestPlan
    ) -> Tensor:
        """Hidden states of tokens, whose keys and values are written at `cache_index`."""
        if self._cpp is not None:
            return self._cpp.forward(tokens, positions, cache_index, plan)

        def attention(
            q: Tensor, k_cache: Tensor, v_cache: Tensor, options: AttentionOptions
        ) -> Tensor:
            return forest_attention(q, k_cache, v_cache, plan, options)

        return self._run(tokens, positions, cache_index, attention)

    def padded(self, rows: int) -> int:
        """Rows of a forward of `rows` tokens; C++ needs none beside them."""
        return rows if self._cpp is not None else round_up(rows)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """The model's raw logits of hidden states."""
        if self._cpp is not None:
            return self._cpp.head_logits(hidden)
        return self.model.head_logits(hidden, self.product)

    def prefill(self, pieces: Sequence[Piece]) -> Tensor:
        """Hidden states of the tokens of pieces, side by side, and of the padding after them. The
        nodes have their slabs; what stands before a piece has been computed, or stands before it
        here."""
        tokens: list[int] = []
        positions: list[int] = []
        cache_index: list[int] = []
        for node, first, stop in pieces:
            assert node.slab is not None
            tokens += node.token_ids[first:stop]
            positions += range(node.start + first, node.start + stop)
            cache_index += range(node.slab.start + first, node.slab.start + stop)
        padding = self.padded(len(tokens)) - len(tokens)
        cache_index += range(padding)
        positions += [0] * padding
        token_ids = self._tensor(tokens + [0] * padding)
        position, at = self._tensor(positions), self._tensor(cache_index)
        if self.prefill_backend is not None:
            segments = SegmentPrefill(pieces, self.prefill_backend, self.device)
            return self._run(token_ids, position, at, segments.attend)
        tiles = prefill_tiles(pieces)
        plan = ForestPlan(tiles, position, per_split=self.deterministic, host_positions=positions)
        return self.forward(token_ids, position, at, plan)

    def _run(
        self, tokens: Tensor, positions: Tensor, cache_index: Tensor, attention: CachedAttention
    ) -> Tensor:
        """The model over the cache."""
        caches = list(zip(self.cache.k, self.cache.v, strict=True))

        def write(
            layer: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            norms: HeadNorms | None,
            cos: Tensor,
            sin: Tensor,
        ) -> Tensor:
            k_cache, v_cache = caches[layer]
            turned = k_cache[..., k_cache.shape[-1] - k.shape[-1] :]  # a key's last channels
            return norm_rope_write(q, k, v, norms, cos, sin, turned, v_cache, cache_index)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, *caches[layer], self.config.attention[layer])

        return self.model(tokens, positions, attend, self.product, write)

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self.device)


def _check_prefill(model: Transformer, backend: Backend) -> None:
    """Raise ValueError where a backend cannot prefill for a model."""
    q = model.head_weight.new_empty(0, model.config.cached_key_dim)
    for options in model.config.attention:
        try:
            check_backend(backend, q, model.config.cached_value_dim, options)
        except ImportError as error:
            raise ValueError(str(error)) from error


def take_pieces(queue: deque[tuple[Node, int]], room: int) -> list[Piece]:
    """The next `room` tokens of a queue of nodes, each from which token on; a node that is cut
    stays at its head."""
    pieces: list[Piece] = []
    while queue and room:
        node, first = queue.popleft()
        stop = min(len(node.token_ids), first + room)
        pieces.append((node, first, stop))
        room -= stop - first
        if stop < len(node.token_ids):
            queue.appendleft((node, stop))
    return pieces


def last_rows(pieces: Sequence[Piece], ends: Collection[Node]) -> dict[Node, int]:
    """For those of `ends` whose last token is in the pieces, the row of that token."""
    row = -1
    rows: dict[Node, int] = {}
    for node, first, stop in pieces:
        row += stop - first
        if node in ends and stop == len(node.token_ids):
            rows[node] = row
    return rows
