"""The router of a mixture of experts: which experts a token goes to, and with what weights.

    l = W x                                  p = softmax(l)
    chosen = the K largest of l              w_k = scale * p[chosen_k] [/ sum_j p[chosen_j]]

T tokens, H the hidden size, E experts, K of them for each token. Logits and all that follows are in
float32 (float64 for float64 input), whatever the dtype of the model. The chosen stand in falling
order of their logits; of equal ones the lower index comes first. With groups the experts are G runs
of E / G; only the groups with the largest logits are chosen from.

A NaN counts as the lowest logit, and all weights of its row are NaN.

In Triton a program has 16 tokens: it adds up H in steps of a fixed size, so a token's bits do not
depend on the others. Nor do they in C++. The backward takes the choice as given.
"""

import ctypes
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from kernels import cpp
from kernels.checks import check
from kernels.packed_linear import packed, packs


@dataclass(frozen=True)
class Routing:
    """How experts are chosen: `per_token` is K. normalise: the weights of a token add up to
    `scale`. groups, groups_kept: of how many groups how many are chosen from, 1 of 1 for all."""

    per_token: int
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1


def route_ref(x: Tensor, gate: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Specification of `route`, in plain torch for any device and floating dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ gate.to(wide).T
    experts = _chosen(logits.detach(), routing)
    return experts, _weights(logits, experts, routing)


def _chosen(logits: Tensor, routing: Routing) -> Tensor:
    logits = logits.masked_fill(logits.isnan(), float("-inf"))
    if routing.groups > 1:
        groups = logits.unflatten(1, (routing.groups, -1))
        best = groups.amax(2).sort(stable=True, descending=True).indices
        outside = best[:, routing.groups_kept :, None].expand(-1, -1, groups.shape[2])
        logits = groups.scatter(1, outside, float("-inf")).flatten(1)
    return logits.sort(stable=True, descending=True).indices[:, : routing.per_token]


def _weights(logits: Tensor, experts: Tensor, routing: Routing) -> Tensor:
    weights = logits.softmax(1).gather(1, experts)
    if routing.normalise:
        weights = weights / weights.sum(1, keepdim=True)
    return weights * routing.scale


def routing_structure(routing: Routing) -> ctypes.Structure:
    """A routing as C++ has it."""
    return cpp.structure("Routing")(*astuple(routing))


def _run_cpp(x: Tensor, gate: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    experts = torch.empty(len(x), routing.per_token, dtype=torch.int64)
    weights = torch.empty(len(x), routing.per_token)
    cpp.call(
        "route", x.dtype, x, *x.shape, packed(gate), len(gate),
        ctypes.byref(routing_structure(routing)), experts, weights,
    )  # fmt: skip
    return experts, weights


def route(x: Tensor, gate: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token.

    x: (T, H), gate: (E, H), one floating dtype. routing.per_token is at most E, and at most what
    the groups that are kept hold; routing.groups divides E.
    Returns the experts (T, K) int64, and their weights (T, K) float32 (float64 for float64 input),
    differentiable. Raises ValueError for anything else.
    """
    check("route: x", x, ("T", "H"), "floating")
    check("route: gate", gate, ("E", x.shape[1]), x.dtype)
    count, groups = len(gate), routing.groups
    kept = count // groups * routing.groups_kept
    if count % groups or not 0 < routing.groups_kept <= groups or not 0 < routing.per_token <= kept:
        raise ValueError(f"route: {routing} does not fit {count} experts")
    if packs(x, gate):
        return _run_cpp(x, gate, routing)
    return route_ref(x, gate, routing)
