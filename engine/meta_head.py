"""The meta head: a scalar head on the judge's own hidden states, in place of a meta model.

    score of a sample = w . h        w: (1, hidden_size) float32
                                     h: the state, after the final norm, of which its last token
                                        was drawn

A sample that ends with its scores is scored where it closes the box, with all of them before it.
The decode step has that state anyway, so a score costs one dot product a token and no forward. It
depends on the sample alone (`models/scalar_head.py`).

B samples, R >= B rows of hidden states, S slots. It does not load the weight, run the decoder, or
choose who votes.
"""

import math

import torch
from torch import Tensor

from kernels import cpp
from kernels.take_token import LiveSamples
from models.scalar_head import scalar_logits


class MetaHead:
    """The head's weight, and the score of each live sample's last token, by slot."""

    def __init__(self, weight: Tensor, num_slots: int) -> None:
        """weight: (1, hidden_size) float32, on the decoder's device."""
        self.weight = weight.contiguous()
        self._unused = num_slots  # a slot more, for what finished samples get no more
        self._scores = torch.zeros(num_slots + 1, device=weight.device)

    def of(self, hidden: Tensor) -> Tensor:
        """The scores of hidden states (R, hidden_size), R a multiple of 16: (R,) float32."""
        return scalar_logits(hidden, self.weight).float()

    def keep(self, live: LiveSamples, scores: Tensor) -> None:
        """Make scores (B,) those of the samples that have not finished; before they take the token
        that goes with it. In place, and the host reads nothing."""
        self._scores[live.slot.masked_fill(live.finished, self._unused)] = scores

    def keep_of(self, live: LiveSamples, hidden: Tensor) -> None:
        """`keep` the scores of the first B hidden states of (R, hidden_size), contiguous."""
        if cpp.runs_cpp(hidden):
            cpp.call(
                "keep_scores", hidden.dtype, hidden, len(live.slot), hidden.shape[1], self.weight,
                live.slot, live.finished, self._scores,
            )  # fmt: skip
            return
        self.keep(live, self.of(hidden)[: len(live.slot)])

    def fetch(self, live: LiveSamples) -> list[float]:
        """The samples' scores; NaN where they are not finite numbers."""
        scores = self._scores[live.slot].tolist()
        return [score if math.isfinite(score) else math.nan for score in scores]
