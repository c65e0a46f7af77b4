"""Join partial attention results of one query over disjoint sets of keys.

    m = max_j lse_j        w_j = exp(lse_j - m)
    o = sum_j w_j o_j / sum_j w_j        lse = m + log sum_j w_j

P partials, R output rows, J partials of a row at most, H heads, Dv value channels. Log-sum-exps are
natural, float32 (float64 for float64 input). Partials are added one after another in the order of
`index`, so that a row's bits depend on its own partials alone: an absent or empty partial (lse =
-inf) adds an exact zero, and a row with nothing to see is 0 with lse = -inf, never NaN. A NaN
reaches only the rows that name its partial. In Triton a program merges several (row, head) pairs.

It does not attend to keys, and is not differentiable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_triton
from kernels.launch import launch, runs_triton
from kernels.target import power_of_two


def merge_states_ref(o: Tensor, lse: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Specification of `merge_states`, one row after another, in the dtype of o."""
    rows = [[j for j in row if j >= 0] for row in index.tolist()]
    out = o.new_zeros(len(rows), *o.shape[1:])
    out_lse = lse.new_full((len(rows), lse.shape[1]), float("-inf"))
    for r, partials in enumerate(rows):
        if partials:
            out_lse[r] = lse[partials].logsumexp(0)
            weight = (lse[partials] - out_lse[r]).nan_to_num(nan=float("-inf")).exp()
            out[r] = (weight[..., None] * o[partials]).sum(0)
    return out, out_lse


@triton.jit
def _merge_states_kernel(
    o_ptr,  # (P, H, Dv), contiguous
    lse_ptr,  # (P, H), contiguous
    index_ptr,  # (R, J), contiguous
    out_ptr,  # (R, H, Dv), contiguous
    out_lse_ptr,  # (R, H), contiguous
    num_pairs,  # R * H
    num_heads,
    width,  # J
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAIRS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    there = pair < num_pairs  # (PAIRS,)
    row, head = pair // num_heads, pair % num_heads
    dv = tl.arange(0, BLOCK_DV)
    top = tl.full((PAIRS,), float("-inf"), tl.float32)
    for j in range(width):
        partial = tl.load(index_ptr + row * width + j, mask=there, other=-1)
        at = partial * num_heads + head
        log = tl.load(lse_ptr + at, mask=there & (partial >= 0), other=float("-inf"))
        top = tl.where(log > top, log, tl.where(log == log, top, log))  # a NaN stays
    safe_top = tl.where(top == float("-inf"), 0.0, top)
    out = tl.zeros((PAIRS, BLOCK_DV), tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    for j in range(width):
        partial = tl.load(index_ptr + row * width + j, mask=there, other=-1)
        at = partial * num_heads + head
        log = tl.load(lse_ptr + at, mask=there & (partial >= 0), other=float("-inf"))
        weight = tl.exp(log - safe_top)
        used = (log != float("-inf"))[:, None] & (dv < DV)[None, :]
        o = tl.load(o_ptr + at[:, None] * DV + dv[None, :], mask=used, other=0.0)
        out += weight[:, None] * o
        total += weight
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    merged = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    there_dv = there[:, None] & (dv < DV)[None, :]
    tl.store(out_ptr + pair[:, None] * DV + dv[None, :], merged, mask=there_dv)
    log = tl.where(seen, safe_top + tl.log(total), float("-inf"))
    tl.store(out_lse_ptr + pair, log, mask=there)


def _launch(v_dim: int) -> dict[str, int]:
    """Pairs of a program: about 2,048 values. Not yet tuned on a device;
    bench/bench_merge_states.py is the bench to tune with."""
    block = power_of_two(v_dim, 16)
    return {"BLOCK_DV": block, "PAIRS": max(1, 2048 // block), "num_warps": 4}


def _run_triton(o: Tensor, lse: Tensor, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    check_triton("merge_states", o)
    rows, (_, heads, v_dim) = len(index), o.shape
    out = torch.empty(rows, heads, v_dim, dtype=dtype, device=o.device)
    out_lse = torch.empty(rows, heads, dtype=torch.float32, device=o.device)
    options = _launch(v_dim)
    launch(
        _merge_states_kernel,
        (-(-rows * heads // options["PAIRS"]),),
        o.contiguous(), lse.contiguous(), index.contiguous(), out, out_lse,
        rows * heads, heads, index.shape[1], DV=v_dim, **options,
    )  # fmt: skip
    return out, out_lse


def merge_states(
    o: Tensor, lse: Tensor, index: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Merge each row's partials.

    o: (P, H, Dv), lse: (P, H), both float32 or both float64. index: (R, J) int64, the partials of
    each row in the order of its keys, -1 where there is none. Partials with lse = -inf may hold
    any finite o. Returns o (R, H, Dv) in `dtype` (default: as given) and lse (R, H). Raises
    ValueError for other shapes or dtypes and, on CPU, for an index of P or more; on a GPU its
    contents are not looked at.
    """
    if o.ndim != 3 or lse.shape != o.shape[:2] or index.ndim != 2:
        raise ValueError(
            f"merge_states: o {tuple(o.shape)}, lse {tuple(lse.shape)}, index {tuple(index.shape)} "
            "must be (P, H, Dv), (P, H), (R, J)"
        )
    if o.dtype not in (torch.float32, torch.float64) or lse.dtype != o.dtype:
        raise ValueError(f"merge_states: o {o.dtype} and lse {lse.dtype} must both be float32/64")
    if index.dtype != torch.int64:
        raise ValueError(f"merge_states: index must be int64, got {index.dtype}")
    if index.device.type == "cpu" and index.numel() and int(index.max()) >= o.shape[0]:
        raise ValueError(f"merge_states: index {int(index.max())}, there are {o.shape[0]} partials")
    dtype = o.dtype if dtype is None else dtype
    if runs_triton(o):
        return _run_triton(o, lse, index, dtype)
    out = o.new_zeros(index.shape[0], *o.shape[1:])
    if not index.numel() or not o.shape[0]:
        return out.to(dtype), lse.new_full((index.shape[0], o.shape[1]), float("-inf"))
    # An absent partial is read at one of the row's own, with weight 0: another's might be NaN.
    at = torch.where(index < 0, index.amax(1, keepdim=True), index).clamp_min(0)
    logs = lse[at].masked_fill_((index < 0)[..., None], float("-inf"))  # (R, J, H)
    top = logs.amax(1)
    top = torch.where(top == float("-inf"), 0, top)
    weights = logs.sub_(top[:, None]).exp_()
    total = torch.zeros_like(top)
    for j in range(index.shape[1]):
        # A product and a sum, not addcmul: a fused multiply-add would round tails differently.
        out.add_(o[at[:, j]].mul_(weights[:, j, :, None]))
        total.add_(weights[:, j])
    out.div_(total[..., None]).masked_fill_((total == 0)[..., None], 0)
    return out.to(dtype), top + total.log()
