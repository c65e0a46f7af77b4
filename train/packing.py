"""Trajectories as one flat batch without padding, and the attention that keeps them apart.

Linear layers and norms see (T,) tokens of all sequences back to back. Only inside attention are
the sequences laid side by side, padded to the longest, for torch's own causal attention. T tokens,
S sequences, R predicted tokens.

Not done here: soft-caps and sliding windows shorter than a sequence, which torch's attention has
not (refused); sharing of prompts between sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.config import ModelConfig
from models.transformer import Attend
from train.data import Trajectory


@dataclass(frozen=True)
class PackedBatch:
    """A flat batch of S sequences with T tokens in all, R of which carry loss.

    token_ids, positions: (T,) int64. predicting: (R,) int64, the places in T of the tokens before
    those with loss; target: (R,) int64, those with loss. lengths: tokens of each sequence.
    """

    token_ids: Tensor
    positions: Tensor
    predicting: Tensor
    target: Tensor
    lengths: tuple[int, ...]


def pack(
    trajectories: Sequence[Trajectory], device: torch.device | str | None = None
) -> PackedBatch:
    """Lay trajectories back to back; the last token of each is a target only.

    Raises ValueError for no trajectories, and for an empty prompt or completion.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    target: list[int] = []
    lengths = []
    for number, trajectory in enumerate(trajectories):
        if not trajectory.prompt or not trajectory.completion:
            raise ValueError(f"trajectory {number} has an empty prompt or completion")
        inputs = [*trajectory.prompt, *trajectory.completion[:-1]]
        first = len(token_ids) + len(trajectory.prompt) - 1
        predicting.extend(range(first, first + len(trajectory.completion)))
        target.extend(trajectory.completion)
        token_ids.extend(inputs)
        positions.extend(range(len(inputs)))
        lengths.append(len(inputs))
    if not lengths:
        raise ValueError("a batch of no trajectories")
    return PackedBatch(
        torch.tensor(token_ids, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(predicting, device=device),
        torch.tensor(target, device=device),
        tuple(lengths),
    )


def packed_attention(
    config: ModelConfig, lengths: Sequence[int], device: torch.device | str | None = None
) -> Attend:
    """Causal attention within each of the packed sequences, differentiable.

    Raises ValueError for a sequence beyond the context and for a layer with a soft-cap or a window
    below the longest sequence.
    """
    longest = max(lengths)
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"a sequence has {longest} tokens, the context {config.max_position_embeddings}"
        )
    for layer, attention in enumerate(config.attention):
        if attention.softcap is not None:
            raise ValueError(f"layer {layer} has a soft-cap of {attention.softcap}")
        if attention.window is not None and attention.window < longest:
            raise ValueError(f"layer {layer} has a window of {attention.window} < {longest}")
    length = torch.tensor(lengths, device=device)
    place = torch.arange(longest, device=device)
    inside = place < length[:, None]  # (S, longest)
    start = torch.cumsum(length, 0) - length
    index = torch.where(inside, start[:, None] + place, 0)
    groups = config.num_heads // config.num_kv_heads

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[index].transpose(1, 2) for x in (q, k, v))  # (S, heads, longest, D)
        out = scaled_dot_product_attention(
            q,
            k.repeat_interleave(groups, 1),
            v.repeat_interleave(groups, 1),
            is_causal=True,
            scale=config.attention[layer].scale,
        )
        return out.transpose(1, 2)[inside]

    return attend
