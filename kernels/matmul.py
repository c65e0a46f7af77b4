"""Matrix product whose rows do not depend on how many there are: x W^T + b in fixed tiles.

    out[t, n] = sum_k x[t, k] W[n, k] + b[n]

T rows, N outputs, K summed. Sums and the bias in float32, float32 input at its full precision,
rounded once to the dtype of x. For runs that have to be reproducible bit for bit on a GPU, where
libraries choose the kernel, and with it the order of a sum, by T.

K is cut into SPLITS pieces of SPLIT. A piece is summed in steps of BLOCK_K from its start, and the
pieces are added in order. These sizes and BLOCK_N are functions of N, K, the dtype and the target,
its number of processors included, so other devices may give other bits. T selects the schedule but
never the order of a sum (`_launch`), and no kernel is specialised for T: not for T = 1, nor for a T
that is divisible by 16.

On CPU it is torch's product, whose rows do depend on T. There is no gradient: training has no use
for it.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_triton
from kernels.launch import launch, runs_triton
from kernels.target import Target, target_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MIN_SPLIT = 512  # long enough to hide the filling of a pipeline
_SUM_COLUMNS = 512  # columns of a program that adds pieces


def matmul_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Specification of `matmul`, in plain torch for any device and floating dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide) @ weight.to(wide).T
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


@triton.jit
def _piece(
    x_ptrs, mask, w_ptrs, start, summed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The sum of a tile over [start, start + SPLIT), or up to K."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for offset in range(0, SPLIT, BLOCK_K):
        k = start + offset + tl.arange(0, BLOCK_K)[None, :]
        if EVEN:
            x = tl.load(x_ptrs + k, mask=mask, other=0.0)  # (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptrs + k)  # (BLOCK_N, BLOCK_K)
        else:
            x = tl.load(x_ptrs + k, mask=mask & (k < summed), other=0.0)
            w = tl.load(w_ptrs + k, mask=k < summed, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    x_ptr,  # (T, K), strides x_t, 1
    weight_ptr,  # (N, K), strides w_n, 1
    bias_ptr,  # (N,), or None
    out_ptr,  # (T, N), or of pieces (SPLITS, T, N) float32, contiguous
    num_rows,  # T
    size,  # N
    summed,  # K
    x_t,
    w_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,  # the pieces end where K does
    IN_PIECES: tl.constexpr,  # each program writes one piece: program_id(1)
    GROUP: tl.constexpr,
):
    # GROUP tiles of rows take each tile of columns in turn: what they read stays in the cache.
    program = tl.program_id(0)
    group_programs = (size + BLOCK_N - 1) // BLOCK_N * GROUP
    first = program // group_programs * GROUP
    tiles = tl.minimum((num_rows + BLOCK_M - 1) // BLOCK_M - first, GROUP)
    inside = program % group_programs
    row = (first + inside % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    column = inside // tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)

    mask = (row < num_rows)[:, None]
    x_ptrs = x_ptr + (row * x_t)[:, None]
    # Columns past the last read its weights: one mask less in the loop.
    w_ptrs = weight_ptr + (tl.minimum(column, size - 1).to(tl.int64) * w_n)[:, None]
    if IN_PIECES:
        split = tl.program_id(1)
        acc = _piece(
            x_ptrs, mask, w_ptrs, split * SPLIT, summed, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, EVEN
        )  # fmt: skip
        row += split.to(tl.int64) * num_rows
    else:
        acc = _piece(x_ptrs, mask, w_ptrs, 0, summed, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, EVEN)
        for split in range(1, SPLITS):
            acc += _piece(
                x_ptrs, mask, w_ptrs, split * SPLIT, summed, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, EVEN
            )  # fmt: skip
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=column < size, other=0.0)
            acc += bias.to(tl.float32)[None, :]
    out_ptrs = out_ptr + (row * size)[:, None] + column[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask & (column < size)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _add_pieces_kernel(
    pieces_ptr,  # (SPLITS, T, N) float32, contiguous
    bias_ptr,  # (N,), or None
    out_ptr,  # (T, N), contiguous
    num_rows,  # T
    size,  # N
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # (COLUMNS,)
    mask = column < size
    offset = row * size + column
    total = tl.load(pieces_ptr + offset, mask=mask)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(pieces_ptr + offset + split * (num_rows.to(tl.int64) * size), mask=mask)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=mask).to(tl.float32)
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=mask)


def _sum_order(size: int, summed: int, dtype: torch.dtype, target: Target) -> dict[str, int]:
    """BLOCK_N, BLOCK_K, SPLIT and SPLITS for N = size and K = summed, independent of T: about as
    many tiles times pieces of K as there are processors, and tiles as wide as that allows. Decode
    reads weights and little else: up to 64 rows cost what 16 cost, if every processor has weights
    to read."""
    block_k = 16 if dtype == torch.float32 else 64  # float32 is unrolled: 32 spill
    widths = (64, 32) if dtype == torch.float32 else (128, 64, 32)
    most_splits = max(1, summed // _MIN_SPLIT)
    wanted = target.num_processors * 9 // 10
    block_n = next((n for n in widths if triton.cdiv(size, n) * most_splits >= wanted), widths[-1])
    splits = 1
    while splits * 2 <= most_splits and triton.cdiv(size, block_n) * splits < wanted:
        splits *= 2
    steps = triton.cdiv(summed, block_k * splits)
    return {
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLIT": steps * block_k,
        "SPLITS": triton.cdiv(summed, steps * block_k),
    }


def _launch(
    rows: int, size: int, summed: int, dtype: torch.dtype, target: Target
) -> dict[str, int | bool]:
    """The order of a sum, and the schedule for T = rows, with warps and stages. Tune with
    bench/ops/matmul.py.

    T decides two things, and neither changes a sum. Where few programs would run (decode), each
    sums one piece of its tile and a second kernel adds the pieces; where many do (prefill), a
    program sums all pieces of its tile in the same order. And BLOCK_M is 64 with 4 warps or 128
    with 8: more instructions of one kind, as `tests/test_aot.py` reads in the compiled code. sm_100
    has different instructions for 64 and for 128 rows, and float32 has none: there BLOCK_M is one
    number.
    """
    order = _sum_order(size, summed, dtype, target)
    if dtype == torch.float32:  # products in float32 are unrolled into registers
        block_m = 64
    elif target.arch == "sm_100":
        block_m = 128
    else:
        block_m = 64 if rows <= 64 else 128
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(size, order["BLOCK_N"])
    stage_bytes = (block_m + order["BLOCK_N"]) * order["BLOCK_K"] * dtype.itemsize
    stages = 2 if dtype == torch.float32 else 4
    # On an AMD GPU one stage lies in registers.
    while (stages - target.is_hip) * stage_bytes > target.shared_bytes * 3 // 4 and stages > 1:
        stages -= 1
    return order | {
        "BLOCK_M": block_m,
        "IN_PIECES": order["SPLITS"] > 1 and tiles < target.num_processors,
        "GROUP": 8,
        "num_warps": block_m // 16,
        "num_stages": stages,
    }


def _run_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_triton("matmul", x, weight, *([] if bias is None else [bias]))
    (rows, summed), size = x.shape, len(weight)
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    options = _launch(rows, size, summed, x.dtype, target_of(x))
    splits = options["SPLITS"] if options["IN_PIECES"] else 1
    sums = out
    if splits > 1:
        sums = torch.empty(splits, rows, size, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(size, options["BLOCK_N"])
    launch(
        _matmul_kernel,
        (tiles, splits),
        x, weight, bias, sums, rows, size, summed, x.stride(0), weight.stride(0),
        EVEN=options["SPLIT"] * options["SPLITS"] == summed, **options,
    )  # fmt: skip
    if splits > 1:
        launch(
            _add_pieces_kernel,
            (rows, triton.cdiv(size, _SUM_COLUMNS)),
            sums, bias, out, rows, size, SPLITS=splits, COLUMNS=_SUM_COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; on a GPU a row has the same bits whatever other rows x holds.

    x: (T, K), weight: (N, K), bias: (N,) or None, one floating dtype and device; in Triton not
    float64, and rows may lie apart, their elements may not. Returns (T, N) in that dtype. Raises
    ValueError for anything else, and where an operand requires a gradient.
    """
    operands = [x, weight] if bias is None else [x, weight, bias]
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or not x.shape[1]:
        raise ValueError(
            f"matmul: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (T, K) and "
            "(N, K), K not 0"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"matmul: bias must be ({len(weight)},), got {tuple(bias.shape)}")
    if x.dtype not in _DTYPES or any(each.dtype != x.dtype for each in operands):
        dtypes = ", ".join(str(each.dtype) for each in operands)
        raise ValueError(f"matmul: dtypes {dtypes} must be one floating dtype")
    if any(each.device != x.device for each in operands):
        devices = ", ".join(str(each.device) for each in operands)
        raise ValueError(f"matmul: devices {devices} must be one")
    if torch.is_grad_enabled() and any(each.requires_grad for each in operands):
        raise ValueError("matmul has no gradient: call it under torch.no_grad()")
    return _run_triton(x, weight, bias) if runs_triton(x) else F.linear(x, weight, bias)
