"""Gated activation of a feed-forward block: act(gate) * up.

    silu(g)      = g / (1 + exp(-g))
    gelu_tanh(g) = g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 g^3)))

T tokens, I the intermediate size; gate and up lie side by side in one tensor (T, 2I). Computed in
float32 (float64 for float64 input) and rounded once.

ATen's fused `silu`, `sigmoid` and `gelu` round differently in the vector body and the scalar tail
of their loops, and the tail lies where the work is cut between threads, so a row's bits change with
the number of rows. `exp`, `tanh`, products, sums and quotients do not have this fault: the forward
is composed of those (and is faster for it). The backward is not bound by this.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def _forward(gate_up: Tensor, activation: str) -> Tensor:
    """The reference with one buffer instead of one per operation."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    if activation == "silu":
        out = gate.neg().exp_().add_(1)
        out = torch.div(gate, out, out=out)
    else:
        out = (gate * gate).mul_(0.044715).add_(1).mul_(gate).mul_(_SQRT_2_OVER_PI)
        out = out.tanh_().add_(1).mul_(gate).mul_(0.5)
    return out.mul_(up).to(gate_up.dtype)


class _GatedAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return _forward(gate_up, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
        gate, up = wide.chunk(2, -1)
        grad = grad.to(wide.dtype)
        out = torch.empty_like(wide)
        d_gate, d_up = out.chunk(2, -1)
        if ctx.activation == "silu":
            sigmoid = gate.neg().exp_().add_(1).reciprocal_()
            active = gate * sigmoid
            torch.mul(grad, active, out=d_up)
            slope = active.addcmul_(active, sigmoid, value=-1).add_(sigmoid)
            torch.mul(slope.mul_(up), grad, out=d_gate)
        else:
            torch.mul(grad, F.gelu(gate, approximate="tanh"), out=d_up)
            d_gate.copy_(torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"))
        return out.to(gate_up.dtype), None


def gated_act(gate_up: Tensor, activation: str) -> Tensor:
    """Apply the activation to the first half of the last dimension and multiply by the second.

    gate_up: (T, 2I) floating. activation: "silu" or "gelu_tanh".
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
    return _GatedAct.apply(gate_up, activation)
