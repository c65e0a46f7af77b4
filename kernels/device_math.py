"""Device functions and constants that several Triton kernels share.

Triton has no tanh of its own, libdevice's does not run under the interpreter, and the hardware's
`tanh.approx` is off by 5e-4: times a soft-cap of 50 that is not attention any more.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e)
LN2 = tl.constexpr(0.6931471805599453)
_GELU_SCALE = tl.constexpr(math.sqrt(2 / math.pi))


@triton.jit
def tanh(x):
    """tanh in float32, within 3 units in the last place: a polynomial (Cephes' tanhf) where exp
    would cancel."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = p * z * x + x
    large = 1 - 2 / (tl.exp2(tl.abs(x) * (2 * LOG2E)) + 1)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def gated(gate, up, GELU: tl.constexpr):
    """act(gate) * up in float32: of silu or gelu_tanh."""
    if GELU:
        active = gate * 0.5 * (1 + tanh(gate * _GELU_SCALE * (1 + 0.044715 * gate * gate)))
    else:
        active = gate / (1 + tl.exp(-gate))
    return active * up


@triton.jit
def gated_gradients(grad, gate, up, GELU: tl.constexpr):
    """The gradients of gate and up in float32, and act(gate). Both activations are g sigmoid(z)
    here, since (1 + tanh(u)) / 2 = sigmoid(2u), with the slope sigmoid(z) (1 + g z' sigmoid(-z)),
    which is free of cancellation."""
    z = gate
    g_dz = gate  # g z'
    if GELU:
        square = tl.minimum(gate * gate, 256.0)  # beyond it the sigmoid is 0 or 1 all the same
        z = 2 * _GELU_SCALE * gate * (1 + 0.044715 * square)
        g_dz = 2 * _GELU_SCALE * gate * (1 + 3 * 0.044715 * square)
    small = tl.exp(-tl.abs(z))
    large = 1 / (1 + small)
    small *= large
    sigmoid, complement = tl.where(z < 0, small, large), tl.where(z < 0, large, small)
    active = gate * sigmoid
    return grad * up * (sigmoid * (1 + g_dz * complement)), grad * active, active
