"""What stands between a layer's projection and its attention over a cache: queries and keys are
normalised and rotated, keys and values are written into the cache.

    out[t, h] = rope(norm(q[t, h]))
    k_cache[h, cache_index[t]] = rope(norm(k[t, h]))        v_cache[h, cache_index[t]] = v[t, h]

T tokens, Hq query heads, Hkv key/value heads, D and Dv channels of a key and a value (they may
differ), N cells of the cache. `norm` is `rms_norm` over the channels of a head, where the model has
one; `rope` is that of `kernels/rope.py`. Each rounds to the dtype of its input. The cache is
head-major: one head's keys in consecutive cells are one contiguous block. Indices are distinct: of
two tokens written to one cell an arbitrary one would stay.

In Triton it is one launch. A program has several rows, pairs of a token and a head: of queries, or
of keys and values. Not differentiable: training has no cache.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cpp
from kernels.checks import check, check_triton
from kernels.cpp import runs_cpp
from kernels.launch import launch, runs_triton
from kernels.rms_norm import rms_norm, rms_norm_ref
from kernels.rope import rope, rope_ref
from kernels.target import power_of_two


@dataclass(frozen=True)
class HeadNorms:
    """The norms of a layer's queries and keys, as `rms_norm` takes them; weights are (D,)."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    plus_one: bool


def norm_rope_write_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_index: Tensor,
) -> Tensor:
    """Specification of `norm_rope_write`, one token after another."""
    if norms is not None:
        normed = [
            rms_norm_ref(x, weight, norms.eps, norms.plus_one)
            for x, weight in ((q, norms.q_weight), (k, norms.k_weight))
        ]
        q, k = (x for x in normed if isinstance(x, Tensor))
    k = rope_ref(k, cos, sin)
    for t, index in enumerate(cache_index.tolist()):
        k_cache[:, index] = k[t]
        v_cache[:, index] = v[t]
    return rope_ref(q, cos, sin)


