"""Gated activation of a feed-forward block: act(gate) * up.

    silu(g)      = g / (1 + exp(-g))
    gelu_tanh(g) = g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 g^3)))

T tokens, I the intermediate size; gate and up are the halves of one tensor (T, 2I). Computed in
float32 (float64 for float64 input) and rounded once.

In Triton a program has a piece of one long row, or several short rows. Its backward writes the
gradients of gate and up side by side, as in the input.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpp
from kernels.checks import check_triton, without_gaps
from kernels.cpp import runs_cpp
from kernels.device_math import gated, gated_gradients
from kernels.launch import launch, runs_triton
from kernels.target import power_of_two

ACTIVATIONS = ("silu", "gelu_tanh")
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def gated_act_ref(gate_up: Tensor, activation: str) -> Tensor:
    """Specification of `gated_act`, in plain torch for any device and floating dtype."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    if activation == "silu":
        active = gate / (1 + torch.exp(-gate))
    else:
        active = gate * 0.5 * (1 + torch.tanh(_SQRT_2_OVER_PI * (gate + 0.044715 * gate**3)))
    return (active * up).to(gate_up.dtype)


@triton.jit
def _gated_act_kernel(
    gate_up_ptr,  # (T, 2I), strides gate_up_t, 1
    out_ptr,  # (T, I), contiguous
    num_rows,  # T
    size,  # I
    gate_up_t,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None] & (column < size)[None, :]  # (ROWS, COLUMNS)
    gate_ptrs = gate_up_ptr + (row * gate_up_t)[:, None] + column[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + size, mask=mask, other=0.0).to(tl.float32)
    out = gated(gate, up, GELU).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * size)[:, None] + column[None, :], out, mask=mask)


@triton.jit
def _gated_act_backward_kernel(
    grad_ptr,  # (T, I), strides grad_t, 1
    gate_up_ptr,  # (T, 2I), strides gate_up_t, 1
    d_gate_up_ptr,  # (T, 2I), contiguous
    num_rows,  # T
    size,  # I
    grad_t,
    gate_up_t,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None] & (column < size)[None, :]  # (ROWS, COLUMNS)
    gate_ptrs = gate_up_ptr + (row * gate_up_t)[:, None] + column[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + size, mask=mask, other=0.0).to(tl.float32)
    grad_ptrs = grad_ptr + (row * grad_t)[:, None] + column[None, :]
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    d_gate, d_up, _ = gated_gradients(grad, gate, up, GELU)
    d_gate_ptrs = d_gate_up_ptr + (row * (2 * size))[:, None] + column[None, :]
    tl.store(d_gate_ptrs, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(d_gate_ptrs + size, d_up.to(d_gate_up_ptr.dtype.element_ty), mask=mask)


def _launch(size: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps: 1,024 elements."""
    columns = min(power_of_two(size, 16), 1024)
    return {"ROWS": 1024 // columns, "COLUMNS": columns, "num_warps": 4}


def _run_triton(gate_up: Tensor, activation: str) -> Tensor:
    check_triton("gated_act", gate_up)
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    options = _launch(size)
    launch(
        _gated_act_kernel,
        (triton.cdiv(tokens, options["ROWS"]), triton.cdiv(size, options["COLUMNS"])),
        gate_up, out, tokens, size, gate_up.stride(0), GELU=activation == "gelu_tanh", **options,
    )  # fmt: skip
    return out


def _run_triton_backward(grad: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    check_triton("gated_act", grad, gate_up)
    tokens, size = grad.shape
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    options = _launch(size)
    launch(
        _gated_act_backward_kernel,
        (triton.cdiv(tokens, options["ROWS"]), triton.cdiv(size, options["COLUMNS"])),
        grad, gate_up, out, tokens, size, grad.stride(0), gate_up.stride(0),
        GELU=activation == "gelu_tanh", **options,
    )  # fmt: skip
    return out


def _run_cpp(gate_up: Tensor, activation: str) -> Tensor:
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, size, dtype=gate_up.dtype)
    cpp.call(
        "gated_act", gate_up.dtype, gate_up, gate_up.stride(0), out, tokens, size,
        int(activation == "gelu_tanh"),
    )  # fmt: skip
    return out


def _run_torch(gate_up: Tensor, activation: str) -> Tensor:
    """The reference with one buffer instead of one per operation."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    if activation == "silu":
        out = gate.neg().exp_().add_(1)
        out = torch.div(gate, out, out=out)
    else:
        out = (gate * gate).mul_(0.044715).add_(1).mul_(gate).mul_(_SQRT_2_OVER_PI)
        out = out.tanh_().add_(1).mul_(gate).mul_(0.5)
    return out.mul_(up).to(gate_up.dtype)


def gated_act(gate_up: Tensor, activation: str) -> Tensor:
    """Apply the activation to the first half of the last dimension and multiply by the second.

    gate_up: (T, 2I) floating; in Triton rows may lie apart, their elements may not. activation:
    "silu" or "gelu_tanh".
    Returns (T, I) in the dtype of gate_up; differentiable once. Raises ValueError for anything
    else.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.is_floating_point():
        raise ValueError(
            f"gated_act: gate_up must be (T, 2I) floating, got {tuple(gate_up.shape)} "
            f"{gate_up.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_act: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if runs_cpp(gate_up):
        return _run_cpp(gate_up, activation)
    return _GatedAct.apply(gate_up, activation)


class _GatedAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        if runs_triton(gate_up):
            return _run_triton(gate_up, activation)
        return _run_torch(gate_up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return gated_act_backward(grad, gate_up, ctx.activation), None


def gated_act_backward(grad: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """The gradient of gate_up from that of the result.

    grad: (T, I) of any strides, in the dtype of gate_up. gate_up, activation: as for `gated_act`.
    Returns (T, 2I) in the dtype of gate_up.
    """
    if runs_triton(gate_up):
        return _run_triton_backward(without_gaps(grad), gate_up, activation)
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    gate, up = (half.contiguous() for half in wide.chunk(2, -1))  # sigmoid: six times faster
    z, g_dz = gate, gate  # g z'
    if activation == "gelu_tanh":
        square = (gate * gate).clamp_(max=256)  # beyond it the sigmoid is 0 or 1 all the same
        z = gate * (2 * _SQRT_2_OVER_PI) * (1 + 0.044715 * square)
        g_dz = gate * (2 * _SQRT_2_OVER_PI) * (1 + 3 * 0.044715 * square)
    sigmoid, complement = z.sigmoid(), z.neg().sigmoid_()  # one from the other would cancel
    out = torch.empty_like(wide)
    d_gate, d_up = out.chunk(2, -1)
    slope = complement.mul_(g_dz).add_(1).mul_(sigmoid)
    torch.mul(sigmoid.mul_(gate), grad, out=d_up)
    torch.mul(slope.mul_(up), grad, out=d_gate)
    return out.to(gate_up.dtype)
