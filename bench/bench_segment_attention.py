"""Attention of segments over segments: our kernel, and other backends of the same interface.

Whole calls are timed, plans and offsets included, as a caller pays for them; these come from the
host in every call, so that none of it is captured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_close, calls_on
from bench.forests import Heads
from bench.shapes import SHAPES
from bench.timing import DEVICE, ON_GPU, num_sets, randn
from kernels.segment_attention import Backend, segment_attention, segment_attention_ref

CHECKED = 3  # queries of the first and of the last segment


@dataclass(frozen=True)
class Case:
    """`pairs` segments of `queries` over as many of `keys`."""

    pairs: int
    queries: int
    keys: int
    causal: bool
    heads: Heads

    def describe(self) -> str:
        """For tables."""
        kind = "causal" if self.causal else "all"
        return f"{self.pairs} x {self.queries} over {self.keys} {kind}, {self.heads.describe()}"

    @property
    def offsets(self) -> tuple[list[int], list[int]]:
        """cu_seqlens_q and cu_seqlens_k."""
        queries, keys = (
            [size * i for i in range(self.pairs + 1)] for size in (self.queries, self.keys)
        )
        return queries, keys

    @property
    def cost(self) -> tuple[int, int]:
        """Bytes to move, the log-sum-exps included, and operations to do."""
        heads = self.heads
        per_query = range(self.keys - self.queries + 1, self.keys + 1)
        seen = sum(per_query) if self.causal else self.queries * self.keys
        moved = self.queries * (heads.query_bytes + 4 * heads.num_heads)
        moved += self.keys * heads.cell_bytes
        return self.pairs * moved, self.pairs * 4 * heads.num_heads * heads.head_dim * seen


QWEN = Heads.of(SHAPES["qwen3-8b"])
POCKET, SMALL = Heads.of(SHAPES["pocket"]), Heads.of(SHAPES["qwen3-107m"])
CASES = (
    [Case(4, 2048, 2048, True, QWEN), Case(8, 512, 4096, False, QWEN)]
    if ON_GPU
    else [Case(2, 128, 128, True, POCKET), Case(2, 64, 256, False, SMALL)]
)


def make_work(case: Case) -> Work:
    """Segments side by side."""
    heads, (cu_seqlens_q, cu_seqlens_k) = case.heads, case.offsets
    num_bytes, flops = case.cost

    def draw(tokens: int, count: int) -> Tensor:
        return randn(tokens, count, heads.head_dim, dtype=heads.dtype)

    sets = [
        (
            draw(cu_seqlens_q[-1], heads.num_heads),
            draw(cu_seqlens_k[-1], heads.num_kv_heads),
            draw(cu_seqlens_k[-1], heads.num_kv_heads),
        )
        for _ in range(num_sets(num_bytes))
    ]

    def run(q: Tensor, k: Tensor, v: Tensor, backend: Backend | None = None) -> Any:
        return segment_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, heads.options, case.causal, backend
        )

    def check(out: Any, factor: float) -> None:
        o = out[0] if isinstance(out, tuple) else out
        q, k, v = sets[0]
        for pair in (0, case.pairs - 1):
            rows = slice(
                cu_seqlens_q[pair + 1] - CHECKED, cu_seqlens_q[pair + 1]
            )  # causal masks end with both
            first, last = cu_seqlens_k[pair], cu_seqlens_k[pair + 1]
            exact, plain = (
                segment_attention_ref(
                    q[rows].to(dtype), k[first:last].to(dtype), v[first:last].to(dtype),
                    [0, CHECKED], [0, last - first],
                    heads.options, case.causal,
                )[0]
                for dtype in (torch.float64, heads.dtype)
            )  # fmt: skip
            assert_close("segment_attention", o[rows], exact, plain, factor)

    def batched(x: Tensor) -> Tensor:
        return x.unflatten(0, (case.pairs, -1)).transpose(1, 2)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            batched(q), batched(k), batched(v),
            is_causal=case.causal, scale=heads.scale, enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = batched(q).unflatten(1, (heads.num_kv_heads, -1))  # (B, Hkv, G, L, D)
        scores = grouped @ batched(k)[:, :, None].transpose(-1, -2) * heads.scale
        if case.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=DEVICE)
            offset = case.keys - case.queries + 1
            scores = scores.masked_fill_(hidden.triu(offset), -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        out = (weights @ batched(v)[:, :, None]).flatten(1, 2)
        return out.transpose(1, 2).flatten(0, 1)

    peers = {
        "eager": Peer(lambda: calls_on(eager, sets)),
        "sdpa": Peer(lambda: calls_on(sdpa, sets)),
    }
    absent = {"unshared": "nothing is shared"}
    backends: dict[Backend, str] = {"flash-attn": "flash_attn", "xformers": "xformers"}
    for backend, module in backends.items() if ON_GPU else ():
        if find_spec(module) is None:
            absent[backend] = "not installed"
        else:
            peers[backend] = Peer(
                partial(calls_on, partial(run, backend=backend), sets),
                third_party=True,
                capture=False,
            )
    return Work(
        "segment_attention", case.describe(), num_bytes, flops, calls_on(run, sets), check,
        peers, absent, capture=False,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=Case.describe)
def test_segment_attention(case: Case, measured: Callable[[Work], Figure]) -> None:
    measured(make_work(case))
