"""Attention of a prefill by other people's kernels: pairs of segments, joined by log-sum-exps.

A layer with full attention runs two calls of `segment_attention`: the queries of each piece over
their own node, under a causal mask, and all queries below a node over that node, whose keys they
all see. So a shared segment is read once here too. `merge_states` joins the partial results in the
order of the sequence. A layer with a sliding window runs one call, over as much of each piece's own
path as its window reaches: no library has a window at a distance.

Bits depend on the backend and on what else is prefilled. It writes no cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.forest import Node
from kernels.device import to_device
from kernels.forest_attention import AttentionOptions
from kernels.forest_attention.plan import partial_table
from kernels.merge_states import merge_states
from kernels.segment_attention import Backend, segment_attention


@dataclass(frozen=True)
class _Pairs:
    """Arguments of a call of `segment_attention`: rows (T,) of q and cells (N,) of the cache, both
    int64, and their offsets."""

    rows: Tensor
    cells: Tensor
    cu_seqlens_q: list[int]
    cu_seqlens_k: list[int]
    causal: bool

    @staticmethod
    def of(
        pairs: Sequence[tuple[Sequence[range], Sequence[range]]],
        causal: bool,
        device: torch.device,
    ) -> "_Pairs":
        """pairs: the rows and the cells of each pair, in ranges."""
        rows: list[int] = []
        cells: list[int] = []
        cu_seqlens_q, cu_seqlens_k = [0], [0]
        for row_ranges, cell_ranges in pairs:
            rows += [row for each in row_ranges for row in each]
            cells += [cell for each in cell_ranges for cell in each]
            cu_seqlens_q.append(len(rows))
            cu_seqlens_k.append(len(cells))
        row_index, cell_index = (
            to_device(torch.tensor(each, dtype=torch.int64), device) for each in (rows, cells)
        )
        return _Pairs(row_index, cell_index, cu_seqlens_q, cu_seqlens_k, causal)

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        options: AttentionOptions,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        """o (T, Hq, Dv) and lse (T, Hq) of these rows."""
        k, v = (cache.index_select(1, self.cells).transpose(0, 1) for cache in (k_cache, v_cache))
        return segment_attention(
            q[self.rows], k, v, self.cu_seqlens_q, self.cu_seqlens_k, options, self.causal, backend
        )


class SegmentPrefill:
    """Attention of one forward: the queries of pieces, tokens [first, stop) of nodes, side by side.
    What stands above a piece is in the cache, or in another of these pieces."""

    def __init__(
        self, pieces: Sequence[tuple[Node, int, int]], backend: Backend, device: torch.device
    ) -> None:
        self.pieces, self.backend, self.device = pieces, backend, device
        self.rows: list[range] = []
        self.num_tokens = 0
        for _, first, stop in pieces:
            self.rows.append(range(self.num_tokens, self.num_tokens + stop - first))
            self.num_tokens += stop - first
        self._full: tuple[list[_Pairs], Tensor] | None = None
        self._windowed: dict[int, _Pairs] = {}

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, options: AttentionOptions
    ) -> Tensor:
        """q: (R, Hq, D), of whose rows those past the pieces' tokens are padding. Returns (R, Hq,
        Dv), 0 in the padding."""
        out = q.new_zeros(*q.shape[:2], v_cache.shape[-1])
        if options.window is not None:
            if options.window not in self._windowed:
                self._windowed[options.window] = self._pairs_in_window(options.window)
            pairs = self._windowed[options.window]
            o, _ = pairs.attend(q, k_cache, v_cache, options, self.backend)
            out[: self.num_tokens] = o
            return out
        if self._full is None:
            self._full = self._all_pairs()
        calls, index = self._full
        results = [call.attend(q, k_cache, v_cache, options, self.backend) for call in calls]
        outs, lses = zip(*results, strict=True)
        lse = torch.cat(lses)
        o, _ = merge_states(torch.cat(outs).to(lse.dtype), lse, index, q.dtype)
        out[: self.num_tokens] = o
        return out

    def _all_pairs(self) -> tuple[list[_Pairs], Tensor]:
        """The pieces over their own nodes, and all queries below a node over that node; then the
        partials (num_tokens, J) of each query, numbered in the order of the calls."""
        own = []
        below: dict[Node, list[range]] = {}
        for (node, _, stop), rows in zip(self.pieces, self.rows, strict=True):
            own.append(([rows], [_cells(node, stop)]))
            for above in node.above:
                below.setdefault(above, []).append(rows)
        calls = [_Pairs.of(own, True, self.device)]
        served = []
        partials = self.num_tokens
        nodes = sorted(below, key=lambda node: len(node.above))
        for node in nodes:
            for rows in below[node]:
                served.append((rows.start, len(rows), partials))
                partials += len(rows)
        served += [(rows.start, len(rows), rows.start) for rows in self.rows]
        if nodes:
            shared = [(below[node], [_cells(node, len(node.token_ids))]) for node in nodes]
            calls.append(_Pairs.of(shared, False, self.device))
        return calls, to_device(partial_table(served, 0, self.num_tokens), self.device)

    def _pairs_in_window(self, window: int) -> _Pairs:
        """The pieces over the ends of their paths, as far as the first token's window reaches."""
        pairs = []
        for (node, first, stop), rows in zip(self.pieces, self.rows, strict=True):
            cells = [_cells(above, len(above.token_ids)) for above in node.above]
            cells.append(_cells(node, stop))
            outside = node.start + stop - (stop - first + window - 1)
            while outside > 0:
                cut = min(outside, len(cells[0]))
                cells[0] = cells[0][cut:]
                outside -= cut
                if not cells[0]:
                    del cells[0]
            pairs.append(([rows], cells))
        return _Pairs.of(pairs, True, self.device)


def _cells(node: Node, tokens: int) -> range:
    """Cache indices of a node's first tokens."""
    assert node.slab is not None
    return range(node.slab.start, node.slab.start + tokens)
