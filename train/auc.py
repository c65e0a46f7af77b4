"""How well scores tell better from worse: the area under the ROC curve, by ranks."""

import math

import torch
from torch import Tensor


def chance_above(better: Tensor, worse: Tensor) -> float:
    """The chance that one of the scores `better` is above one of `worse`, a tie being half; NaN
    where one of them is empty."""
    if not len(better) or not len(worse):
        return math.nan
    ranked = worse.sort().values
    below, not_above = (torch.searchsorted(ranked, better, right=end) for end in (False, True))
    return (below + not_above).sum().item() / (2 * len(better) * len(worse))
