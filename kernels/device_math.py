"""Device functions and constants that several Triton kernels share.

Triton has no tanh of its own, libdevice's does not run under the interpreter, and the hardware's
`tanh.approx` is off by 5e-4: times a soft-cap of 50 that is not attention any more.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e)
LN2 = tl.constexpr(0.6931471805599453)


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
