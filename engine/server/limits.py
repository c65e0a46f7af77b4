"""How much a request may ask of the server. Needs no torch, so that a command line can show it."""

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What requests may ask for; raises ValueError for limits below 1, and for fewer rows at a time
    than one request may have."""

    max_pending: int = 1024
    """Most rows that are not done; a request past that is answered 429."""
    max_rows: int = 512
    """Most rows of a request."""
    max_body_bytes: int = 1 << 20
    """Longest body of a request, in bytes."""
    max_k: int = 256
    """Most judgements of a row that a request may ask for."""
    limit_new_tokens: int = 8192
    """Longest judgement that a request may ask for, in tokens."""
    body_seconds: float = 30.0
    """How long a client may take to send its request."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            least = 0 if each.name == "body_seconds" else 1
            if not (value >= least and math.isfinite(value)):
                raise ValueError(f"{each.name} = {value} is not a number of at least {least}")
        if self.max_rows > self.max_pending:
            raise ValueError(f"max_rows = {self.max_rows} is more than max_pending")
