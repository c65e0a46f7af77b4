"""Attention of segments of queries over segments of keys, by a backend of choice.

    s_ij = scale * q_i . k_j        [softcap * tanh(s / softcap)]
    o_i  = sum_j exp(s_ij - lse_i) v_j,      lse_i = log sum_j exp(s_ij)

B pairs of segments lie side by side: queries [cu_seqlens_q[b], cu_seqlens_q[b + 1]) see keys
[cu_seqlens_k[b], cu_seqlens_k[b + 1]) of the same pair only. T queries, N keys, Hq and Hkv heads
(Hkv divides Hq), D and Dv channels. Causal masks are aligned at the end of both segments, as in
flash-attn: query i of L sees key j of M where j <= i + M - L. Log-sum-exps are natural, float32.

"triton" and "torch" run `forest_attention` on a plan of B trees; "flash-attn" is flash-attn,
"xformers" is xformers' flash operator. None of them is chosen silently: what a backend cannot do is
a ValueError. The engine prefills prompts through this interface with `--attention`, and benchmarks
compare the backends here. It knows no cache and no tree, and computes no gradients.
"""

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from kernels.forest_attention import AttentionOptions, forest_attention_with_lse
from kernels.forest_attention.plan import MAX_SPLIT, MAX_TILE, ForestPlan, WorkTile
from kernels.forest_attention.reference import dense_attention, visible_keys
from kernels.launch import runs_triton

Backend = Literal["triton", "torch", "flash-attn", "xformers"]
BACKENDS = ("triton", "torch", "flash-attn", "xformers")
MAX_CHANNELS = 256  # of a key that is copied beside its value
_PACKAGES = {"flash-attn": ("flash_attn", "flash"), "xformers": ("xformers", "xformers")}


def segment_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    options: AttentionOptions,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Specification of `segment_attention`, pair by pair; float64 stays float64."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_zeros(q.shape[:2])
    pairs = zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in pairs:
        visible = None
        if causal:
            k_pos = torch.arange(k_stop - k_start)
            q_pos = torch.arange(q_stop - q_start) + len(k_pos) - (q_stop - q_start)
            visible = visible_keys(q_pos, k_pos, options.window).to(q.device)
        queries, keys = slice(q_start, q_stop), slice(k_start, k_stop)
        out[queries], lse[queries] = dense_attention(q[queries], k[keys], v[keys], options, visible)
    return out, lse


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    options: AttentionOptions,
    causal: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each segment of queries over its segment of keys.

    q: (T, Hq, D), k: (N, Hkv, D), v: (N, Hkv, Dv), one floating dtype and device. cu_seqlens_q,
    cu_seqlens_k: B + 1 ascending offsets from 0 to T and to N. options: with a window only if
    `causal`. backend: one of BACKENDS; None is "triton" on a GPU and "torch" on CPU. Returns o
    (T, Hq, Dv) in q's dtype and lse (T, Hq) float32 (float64 for float64 input); a query that sees
    no key gets 0 and -inf.
    Raises ValueError for other shapes or values and for what the backend cannot do, and ImportError
    naming the extra to install where its package is absent.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, options, causal)
    if backend is None:
        backend = "triton" if runs_triton(q) else "torch"
    check_backend(backend, q, v.shape[-1], options)
    if backend == "flash-attn":
        return _run_flash(q, k, v, cu_seqlens_q, cu_seqlens_k, options, causal)
    if backend == "xformers":
        return _run_xformers(q, k, v, cu_seqlens_q, cu_seqlens_k, options, causal)
    plan = _plan(cu_seqlens_q, cu_seqlens_k, causal, q.device)
    return forest_attention_with_lse(q, k.transpose(0, 1), v.transpose(0, 1), plan, options)


def check_backend(backend: str, q: Tensor, v_dim: int, options: AttentionOptions) -> None:
    """Raise ValueError for what a backend cannot do, and ImportError where its package is absent.

    q: (..., D), for its dtype, its device and D.
    """
    if backend not in BACKENDS:
        raise ValueError(f"segment_attention: backend must be one of {BACKENDS}, got {backend!r}")
    if backend in ("triton", "torch"):
        if (backend == "triton") != runs_triton(q):
            raise ValueError(
                f"segment_attention: backend {backend!r} does not run on {q.device} here"
            )
        if backend == "triton" and q.shape[-1] > MAX_CHANNELS:
            raise ValueError(
                f"segment_attention: triton takes keys of at most {MAX_CHANNELS} channels, got "
                f"{q.shape[-1]}"
            )
        return
    module, extra = _PACKAGES[backend]
    try:
        import_module(module)
    except ImportError as error:
        raise ImportError(
            f"segment_attention: backend {backend!r} needs the package {backend}: "
            f"pip install 'quorum-grm[{extra}]'"
        ) from error
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] != v_dim:
        raise ValueError(
            f"segment_attention: {backend} takes float16 and bfloat16 with keys as wide as values, "
            f"got {q.dtype}, {q.shape[-1]} and {v_dim}"
        )
    if backend == "xformers" and options.softcap is not None:
        raise ValueError(f"segment_attention: xformers has no soft-cap, got {options.softcap}")


