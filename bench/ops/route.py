"""The router of a mixture of experts, for a step's tokens and a prefill's."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Arguments, NotLikeReference, OpCase, assert_close, each, same_inputs
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU
from kernels.route import Routing, route, route_ref

GROUPED = Routing(3, False, 2.5, 4, 2)


def _eager(x: Tensor, gate: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """In torch, which does not say which of equal logits comes first."""
    probabilities = (x.float() @ gate.float().T).softmax(-1)
    if routing.groups > 1:
        groups = probabilities.unflatten(1, (routing.groups, -1))
        kept = groups.amax(2).topk(routing.groups_kept).indices
        inside = torch.zeros(groups.shape[:2], device=x.device).scatter(1, kept, 1.0)
        probabilities = (groups * inside[..., None]).flatten(1)
    weights, experts = probabilities.topk(routing.per_token)
    if routing.normalise:
        weights = weights / weights.sum(1, keepdim=True)
    return experts, weights * routing.scale


def _check(arguments: Arguments, out: tuple[Tensor, Tensor], factor: float) -> None:
    """The chosen experts have the weights that they should have, which are the largest."""
    x, gate, routing = arguments
    experts, weights = out
    if bool((experts < 0).any()) or bool((experts >= len(gate)).any()):
        raise NotLikeReference("route: an expert that is not there")
    exact, plain = (route_ref(each, gate.to(each.dtype), routing)[1] for each in (x.double(), x))
    assert_close("route: weights", weights, exact, plain, 2 * factor, 1e-6)
    logits = x.double() @ gate.double().T
    of_chosen = logits.softmax(1).gather(1, experts)
    if routing.normalise:
        of_chosen /= of_chosen.sum(1, keepdim=True)
    assert_close("route: experts", of_chosen * routing.scale, exact, plain, 2 * factor, 1e-6)


def forward(shape: Shape, rows: int, routing: Routing | None = None) -> OpCase:
    """The choice for `rows` tokens, as the shape's mixture makes it."""
    hidden, dtype, experts = shape.hidden_size, shape.dtype, shape.mixture
    chosen = routing or experts.routing
    groups = f", {chosen.groups_kept} of {chosen.groups} groups" if chosen.groups > 1 else ""
    return OpCase(
        "route",
        f"{shape.name} {chosen.per_token} of {experts.count}{groups} {rows} rows",
        each(
            lambda tensor: (
                tensor(rows, hidden, dtype=dtype),
                tensor(experts.count, hidden, dtype=dtype, scale=hidden**-0.5),
                chosen,
            )
        ),
        route,
        _check,
        (rows + experts.count) * hidden * dtype.itemsize + 12 * rows * chosen.per_token,
        2 * rows * hidden * experts.count,
        same_inputs(eager=_eager),
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Of the shape, and with groups."""
    yield forward(shape, rows)
    yield forward(shape, rows, GROUPED)


_NAMES = ("qwen3-30b-a3b", "deepseek-v2-lite") if ON_GPU else ("pocket", "v2-lite-small")
CASES = [
    forward(SHAPES[name], rows) for name in _NAMES for rows in ((64, 2048) if ON_GPU else (32, 512))
]
