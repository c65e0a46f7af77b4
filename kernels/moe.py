"""Experts of a mixture: each token goes through K of E gated feed-forward blocks.

    out[t] = sum_k weights[t, k] D_e (act(G_e x_t) * U_e x_t)          e = experts[t, k]

T tokens, H the hidden size, I the width of an expert; P = T K pairs of a token and one of its
experts. G and U are the halves of gate_up (E, 2I, H), D is down (E, H, I). Sums are in float32
(float64 for float64 input). What gate and up give, their product, an expert's output and the result
are rounded to the dtype of x, though C++ rounds neither of the first two before the activation.
The K outputs of a token are added in the order of k.

Pairs are sorted by expert, and an expert without pairs costs nothing. A token's bits do not depend
on the others, in C++ and in Triton, not even on those with which it shares an expert.

In Triton a program has a tile of at most ROWS pairs of one expert, and of some columns. For any
choice E + P / ROWS tiles are enough, so the host need not know it. Sums over H and over I are in
steps of a fixed size, and tiles have the same size for any T.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpp
from kernels.checks import check, check_triton, without_gaps
from kernels.device_math import gated, gated_gradients
from kernels.gated_act import ACTIVATIONS, gated_act, gated_act_ref
from kernels.launch import launch, runs_triton
from kernels.packed_linear import pack, packed, packs, uses_dot_products
from kernels.target import Target, power_of_two, target_of

_SORTED = 1024  # pairs that are sorted at a time


def moe_ref(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """Specification of `moe`, in plain torch for any device and floating dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    outputs = x.new_zeros(*experts.shape, x.shape[1])
    for expert in range(len(gate_up)):
        of_it = experts == expert
        rows = x[of_it.nonzero()[:, 0]]
        halves = (rows.to(wide) @ gate_up[expert].to(wide).T).to(x.dtype)
        active = gated_act_ref(halves, activation)
        outputs[of_it] = (active.to(wide) @ down[expert].to(wide).T).to(x.dtype)
    return (weights[..., None].to(wide) * outputs.to(wide)).sum(1).to(x.dtype)


class _Groups(NamedTuple):
    """Pairs sorted by expert: their numbers in that order (P,); of each expert its first and its
    end there (E, 2); of each tile its expert, its first and its expert's end (tiles, 3), where an
    idle tile has its first at the end. int32."""

    order: Tensor
    spans: Tensor
    tiles: Tensor


