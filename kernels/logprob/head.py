"""What computes log-probs and logit gradients some rows at a time: the interface.

n rows of a chunk, N in all, H the hidden size, V the vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class LogProbs(NamedTuple):
    """Each (N,) float32 (float64 for float64 input); natural logarithms."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


class LogProbGradients(NamedTuple):
    """Gradients of log-probs, each (N,) in their dtype; None is 0."""

    logp: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None


class LogitHead(Protocol):
    """The head's weight (V, H), soft-cap and temperature, and the logits of one chunk of rows.

    dtype: of results and of the weight's gradient. chunk_size: rows of a chunk.
    """

    dtype: torch.dtype
    chunk_size: int

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """Consecutive chunks of rows."""
        for first in range(0, num_rows, self.chunk_size):
            yield slice(first, min(first + self.chunk_size, num_rows))

    def partition_rows(self, *masks: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Row order that puts each mask's rows first, and each mask's count.

        masks: (N,) bool, nested: each is a subset of the next. Where the host may wait for the
        counts, only rows of the last mask are returned, and the counts are None.
        """
        ...

    def log_probs(
        self, hidden: Tensor, target: Tensor, num_valid: Tensor | None = None, save: bool = False
    ) -> LogProbs:
        """Log-probs of the targets (n,) int64 after hidden states (n, H).

        num_valid: () int64; past these rows nothing is computed and results are 0. None: all rows.
        save: keep what `gradients`, the next call, needs.
        """
        ...

    def gradients(
        self,
        d_out: LogProbGradients,
        num_valid: Tensor | None,
        needs_hidden: bool,
        d_weight: Tensor | None,
    ) -> Tensor | None:
        """The gradient (n, H) of the saved rows' hidden states from that of their log-probs, or
        None where it is not needed; the weight's is added to `d_weight` (V, H). Frees what was
        saved. num_valid: as for `log_probs`, and at most that number."""
        ...
