"""Hidden states and heads of language models, and how many rows of logits are made of them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kernels.logprob import LogProbs
from kernels.logprob.torch_impl import TorchLogitHead
from tests.implementations import Implementation, gradients


def draw_head(
    on: Implementation,
    tokens: int,
    hidden: int,
    vocab: int,
    peaked: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets; peaked: one token has nearly all the mass."""
    weight = on.draw(vocab, hidden, seed=1) * (6.0 if peaked else 0.3) / hidden**0.5
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(vocab, (tokens,), generator=generator).to(on.device)
    return on.draw(tokens, hidden, dtype=dtype), weight.to(dtype), target


def check_gradients(
    on: Implementation,
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> Counter[str]:
    """As `on.check_gradients`; float64, where no reference is more exact, to twelve digits."""
    if inputs[0].dtype != torch.float64:
        return on.check_gradients(op, reference, inputs, grads)
    found, exact = (gradients(each, inputs, grads) for each in (op, reference))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)
    return Counter()


@contextmanager
def rows_computed() -> Iterator[list[int]]:
    """How many rows of logits torch makes, each time that it makes some."""
    rows: list[int] = []
    made = TorchLogitHead.log_probs

    def counted(head: TorchLogitHead, hidden: Tensor, *more: Any, **named: Any) -> LogProbs:
        rows.append(len(hidden))
        return made(head, hidden, *more, **named)

    with patch.object(TorchLogitHead, "log_probs", counted):
        yield rows
