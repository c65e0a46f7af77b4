"""Scalar models under training: what they begin as, and their logits of packed trajectories.

R is what a row is for a training: with `labelled` its rows become trajectories, each of which is
read at the last token but one, and their labels (`train/ranking.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from models import load
from models.files import read_json
from models.scalar_head import ScalarModel
from models.tokenizer import Tokenizer
from train import parallel
from train.packing import pack, packed_attention
from train.ranking import Labelled, losses_of
from train.trajectories import Trajectory

R = TypeVar("R")


def scalar_of(
    directory: Path, dtype: str | torch.dtype = torch.float32
) -> tuple[ScalarModel, Tokenizer]:
    """A scalar model with the decoder of a causal language model; its score is 0."""
    decoder, tokenizer = load(directory, dtype=dtype)
    pad = read_json(directory / "config.json").get("pad_token_id")
    config = replace(decoder.config, tied=True, pad_token_id=pad)
    with torch.device("meta"):
        model = ScalarModel(config)
    weights = {k: v for k, v in decoder.named_parameters() if k != "lm_head.weight"}
    model.model.load_state_dict(weights, assign=True)
    model.score.weight = nn.Parameter(decoder.head_weight.new_zeros(1, config.hidden_size))
    return model, tokenizer


def logits_of(model: ScalarModel, trajectories: Sequence[Trajectory]) -> Tensor:
    """(S,) float32, with gradient."""
    batch = pack(trajectories, model.score.weight.device)
    last = torch.tensor(batch.lengths, device=batch.predicting.device).cumsum(0) - 1
    attend = packed_attention(model.model.config, batch)
    logits: Tensor = model(batch.token_ids, batch.positions, attend, batch.predicting[last])
    return logits


def add_gradients(
    model: ScalarModel,
    rows: Sequence[R],
    labelled: Callable[[Sequence[R]], Labelled],
    kind: str,
    micro_rows: int,
    total: int,
) -> tuple[float, Tensor]:
    """Add the gradients of the rows' losses of this kind (`train.ranking.losses_of`), their sum
    over `total`; a rank takes its share. Returns that loss, and all logits (S,) float32."""
    losses: list[float] = []
    found: list[float] = []
    for own, counts in parallel.micro_batches(rows, micro_rows):
        each = labelled(own)
        logits = logits_of(model, each.trajectories)
        loss = losses_of(logits, each, kind).sum() / max(1, total)
        (loss * parallel.world_size() * counts).backward()
        if counts:
            losses.append(loss.item())
            found += logits.tolist()
    return sum(parallel.gather(losses)), torch.tensor(parallel.gather(found))


@torch.no_grad()
def all_logits(
    model: ScalarModel,
    rows: Sequence[R],
    labelled: Callable[[Sequence[R]], Labelled],
    micro_rows: int,
) -> Tensor:
    """The logits (S,) float32 of all rows; a rank computes its share."""
    found: list[float] = []
    own = parallel.share(rows)
    for first in range(0, len(own), micro_rows):
        some = labelled(own[first : first + micro_rows])
        found += logits_of(model, some.trajectories).tolist()
    return torch.tensor(parallel.gather(found))
