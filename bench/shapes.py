"""The shapes that benchmarks measure and ahead-of-time compilation covers.

Dimensions only: no weights of these models are needed, or looked for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.timing import Fill
from kernels.route import Routing
from models.config import Latent
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
    latent: Latent | None = None  # head_dim and num_kv_heads are those of expanded attention
    value_dim: int | None = None  # of its values
    experts: Experts | None = None  # of a mixture
    num_dense: int = 0  # layers before the first with experts
    dtype: torch.dtype = torch.bfloat16

    @property
    def mixture(self) -> Experts:
        """The experts, or of a dense shape what might stand for its block: a token goes through as
        many weights."""
        count = 16 if self.hidden_size <= 1024 else 64
        return self.experts or Experts(count, self.intermediate_size // 4, Routing(4, True))

    @property
    def architecture(self) -> str:
        """The family."""
        if self.latent is not None:
            return "deepseek_v2"
        if self.experts is not None:
            return "qwen3_moe"
        return "gemma2" if self.norm_plus_one else "qwen3"

    @property
    def groups(self) -> int:
        """Query heads of a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def turned(self) -> tuple[int, int]:
        """Key/value heads that rope turns, and their channels."""
        latent = self.latent
        return (self.num_kv_heads, self.head_dim) if latent is None else (1, latent.rope_dim)

    @property
    def v_head_dim(self) -> int:
        """Channels of a value."""
        return self.value_dim or self.head_dim

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Outputs and summed inputs of every matrix product of a decoder, by its layer."""
        heads, out = self.num_heads * self.head_dim, self.num_heads * self.v_head_dim
        kv = self.num_kv_heads * (self.head_dim + self.v_head_dim)
        if self.latent is not None:
            kv = self.latent.kv_rank + self.latent.rope_dim
        return {
            "qkv_proj": (heads + kv, self.hidden_size),
            "o_proj": (self.hidden_size, out),
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


def _qwen3_moe(name: str, hidden: int, width: int, layers: int, heads: int, kv: int) -> Shape:
    """width: of an expert."""
    return Shape(
        name, 151_936, hidden, 3 * hidden, layers, heads, kv, 128, tied=False,
        experts=Experts(128, width, Routing(8, True)),
    )  # fmt: skip


def _deepseek_v2(
    name: str, vocab: int, hidden: int, intermediate: int, width: int, layers: int, heads: int,
    dims: tuple[int, int, int, int],
) -> Shape:  # fmt: skip
    """width: of an expert. dims: of the latents, of a head's query without rope and with it, and of
    its value."""
    rank, nope, rope, value = dims
    return Shape(
        name, vocab, hidden, intermediate, layers, heads, heads, nope + rope, qk_norm=False,
        tied=False, latent=Latent(None, rank, nope, rope), value_dim=value,
        experts=Experts(64, width, Routing(6), 2 * width), num_dense=1,
    )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("pocket", 475, 192, 512, 4, 6, 2, 32, dtype=torch.float32),
        Shape("qwen3-107m", 32_000, 768, 2304, 12, 12, 4, 64),
        Shape("qwen3-8b", 151_936, 4096, 12_288, 36, 32, 8, 128, tied=False),
        _gemma2("gemma2-9b", 3584, 14_336, 42, 16, 8, 256),
        _gemma2("gemma2-27b", 4608, 36_864, 46, 32, 16, 128),
        _qwen3_moe("qwen3-30b-a3b", 2048, 768, 48, 32, 4),
        _deepseek_v2("deepseek-v2-lite", 102_400, 2048, 10_944, 1408, 27, 16, (512, 128, 64, 128)),
        # An eighth of its widths and heads.
        _deepseek_v2("v2-lite-small", 12_800, 256, 1368, 176, 6, 2, (64, 16, 8, 16)),
    )
}


def experts_met(experts: Experts, rows: int) -> float:
    """How many experts so many tokens go to on average, where all are as likely."""
    return experts.count * (1 - (1 - experts.routing.per_token / experts.count) ** rows)


def projected(shape: Shape, rows: int, tensor: Fill) -> list[Tensor]:
    """Queries (rows, heads, head_dim), keys and values as slices of one projection; with latent
    attention what rope turns of them, and a latent as the value."""
    heads, (kv_heads, dim) = shape.num_heads, shape.turned
    value_dim = shape.v_head_dim if shape.latent is None else shape.latent.kv_rank
    sizes = [heads * dim, kv_heads * dim, kv_heads * value_dim]
    whole = tensor(rows, sum(sizes), dtype=shape.dtype).split(sizes, 1)
    each = heads, kv_heads, kv_heads
    return [x.unflatten(1, (n, -1)) for x, n in zip(whole, each, strict=True)]
