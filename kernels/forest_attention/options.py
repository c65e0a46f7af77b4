"""Options of one layer's attention."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionOptions:
    """score = softcap(scale * q . k), over keys with q_pos - window < k_pos <= q_pos.

    softcap: cap * tanh(score / cap), None for none. window: tokens, the query's own included, None
    for all. Raises ValueError for a value that is not positive.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "softcap", "window"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"attention: {name} must be positive, got {value}")

    def exp2_factors(self) -> tuple[float, float]:
        """`factor` and `cap_scale` of the Triton kernels: score * log2(e) is factor * (q . k), or
        factor * tanh(cap_scale * (q . k)) with a soft-cap."""
        log2e = math.log2(math.e)
        if self.softcap is None:
            return self.scale * log2e, 0.0
        return self.softcap * log2e, self.scale / self.softcap
