"""Join partial attention results of one query over disjoint sets of keys.

    m = max_j lse_j        w_j = exp(lse_j - m)
    o = sum_j w_j o_j / sum_j w_j        lse = m + log sum_j w_j

P partials, R output rows, J partials of a row at most, H heads, Dv value channels. Log-sum-exps are
natural, float32 (float64 for float64 input). Partials are added one after another in the order of
`index`, so a row's bits depend on its own partials alone. An absent or empty partial (lse = -inf)
adds an exact zero; a row without any key is 0 with lse = -inf, never NaN. A NaN reaches only the
rows that name its partial. In Triton a program merges one (row, head) pair.

It does not attend to keys, and is not differentiable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_triton
from kernels.launch import launch, runs_triton
from kernels.target import Target, power_of_two, target_of


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
    UNROLL: tl.constexpr,
):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[:, None]  # (PAIRS, 1)
    mask = pair < num_pairs
    row, head = pair // num_heads, pair % num_heads
    dv = tl.arange(0, BLOCK_DV)[None, :]
    row_max = tl.full((PAIRS, 1), float("-inf"), tl.float32)
    # The loads of UNROLL partials do not wait for one another.
    for first in range(0, width, UNROLL):
        for i in tl.static_range(UNROLL):
            j = first + i
            partial = tl.load(index_ptr + row * width + j, mask=mask & (j < width), other=-1)
            lse_ptrs = lse_ptr + (partial * num_heads + head)
            lse = tl.load(lse_ptrs, mask=partial >= 0, other=float("-inf"))
            # A NaN stays.
            row_max = tl.where(lse > row_max, lse, tl.where(lse == lse, row_max, lse))
    finite_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    out = tl.zeros((PAIRS, BLOCK_DV), tl.float32)
    row_sum = tl.zeros((PAIRS, 1), tl.float32)
    for first in range(0, width, UNROLL):
        for i in tl.static_range(UNROLL):
            j = first + i
            partial = tl.load(index_ptr + row * width + j, mask=mask & (j < width), other=-1)
            offset = partial * num_heads + head
            lse = tl.load(lse_ptr + offset, mask=partial >= 0, other=float("-inf"))
            o = tl.load(o_ptr + offset * DV + dv, mask=(partial >= 0) & (dv < DV), other=0.0)
            weight = tl.exp(lse - finite_max)
            # An empty partial was perhaps never written: its o may be NaN.
            out += weight * tl.where(lse == float("-inf"), 0.0, o)
            row_sum += weight
    seen = row_sum != 0
    row_sum = tl.where(seen, row_sum, 1.0)
    merged = (out / row_sum).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pair.to(tl.int64) * DV + dv, merged, mask=mask & (dv < DV))
    lse = tl.where(seen, finite_max + tl.log(row_sum), float("-inf"))
    tl.store(out_lse_ptr + pair, lse, mask=mask)


def _launch(v_dim: int, target: Target) -> dict[str, int]:
    """A pair and a warp for each program, so that nothing waits at a barrier; under the interpreter
    more, since there every program costs milliseconds. Tune with bench/ops/merge_states.py."""
    pairs = 1 if target.num_processors > 16 else 16
    return {"BLOCK_DV": power_of_two(v_dim, 16), "PAIRS": pairs, "UNROLL": 8, "num_warps": 1}


def _run_triton(o: Tensor, lse: Tensor, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    check_triton("merge_states", o)
    rows, (_, heads, v_dim) = len(index), o.shape
    out = torch.empty(rows, heads, v_dim, dtype=dtype, device=o.device)
    out_lse = torch.empty(rows, heads, dtype=torch.float32, device=o.device)
    options = _launch(v_dim, target_of(o))
    launch(
        _merge_states_kernel,
        (triton.cdiv(rows * heads, options["PAIRS"]),),
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
    # Index -1 means no partial. Read one of this row's own partials instead, with weight 0: another
    # row's could hold NaN, and 0 * NaN is NaN.
    index_or_own = torch.where(index < 0, index.amax(1, keepdim=True), index).clamp_min(0)
    lses = lse[index_or_own].masked_fill_((index < 0)[..., None], float("-inf"))  # (R, J, H)
    row_max = lses.amax(1)
    row_max = torch.where(row_max == float("-inf"), 0, row_max)
    weights = lses.sub_(row_max[:, None]).exp_()
    row_sum = torch.zeros_like(row_max)
    for j in range(index.shape[1]):
        # A product and a sum, not addcmul: a fused multiply-add would round tails differently.
        out.add_(o[index_or_own[:, j]].mul_(weights[:, j, :, None]))
        row_sum.add_(weights[:, j])
    out.div_(row_sum[..., None]).masked_fill_((row_sum == 0)[..., None], 0)
    return out.to(dtype), row_max + row_sum.log()
