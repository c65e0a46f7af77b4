"""A decoder that scores a text: one scalar, read at one position.

    logit = w . norm(h_last)                 w: (1, hidden), without bias

This is Hugging Face's sequence classification with one label (`Qwen3ForSequenceClassification` and
its like), whose tensors are `model.*` and `score.weight`. Transformers reads the logit at the last
token that is not the pad token; so where the pad token is also the end token, it never reads at the
end token. R rows.

It does not choose the position, squash the logit, or know what is scored.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels import cpp
from kernels.cpp import runs_cpp
from models.config import ModelConfig
from models.layers import Attend, Linear
from models.transformer import Transformer

if TYPE_CHECKING:
    from models.critique_model import CritiqueModel

_BLOCK = 16


def decoder_of(model: "Transformer | ScalarModel | CritiqueModel") -> Transformer:
    """The decoder that a model is, or has."""
    return model if isinstance(model, Transformer) else model.model


class ScalarModel(nn.Module):
    """A decoder and the weight of its score. Parameters are uninitialised until loaded."""

    def __init__(self, config: ModelConfig) -> None:
        """`config` is that of a scalar model: tied, so that the decoder has no head."""
        super().__init__()
        assert config.tied, "a scalar model has no head over the vocabulary"
        self.model = Transformer(config)
        self.score = Linear(config.hidden_size, 1, bias=False)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend, at: Tensor) -> Tensor:
        """Raw logits at the places `at` (R,) of a batch, as in `Transformer.forward`: (R,)."""
        return self.logits(self.model(token_ids, positions, attend)[at])

    def logits(self, hidden: Tensor) -> Tensor:
        """Raw logits of hidden states (R, hidden_size) after the final norm: (R,) float32 (float64
        from float64).

        The sum is in float32 even where the model is not: the digits of bfloat16 would make ties.
        Rows do not depend on each other, bit for bit, where R is a multiple of 16: they are summed
        16 at a time, since torch on a GPU cuts a sum by the number of rows.
        """
        return row_dots(hidden, self.score.weight)


def row_dots(hidden: Tensor, weight: Tensor) -> Tensor:
    """The product of each row of (R, hidden_size) with a weight (1, hidden_size): (R,), as
    `ScalarModel.logits` has it."""
    learns = weight.requires_grad and torch.is_grad_enabled()
    if runs_cpp(hidden) and hidden.is_contiguous() and not learns:
        out = torch.empty(len(hidden))
        as_float = weight.detach().float().contiguous()
        cpp.call("row_dots", hidden.dtype, hidden, *hidden.shape, as_float, out)
        return out
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight = weight.to(wide)
    return torch.cat([(rows.to(wide) * weight).sum(-1) for rows in hidden.split(_BLOCK)])
