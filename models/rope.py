"""The rotary embedding of a checkpoint: radians per position, and what scaling does to them.

    inv_freq[i] = theta^(-2i / D), then changed by the scaling; i < D/2

Arithmetic, order and precision are those of transformers, so that logits agree; powers are taken in
float64 and rounded once, because float32 powers differ between processors. `linear`, `llama3` and
`yarn` have the same frequencies at every length. `dynamic` (NTK) raises theta with the length of
the sequence once that passes max_position_embeddings: keys that are cached and shared cannot turn
anew, so the context ends there, and up to there nothing is scaled.

It does not turn anything (`kernels/rope.py`), and knows nothing of longrope or multimodal ropes.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies are divided by `factor`."""

    rope_type: ClassVar[str] = "linear"
    factor: float

    def inv_freq(self, powers: Tensor, theta: float) -> Tensor:
        return 1.0 / powers / self.factor


@dataclass(frozen=True)
class DynamicScaling:
    """No change within max_position_embeddings; `factor` is kept for the config.json to write."""

    rope_type: ClassVar[str] = "dynamic"
    factor: float

    def inv_freq(self, powers: Tensor, theta: float) -> Tensor:
        return 1.0 / powers


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are stretched by `factor`, in the words of config.json."""

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def inv_freq(self, powers: Tensor, theta: float) -> Tensor:
        inv_freq = 1.0 / powers
        low, high = self.low_freq_factor, self.high_freq_factor
        old = self.original_max_position_embeddings
        wavelength = 2 * math.pi / inv_freq
        smooth = (old / wavelength - low) / (high - low)
        between = (1 - smooth) * inv_freq / self.factor + smooth * inv_freq
        scaled = torch.where(wavelength > old / low, inv_freq / self.factor, between)
        return torch.where(wavelength < old / high, inv_freq, scaled)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: channels that turn less than `beta_slow` times within the original context are
    stretched by `factor`, those that turn more than `beta_fast` times are kept, and a ramp over the
    channels lies between, whose ends are whole channels where `truncate`. attention_factor:
    multiplies cosines and sines, hence every score by its square. mscale, mscale_all_dim: what it
    follows from; DeepSeek-V2 also multiplies all scores by what the second gives.
    """

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def inv_freq(self, powers: Tensor, theta: float) -> Tensor:
        half = len(powers)
        low, high = (
            self._channel(turns, 2 * half, theta) for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept = 1 - ramp
        return 1.0 / (self.factor * powers) * (1 - kept) + 1.0 / powers * kept

    def _channel(self, turns: float, dim: int, theta: float) -> float:
        """Which channel, as a fraction, turns so often within the original context."""
        old = self.original_max_position_embeddings
        return dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """YaRN's attention factor where config.json does not give it; of the two mscales neither counts
    without the other."""

    if mscale is None or mscale_all_dim is None:
        return _grown(factor, 1.0)
    return _grown(factor, mscale) / _grown(factor, mscale_all_dim)


def _grown(factor: float, by: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base `theta` and, where there is one, its scaling."""

    theta: float
    scaling: RopeScaling | None

    def inv_freq(self, dim: int) -> Tensor:
        """Angles per position in radians, (dim / 2,) float32 on the CPU."""
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
        powers = torch.tensor([self.theta**e for e in exponents.tolist()], dtype=torch.float32)
        if self.scaling is None:
            return 1.0 / powers
        return self.scaling.inv_freq(powers, self.theta)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines have to be multiplied with."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0

    @property
    def score_factor(self) -> float:
        """Whose square DeepSeek-V2 multiplies its scores with, beside `attention_factor`."""
        scaling = self.scaling
        if not isinstance(scaling, YarnScaling) or scaling.mscale_all_dim is None:
            return 1.0
        return _grown(scaling.factor, scaling.mscale_all_dim)
