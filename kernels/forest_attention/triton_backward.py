"""Gradients of forest attention in Triton: one kernel sums over keys, one over queries.

    x_ij = scale q_i . k_j  [softcap tanh(...)]        p_ij = exp(x_ij - lse_i)
    delta_i = sum_d do_i o_i - dlse_i
    dx_ij = p_ij (do_i . v_j - delta_i)                ds_ij = dx_ij  [(1 - tanh^2)]
    dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i      dv_j = sum_i p_ij do_i

T queries, Hq query heads in groups of G per key/value head (Hkv of them), D and Dv channels of keys
and values, N cache indices. Scores, weights and sums are float32, rounded once; weights and ds
enter products in the dtype of q. Nothing is added atomically: a program has one tile of queries, or
one tile of keys with all queries that see them and all heads of the group. It adds in the order of
its list (`backward_schedule.py`), so gradients have the same bits in every run. A query without
keys has lse -inf and gets gradient 0, and so does a key that no query sees; neither is read.

The first kernel computes delta and leaves it to the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_triton, without_gaps
from kernels.device import to_device
from kernels.device_math import LOG2E, tanh
from kernels.forest_attention.backward_schedule import TileList, key_tiles, query_tiles
from kernels.forest_attention.options import AttentionOptions
from kernels.forest_attention.plan import CompiledKey, ForestPlan
from kernels.launch import launch
from kernels.target import Target, power_of_two, target_of


@triton.jit
def _weights_of(scores, lse, factor, cap_scale, SOFTCAP: tl.constexpr):
    """exp(x - lse), from q . k and lse * log2(e), and ds / dx."""
    slope = 1.0
    if SOFTCAP:
        scores = tanh(scores * cap_scale)
        slope = 1 - scores * scores
    return tl.exp2(scores * factor - lse), slope


@triton.jit
def _sum_over_keys(
    dq, q, do, lse, delta, q_pos, k_ptr, v_ptr, num_keys, position,
    k_n, v_n, factor, cap_scale, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    N: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the terms of a span of keys to the gradient of a query tile."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    last = tl.minimum(q_pos - position, num_keys - 1)  # (M,) of the keys that a query sees
    last_hidden = q_pos - position - window
    for start in range(0, num_keys, N):
        column = start + tl.arange(0, N)
        k_ptrs = k_ptr + column[:, None] * k_n + d[None, :]  # (N, BLOCK_D)
        v_ptrs = v_ptr + column[:, None] * v_n + dv[None, :]  # (N, BLOCK_DV)
        mask = (column < num_keys)[:, None]
        if MASKED or D != BLOCK_D:
            k = tl.load(k_ptrs, mask=mask & (d < D)[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
        if MASKED or DV != BLOCK_DV:
            v = tl.load(v_ptrs, mask=mask & (dv < DV)[None, :], other=0.0)
        else:
            v = tl.load(v_ptrs)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (M, N)
        weights, slope = _weights_of(scores, lse[:, None], factor, cap_scale, SOFTCAP)
        if MASKED:
            visible = column[None, :] <= last[:, None]
            if WINDOW:
                visible = visible & (column[None, :] > last_hidden[:, None])
            weights = tl.where(visible, weights, 0.0)
        d_weights = tl.dot(do, tl.trans(v), input_precision="ieee")  # (M, N)
        ds = weights * (d_weights - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # (M, BLOCK_D)
    return dq


@triton.jit
def _forest_attention_dq_kernel(
    q_ptr,  # (T, Hq, D), strides q_t, q_h, 1
    k_ptr,  # (Hkv, N, D), strides k_h, k_n, 1
    v_ptr,  # (Hkv, N, Dv), strides v_h, v_n, 1
    o_ptr,  # (T, Hq, Dv), contiguous
    do_ptr,  # (T, Hq, Dv), strides do_t, do_h, 1
    lse_ptr,  # (T, Hq)
    dlse_ptr,  # (T, Hq), or None
    delta_ptr,  # (T, Hq), written
    dq_ptr,  # (T, Hq, D), contiguous
    positions_ptr,  # (T,)
    tiles_ptr,  # (tiles, 5): first query, queries, first full span, first masked span, end span
    spans_ptr,  # (spans, 3): first key, keys, position of the first
    q_t,
    q_h,
    k_h,
    k_n,
    v_h,
    v_n,
    do_t,
    do_h,
    scale,
    factor,
    cap_scale,
    window,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1) * G
    tiles_ptr += tl.program_id(0).to(tl.int64) * 5
    query = tl.load(tiles_ptr).to(tl.int64)
    num_queries = tl.load(tiles_ptr + 1)
    first_span = tl.load(tiles_ptr + 2)
    first_masked = tl.load(tiles_ptr + 3)
    end_span = tl.load(tiles_ptr + 4)

    m = tl.arange(0, M)
    row, head = m // G, kv_head * G + m % G
    mask = row < num_queries  # (M,)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_pos = tl.load(positions_ptr + query + row, mask=mask, other=0).to(tl.int32)
    q_ptrs = q_ptr + ((query + row) * q_t + head * q_h)[:, None] + d[None, :]
    q = tl.load(q_ptrs, mask=mask[:, None] & (d < D)[None, :], other=0.0)  # (M, BLOCK_D)
    out = (query + row) * num_heads + head  # (M,)
    in_row = mask[:, None] & (dv < DV)[None, :]
    do_ptrs = do_ptr + ((query + row) * do_t + head * do_h)[:, None] + dv[None, :]
    do = tl.load(do_ptrs, mask=in_row, other=0.0)  # (M, BLOCK_DV)
    o = tl.load(o_ptr + out[:, None] * DV + dv[None, :], mask=in_row, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + out, mask=mask, other=0.0)
    tl.store(delta_ptr + out, delta, mask=mask)
    lse = tl.load(lse_ptr + out, mask=mask, other=0.0)
    # A query without keys: exp2(... - inf) is 0.
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)

    dq = tl.zeros((M, BLOCK_D), tl.float32)
    k_ptr += kv_head * k_h
    v_ptr += kv_head * v_h
    for span in range(first_span, first_masked):
        key = tl.load(spans_ptr + span * 3).to(tl.int64)
        num_keys = tl.load(spans_ptr + span * 3 + 1)
        dq = _sum_over_keys(
            dq, q, do, lse, delta, q_pos, k_ptr + key * k_n, v_ptr + key * v_n, num_keys, 0,
            k_n, v_n, factor, cap_scale, window,
            D, DV, BLOCK_D, BLOCK_DV, N, SOFTCAP, WINDOW, False,
        )  # fmt: skip
    for span in range(first_masked, end_span):
        key = tl.load(spans_ptr + span * 3).to(tl.int64)
        num_keys = tl.load(spans_ptr + span * 3 + 1)
        position = tl.load(spans_ptr + span * 3 + 2)
        dq = _sum_over_keys(
            dq, q, do, lse, delta, q_pos, k_ptr + key * k_n, v_ptr + key * v_n, num_keys, position,
            k_n, v_n, factor, cap_scale, window,
            D, DV, BLOCK_D, BLOCK_DV, N, SOFTCAP, WINDOW, True,
        )  # fmt: skip
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    dq_ptrs = dq_ptr + out[:, None] * D + d[None, :]
    tl.store(dq_ptrs, dq, mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def _sum_over_queries(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, positions_ptr, num_queries, k_pos,
    q_t, q_h, do_t, do_h, num_heads, factor, cap_scale, window,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, M: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add the terms of a span of queries to the gradients of a tile of keys and values."""
    m = tl.arange(0, M)
    head = m % G
    d_k, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for start in range(0, num_queries, M // G):
        row = start + m // G
        mask = m < M // G * G
        if MASKED:
            mask = mask & (row < num_queries)
        q_ptrs = q_ptr + (row * q_t + head * q_h)[:, None] + d_k[None, :]  # (M, BLOCK_D)
        do_ptrs = do_ptr + (row * do_t + head * do_h)[:, None] + d_v[None, :]  # (M, BLOCK_DV)
        if MASKED or M % G != 0 or D != BLOCK_D:
            q = tl.load(q_ptrs, mask=mask[:, None] & (d_k < D)[None, :], other=0.0)
        else:
            q = tl.load(q_ptrs)
        if MASKED or M % G != 0 or DV != BLOCK_DV:
            do = tl.load(do_ptrs, mask=mask[:, None] & (d_v < DV)[None, :], other=0.0)
        else:
            do = tl.load(do_ptrs)
        if MASKED or M % G != 0:
            lse = tl.load(lse_ptr + row * num_heads + head, mask=mask, other=float("-inf"))
            delta = tl.load(delta_ptr + row * num_heads + head, mask=mask, other=0.0)
        else:
            lse = tl.load(lse_ptr + row * num_heads + head)
            delta = tl.load(delta_ptr + row * num_heads + head)
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (N, M)
        weights, slope = _weights_of(scores, lse[None, :], factor, cap_scale, SOFTCAP)
        if MASKED:
            q_pos = tl.load(positions_ptr + row, mask=mask, other=-1).to(tl.int32)
            visible = k_pos[:, None] <= q_pos[None, :]
            if WINDOW:
                visible = visible & (k_pos[:, None] > q_pos[None, :] - window)
            weights = tl.where(visible, weights, 0.0)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")  # (N, BLOCK_DV)
        d_weights = tl.dot(v, tl.trans(do), input_precision="ieee")  # (N, M)
        ds = weights * (d_weights - delta[None, :]) * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")  # (N, BLOCK_D)
    return dk, dv


@triton.jit
def _forest_attention_dkv_kernel(
    q_ptr,  # (T, Hq, D), strides q_t, q_h, 1
    k_ptr,  # (Hkv, N, D), strides k_h, k_n, 1
    v_ptr,  # (Hkv, N, Dv), strides v_h, v_n, 1
    do_ptr,  # (T, Hq, Dv), strides do_t, do_h, 1
    lse_ptr,  # (T, Hq)
    delta_ptr,  # (T, Hq)
    dk_ptr,  # (N, Hkv, D), contiguous
    dv_ptr,  # (N, Hkv, Dv), contiguous
    positions_ptr,  # (T,)
    tiles_ptr,  # (tiles, 5): first key, keys, first full span, first masked span, end span
    spans_ptr,  # (spans, 3): first query, queries, position of the tile's first key
    q_t,
    q_h,
    k_h,
    k_n,
    v_h,
    v_n,
    do_t,
    do_h,
    scale,
    factor,
    cap_scale,
    window,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(1)
    tiles_ptr += tl.program_id(0).to(tl.int64) * 5
    key = tl.load(tiles_ptr).to(tl.int64)
    num_keys = tl.load(tiles_ptr + 1)
    first_span = tl.load(tiles_ptr + 2)
    first_masked = tl.load(tiles_ptr + 3)
    end_span = tl.load(tiles_ptr + 4)

    n = tl.arange(0, N)
    d_k, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    # Rows past the tile's last key repeat it; their gradients are not stored.
    row = key + tl.minimum(n, num_keys - 1)
    k_ptrs = k_ptr + kv_head * k_h + row[:, None] * k_n + d_k[None, :]
    v_ptrs = v_ptr + kv_head * v_h + row[:, None] * v_n + d_v[None, :]
    k = tl.load(k_ptrs, mask=(d_k < D)[None, :], other=0.0)  # (N, BLOCK_D)
    v = tl.load(v_ptrs, mask=(d_v < DV)[None, :], other=0.0)  # (N, BLOCK_DV)
    dk = tl.zeros((N, BLOCK_D), tl.float32)
    dv = tl.zeros((N, BLOCK_DV), tl.float32)
    num_heads = kv_heads * G
    q_ptr += kv_head * G * q_h
    do_ptr += kv_head * G * do_h
    lse_ptr += kv_head * G
    delta_ptr += kv_head * G
    for span in range(first_span, first_masked):
        query = tl.load(spans_ptr + span * 3).to(tl.int64)
        num_queries = tl.load(spans_ptr + span * 3 + 1)
        dk, dv = _sum_over_queries(
            dk, dv, k, v, q_ptr + query * q_t, do_ptr + query * do_t,
            lse_ptr + query * num_heads, delta_ptr + query * num_heads, positions_ptr + query,
            num_queries, n, q_t, q_h, do_t, do_h, num_heads, factor, cap_scale, window,
            G, D, DV, BLOCK_D, BLOCK_DV, M, SOFTCAP, WINDOW, False,
        )  # fmt: skip
    for span in range(first_masked, end_span):
        query = tl.load(spans_ptr + span * 3).to(tl.int64)
        num_queries = tl.load(spans_ptr + span * 3 + 1)
        position = tl.load(spans_ptr + span * 3 + 2)
        dk, dv = _sum_over_queries(
            dk, dv, k, v, q_ptr + query * q_t, do_ptr + query * do_t,
            lse_ptr + query * num_heads, delta_ptr + query * num_heads, positions_ptr + query,
            num_queries, position + n, q_t, q_h, do_t, do_h, num_heads, factor, cap_scale, window,
            G, D, DV, BLOCK_D, BLOCK_DV, M, SOFTCAP, WINDOW, True,
        )  # fmt: skip
    out = ((key + n) * kv_heads + kv_head)[:, None]  # (N, 1)
    mask = (n < num_keys)[:, None]
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + out * D + d_k[None, :], dk, mask=mask & (d_k < D)[None, :])
    dv = dv.to(dv_ptr.dtype.element_ty)
    tl.store(dv_ptr + out * DV + d_v[None, :], dv, mask=mask & (d_v < DV)[None, :])


def _launch_dq(
    groups: int, dim: int, v_dim: int, dtype: torch.dtype, target: Target
) -> dict[str, int]:
    """Rows of a query tile, keys of a step, warps and stages: what registers and shared memory hold
    without spilling. Tune with bench/ops/forest_attention.py."""
    block_d, block_dv = power_of_two(dim, 16), power_of_two(v_dim, 16)
    widest = max(block_d, block_dv)
    if dtype == torch.float32:  # products in float32 are unrolled into registers
        rows, keys, warps = 32 if widest <= 64 else 16, 32 if widest <= 32 else 16, 4
    elif widest <= 128:
        rows, keys, warps = 128, 32 if target.is_hip else 64, 8
    else:
        rows, keys, warps = 64, 16, 8
    return {
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "M": power_of_two(groups, rows),
        "N": keys,
        "num_warps": warps,
        "num_stages": 2 if target.is_hip or dtype == torch.float32 else 3,
    }


def _launch_dkv(
    groups: int, dim: int, v_dim: int, dtype: torch.dtype, target: Target
) -> dict[str, int]:
    """Keys of a tile, rows (queries x the group's heads) of a step, warps and stages, likewise."""
    block_d, block_dv = power_of_two(dim, 16), power_of_two(v_dim, 16)
    widest = max(block_d, block_dv)
    if dtype == torch.float32:
        keys, rows, warps = 32 if widest <= 64 else 16, 16, 8
    elif widest <= 128:
        keys, rows, warps = 128, 32, 8
    else:
        keys, rows, warps = 32, 32, 8
    return {
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "M": power_of_two(groups, rows),
        "N": keys,
        "num_warps": warps,
        "num_stages": 2 if target.is_hip or dtype == torch.float32 else 3,
    }


def _to_device(tiles: TileList, device: torch.device) -> TileList:
    return TileList(*(to_device(each, device) for each in tiles))


def run_backward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    plan: ForestPlan,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (T, Hq, D), k_cache (Hkv, N, D) and v_cache (Hkv, N, Dv) from those of o
    (T, Hq, Dv) and lse (T, Hq), the results of the forward. In memory the caches' gradients are
    (N, Hkv, ...)."""
    d_o = without_gaps(d_o)
    check_triton("forest_attention", q, k_cache, v_cache, o, d_o)
    (queries, heads, dim), (kv_heads, cells, v_dim) = q.shape, v_cache.shape
    device, target, groups, window = q.device, target_of(q), heads // kv_heads, options.window
    over_keys = _launch_dq(groups, dim, v_dim, q.dtype, target)
    over_queries = _launch_dkv(groups, dim, v_dim, q.dtype, target)
    size, step = over_keys["M"] // groups, over_keys["N"]
    query_list = plan.compiled(
        CompiledKey("triton", "dq", window, (size, step)),
        lambda: _to_device(query_tiles(plan, window, size, step), device),
    )
    tile, rows = over_queries["N"], over_queries["M"] // groups
    key_list = plan.compiled(
        CompiledKey("triton", "dkv", window, (cells, tile, rows)),
        lambda: _to_device(key_tiles(plan, cells, window, tile, rows), device),
    )
    delta = torch.empty(queries, heads, dtype=torch.float32, device=device)
    d_q = torch.empty(q.shape, dtype=q.dtype, device=device)
    d_k = torch.empty(cells, kv_heads, dim, dtype=q.dtype, device=device)
    d_v = torch.empty(cells, kv_heads, v_dim, dtype=q.dtype, device=device)
    common = (
        *q.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2], *d_o.stride()[:2],
        options.scale, *options.exp2_factors(), window or 0,
    )  # fmt: skip
    constants = {
        "G": groups, "D": dim, "DV": v_dim, "SOFTCAP": options.softcap is not None,
        "WINDOW": window is not None,
    }  # fmt: skip
    launch(
        _forest_attention_dq_kernel,
        (len(query_list.tiles), kv_heads),
        q, k_cache, v_cache, o.contiguous(), d_o, lse.contiguous(),
        None if d_lse is None else d_lse.contiguous(), delta, d_q, plan.positions, *query_list,
        *common, **constants, **over_keys,
    )  # fmt: skip
    launch(
        _forest_attention_dkv_kernel,
        (len(key_list.tiles), kv_heads),
        q, k_cache, v_cache, d_o, lse.contiguous(), delta, d_k, d_v, plan.positions, *key_list,
        *common, **constants, **over_queries,
    )  # fmt: skip
    return d_q, d_k.transpose(0, 1), d_v.transpose(0, 1)