@triton.jit
def _rotated(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, t, h, mask, x_t, x_h, cos_t, sin_t, eps,
    HALF: tl.constexpr, PLUS_ONE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The halves of heads h of tokens t, normalised if there is a weight, and rotated."""
    pair = tl.arange(0, PAIRS)
    dtype = x_ptr.dtype.element_ty
    x_ptrs = x_ptr + (t.to(tl.int64) * x_t + h * x_h)[:, None] + pair[None, :]
    a = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # (ROWS, PAIRS)
    b = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + (t * cos_t)[:, None] + pair[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + (t * sin_t)[:, None] + pair[None, :], mask=mask, other=0.0)
    if weight_ptr is not None:
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
        inside = pair < HALF
        weight_a = tl.load(weight_ptr + pair, mask=inside, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + HALF + pair, mask=inside, other=0.0).to(tl.float32)
        if PLUS_ONE:
            weight_a += 1
            weight_b += 1
        a = (a * rstd * weight_a[None, :]).to(dtype).to(tl.float32)
        b = (b * rstd * weight_b[None, :]).to(dtype).to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def _norm_rope_write_kernel(
    q_ptr,  # (T, Hq, D), strides q_t, q_h, 1
    k_ptr,  # (T, Hkv, D), strides k_t, k_h, 1
    v_ptr,  # (T, Hkv, Dv), strides v_t, v_h, 1
    q_weight_ptr,  # (D,), or None
    k_weight_ptr,  # (D,), or None
    cos_ptr,  # (T, D/2), strides cos_t, 1
    sin_ptr,  # (T, D/2), strides sin_t, 1
    cache_index_ptr,  # (T,) int64
    out_ptr,  # (T * Hq, D), contiguous
    k_cache_ptr,  # (Hkv, N, D), strides k_cache_h, k_cache_n, 1
    v_cache_ptr,  # (Hkv, N, Dv), strides v_cache_h, v_cache_n, 1
    num_tokens,  # T
    num_heads,  # Hq
    num_kv_heads,  # Hkv
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    cos_t,
    sin_t,
    k_cache_h,
    k_cache_n,
    v_cache_h,
    v_cache_n,
    eps,
    HALF: tl.constexpr,  # D/2
    V_D: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
):
    pair = tl.arange(0, PAIRS)
    program, q_programs = tl.program_id(0), tl.cdiv(num_tokens * num_heads, ROWS)
    if program < q_programs:
        row = program * ROWS + tl.arange(0, ROWS)
        mask = (row < num_tokens * num_heads)[:, None] & (pair < HALF)[None, :]
        a, b = _rotated(
            q_ptr, q_weight_ptr, cos_ptr, sin_ptr, row // num_heads, row % num_heads, mask,
            q_t, q_h, cos_t, sin_t, eps, HALF, PLUS_ONE, PAIRS,
        )  # fmt: skip
        out_ptrs = out_ptr + row.to(tl.int64)[:, None] * (2 * HALF) + pair[None, :]
        tl.store(out_ptrs, a, mask=mask)
        tl.store(out_ptrs + HALF, b, mask=mask)
    else:
        row = (program - q_programs) * ROWS + tl.arange(0, ROWS)
        valid = row < num_tokens * num_kv_heads
        t, h = row // num_kv_heads, (row % num_kv_heads).to(tl.int64)
        index = tl.load(cache_index_ptr + t, mask=valid, other=0)  # (ROWS,)
        mask = valid[:, None] & (pair < HALF)[None, :]
        a, b = _rotated(
            k_ptr, k_weight_ptr, cos_ptr, sin_ptr, t, h, mask,
            k_t, k_h, cos_t, sin_t, eps, HALF, PLUS_ONE, PAIRS,
        )  # fmt: skip
        k_ptrs = k_cache_ptr + (h * k_cache_h + index * k_cache_n)[:, None] + pair[None, :]
        tl.store(k_ptrs, a, mask=mask)
        tl.store(k_ptrs + HALF, b, mask=mask)
        column = tl.arange(0, V_COLUMNS)
        in_value = valid[:, None] & (column < V_D)[None, :]
        v_ptrs = v_ptr + (t.to(tl.int64) * v_t + h * v_h)[:, None] + column[None, :]
        v = tl.load(v_ptrs, mask=in_value)
        v_ptrs = v_cache_ptr + (h * v_cache_h + index * v_cache_n)[:, None] + column[None, :]
        tl.store(v_ptrs, v, mask=in_value)


def _launch(half: int, v_dim: int) -> dict[str, int]:
    """Rows of a program, and its warps: 1,024 pairs or one head."""
    pairs = power_of_two(half, 8)
    rows = max(1, 1024 // pairs)
    return {"ROWS": rows, "PAIRS": pairs, "V_COLUMNS": power_of_two(v_dim, 16), "num_warps": 4}


def _run_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_index: Tensor,
) -> Tensor:
    weights = (None, None) if norms is None else (norms.q_weight, norms.k_weight)
    given = (weight for weight in weights if weight is not None)
    check_triton("norm_rope_write", q, k, v, *given, cos, sin, k_cache, v_cache, cache_index)
    (tokens, heads, dim), (_, kv_heads, v_dim) = q.shape, v.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    options = _launch(dim // 2, v_dim)
    programs = [triton.cdiv(tokens * each, options["ROWS"]) for each in (heads, kv_heads)]
    launch(
        _norm_rope_write_kernel,
        (sum(programs),),
        q, k, v, *weights, cos, sin, cache_index, out, k_cache, v_cache, tokens, heads, kv_heads,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0),
        *k_cache.stride()[:2], *v_cache.stride()[:2], 0.0 if norms is None else norms.eps,
        HALF=dim // 2, V_D=v_dim, PLUS_ONE=norms is not None and norms.plus_one, **options,
    )  # fmt: skip
    return out


def _write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_index: Tensor) -> None:
    """Into the cache on a CPU. Raises ValueError for indices that repeat or lie outside it."""
    (tokens, heads, dim), size = k.shape, k_cache.shape[1]
    if runs_cpp(k, v, k_cache, v_cache) and cpp.distinct_slots(cache_index, size):
        cpp.call(
            "write_kv", k.dtype, k, *k.stride()[:2], v, *v.stride()[:2], k_cache,
            *k_cache.stride()[:2], v_cache, *v_cache.stride()[:2], cache_index,
            tokens, heads, dim, v.shape[-1],
        )  # fmt: skip
        return
    ordered = cache_index.sort().values
    if tokens and (ordered[0] < 0 or ordered[-1] >= size):
        raise ValueError(
            f"norm_rope_write: cache_index must lie in [0, {size}), got {int(ordered[0])} to "
            f"{int(ordered[-1])}"
        )
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(f"norm_rope_write: index {int(repeated[0])} is written twice")
    k_cache.index_copy_(1, cache_index, k.transpose(0, 1))
    v_cache.index_copy_(1, cache_index, v.transpose(0, 1))


@torch.no_grad()
def norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_index: Tensor,
) -> Tensor:
    """Normalise and rotate queries and keys, and write keys and values into the cache, in place.

    q: (T, Hq, D), D even. k: (T, Hkv, D). v: (T, Hkv, Dv). norms: None for a model without. cos,
    sin: (T, D/2) float32, from `rope_cos_sin`. k_cache: (Hkv, N, D). v_cache: (Hkv, N, Dv).
    cache_index: (T,) int64, distinct, in [0, N). All other floating tensors have q's dtype, all
    tensors one device. In Triton the last dimensions are contiguous; the others may be slices of
    something wider. Returns the queries (T, Hq, D), contiguous. Raises ValueError for other shapes
    and dtypes and, on CPU, for indices that repeat or lie outside the cache; on a GPU they are not
    checked, since that would wait for the device.
    """
    check("norm_rope_write: q", q, "THD", "floating")
    tokens, _, dim = q.shape
    if dim % 2:
        raise ValueError(f"norm_rope_write: q must have an even number of channels, not {dim}")
    check("norm_rope_write: k", k, (tokens, "Hkv", dim), q.dtype)
    heads = k.shape[1]
    check("norm_rope_write: v", v, (tokens, heads, "Dv"), q.dtype)
    check("norm_rope_write: k_cache", k_cache, (heads, "N", dim), q.dtype)
    check("norm_rope_write: v_cache", v_cache, (heads, k_cache.shape[1], v.shape[-1]), q.dtype)
    check("norm_rope_write: cache_index", cache_index, (tokens,), torch.int64)
    check("norm_rope_write: cos", cos, (tokens, dim // 2), torch.float32)
    check("norm_rope_write: sin", sin, (tokens, dim // 2), torch.float32)
    others = {
        "k": k, "v": v, "cos": cos, "sin": sin, "k_cache": k_cache, "v_cache": v_cache,
        "cache_index": cache_index,
    }  # fmt: skip
    if norms is not None:
        others |= {"q_weight": norms.q_weight, "k_weight": norms.k_weight}
        check("norm_rope_write: q_weight", norms.q_weight, (dim,), "floating")
        check("norm_rope_write: k_weight", norms.k_weight, (dim,), "floating")
    for name, tensor in others.items():
        if tensor.device != q.device:
            raise ValueError(f"norm_rope_write: {name} is on {tensor.device}, q on {q.device}")
    if runs_triton(q):
        return _run_triton(q, k, v, norms, cos, sin, k_cache, v_cache, cache_index)
    if norms is not None:
        normed = [
            rms_norm(x, weight, norms.eps, norms.plus_one)
            for x, weight in ((q, norms.q_weight), (k, norms.k_weight))
        ]
        q, k = (x for x in normed if isinstance(x, Tensor))
    _write(rope(k, cos, sin), v, k_cache, v_cache, cache_index)
    return rope(q, cos, sin)
