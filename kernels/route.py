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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpp
from kernels.checks import check, check_triton
from kernels.launch import launch, runs_triton
from kernels.packed_linear import pack, packed, packs, uses_dot_products
from kernels.target import Target, power_of_two, target_of


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
    """Specification of `route`, in plain torch for any device and floating dtype. Autocast does not
    narrow its logits."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
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


@triton.jit
def _take_largest(order, free, expert):
    """For each row its largest number that is free, and of equal ones the first: its index."""
    best = tl.max(tl.where(free, order, float("-inf")), 1)
    found = free & (order == best[:, None])
    return tl.min(tl.where(found, expert, order.shape[1]), 1)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    x_ptr,  # (T, H), strides x_t, 1
    gate_ptr,  # (E, H), strides gate_e, 1
    experts_ptr,  # (T, K) int64, contiguous
    weights_ptr,  # (T, K) float32, contiguous
    num_tokens,  # T
    hidden,  # H
    num_experts,  # E
    x_t,
    gate_e,
    scale,
    PER_TOKEN: tl.constexpr,  # K
    NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,  # E or more
    CHOICES: tl.constexpr,  # K or more
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)[None, :]
    exists = expert < num_experts
    x_ptrs = x_ptr + (token * x_t)[:, None]
    gate_ptrs = gate_ptr + (tl.arange(0, EXPERTS).to(tl.int64) * gate_e)[:, None]
    logits = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptrs + k, mask=(token < num_tokens)[:, None] & (k < hidden), other=0.0)
        gate = tl.load(gate_ptrs + k, mask=tl.trans(exists) & (k < hidden), other=0.0)
        logits = tl.dot(x, tl.trans(gate), logits, input_precision="ieee")

    order = tl.where(exists & (logits == logits), logits, float("-inf"))
    p = tl.where(exists, tl.exp(logits - tl.max(order, 1)[:, None]), 0.0)
    total = tl.sum(p, 1)
    if GROUPS > 1:
        group = expert // (num_experts // GROUPS)
        free = tl.broadcast_to(exists, order.shape)
        for _ in tl.static_range(GROUPS_KEPT):
            taken = _take_largest(order, free, expert) // (num_experts // GROUPS)
            free &= group != taken[:, None]
        order = tl.where(free, float("-inf"), order)  # of the groups that are left
    free = tl.broadcast_to(exists, order.shape)
    choice = tl.arange(0, CHOICES)[None, :]
    chosen = tl.zeros((TOKENS, CHOICES), tl.int32)
    weights = tl.zeros((TOKENS, CHOICES), tl.float32)
    for k in tl.static_range(PER_TOKEN):
        taken = _take_largest(order, free, expert)[:, None]
        weight = tl.sum(tl.where(expert == taken, p, 0.0), 1) / total
        chosen = tl.where(choice == k, taken, chosen)
        weights = tl.where(choice == k, weight[:, None], weights)
        free &= expert != taken
    if NORMALISE:
        weights /= tl.sum(weights, 1)[:, None]
    place = (token * PER_TOKEN)[:, None] + choice
    mask = (token < num_tokens)[:, None] & (choice < PER_TOKEN)
    tl.store(experts_ptr + place, chosen.to(tl.int64), mask=mask)
    tl.store(weights_ptr + place, weights * scale, mask=mask)


def _launch(count: int, per_token: int, dtype: torch.dtype, target: Target) -> dict[str, int]:
    """Tokens of a program, sizes of its tiles, warps and stages: the same for any T."""
    experts = power_of_two(count, 16)
    tokens, block_k = 16, 16 if dtype == torch.float32 else 64
    stage_bytes = (tokens + experts) * block_k * dtype.itemsize
    stages = 2 if dtype == torch.float32 else 4
    while (stages - target.is_hip) * stage_bytes > target.shared_bytes * 3 // 4 and stages > 1:
        stages -= 1
    return {
        "TOKENS": tokens,
        "EXPERTS": experts,
        "CHOICES": power_of_two(per_token),
        "BLOCK_K": block_k,
        "num_warps": 4 if experts <= 128 else 8,
        "num_stages": stages,
    }


def _run_triton(x: Tensor, gate: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    check_triton("route", x, gate)
    tokens, hidden = x.shape
    shape = tokens, routing.per_token
    experts = torch.empty(shape, dtype=torch.int64, device=x.device)
    weights = torch.empty(shape, dtype=torch.float32, device=x.device)
    options = _launch(len(gate), routing.per_token, x.dtype, target_of(x))
    launch(
        _route_kernel,
        (triton.cdiv(tokens, options["TOKENS"]),),
        x, gate, experts, weights, tokens, hidden, len(gate), x.stride(0), gate.stride(0),
        routing.scale, PER_TOKEN=routing.per_token, NORMALISE=routing.normalise,
        GROUPS=routing.groups, GROUPS_KEPT=routing.groups_kept, **options,
    )  # fmt: skip
    return experts, weights


def routing_structure(routing: Routing) -> ctypes.Structure:
    """A routing as C++ has it."""
    return cpp.structure("Routing")(*astuple(routing))


def _run_cpp(x: Tensor, gate: Tensor, routing: Routing, keep: bool) -> tuple[Tensor, Tensor]:
    experts = torch.empty(len(x), routing.per_token, dtype=torch.int64)
    weights = torch.empty(len(x), routing.per_token)
    cpp.call(
        "route", x.dtype, x, *x.shape, packed(gate) if keep else pack(gate), len(gate),
        ctypes.byref(routing_structure(routing)), experts, weights,
        dots=uses_dot_products(gate),
    )  # fmt: skip
    return experts, weights


def route(x: Tensor, gate: Tensor, routing: Routing, keep: bool = True) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token.

    x: (T, H), gate: (E, H), one floating dtype. routing.per_token is at most E, and at most what
    the groups that are kept hold; routing.groups divides E. keep: where C++ packs gate, the copy
    stays beside it.
    Returns the experts (T, K) int64, and their weights (T, K) float32 (float64 for float64 input),
    differentiable. Raises ValueError for anything else.
    """
    check("route: x", x, ("T", "H"), "floating")
    check("route: gate", gate, ("E", x.shape[1]), x.dtype)
    count, groups = len(gate), routing.groups
    kept = count // groups * routing.groups_kept
    if count % groups or not 0 < routing.groups_kept <= groups or not 0 < routing.per_token <= kept:
        raise ValueError(f"route: {routing} does not fit {count} experts")
    if runs_triton(x):
        found: tuple[Tensor, Tensor] = _Route.apply(x, gate, routing)
        return found
    if packs(x, gate):
        return _run_cpp(x, gate, routing, keep)
    return route_ref(x, gate, routing)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        experts, weights = _run_triton(x, gate, routing)
        ctx.save_for_backward(x, gate, experts)
        ctx.routing = routing
        ctx.mark_non_differentiable(experts)
        return experts, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gate, experts = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        leaves = [tensor.detach().to(wide).requires_grad_() for tensor in (x, gate)]
        with torch.enable_grad():
            weights = _weights(leaves[0] @ leaves[1].T, experts, ctx.routing)
        d_x, d_gate = torch.autograd.grad(weights, leaves, grad)
        return d_x.to(x.dtype), d_gate.to(gate.dtype), None