@triton.jit(do_not_specialize=["num_pairs"])
def _group_kernel(
    experts_ptr,  # (P,) int64
    order_ptr,  # (P,) int32
    spans_ptr,  # (E, 2) int32
    tiles_ptr,  # (E + P / ROWS, 3) int32
    num_pairs,  # P
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The pairs of one expert, in order, and its tiles."""
    expert = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    own = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        chosen = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=0x7FFFFFFF)
        before += (chosen < expert).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
    first = tl.sum(before, 0)
    end = first + tl.sum(own, 0)
    tl.store(spans_ptr + expert * 2, first)
    tl.store(spans_ptr + expert * 2 + 1, end)
    place = first
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        chosen = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=0x7FFFFFFF)
        mine = (chosen == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(mine, 0) - 1, pair, mask=mine != 0)
        place += tl.sum(mine, 0)
    # From first / ROWS + expert to where the next expert's begin: at least as many as it needs.
    tile = first // ROWS + expert
    for i in range(0, end // ROWS + expert + 1 - tile):
        tl.store(tiles_ptr + (tile + i) * 3, expert)
        tl.store(tiles_ptr + (tile + i) * 3 + 1, tl.minimum(first + i * ROWS, end))
        tl.store(tiles_ptr + (tile + i) * 3 + 2, end)


@triton.jit
def _experts_kernel(
    x_ptr,  # a row for each token or pair, of K numbers, strides x_t, 1
    weight_ptr,  # (E, N or 2N, K), strides w_e, w_n, w_k
    order_ptr,  # (P,) int32
    tiles_ptr,  # (tiles, 3) int32
    out_ptr,  # (P, N), contiguous
    halves_ptr,  # (P, 2N) of gate and up, contiguous, or None
    size,  # N
    summed,  # K
    per_token,
    x_t,
    w_e,
    w_n,
    w_k,
    TRANSPOSED: tl.constexpr,  # w_n is 1, else w_k
    BY_TOKEN: tl.constexpr,  # x has a row for each token, else one for each pair as sorted
    SORTED: tl.constexpr,  # so has out, else in the order of tokens
    GATED: tl.constexpr,  # the weights are of gate and up, and their product is wanted
    GELU: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides K
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The products of one tile's rows with its expert's weights."""
    # All columns of a tile one after another: what they read stays in the cache.
    programs = (size + BLOCK_N - 1) // BLOCK_N
    tile = tiles_ptr + tl.program_id(0) // programs * 3
    first, end = tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    expert = tl.load(tile).to(tl.int64)
    place = first + tl.arange(0, ROWS)
    inside = place < end
    pair = tl.load(order_ptr + place, mask=inside, other=0)
    row = (pair // per_token if BY_TOKEN else place).to(tl.int64)
    column = tl.program_id(0) % programs * BLOCK_N + tl.arange(0, BLOCK_N)

    x_ptrs = x_ptr + (row * x_t)[:, None]
    w_ptrs = weight_ptr + expert * w_e
    # Columns past the last read its weights: one mask less in the loop.
    if TRANSPOSED:
        w_ptrs += column[None, :]
    else:
        w_ptrs += (tl.minimum(column, size - 1).to(tl.int64) * w_n)[:, None]
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    acc_up = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, summed, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptrs + k, mask=inside[:, None] & (EVEN | (k < summed)[None, :]), other=0.0)
        if TRANSPOSED:
            mask = (k < summed)[:, None] & (column < size)[None, :]
            weight = tl.load(w_ptrs + (k.to(tl.int64) * w_k)[:, None], mask=mask, other=0.0)
            acc = tl.dot(x, weight, acc, input_precision="ieee")
        else:
            mask = EVEN | (k < summed)[None, :]
            weight = tl.load(w_ptrs + k[None, :], mask=mask, other=0.0)
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
        if GATED:
            up = tl.load(w_ptrs + size * w_n + k[None, :], mask=mask, other=0.0)
            acc_up = tl.dot(x, tl.trans(up), acc_up, input_precision="ieee")

    dtype = out_ptr.dtype.element_ty
    mask = inside[:, None] & (column < size)[None, :]
    if GATED:
        gate, up = acc.to(dtype), acc_up.to(dtype)
        if halves_ptr is not None:
            halves_ptrs = halves_ptr + (place.to(tl.int64) * 2 * size)[:, None] + column[None, :]
            tl.store(halves_ptrs, gate, mask=mask)
            tl.store(halves_ptrs + size, up, mask=mask)
        acc = gated(gate.to(tl.float32), up.to(tl.float32), GELU)
    out_row = (place if SORTED else pair).to(tl.int64)
    tl.store(out_ptr + (out_row * size)[:, None] + column[None, :], acc.to(dtype), mask=mask)


@triton.jit
def _mix_kernel(
    outputs_ptr,  # (T, K, H), contiguous
    weights_ptr,  # (T, K) float32, contiguous, or None: all are 1
    out_ptr,  # (T, H), contiguous
    hidden,  # H
    PER_TOKEN: tl.constexpr,  # K
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < hidden
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(PER_TOKEN):
        pair = token * PER_TOKEN + k
        output = tl.load(outputs_ptr + pair * hidden + column, mask=mask).to(tl.float32)
        if weights_ptr is not None:
            output *= tl.load(weights_ptr + pair)
        total += output
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pair_backward_kernel(
    d_active_ptr,  # (P, I) float32, before the weights, contiguous
    halves_ptr,  # (P, 2I), contiguous
    weights_ptr,  # (P,) float32, in the order of tokens
    order_ptr,  # (P,) int32
    d_halves_ptr,  # (P, 2I), contiguous
    weighted_ptr,  # (P, I): the product of gate and up times the weight, contiguous
    d_weights_ptr,  # (P,) float32, in the order of tokens
    size,  # I
    GELU: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One pair's gradients of gate, up and weight."""
    place = tl.program_id(0).to(tl.int64)
    pair = tl.load(order_ptr + place)
    weight = tl.load(weights_ptr + pair)
    products = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = column < size
        gate_ptrs = halves_ptr + place * 2 * size + column
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_ptrs + size, mask=mask, other=0.0).to(tl.float32)
        d_active_ptrs = d_active_ptr + place * size + column
        d_active = tl.load(d_active_ptrs, mask=mask, other=0.0)
        d_gate, d_up, active = gated_gradients(d_active * weight, gate, up, GELU)
        products += d_active * (active * up)
        dtype = d_halves_ptr.dtype.element_ty
        d_gate_ptrs = d_halves_ptr + place * 2 * size + column
        tl.store(d_gate_ptrs, d_gate.to(dtype), mask=mask)
        tl.store(d_gate_ptrs + size, d_up.to(dtype), mask=mask)
        weighted = (active * up * weight).to(dtype)
        tl.store(weighted_ptr + place * size + column, weighted, mask=mask)
    tl.store(d_weights_ptr + pair, tl.sum(products, 0))


@triton.jit
def _experts_backward_kernel(
    grad_ptr,  # a row for each token or pair, of N numbers, strides grad_t, 1
    x_ptr,  # a row for each token or pair, of K numbers, strides x_t, 1
    order_ptr,  # (P,) int32
    spans_ptr,  # (E, 2) int32
    out_ptr,  # (E, N, K), contiguous
    size,  # N
    summed,  # K
    per_token,
    grad_t,
    x_t,
    GRAD_BY_TOKEN: tl.constexpr,  # grad has a row for each token, else one for each pair as sorted
    X_BY_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A tile of one expert's gradient: the sum over its pairs of grad^T x."""
    expert = tl.program_id(1)
    across = (summed + BLOCK_K - 1) // BLOCK_K
    n = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    first, end = tl.load(spans_ptr + expert * 2), tl.load(spans_ptr + expert * 2 + 1)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(first, end, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        inside = place < end
        token = tl.load(order_ptr + place, mask=inside, other=0) // per_token
        grad_row = (token if GRAD_BY_TOKEN else place).to(tl.int64)
        x_row = (token if X_BY_TOKEN else place).to(tl.int64)
        grad = tl.load(
            grad_ptr + (grad_row * grad_t)[:, None] + n[None, :],
            mask=inside[:, None] & (n < size)[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + (x_row * x_t)[:, None] + k[None, :],
            mask=inside[:, None] & (k < summed)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(tl.trans(grad), x, acc, input_precision="ieee")
    out_row = expert.to(tl.int64) * size + n
    tl.store(
        out_ptr + (out_row * summed)[:, None] + k[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=(n < size)[:, None] & (k < summed)[None, :],
    )  # fmt: skip


def _launch(matrices: int, dtype: torch.dtype, target: Target) -> dict[str, int]:
    """Tiles, warps and stages of products with so many matrices at once: the same for any T, and
    with them the order of a sum. Decode reads weights and little else, and has few pairs of an
    expert: 64 rows cost what 16 cost."""
    wide = dtype == torch.float32  # unrolled into registers
    options = {"ROWS": 64, "BLOCK_N": (64 if wide else 128) // matrices, "num_warps": 4}
    options["BLOCK_K"] = 16 if wide else 64
    stage_bytes = (64 + options["BLOCK_N"] * matrices) * options["BLOCK_K"] * dtype.itemsize
    stages = 2 if wide else 4
    # On an AMD GPU one stage lies in registers.
    while (stages - target.is_hip) * stage_bytes > target.shared_bytes * 3 // 4 and stages > 1:
        stages -= 1
    return options | {"num_stages": stages}


def _launch_backward(dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and stages of the gradient of the weights."""
    if dtype == torch.float32:
        return {"BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_P": 16, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_P": 64, "num_warps": 4, "num_stages": 2}


def _group(experts: Tensor, count: int, rows: int) -> _Groups:
    num_pairs, device = experts.numel(), experts.device
    order, spans, tiles = (
        torch.empty(shape, dtype=torch.int32, device=device)
        for shape in ((num_pairs,), (count, 2), (count + num_pairs // rows, 3))
    )
    launch(
        _group_kernel, (count,), experts.contiguous(), order, spans, tiles, num_pairs,
        ROWS=rows, BLOCK=_SORTED, num_warps=4,
    )  # fmt: skip
    return _Groups(order, spans, tiles)


def _products(
    x: Tensor, weight: Tensor, groups: _Groups, per_token: int, *, by_token: bool, in_order: bool,
    activation: str | None = None, halves: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Rows of x, one for each token or for each sorted pair, times the weights (E, N, K) of their
    experts, of any strides: (P, N), sorted or in the order of tokens. activation: the weights are
    (E, 2N, K) of gate and up, whose results go to `halves`. dtype: of the results, None for that of
    x."""
    _, size, summed = weight.shape
    size //= 1 if activation is None else 2
    out = torch.empty(len(groups.order), size, dtype=dtype or x.dtype, device=x.device)
    options = _launch(1 if activation is None else 2, x.dtype, target_of(x))
    launch(
        _experts_kernel,
        (len(groups.tiles) * triton.cdiv(size, options["BLOCK_N"]),),
        x, weight, groups.order, groups.tiles, out, halves, size, summed, per_token, x.stride(0),
        *weight.stride(), TRANSPOSED=weight.stride(2) != 1, BY_TOKEN=by_token, SORTED=not in_order,
        GATED=activation is not None, GELU=activation == "gelu_tanh",
        EVEN=summed % options["BLOCK_K"] == 0, **options,
    )  # fmt: skip
    return out


def _mix(outputs: Tensor, weights: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Sums of the outputs (T K, H) of each token, as many as `shape` (T, K) says."""
    tokens, per_token = shape
    hidden = outputs.shape[1]
    out = torch.empty(tokens, hidden, dtype=outputs.dtype, device=outputs.device)
    columns = min(power_of_two(hidden, 16), 1024)
    launch(
        _mix_kernel, (tokens, triton.cdiv(hidden, columns)), outputs, weights, out, hidden,
        PER_TOKEN=per_token, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


def _weight_gradients(
    grad: Tensor, x: Tensor, groups: _Groups, per_token: int, *, grad_by_token: bool
) -> Tensor:
    """Of weights (E, N, K), from rows of grad (N) and of x (K): one of the two has one for each
    token, the other for each sorted pair."""
    count, size, summed = len(groups.spans), grad.shape[1], x.shape[1]
    out = torch.empty(count, size, summed, dtype=x.dtype, device=x.device)
    options = _launch_backward(x.dtype)
    across = triton.cdiv(size, options["BLOCK_N"]) * triton.cdiv(summed, options["BLOCK_K"])
    launch(
        _experts_backward_kernel, (across, count),
        grad, x, groups.order, groups.spans, out, size, summed, per_token, grad.stride(0),
        x.stride(0), GRAD_BY_TOKEN=grad_by_token, X_BY_TOKEN=not grad_by_token, **options,
    )  # fmt: skip
    return out


class _Moe(torch.autograd.Function):
    """In Triton."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor,
        activation: str, learns: bool,
    ) -> Tensor:  # fmt: skip
        check_triton("moe", x, gate_up, down)
        per_token = experts.shape[1]
        groups = _group(experts, len(down), _launch(1, x.dtype, target_of(x))["ROWS"])
        weights = weights.contiguous()
        halves = None
        if learns:
            shape = len(groups.order), gate_up.shape[1]
            halves = torch.empty(shape, dtype=x.dtype, device=x.device)
        active = _products(
            x, gate_up, groups, per_token, by_token=True, in_order=False,
            activation=activation, halves=halves,
        )  # fmt: skip
        outputs = _products(active, down, groups, per_token, by_token=False, in_order=True)
        ctx.save_for_backward(x, gate_up, down, weights, halves, *groups)
        ctx.activation = activation
        return _mix(outputs, weights, (len(x), per_token))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, Tensor, None, None]:
        x, gate_up, down, weights, halves, *sorted_by_expert = ctx.saved_tensors
        groups, per_token = _Groups(*sorted_by_expert), weights.shape[1]
        grad = without_gaps(grad)
        d_active = _products(
            grad, down.transpose(1, 2), groups, per_token, by_token=True, in_order=False,
            dtype=torch.float32,
        )  # fmt: skip
        num_pairs, width = d_active.shape
        d_halves, d_weights = torch.empty_like(halves), torch.empty_like(weights)
        weighted = halves.new_empty(num_pairs, width)
        launch(
            _pair_backward_kernel, (num_pairs,),
            d_active, halves, weights, groups.order, d_halves, weighted, d_weights, width,
            GELU=ctx.activation == "gelu_tanh", COLUMNS=min(power_of_two(width, 16), 1024),
            num_warps=4,
        )  # fmt: skip
        d_x = d_gate_up = d_down = None
        if ctx.needs_input_grad[0]:
            of_pairs = _products(
                d_halves, gate_up.transpose(1, 2), groups, per_token, by_token=False, in_order=True
            )
            d_x = _mix(of_pairs, None, (len(x), per_token))
        if ctx.needs_input_grad[1]:
            d_gate_up = _weight_gradients(d_halves, x, groups, per_token, grad_by_token=False)
        if ctx.needs_input_grad[2]:
            d_down = _weight_gradients(grad, weighted, groups, per_token, grad_by_token=True)
        return d_x, d_gate_up, d_down, None, d_weights, None, None


def _run_cpp(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str,
    keep: bool,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x)
    count, hidden, width = down.shape
    laid = packed if keep else pack
    cpp.call(
        "moe", x.dtype, x, len(x), hidden, laid(gate_up, paired=True), laid(down), count, width,
        experts.contiguous(), weights.detach().contiguous(), experts.shape[1],
        int(activation == "gelu_tanh"), out, dots=uses_dot_products(down),
    )  # fmt: skip
    return out


def _run_torch(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """Expert by expert, over those that have pairs."""
    counts = experts.flatten().bincount(minlength=len(gate_up)).tolist()
    return run_counted(x, gate_up, down, experts, weights, activation, counts)


def run_counted(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str,
    counts: Sequence[int],
) -> Tensor:  # fmt: skip
    """`moe` in torch, with how many pairs each expert has."""
    order = experts.flatten().argsort(stable=True)
    rows = x.index_select(0, order // experts.shape[1])
    # Not gate_up[expert]: the gradient of each would be as large as that of all.
    each = zip(rows.split(list(counts)), gate_up.unbind(), down.unbind(), strict=True)
    outputs = torch.cat(
        [F.linear(gated_act(F.linear(own, g_u), activation), d) if len(own) else own
         for own, g_u, d in each]
    )  # fmt: skip
    outputs = outputs.index_select(0, order.argsort()).unflatten(0, experts.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (weights[..., None] * outputs.to(wide)).sum(1).to(x.dtype)


def moe(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str,
    keep: bool = True,
) -> Tensor:  # fmt: skip
    """The weighted sum of what its experts make of each token.

    x: (T, H), gate_up: (E, 2I, H), down: (E, H, I), one floating dtype. experts: (T, K) int64 in
    [0, E), which Triton does not check. weights: (T, K) float32, or float64 for float64 x.
    activation: "silu" or "gelu_tanh". keep: where C++ packs weights, the copies stay beside them.
    Returns (T, H) in the dtype of x; differentiable once, in all but the experts. Raises ValueError
    for anything else.
    """
    check("moe: x", x, ("T", "H"), "floating")
    check("moe: down", down, ("E", x.shape[1], "I"), x.dtype)
    count, hidden, width = down.shape
    check("moe: gate_up", gate_up, (count, 2 * width, hidden), x.dtype)
    check("moe: experts", experts, (len(x), "K"), torch.int64)
    wide = torch.promote_types(x.dtype, torch.float32)
    check("moe: weights", weights, experts.shape, wide)
    if activation not in ACTIVATIONS:
        raise ValueError(f"moe: activation must be one of {ACTIVATIONS}, got {activation!r}")
    learns = torch.is_grad_enabled() and any(
        each.requires_grad for each in (x, gate_up, down, weights)
    )
    if runs_triton(x):
        out: Tensor = _Moe.apply(x, gate_up, down, experts, weights, activation, learns)
        return out
    if bool(((experts < 0) | (experts >= count)).any()):
        raise ValueError(f"moe: experts must be in [0, {count}), got {experts.tolist()}")
    if packs(x, gate_up) and packs(x, down) and not learns:
        return _run_cpp(x, gate_up, down, experts, weights, activation, keep)
    return _run_torch(x, gate_up, down, experts, weights, activation)
