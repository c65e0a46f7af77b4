"""Attention of segments of queries over segments of keys, by a backend of choice.

    s_ij = scale * q_i . k_j        [softcap * tanh(s / softcap)]
    o_i  = sum_j exp(s_ij - lse_i) v_j,      lse_i = log sum_j exp(s_ij)

B pairs of segments lie side by side: queries [cu_q[b], cu_q[b + 1]) see keys [cu_k[b], cu_k[b + 1])
of the same pair only. T queries, N keys, Hq and Hkv heads (Hkv divides Hq), D and Dv channels.
Causal masks are aligned at the end of both segments, as in flash-attn: query i of L sees key j of M
where j <= i + M - L. Log-sum-exps are natural, float32.

This is where other people's kernels stand beside our own: a prompt's segments can be prefilled by
any of them and joined by `merge_states`, and benchmarks compare them here. "triton" and "torch" run
`forest_attention` on a plan of B trees; "flash" is flash-attn, "xformers" is xformers' flash
operator. None of them is chosen silently: what a backend cannot do is a ValueError.

It knows no cache and no tree, and computes no gradients.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from kernels.forest_attention import forest_attention_with_lse
from kernels.forest_attention.plan import MAX_SPLIT, MAX_TILE, ForestPlan, WorkItem
from kernels.launch import runs_triton

Backend = Literal["triton", "torch", "flash", "xformers"]
BACKENDS = ("triton", "torch", "flash", "xformers")


def segment_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Specification of `segment_attention`, pair by pair; float64 stays float64."""
    groups = q.shape[1] // k.shape[1]
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full(q.shape[:2], float("-inf"))
    for b in range(len(cu_q) - 1):
        queries, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        mine = k[keys].repeat_interleave(groups, 1), v[keys].repeat_interleave(groups, 1)
        scores = torch.einsum("lhd,nhd->hln", q[queries], mine[0]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        length, num_keys = scores.shape[1:]
        at = torch.arange(length)[:, None] + num_keys - length
        key = torch.arange(num_keys)
        if causal:
            scores[:, key > at] = float("-inf")
        if window is not None:
            scores[:, key <= at - window] = float("-inf")
        lse[queries] = scores.logsumexp(-1).T
        weights = (scores - lse[queries].T[..., None]).exp().nan_to_num(nan=0.0)
        out[queries] = torch.einsum("hln,nhe->lhe", weights, mine[1])
    return out, lse


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each segment of queries over its segment of keys.

    q: (T, Hq, D), k: (N, Hkv, D), v: (N, Hkv, Dv), one floating dtype and device. cu_q, cu_k: B + 1
    ascending offsets from 0 to T and to N. window: keys a query sees back from its own place, that
    one included; only with `causal`. backend: one of BACKENDS; None is "triton" on a GPU and
    "torch" on CPU. Returns o (T, Hq, Dv) in q's dtype and lse (T, Hq) float32 (float64 for float64
    input); a query that sees no key gives 0 and -inf.
    Raises ValueError for other shapes or values and for what the backend cannot do, and ImportError
    naming the extra to install where its package is absent.
    """
    _check(q, k, v, cu_q, cu_k, causal, window)
    if backend is None:
        backend = "triton" if runs_triton(q) else "torch"
    if backend == "flash":
        return _flash(q, k, v, cu_q, cu_k, scale, causal, softcap, window)
    if backend == "xformers":
        return _xformers(q, k, v, cu_q, cu_k, scale, causal, softcap, window)
    if backend not in BACKENDS:
        raise ValueError(f"segment_attention: backend must be one of {BACKENDS}, got {backend!r}")
    if (backend == "triton") != runs_triton(q):
        raise ValueError(f"segment_attention: backend {backend!r} does not run on {q.device} here")
    plan = _plan(cu_q, cu_k, causal, q.device)
    heads_first = k.transpose(0, 1), v.transpose(0, 1)
    return forest_attention_with_lse(q, *heads_first, plan, scale, softcap, window)


def _plan(
    cu_q: Sequence[int], cu_k: Sequence[int], causal: bool, device: torch.device
) -> ForestPlan:
    """One tree of one node for each pair; keys stand at 0, 1, 2, ... of their segment."""
    items = []
    positions: list[int] = []
    for b in range(len(cu_q) - 1):
        length, num_keys = cu_q[b + 1] - cu_q[b], cu_k[b + 1] - cu_k[b]
        last = num_keys - 1
        positions += [last - length + 1 + i if causal else last for i in range(length)]
        for first in range(0, length, MAX_TILE):
            queries = min(MAX_TILE, length - first)
            for key in range(0, num_keys, MAX_SPLIT):
                keys = min(MAX_SPLIT, num_keys - key)
                items.append(WorkItem(cu_q[b] + first, queries, cu_k[b] + key, keys, key))
    return ForestPlan(items, torch.tensor(positions, dtype=torch.int64, device=device))


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    scale: float,
    causal: bool,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(_absent("flash", "flash-attn")) from error
    _check_half("flash", q, v)
    offsets = [torch.tensor(cu, dtype=torch.int32, device=q.device) for cu in (cu_q, cu_k)]
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, *offsets, max(_lengths(cu_q), default=0), max(_lengths(cu_k), default=0),
        softmax_scale=scale, causal=causal, softcap=softcap or 0.0,
        window_size=(-1, -1) if window is None else (window - 1, 0), return_attn_probs=True,
    )  # fmt: skip
    lse = lse.T  # from (Hq, T)
    # flash-attn gives a row without keys +inf.
    return out, lse.masked_fill(lse == float("inf"), float("-inf"))


def _xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    scale: float,
    causal: bool,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    try:
        from xformers.ops import fmha
        from xformers.ops.fmha import attn_bias
    except ImportError as error:
        raise ImportError(_absent("xformers", "xformers")) from error
    _check_half("xformers", q, v)
    if softcap is not None:
        raise ValueError(f"segment_attention: xformers has no soft-cap, got {softcap}")
    lengths = [_lengths(cu) for cu in (cu_q, cu_k)]
    if causal and any(a > b for a, b in zip(*lengths, strict=True)):
        raise ValueError(
            f"segment_attention: xformers' causal mask needs as many keys as queries, got {lengths}"
        )
    bias = attn_bias.BlockDiagonalMask.from_seqlens(*lengths, device=q.device)
    if window is not None:
        bias = bias.make_local_attention_from_bottomright(window)
    elif causal:
        bias = bias.make_causal_from_bottomright()
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    grouped = (1, -1, kv_heads, heads // kv_heads, dim)  # (1, M, G, H, K) in xformers' letters
    out, lse = fmha.memory_efficient_attention_partial(
        q.unflatten(1, grouped[2:4])[None],
        k[None, :, :, None].expand(grouped),
        v[None, :, :, None].expand(grouped),
        bias,
        scale=scale,
        op=fmha.flash.FwOp,
    )
    # lse: (1, G, H, M), -inf or +inf where there is no key
    lse = lse.reshape(heads, tokens).T.float()
    out = out.reshape(tokens, heads, dim).to(q.dtype)
    nothing = lse.isinf()
    return out.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, float("-inf"))


def _absent(extra: str, package: str) -> str:
    return (
        f"segment_attention: backend {extra!r} needs the package {package}: "
        f"pip install 'quorum-grm[{extra}]'"
    )


def _lengths(cu: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(cu)]


def _check_half(backend: str, q: Tensor, v: Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] != v.shape[-1]:
        raise ValueError(
            f"segment_attention: {backend} takes float16 and bfloat16 with keys as wide as values, "
            f"got {q.dtype}, {q.shape[-1]} and {v.shape[-1]}"
        )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    causal: bool,
    window: int | None,
) -> None:
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"segment_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must "
            "be (T, Hq, D), (N, Hkv, D), (N, Hkv, Dv)"
        )
    for name, cu, size in (("cu_q", cu_q, len(q)), ("cu_k", cu_k, len(k))):
        if not cu or cu[0] != 0 or cu[-1] != size or list(cu) != sorted(cu):
            raise ValueError(f"segment_attention: {name} must ascend from 0 to {size}, got {cu}")
    if len(cu_q) != len(cu_k):
        raise ValueError(
            f"segment_attention: {len(cu_q) - 1} segments of queries, {len(cu_k) - 1} of keys"
        )
    if window is not None and not causal:
        raise ValueError(f"segment_attention: a window needs a causal mask, got window {window}")
