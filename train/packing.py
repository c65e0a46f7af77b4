"""Trajectories as one flat batch: their tree, every shared segment once, and its attention.

Segments that begin several prompts are computed once, forward and backward: a batch of G judgements
of one prompt has P + sum of R tokens, not G (P + R). The tokens of a segment lie together, parents
before children; a completion is a segment of its own, without its last token, which is a target
only. The last token of a prompt predicts the first token of each of its completions. Attention is
`forest_attention` over the batch's own keys and values, so soft-caps and sliding windows are there,
and no query ever sees another branch.

T tokens, filled up to a multiple of 16; S trajectories; R predicted tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from engine.forest import Node, TokenIds, prefill_tiles
from engine.kv_cache import Slab, round_up
from kernels.forest_attention import forest_attention
from kernels.forest_attention.plan import ForestPlan
from models.config import ModelConfig
from models.layers import Attend, linear
from models.transformer import Transformer
from train.trajectories import Trajectory


@dataclass(frozen=True)
class PackedBatch:
    """A tree of S trajectories with T tokens in all, and R predicted tokens.

    token_ids, positions: (T,) int64. predicting: (R,) int64, the places in T of the tokens before
    those predicted; target: (R,) int64, those predicted. lengths: how many of them each trajectory
    has, in their order. plan: of the attention. num_tokens: those of the tree, without filling;
    longest: of a trajectory.
    """

    token_ids: Tensor
    positions: Tensor
    predicting: Tensor
    target: Tensor
    lengths: tuple[int, ...]
    plan: ForestPlan
    num_tokens: int
    longest: int


@dataclass(eq=False)
class _Segment:
    """A segment of some trajectories, while the tree is built; `first` is its place in T."""

    token_ids: TokenIds
    children: dict[TokenIds, "_Segment"] = field(default_factory=dict)
    completions: list["_Segment"] = field(default_factory=list)
    first: int = -1

    def below(self) -> Iterator["_Segment"]:
        """What follows it directly."""
        yield from self.completions
        yield from self.children.values()


def pack(
    trajectories: Sequence[Trajectory], device: torch.device | str | None = None
) -> PackedBatch:
    """Lay trajectories out as a tree.

    Raises ValueError for no trajectories, and for an empty prompt or completion.
    """
    root = _Segment(())
    ends: list[tuple[_Segment, _Segment]] = []  # of each trajectory: its prompt's end, completion
    for number, trajectory in enumerate(trajectories):
        segments = [segment for segment in trajectory.prompt if segment]
        if not segments or not trajectory.completion:
            raise ValueError(f"trajectory {number} has an empty prompt or completion")
        end = root
        for tokens in segments:
            end = end.children.setdefault(tokens, _Segment(tokens))
        own = _Segment(tuple(trajectory.completion[:-1]))
        if own.token_ids:
            end.completions.append(own)
        ends.append((end, own))
    if not ends:
        raise ValueError("a batch of no trajectories")

    token_ids: list[int] = []
    positions: list[int] = []
    nodes: list[Node] = []
    stack: list[tuple[_Segment, Node | None]] = []
    stack += [(child, None) for child in reversed(list(root.below()))]
    while stack:
        segment, parent = stack.pop()
        first, start = len(token_ids), 0 if parent is None else parent.stop
        while True:  # a chain that does not branch is one segment
            segment.first = len(token_ids)
            token_ids += segment.token_ids
            below = list(segment.below())
            if len(below) != 1:
                break
            (segment,) = below
        slab = Slab(first, len(token_ids) - first)
        nodes.append(Node(tuple(token_ids[first:]), parent, len(nodes), start, slab))
        positions += range(start, start + slab.length)
        stack += [(child, nodes[-1]) for child in reversed(below)]
    num_tokens = len(token_ids)
    filling = [0] * (round_up(num_tokens) - num_tokens)
    positions += filling

    predicting: list[int] = []
    for end, own in ends:
        predicting.append(end.first + len(end.token_ids) - 1)
        predicting += range(own.first, own.first + len(own.token_ids))
    plan = ForestPlan(
        prefill_tiles([(node, 0, len(node.token_ids)) for node in nodes]),
        torch.tensor(positions, device=device),
        host_positions=positions,
    )
    return PackedBatch(
        token_ids=torch.tensor(token_ids + filling, device=device),
        positions=plan.positions,
        predicting=torch.tensor(predicting, device=device),
        target=torch.tensor([t for each in trajectories for t in each.completion], device=device),
        lengths=tuple(len(each.completion) for each in trajectories),
        plan=plan,
        num_tokens=num_tokens,
        longest=1 + max(positions),
    )


def packed_attention(config: ModelConfig, batch: PackedBatch) -> Attend:
    """Attention over a packed batch, differentiable. Raises ValueError for a trajectory beyond the
    context."""
    if batch.longest > config.max_position_embeddings:
        raise ValueError(
            f"a sequence has {batch.longest} tokens, the context {config.max_position_embeddings}"
        )

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        return forest_attention(q, k, v, batch.plan, config.attention[layer])

    return attend


def hidden_states(model: Transformer, batch: PackedBatch) -> Tensor:
    """Of the tokens before those predicted, (R, H). No packed copy of a weight is kept."""
    attend, product = packed_attention(model.config, batch), partial(linear, keep=False)
    return model(batch.token_ids, batch.positions, attend, product)[batch.predicting]
