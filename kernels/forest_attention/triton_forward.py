"""Forest attention in Triton: the kernel, its launches, and the merge of partial results.

A program takes a query tile (M rows: queries x the group's heads, of one key/value head) along a
list of spans of keys, and writes one partial result for each of its queries; `merge_states` joins
them in the order of the sequence. Where every query has one partial, that is the result, and there
is no merge. The kernel has three instances: *wide* for nodes that many queries share (M is 64) and
for prefill (128), *narrow* (16) for few queries, and one for the leaves' suffixes. The last needs
no list of spans: it runs one program per query and split, beside the other two, and reads the
suffixes' lengths on the device. Programs, spans and partials are laid out by `schedule.py`. Values
that are the first channels of their keys are read once.

The weights are exp2(x * factor - m * factor), where factor = scale * log2(e) is folded into the
subtraction. That is one multiply-add, and q keeps its bits: a bfloat16 q scaled beforehand would
lose some.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_triton
from kernels.device_math import LN2, tanh
from kernels.forest_attention.options import AttentionOptions
from kernels.forest_attention.plan import MAX_SPLIT, ForestPlan
from kernels.forest_attention.schedule import HeadShape, Programs, compile_plan, forward_key
from kernels.launch import launch, launch_beside
from kernels.merge_states import merge_states
from kernels.target import Target, power_of_two, target_of


@triton.jit
def _attend_keys(
    q, q_tail, acc, row_max, row_sum, k_ptr, v_ptr, first, end, num_keys, position, q_pos,
    k_n, v_n, factor, cap_scale, window,
    D: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_DV: tl.constexpr,
    N: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take keys [first, end) of a span into the running softmax of a query tile."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    tail = tl.arange(0, BLOCK_TAIL)
    last = tl.minimum(q_pos - position, num_keys - 1)  # (M,) of the keys that a query sees
    last_hidden = q_pos - position - window
    for start in range(first, end, N):
        column = start + tl.arange(0, N)
        k_ptrs = k_ptr + column[:, None] * k_n + d[None, :]  # (N, BLOCK_D)
        v_ptrs = v_ptr + column[:, None] * v_n + dv[None, :]  # (N, BLOCK_DV)
        mask = (column < num_keys)[:, None]
        if MASKED or D != BLOCK_D:
            k = tl.load(k_ptrs, mask=mask & (d < D)[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
        if TAIL:
            v = k
        elif MASKED or DV != BLOCK_DV:
            v = tl.load(v_ptrs, mask=mask & (dv < DV)[None, :], other=0.0)
        else:
            v = tl.load(v_ptrs)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (M, N)
        if TAIL:
            tail_ptrs = k_ptr + D + column[:, None] * k_n + tail[None, :]
            k_tail = tl.load(tail_ptrs, mask=mask & (tail < TAIL)[None, :], other=0.0)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        if SOFTCAP:
            scores = tanh(scores * cap_scale)
        if MASKED:
            visible = column[None, :] <= last[:, None]
            if WINDOW:
                visible = visible & (column[None, :] > last_hidden[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)  # (M,)
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * factor - finite_max[:, None])
        rescale = tl.exp2(row_max - finite_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")  # (M, BLOCK_DV)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _forest_attention_kernel(
    q_ptr,  # (T, Hq, D + TAIL), strides q_t, q_h, 1
    k_ptr,  # (Hkv, N, D + TAIL), strides k_h, k_n, 1
    v_ptr,  # (Hkv, N, Dv), strides v_h, v_n, 1; with a tail the first channels of k
    o_ptr,  # (P, Hq, Dv), contiguous
    lse_ptr,  # (P, Hq), contiguous
    positions_ptr,  # (T,)
    programs_ptr,  # (programs, 5): first query, queries, first span, end span, first partial
    spans_ptr,  # (spans, 3): first key, keys, position of the first
    suffix_blocks_ptr,  # (T, J), stride blocks_t: cache index of the first key of each split
    suffix_length_ptr,  # (T,) own keys of each query
    suffix_position_ptr,  # (T,) position of the first of them
    blocks_t,
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
    TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
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
        num_queries, first_span, end_span = 1, 0, 1
        partial = program.to(tl.int64)
        suffix_keys = tl.load(suffix_length_ptr + query) - split * SPLIT
        suffix_keys = tl.minimum(suffix_keys, SPLIT).to(tl.int32)
        suffix_position = (tl.load(suffix_position_ptr + query) + split * SPLIT).to(tl.int32)
        suffix_key = tl.load(suffix_blocks_ptr + query.to(tl.int64) * blocks_t + split)
        if suffix_keys <= 0:  # most of the grid may lie past the suffixes' ends
            suffix_head = tl.arange(0, M)
            suffix_lse = lse_ptr + partial * num_heads + kv_head * G + suffix_head
            tl.store(suffix_lse, tl.full((M,), float("-inf"), tl.float32), mask=suffix_head < G)
            return
    else:
        programs_ptr += program.to(tl.int64) * 5
        query = tl.load(programs_ptr).to(tl.int64)
        num_queries = tl.load(programs_ptr + 1)
        first_span = tl.load(programs_ptr + 2)
        end_span = tl.load(programs_ptr + 3)
        partial = tl.load(programs_ptr + 4).to(tl.int64)
        if num_queries == 0:
            return

    m = tl.arange(0, M)
    row, head = m // G, kv_head * G + m % G
    mask = row < num_queries  # (M,)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_pos = tl.load(positions_ptr + query + row, mask=mask, other=0).to(tl.int32)
    max_pos = tl.max(tl.where(mask, q_pos, -1))
    min_pos = tl.min(tl.where(mask, q_pos, 2147483647))
    q_ptrs = q_ptr + ((query + row) * q_t + head * q_h)[:, None] + d[None, :]
    q = tl.load(q_ptrs, mask=mask[:, None] & (d < D)[None, :], other=0.0)  # (M, BLOCK_D)
    q_tail = q
    if TAIL:
        tail = tl.arange(0, BLOCK_TAIL)
        tail_ptrs = q_ptr + D + ((query + row) * q_t + head * q_h)[:, None] + tail[None, :]
        q_tail = tl.load(tail_ptrs, mask=mask[:, None] & (tail < TAIL)[None, :], other=0.0)
    acc = tl.zeros((M, BLOCK_DV), tl.float32)
    row_max = tl.full((M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((M,), tl.float32)

    for span in range(first_span, end_span):
        if SUFFIX:
            key, num_keys, position = suffix_key, suffix_keys, suffix_position
        else:
            key = tl.load(spans_ptr + span * 3).to(tl.int64)
            num_keys = tl.load(spans_ptr + span * 3 + 1)
            position = tl.load(spans_ptr + span * 3 + 2)
        k_span = k_ptr + kv_head * k_h + key * k_n
        v_span = v_ptr + kv_head * v_h + key * v_n
        # Tiles of N keys, counted from the span's start: [begin, whole) cut by the window,
        # [whole, full) seen by all queries, [full, num_keys) ragged or ahead of some query.
        num_keys = tl.minimum(num_keys, max_pos + 1 - position)
        full = tl.maximum(tl.minimum(num_keys, min_pos + 1 - position), 0) // N * N
        begin = 0
        if WINDOW:
            begin = tl.maximum(min_pos + 1 - window - position, 0) // N * N
            whole = (tl.maximum(max_pos + 1 - window - position, 0) + N - 1) // N * N
            whole = tl.minimum(tl.maximum(whole, begin), tl.maximum(num_keys, begin))
            acc, row_max, row_sum = _attend_keys(
                q, q_tail, acc, row_max, row_sum, k_span, v_span, begin, whole, num_keys, position,
                q_pos, k_n, v_n, factor, cap_scale, window,
                D, TAIL, DV, BLOCK_D, BLOCK_TAIL, BLOCK_DV, N, SOFTCAP, WINDOW, True,
            )  # fmt: skip
            # The last tile above may have reached past `whole`, but not past its own N keys.
            begin = (whole + N - 1) // N * N
            full = tl.maximum(full, begin)
        acc, row_max, row_sum = _attend_keys(
            q, q_tail, acc, row_max, row_sum, k_span, v_span, begin, full, num_keys, position,
            q_pos, k_n, v_n, factor, cap_scale, window,
            D, TAIL, DV, BLOCK_D, BLOCK_TAIL, BLOCK_DV, N, SOFTCAP, WINDOW, False,
        )  # fmt: skip
        acc, row_max, row_sum = _attend_keys(
            q, q_tail, acc, row_max, row_sum, k_span, v_span, full, num_keys, num_keys, position,
            q_pos, k_n, v_n, factor, cap_scale, window,
            D, TAIL, DV, BLOCK_D, BLOCK_TAIL, BLOCK_DV, N, SOFTCAP, WINDOW, True,
        )  # fmt: skip

    seen = row_sum != 0  # true of NaN, which has to show
    row_sum = tl.where(seen, row_sum, 1.0)
    lse = tl.where(seen, (row_max + tl.log2(row_sum)) * LN2, float("-inf"))
    out = (partial + row) * num_heads + head  # (M,)
    tl.store(lse_ptr + out, lse, mask=mask)
    o = (acc / row_sum[:, None]).to(o_ptr.dtype.element_ty)
    o_ptrs = o_ptr + out[:, None] * DV + dv[None, :]
    tl.store(o_ptrs, o, mask=mask[:, None] & (dv < DV)[None, :])


def _launch(
    rows: int, dim: int, tail: int, v_dim: int, dtype: torch.dtype, target: Target, suffix: bool
) -> dict[str, int]:
    """Keys of a tile, warps and stages of one instance: as many bytes in flight as registers and
    shared memory hold without spilling. Tune with bench/ops/forest_attention.py."""
    block_d, block_dv = power_of_two(dim, 16), power_of_two(v_dim, 16)
    block_tail = power_of_two(tail, 16)
    is_long, is_float32 = max(block_d, block_dv) > 128, dtype == torch.float32
    keys, stages = 32 if is_long else 64, 3
    if is_float32:  # products in float32 are unrolled into registers
        keys, stages = 32 if rows > 16 and max(block_d, block_dv) <= 64 else 16, 2
    elif is_long and rows == 16 and not suffix:
        stages = 2  # what three spill
    warps = 8 if rows > 64 or (rows > 16 and (is_long or is_float32)) else 4
    # On an AMD GPU the queries stay in registers.
    more = block_tail if tail else 0
    q_bytes = 0 if target.is_hip else rows * (block_d + more) * dtype.itemsize
    row_bytes = (block_d + (more or block_dv)) * dtype.itemsize
    while q_bytes + stages * keys * row_bytes > target.shared_bytes * 3 // 4 and stages > 1:
        if stages > 2 or keys == 16:
            stages -= 1
        else:
            keys //= 2
    return {
        "M": rows,
        "N": keys,
        "BLOCK_D": block_d,
        "BLOCK_TAIL": block_tail,
        "BLOCK_DV": block_dv,
        "num_warps": warps,
        "num_stages": stages,
    }


def run(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: ForestPlan, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """The output (T, Hq, Dv) in q's dtype and the natural log-sum-exps (T, Hq) of checked input."""
    check_triton("forest_attention", q, k_cache, v_cache)
    (_, heads, dim), (kv_heads, _, v_dim) = q.shape, v_cache.shape
    shape = HeadShape.of(heads, kv_heads, dim, v_dim, q.dtype, target_of(q), plan.advancing)
    window, suffix = options.window, plan.suffix
    schedules = plan.compiled(
        forward_key(window, shape),
        lambda: [each.to(q.device) for each in compile_plan(plan, window, shape)],
    )
    partials = max((s.num_partials for s in schedules if s.table is not None), default=0)
    o = torch.empty(partials, heads, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(partials, heads, dtype=torch.float32, device=q.device)
    inputs = q, k_cache, v_cache
    join_suffixes: Callable[[], None] | None = None
    if suffix is not None:
        launches = partial(_run_suffixes, inputs, plan, options, shape, (o, lse))
        join_suffixes = launch_beside(q, launches)
    results: list[tuple[Tensor, Tensor]] = []
    for schedule in schedules:
        out = o, lse
        if schedule.table is None:  # queries without any key are in no program
            size = schedule.stop - schedule.start, heads
            out = (
                torch.zeros(*size, v_dim, dtype=q.dtype, device=q.device),
                torch.full(size, float("-inf"), device=q.device),
            )
        _run_programs(inputs, plan, options, shape, schedule.wide, shape.rows.wide, out)
        _run_programs(inputs, plan, options, shape, schedule.narrow, shape.rows.narrow, out)
        plan.executed += schedule.num_tiles
        if schedule.table is not None:
            if join_suffixes is not None:
                join_suffixes()
            out = merge_states(o, lse, schedule.table, dtype=q.dtype)
        results.append(out)
    if len(results) == 1:
        return results[0]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _run_programs(
    inputs: tuple[Tensor, Tensor, Tensor],
    plan: ForestPlan,
    options: AttentionOptions,
    shape: HeadShape,
    programs: Programs,
    rows: int,
    out: tuple[Tensor, Tensor],
) -> None:
    """The wide or the narrow instance, with query tiles of `rows` rows."""
    tensors = programs.programs, programs.spans, None, None, None, 0
    _run_instance(inputs, plan, options, shape, len(programs.programs), tensors, rows, out)


def _run_suffixes(
    inputs: tuple[Tensor, Tensor, Tensor],
    plan: ForestPlan,
    options: AttentionOptions,
    shape: HeadShape,
    out: tuple[Tensor, Tensor],
) -> None:
    """One program for each query and split of the suffixes."""
    suffix, queries = plan.suffix, len(plan.positions)
    assert suffix is not None
    tensors = (
        *(None, None, suffix.blocks, suffix.length, suffix.position),
        suffix.blocks.stride(0),
    )
    num_programs = queries * suffix.num_splits
    _run_instance(inputs, plan, options, shape, num_programs, tensors, shape.rows.narrow, out)


def _run_instance(
    inputs: tuple[Tensor, Tensor, Tensor],
    plan: ForestPlan,
    options: AttentionOptions,
    shape: HeadShape,
    num_programs: int,
    tensors: tuple[Tensor | int | None, ...],
    rows: int,
    out: tuple[Tensor, Tensor],
) -> None:
    q, k_cache, v_cache = inputs
    dim, v_dim = q.shape[-1], v_cache.shape[-1]
    is_alias = v_cache.data_ptr() == k_cache.data_ptr() and dim > v_dim
    tail = dim - v_dim if is_alias and v_cache.stride() == k_cache.stride() else 0
    launch(
        _forest_attention_kernel,
        (num_programs, shape.kv_heads),
        *inputs, *out, plan.positions, *tensors,
        len(q), *q.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2],
        *options.exp2_factors(), options.window or 0,
        G=shape.groups, D=dim - tail, TAIL=tail, DV=v_dim, SPLIT=MAX_SPLIT,
        SUFFIX=tensors[0] is None, SOFTCAP=options.softcap is not None,
        WINDOW=options.window is not None,
        **_launch(rows, dim - tail, tail, v_dim, q.dtype, shape.rows.target, tensors[0] is None),
    )  # fmt: skip
