"""Attention of many queries over the keys of a forest: a tile is read once for all who share it.

    s_ij = scale * q_i . k_j        [softcap * tanh(s / softcap)]
    o_i  = sum_j exp(s_ij - lse_i) v_j,      j over the keys that i's work items name, where
           position(j) <= position(i)   and, with a window,   position(j) > position(i) - window

T queries, Hq query heads in groups of G per key/value head (Hkv of them), D and Dv channels of keys
and values, N cache slots. Prefill, decode and training differ in the plan only
(`kernels/forest_attention/plan.py`). Log-sum-exps are natural; scores, partial results and their
merge are float32 (float64 for float64 input). No T x T mask exists.

Triton. A program takes a query tile (M rows: queries x the group's heads, of one key/value head)
along a list of runs of keys and writes one partial for each of its queries; `merge_states` joins
them in the order of the sequence. Where every query has one partial, that is the result, and there
is no merge. One kernel in two instances: *wide* (M 64 or 128) for nodes that many queries share and
for prefill, *narrow* (M 16) for few queries and for the leaves' suffixes, which need no list: one
program for each query and split, whose length is read on the device. Programs, runs and partials
are laid out in `kernels/forest_attention/schedule.py`.
The weights are exp2(x c - m c) with c = scale log2(e) folded into the subtraction: that is one
multiply-add, and q keeps its bits (a bfloat16 q would lose some if it were scaled beforehand).

Gradients of q, keys and values are those of o and of lse, once; their Triton kernels are in
`kernels/forest_attention/triton_backward.py`.

It does not write the cache or choose what is shared.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import check_triton
from kernels.cpp import runs_cpp
from kernels.device_math import tanh
from kernels.forest_attention import cpp_impl, torch_impl, triton_backward
from kernels.forest_attention.plan import MAX_SPLIT, ForestPlan
from kernels.forest_attention.schedule import CELLS, HeadShape, Programs, schedule_key, schedules_of
from kernels.launch import launch, runs_triton
from kernels.merge_states import merge_states
from kernels.target import Target, power_of_two, target_of

_LOG2E = 1.4426950408889634


def forest_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Specification of `forest_attention`: each query by itself over all the keys it may see."""
    out = torch.zeros(*q.shape[:2], v_cache.shape[-1], dtype=q.dtype, device=q.device)
    groups = q.shape[1] // k_cache.shape[0]
    positions = plan.positions.tolist()
    for i, at in enumerate(positions):
        keys: list[tuple[int, int]] = []  # cache slot, position
        for item in plan.items:
            if item.query <= i < item.query + item.num_queries:
                keys += [(item.key + j, item.position + j) for j in range(item.num_keys)]
        if plan.suffix is not None and i in plan.suffix.row.tolist():
            slot = plan.suffix.row.tolist().index(i)
            first = plan.suffix.base + slot * plan.suffix.capacity
            start = int(plan.suffix.position[i])
            keys += [(first + j, start + j) for j in range(int(plan.suffix.length[i]))]
        seen = [slot for slot, p in keys if p <= at and (window is None or p > at - window)]
        if not seen:
            continue
        k = k_cache[:, seen].repeat_interleave(groups, 0)  # (Hq, n, D)
        v = v_cache[:, seen].repeat_interleave(groups, 0)
        scores = torch.einsum("hd,hnd->hn", q[i], k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[i] = torch.einsum("hn,hnd->hd", scores.softmax(-1), v)
    return out


@triton.jit
def _attend_keys(
    q, acc, top, total, k_ptr, v_ptr, first, last, num_keys, position, at,
    k_n, v_n, factor, cap_scale, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    N: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take keys [first, last) of a run into the running softmax of a query tile."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for start in range(first, last, N):
        column = start + tl.arange(0, N)
        k_at = k_ptr + column[:, None] * k_n + d[None, :]  # (N, BLOCK_D)
        v_at = v_ptr + column[:, None] * v_n + dv[None, :]  # (N, BLOCK_DV)
        there = (column < num_keys)[:, None]
        if MASKED or D != BLOCK_D:
            k = tl.load(k_at, mask=there & (d < D)[None, :], other=0.0)
        else:
            k = tl.load(k_at)
        if MASKED or DV != BLOCK_DV:
            v = tl.load(v_at, mask=there & (dv < DV)[None, :], other=0.0)
        else:
            v = tl.load(v_at)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (M, N)
        if SOFTCAP:
            scores = tanh(scores * cap_scale)
        if MASKED:
            key_at = position + column[None, :]
            visible = (column < num_keys)[None, :] & (key_at <= at[:, None])
            if WINDOW:
                visible = visible & (key_at > at[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)  # (M,)
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * factor - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")  # (M, BLOCK_DV)
        top = new_top
    return acc, top, total


@triton.jit
def _forest_attention_kernel(
    q_ptr,  # (T, Hq, D), strides q_t, q_h, 1
    k_ptr,  # (Hkv, N, D), strides k_h, k_n, 1
    v_ptr,  # (Hkv, N, Dv), strides v_h, v_n, 1
    o_ptr,  # (P, Hq, Dv), contiguous
    lse_ptr,  # (P, Hq), contiguous
    positions_ptr,  # (T,)
    programs_ptr,  # (programs, 5): first query, queries, first run, last run, first partial
    runs_ptr,  # (runs, 3): first key, keys, position of the first
    cell_ptr,  # (T,) suffixes: where each query's keys begin in the cache
    length_ptr,  # (T,) suffixes: keys of each query; 0 or less where there is no suffix
    start_ptr,  # (T,) suffixes: position of the first key
    num_rows,  # T
    q_t,
    q_h,
    k_h,
    k_n,
    v_h,
    v_n,
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
    SPLIT: tl.constexpr,
    SUFFIX: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    program = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1) * G
    if SUFFIX:
        query, split = program % num_rows, program // num_rows
        num_queries, first_run, last_run = 1, 0, 1
        partial = program.to(tl.int64)
        own_key = tl.load(cell_ptr + query)
        own_keys = tl.minimum(tl.load(length_ptr + query) - split * SPLIT, SPLIT)
        own_keys = tl.where(own_key >= 0, own_keys, 0).to(tl.int32)
        own_position = (tl.load(start_ptr + query) + split * SPLIT).to(tl.int32)
        own_key += split * SPLIT
        if own_keys <= 0:  # most of the grid may lie behind the suffixes' ends
            own_head = tl.arange(0, M)
            own_lse = lse_ptr + partial * num_heads + kv_head * G + own_head
            tl.store(own_lse, tl.full((M,), float("-inf"), tl.float32), mask=own_head < G)
            return
    else:
        programs_ptr += program.to(tl.int64) * 5
        query = tl.load(programs_ptr).to(tl.int64)
        num_queries = tl.load(programs_ptr + 1)
        first_run = tl.load(programs_ptr + 2)
        last_run = tl.load(programs_ptr + 3)
        partial = tl.load(programs_ptr + 4).to(tl.int64)
        if num_queries == 0:
            return

    m = tl.arange(0, M)
    row, head = m // G, kv_head * G + m % G
    there = row < num_queries  # (M,)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at = tl.load(positions_ptr + query + row, mask=there, other=0).to(tl.int32)
    last_at = tl.max(tl.where(there, at, -1))
    first_at = tl.min(tl.where(there, at, 2147483647))
    q_at = q_ptr + ((query + row) * q_t + head * q_h)[:, None] + d[None, :]
    q = tl.load(q_at, mask=there[:, None] & (d < D)[None, :], other=0.0)  # (M, BLOCK_D)
    acc = tl.zeros((M, BLOCK_DV), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)

    for run in range(first_run, last_run):
        if SUFFIX:
            key, num_keys, position = own_key, own_keys, own_position
        else:
            key = tl.load(runs_ptr + run * 3).to(tl.int64)
            num_keys = tl.load(runs_ptr + run * 3 + 1)
            position = tl.load(runs_ptr + run * 3 + 2)
        k_run = k_ptr + kv_head * k_h + key * k_n
        v_run = v_ptr + kv_head * v_h + key * v_n
        # Tiles of N keys, counted from the run's start: [begin, whole) cut by the window,
        # [whole, full) seen by all queries, [full, num_keys) ragged or ahead of some query.
        num_keys = tl.minimum(num_keys, last_at + 1 - position)
        full = tl.maximum(tl.minimum(num_keys, first_at + 1 - position), 0) // N * N
        begin = 0
        if WINDOW:
            begin = tl.maximum(first_at + 1 - window - position, 0) // N * N
            whole = (tl.maximum(last_at + 1 - window - position, 0) + N - 1) // N * N
            whole = tl.minimum(tl.maximum(whole, begin), tl.maximum(num_keys, begin))
            acc, top, total = _attend_keys(
                q, acc, top, total, k_run, v_run, begin, whole, num_keys, position, at,
                k_n, v_n, factor, cap_scale, window,
                D, DV, BLOCK_D, BLOCK_DV, N, SOFTCAP, WINDOW, True,
            )  # fmt: skip
            # The last tile above may have reached beyond `whole`, but never beyond its own N.
            begin = (whole + N - 1) // N * N
            full = tl.maximum(full, begin)
        acc, top, total = _attend_keys(
            q, acc, top, total, k_run, v_run, begin, full, num_keys, position, at,
            k_n, v_n, factor, cap_scale, window,
            D, DV, BLOCK_D, BLOCK_DV, N, SOFTCAP, WINDOW, False,
        )  # fmt: skip
        acc, top, total = _attend_keys(
            q, acc, top, total, k_run, v_run, full, num_keys, num_keys, position, at,
            k_n, v_n, factor, cap_scale, window,
            D, DV, BLOCK_D, BLOCK_DV, N, SOFTCAP, WINDOW, True,
        )  # fmt: skip

    seen = total != 0  # of NaN too, which has to show
    total = tl.where(seen, total, 1.0)
    lse = tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    out = (partial + row) * num_heads + head  # (M,)
    tl.store(lse_ptr + out, lse, mask=there)
    o = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    o_at = o_ptr + out[:, None] * DV + dv[None, :]
    tl.store(o_at, o, mask=there[:, None] & (dv < DV)[None, :])


def _launch(rows: int, dim: int, v_dim: int, dtype: torch.dtype, target: Target) -> dict[str, int]:
    """Keys of a tile, warps and stages of one instance: as many bytes in flight as registers and
    shared memory hold without spilling. Not yet tuned on a device; bench/bench_forest_attention.py
    is the bench to tune with."""
    block_d, block_dv = power_of_two(dim, 16), power_of_two(v_dim, 16)
    is_wide = rows > 16
    if dtype == torch.float32:
        keys, stages = 16, 2  # products in float32 are unrolled into registers
    else:
        keys, stages = 32 if is_wide and max(block_d, block_dv) > 128 else 64, 3
    # On an AMD GPU the queries stay in registers.
    q_bytes = 0 if target.is_hip else rows * block_d * dtype.itemsize
    row_bytes = (block_d + block_dv) * dtype.itemsize
    while q_bytes + stages * keys * row_bytes > target.shared_bytes * 3 // 4 and stages > 1:
        if stages > 2 or keys == 16:
            stages -= 1
        else:
            keys //= 2
    return {
        "M": rows,
        "N": keys,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "num_warps": 8 if is_wide else 4,
        "num_stages": stages,
    }


def keys_per_partial(
    num_heads: int, num_kv_heads: int, dim: int, v_dim: int, dtype: torch.dtype
) -> int:
    """How many keys and values of one layer are as many bytes as one query's partial result, which
    is written and read again: what the choice between sharing and inlining weighs."""
    partial_bytes = num_heads * (v_dim + 1) * 4 * 2
    return partial_bytes // (num_kv_heads * (dim + v_dim) * dtype.itemsize)


def _run_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The output (T, Hq, Dv) in q's dtype and the natural log-sum-exps (T, Hq) of checked input."""
    check_triton("forest_attention", q, k_cache, v_cache)
    (_, heads, dim), (kv_heads, _, v_dim) = q.shape, v_cache.shape
    groups = heads // kv_heads
    target = target_of(q)
    shape = HeadShape.of(heads, kv_heads, dim, v_dim, q.dtype, target)
    tiles = shape.tiles
    schedules = plan.compiled(
        schedule_key(window, shape),
        lambda: [each.to(q.device) for each in schedules_of(plan, window, shape)],
    )
    suffix = plan.suffix
    partials = max((s.num_partials for s in schedules if s.table is not None), default=0)
    o = torch.empty(partials, heads, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(partials, heads, dtype=torch.float32, device=q.device)

    def run(
        rows: int, num_programs: int, programs: Programs | None, to: tuple[Tensor, Tensor]
    ) -> None:
        tensors: list[Tensor | None] = [None] * 5
        if programs is not None:
            tensors[:2] = programs.programs, programs.runs
        elif suffix is not None:
            cells = plan.compiled(CELLS, lambda: suffix.first_cells(len(q)))
            tensors[2:] = cells, suffix.length, suffix.position
        launch(
            _forest_attention_kernel,
            (num_programs, kv_heads),
            q, k_cache, v_cache, *to, plan.positions, *tensors,
            len(q), q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1),
            v_cache.stride(0), v_cache.stride(1),
            (scale if softcap is None else softcap) * _LOG2E,
            0.0 if softcap is None else scale / softcap, window or 0,
            G=groups, D=dim, DV=v_dim, SPLIT=MAX_SPLIT, SUFFIX=programs is None,
            SOFTCAP=softcap is not None, WINDOW=window is not None,
            **_launch(rows, dim, v_dim, q.dtype, target),
        )  # fmt: skip

    if suffix is not None:
        run(tiles.narrow, len(q) * suffix.num_splits, None, (o, lse))
    results: list[tuple[Tensor, Tensor]] = []
    for schedule in schedules:
        to = o, lse
        if schedule.table is None:  # queries without any key are in no program
            size = schedule.stop - schedule.start, heads
            to = (
                torch.zeros(*size, v_dim, dtype=q.dtype, device=q.device),
                torch.full(size, float("-inf"), device=q.device),
            )
        for rows, programs in ((tiles.wide, schedule.wide), (tiles.narrow, schedule.narrow)):
            run(rows, len(programs.programs), programs, to)
        plan.executed += schedule.num_items
        if schedule.table is not None:
            to = merge_states(o, lse, schedule.table, dtype=q.dtype)
        results.append(to)
    if len(results) == 1:
        return results[0]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses)


def forest_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of all queries of a plan.

    q: (T, Hq, D), k_cache: (Hkv, N, D), v_cache: (Hkv, N, Dv), one floating dtype and device;
    T = len(plan.positions), Hkv divides Hq. What no item names is not read, except, by torch, in
    the slots of live leaves: there values behind the last key must be finite (keys may be
    anything). Returns (T, Hq, Dv) in q's dtype; a query without any key gives 0.
    Differentiable once in q, k_cache and v_cache (gradients of the caches are laid out as
    (N, Hkv, ...)) for plans without suffixes whose positions stay. Raises ValueError for other
    shapes, dtypes or devices, a scale, soft-cap or window that is not positive, or where a gradient
    is wanted of another plan.
    """
    return forest_attention_with_lse(q, k_cache, v_cache, plan, scale, softcap, window)[0]


def forest_attention_with_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`forest_attention`, and the natural log-sum-exp of each query's scores, (T, Hq) float32
    (float64 for float64 input), -inf for a query without any key."""
    _check(q, k_cache, v_cache, plan, scale, softcap, window)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        if plan.suffix is not None or plan.advancing:
            kind = "advancing positions" if plan.suffix is None else "suffixes"
            raise ValueError(f"forest_attention: no gradient for a plan with {kind}")
        return _ForestAttention.apply(q, k_cache, v_cache, plan, scale, softcap, window)
    return _run(q, k_cache, v_cache, plan, scale, softcap, window)


def _run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    if runs_triton(q):
        run = _run_triton
    elif runs_cpp(q, k_cache, v_cache):
        run = cpp_impl.attend
    else:
        run = torch_impl.attend
    return run(q, k_cache, v_cache, plan, scale, softcap, window)


class _ForestAttention(torch.autograd.Function):
    """Gives o and lse."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: ForestPlan,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        o, lse = _run(q, k_cache, v_cache, plan, scale, softcap, window)
        ctx.save_for_backward(q, k_cache, v_cache, o, lse)
        ctx.options = plan, scale, softcap, window
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_o: Tensor | None, d_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        q, k_cache, v_cache, o, lse = ctx.saved_tensors
        run = triton_backward if runs_triton(q) else torch_impl
        d_q, d_k, d_v = run.attend_backward(
            q, k_cache, v_cache, o, lse, torch.zeros_like(o) if d_o is None else d_o, d_lse,
            *ctx.options,
        )  # fmt: skip
        return d_q, d_k, d_v, None, None, None, None


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> None:
    if q.ndim != 3 or k_cache.ndim != 3 or v_cache.ndim != 3:
        raise ValueError(
            f"forest_attention: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache "
            f"{tuple(v_cache.shape)} must be (T, Hq, D), (Hkv, N, D), (Hkv, N, Dv)"
        )
    if q.shape[2] != k_cache.shape[2] or k_cache.shape[:2] != v_cache.shape[:2]:
        raise ValueError(
            f"forest_attention: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)} do not agree"
        )
    if not k_cache.shape[0] or q.shape[1] % k_cache.shape[0]:
        raise ValueError(
            f"forest_attention: {k_cache.shape[0]} kv heads do not divide {q.shape[1]} heads"
        )
    if len(q) != len(plan.positions):
        raise ValueError(f"forest_attention: {len(q)} queries, plan for {len(plan.positions)}")
    if not q.dtype == k_cache.dtype == v_cache.dtype or not q.is_floating_point():
        raise ValueError(
            f"forest_attention: dtypes {q.dtype}, {k_cache.dtype}, {v_cache.dtype} must be one "
            "floating dtype"
        )
    if not q.device == k_cache.device == v_cache.device == plan.positions.device:
        raise ValueError(
            f"forest_attention: q is on {q.device}, k_cache on {k_cache.device}, v_cache on "
            f"{v_cache.device}, the plan on {plan.positions.device}"
        )
    for name, value in (("scale", scale), ("softcap", softcap), ("window", window)):
        if value is not None and not value > 0:
            raise ValueError(f"forest_attention: {name} must be positive, got {value}")
