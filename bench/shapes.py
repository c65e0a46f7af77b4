"""The shapes that benchmarks measure and ahead-of-time compilation covers.

Dimensions only: no weights of these models are needed, or looked for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.timing import Fill
from kernels.route import Routing
from models.experts_config import Experts

DECODE_ROWS = (1, 16, 64, 128)
PREFILL_ROWS = (2048,)


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions, in the names of its configuration."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str = "silu"
    norm_plus_one: bool = False
    qk_norm: bool = True
    softcap: float | None = None  # of attention scores
    final_softcap: float | None = None
    window: int | None = None  # of every other layer
    tied: bool = True
    dtype: torch.dtype = torch.bfloat16
    experts: Experts | None = None  # of a mixture

    @property
    def mixture(self) -> Experts:
        """The experts, or of a dense shape what might stand for its block: a token goes through as
        many weights."""
        count = 16 if self.hidden_size <= 1024 else 64
        return self.experts or Experts(count, self.intermediate_size // 4, Routing(4, True))

    @property
    def groups(self) -> int:
        """Query heads of a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Outputs and summed inputs of every matrix product of a decoder, by its layer."""
        heads = self.num_heads * self.head_dim
        return {
            "qkv_proj": (heads + 2 * self.num_kv_heads * self.head_dim, self.hidden_size),
            "o_proj": (self.hidden_size, heads),
            "gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
            "lm_head": (self.vocab_size, self.hidden_size),
        }


def _gemma2(
    name: str, hidden: int, intermediate: int, layers: int, heads: int, kv: int, dim: int
) -> Shape:
    return Shape(
        name, 256_000, hidden, intermediate, layers, heads, kv, dim,
        activation="gelu_tanh", norm_plus_one=True, qk_norm=False,
        softcap=50.0, final_softcap=30.0, window=4096,
    )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("pocket", 475, 192, 512, 4, 6, 2, 32, dtype=torch.float32),
        Shape("qwen3-107m", 32_000, 768, 2304, 12, 12, 4, 64),
        Shape("qwen3-8b", 151_936, 4096, 12_288, 36, 32, 8, 128, tied=False),
        _gemma2("gemma2-9b", 3584, 14_336, 42, 16, 8, 256),
        _gemma2("gemma2-27b", 4608, 36_864, 46, 32, 16, 128),
    )
}


# Their experts are measured, and nothing else of them.
MIXTURES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 151_936, 2048, 6144, 48, 32, 4, 128, tied=False,
              experts=Experts(128, 768, Routing(8, True))),
        Shape("deepseek-v2-lite", 102_400, 2048, 10_944, 27, 16, 16, 192, qk_norm=False, tied=False,
              experts=Experts(64, 1408, Routing(6), 2816)),
    )
}  # fmt: skip


def projected(shape: Shape, rows: int, tensor: Fill) -> list[Tensor]:
    """Queries, keys and values (rows, heads, head_dim) as slices of one projection."""
    sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    return list(tensor(rows, sum(sizes), shape.head_dim, dtype=shape.dtype).split(sizes, 1))
