"""Low-rank adapters on the linear layers of a decoder's blocks.

    y = x W^T + b + (alpha / r) (x A^T) B^T       A: (r, K)   B: (N, r)   W: (N, K), frozen

B begins as zeros, so that an adapted model begins as the model itself; with its adapters off it
stays that for ever. Fused projections (q, k, v; gate, up) share one A. Source: arXiv 2106.09685.

Adapters are for training: sampling in C++ and writing Hugging Face directories want whole weights
(`merged_weight`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.transformer import Linear, Product, Transformer, linear


class AdaptedLinear(Linear):
    """A frozen linear layer and its adapter, which `enabled` switches."""

    def __init__(
        self, base: Linear, rank: int, scale: float, generator: torch.Generator | None = None
    ) -> None:
        """scale: alpha / r. A is drawn as Kaiming's uniform with a = sqrt(5) has it."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        weight, bound = base.weight, base.in_features**-0.5
        drawn = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(drawn.to(weight))
        self.lora_b = nn.Parameter(torch.zeros(len(weight), rank).to(weight))
        self.scale = scale
        self.enabled = True

    def forward(self, x: Tensor, product: Product = linear) -> Tensor:
        out = product(x, self.weight, self.bias)
        if not self.enabled:
            return out
        low = product(x, self.lora_a, None)
        return out + self.scale * product(low, self.lora_b, None)


def add_adapters(model: Transformer, rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze a decoder, in place, and give every linear layer of its blocks an adapter.

    Raises ValueError for a rank or an alpha that is not positive.
    """
    if rank < 1 or not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"an adapter of rank {rank} and alpha {alpha}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        for parent in layer.modules():
            for name, child in list(parent.named_children()):
                if type(child) is Linear:
                    setattr(parent, name, AdaptedLinear(child, rank, alpha / rank, generator))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, an adapted model is the one that it began as."""
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.enabled = True


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The weight (N, K) of one layer that does the same, in the dtype of `weight`, rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (lora_b.to(wide) @ lora_a.to(wide))).to(weight.dtype)