def _plan(
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    causal: bool,
    device: torch.device,
) -> ForestPlan:
    """One tree of one node for each pair. The positions of its keys are 0, 1, 2, ..."""
    tiles = []
    positions: list[int] = []
    pairs = zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in pairs:
        length, num_keys = q_stop - q_start, k_stop - k_start
        last = num_keys - 1
        positions += [last - length + 1 + i if causal else last for i in range(length)]
        for first in range(0, length, MAX_TILE):
            queries = min(MAX_TILE, length - first)
            for key in range(0, num_keys, MAX_SPLIT):
                keys = min(MAX_SPLIT, num_keys - key)
                tiles.append(WorkTile(q_start + first, queries, k_start + key, keys, key))
    return ForestPlan(tiles, torch.tensor(positions, dtype=torch.int64, device=device))


def _run_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    options: AttentionOptions,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_varlen_func

    offsets = [
        torch.tensor(cu_seqlens, dtype=torch.int32, device=q.device)
        for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)
    ]
    longest = [max(_lengths(cu_seqlens), default=0) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
    window = options.window
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, *offsets, *longest, softmax_scale=options.scale, causal=causal,
        softcap=options.softcap or 0.0, window_size=(-1, -1) if window is None else (window - 1, 0),
        return_attn_probs=True,
    )  # fmt: skip
    lse = lse.T  # from (Hq, T)
    # flash-attn gives a row without keys +inf.
    return out, lse.masked_fill(lse == float("inf"), float("-inf"))


def _run_xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    options: AttentionOptions,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha
    from xformers.ops.fmha import attn_bias

    lengths = [_lengths(cu_seqlens) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
    if causal and any(a > b for a, b in zip(*lengths, strict=True)):
        raise ValueError(
            f"segment_attention: xformers' causal mask needs as many keys as queries, got {lengths}"
        )
    bias = attn_bias.BlockDiagonalMask.from_seqlens(*lengths, device=q.device)
    if options.window is not None:
        bias = bias.make_local_attention_from_bottomright(options.window)
    elif causal:
        bias = bias.make_causal_from_bottomright()
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    grouped = (1, -1, kv_heads, heads // kv_heads, dim)  # (1, M, G, H, K) in xformers' letters
    out, lse = fmha.memory_efficient_attention_partial(
        q.unflatten(1, grouped[2:4])[None],
        k[None, :, :, None].expand(grouped),
        v[None, :, :, None].expand(grouped),
        bias,
        scale=options.scale,
        op=fmha.flash.FwOp,
    )
    # lse: (1, G, H, M), -inf or +inf where there is no key
    lse = lse.reshape(heads, tokens).T.float()
    out = out.reshape(tokens, heads, dim).to(q.dtype)
    nothing = lse.isinf()
    return out.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, float("-inf"))


def _lengths(cu_seqlens: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(cu_seqlens)]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    options: AttentionOptions,
    causal: bool,
) -> None:
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"segment_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must "
            "be (T, Hq, D), (N, Hkv, D), (N, Hkv, Dv)"
        )
    for name, offsets, size in (
        ("cu_seqlens_q", cu_seqlens_q, len(q)),
        ("cu_seqlens_k", cu_seqlens_k, len(k)),
    ):
        ascending = list(offsets) == sorted(offsets)
        if not offsets or offsets[0] != 0 or offsets[-1] != size or not ascending:
            raise ValueError(
                f"segment_attention: {name} must ascend from 0 to {size}, got {offsets}"
            )
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"segment_attention: {len(cu_seqlens_q) - 1} segments of queries, "
            f"{len(cu_seqlens_k) - 1} of keys"
        )
    if options.window is not None and not causal:
        raise ValueError(
            f"segment_attention: a window needs a causal mask, got window {options.window}"
        )
