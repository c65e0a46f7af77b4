"""Attention of segments over segments: our kernel, and other backends of the same interface.

Whole calls are timed, plans and offsets included, as a caller pays for them; these come from the
host in every call, so that none of it is captured.
"""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Arguments, OpCase, Peer, Peers, calls_on, like, same_inputs
from bench.forests import Heads
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, ON_GPU, Fill
from kernels.segment_attention import Backend, segment_attention, segment_attention_ref

CHECKED = 3  # queries of the first and of the last segment


def _cost(pairs: int, queries: int, keys: int, causal: bool, heads: Heads) -> tuple[int, int]:
    """Bytes to move, the log-sum-exps included, and operations to do."""
    window = heads.window or keys
    per_query = range(keys - queries + 1, keys + 1)
    seen = sum(min(n, window) for n in per_query) if causal else queries * keys
    moved = queries * (heads.query_bytes + 4 * heads.num_heads) + keys * heads.cell_bytes
    return pairs * moved, pairs * 4 * heads.num_heads * heads.head_dim * seen


def forward(pairs: int, queries: int, keys: int, causal: bool, heads: Heads) -> OpCase:
    """`pairs` segments of `queries` over as many of `keys`, slices of one projection each."""
    cu_seqlens_q, cu_seqlens_k = ([size * i for i in range(pairs + 1)] for size in (queries, keys))

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]

        def draw(tokens: int) -> tuple[Tensor, ...]:
            return tensor(tokens, sum(sizes), heads.head_dim, dtype=heads.dtype).split(sizes, 1)

        return [(draw(cu_seqlens_q[-1])[0], *draw(cu_seqlens_k[-1])[1:]) for _ in range(count)]

    def run(q: Tensor, k: Tensor, v: Tensor, backend: Backend | None = None) -> Any:
        return segment_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, heads.options, causal, backend
        )

    def check(arguments: Arguments, out: Any, factor: float) -> None:
        o = out[0] if isinstance(out, tuple) else out
        q, k, v = arguments
        checked = min(queries, CHECKED)

        def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return segment_attention_ref(q, k, v, [0, checked], [0, keys], heads.options, causal)[0]

        for pair in (0, pairs - 1):
            last = cu_seqlens_q[pair + 1]  # causal masks end with both
            rows = slice(last - checked, last)
            mine = slice(cu_seqlens_k[pair], cu_seqlens_k[pair + 1])
            like("segment_attention", reference)((q[rows], k[mine], v[mine]), o[rows], factor)

    def batched(x: Tensor) -> Tensor:
        return x.unflatten(0, (pairs, -1)).transpose(1, 2)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            batched(q), batched(k), batched(v),
            is_causal=causal, scale=heads.scale, enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = batched(q).unflatten(1, (heads.num_kv_heads, -1))  # (B, Hkv, G, L, D)
        scores = grouped @ batched(k)[:, :, None].transpose(-1, -2) * heads.scale
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=DEVICE)
            scores = scores.masked_fill_(hidden.triu(keys - queries + 1), -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        out = (weights @ batched(v)[:, :, None]).flatten(1, 2)
        return out.transpose(1, 2).flatten(0, 1)

    def peers(inputs: list[Arguments]) -> Peers:
        found: dict[str, Peer | str] = {"unshared": "nothing is shared"}
        if heads.softcap is None and heads.window is None:
            found |= same_inputs(eager=eager)(inputs)
            if not causal or queries == keys:  # SDPA's causal mask is aligned at the start
                found |= same_inputs(sdpa=sdpa)(inputs)
        backends: dict[Backend, str] = {"flash-attn": "flash_attn", "xformers": "xformers"}
        for backend, module in backends.items() if ON_GPU else ():
            if find_spec(module) is None:
                found[backend] = "not installed"
            else:
                make = partial(calls_on, partial(run, backend=backend), inputs)
                found[backend] = Peer(make, third_party=True, capture=False)
        return found

    kind = "causal" if causal else "all"
    return OpCase(
        "segment_attention",
        f"{pairs} x {queries} over {keys} {kind}, {heads.describe()}",
        make_inputs,
        run,
        check,
        *_cost(pairs, queries, keys, causal, heads),
        peers,
        capture=False,
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Long and short segments, over themselves and over a prefix; of latent attention none."""
    if shape.latent is not None:
        return
    for pairs, queries, keys in ((1, rows, rows), (4, 20, 20), (2, 100, 700), (16, 1, 300)):
        yield forward(pairs, queries, keys, True, Heads.of(shape, shape.window))
        yield forward(pairs, queries, keys, False, Heads.of(shape))


_QWEN = Heads.of(SHAPES["qwen3-8b"])
CASES = (
    [forward(4, 2048, 2048, True, _QWEN), forward(8, 512, 4096, False, _QWEN)]
    if ON_GPU
    else [
        forward(2, 128, 128, True, Heads.of(SHAPES["pocket"])),
        forward(2, 64, 256, False, Heads.of(SHAPES["qwen3-107m"])),
    ]
)
