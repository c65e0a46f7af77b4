"""What layers are made of, and what a run passes in."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.norm_rope_write import HeadNorms
from kernels.packed_linear import packed_linear, packs
from kernels.rms_norm import rms_norm

# attend(layer, q (T, Hq, D), k (T, Hkv, D), v (T, Hkv, Dv)) -> (T, Hq, Dv), after rope. Scale,
# soft-cap and window are the caller's to apply: they are in config.attention[layer].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# write(layer, q, k, v, norms, cos, sin) -> the queries: normalised and rotated, and so are the keys
# that are in the cache then, with their values. Attention runs on the cache.
Write = Callable[[int, Tensor, Tensor, Tensor, HeadNorms | None, Tensor, Tensor], Tensor]
# product(x (T, K), weight (N, K), bias (N,) or None) -> x W^T + b, (T, N)
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, keep: bool = True) -> Tensor:
    """x W^T + b. x: (T, K), weight: (N, K), bias: (N,) or None. Returns (T, N). keep: a weight that
    is packed on the way stays so, for the next time."""
    if packs(x, weight):
        return packed_linear(x, weight, bias, keep)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer through the matrix product that it is called with."""

    def forward(self, x: Tensor, product: Product = linear) -> Tensor:
        return product(x, self.weight, self.bias)

    def merged(self) -> Tensor:
        """The weight (N, K) that does by itself what the layer does, but for its bias."""
        return self.weight


class RMSNorm(nn.Module):
    """A learned scale over root-mean-square normalised vectors."""

    def __init__(self, size: int, eps: float, plus_one: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, self.weight, self.eps, self.plus_one)
        assert isinstance(normed, Tensor)
        return normed

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and x + residual."""
        normed = rms_norm(x, self.weight, self.eps, self.plus_one, residual)
        assert isinstance(normed, tuple)
        return normed
