"""One description of an operation at work, which timings, ahead-of-time compilation and tests read.

An `OpCase` is an operation on one shape with given options: its inputs, its call, a check of its
result, the bytes that it has to move and the floating-point operations that it has to do (an
exponential counts as one), and its peers. The cases are in bench/ops.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.timing import Call, Fill

Arguments = tuple[Any, ...]


class NotLikeReference(Exception):
    """An operation's result is not that of its reference, so that its speed means nothing."""


@dataclass(frozen=True)
class Peer:
    """Something else that does the same work: `make` gives its calls, on the same inputs as ours as
    far as they go. compare: the first call's result, through `as_ours` if that is given, has to
    pass our check, at a tolerance for what rounds in other places. third_party: whatever it raises
    is noted, since it is not for us to repair. capture: see `Rotation`."""

    make: Callable[[], Sequence[Call]]
    compare: bool = True
    third_party: bool = False
    as_ours: Callable[[Any], object] | None = None
    capture: bool = True


# By name; a text says why a peer that one would look for is absent.
Peers = Mapping[str, Peer | str]


@dataclass(frozen=True)
class OpCase:
    """An operation on one shape with given options.

    make_inputs(tensor, count): the arguments of `count` calls, each with its own memory, so that a
    rotation of them does not fit in the cache. tensor(*shape, dtype=, scale=): `randn` for timings
    and tests, `empty` for compilation. call(*arguments): the operation. check(arguments, out,
    factor): raises NotLikeReference unless the result equals the reference's within `factor` times
    the reference's own error in the operation's dtype. peers(inputs): what is timed beside it.
    capture: see `Rotation`.
    """

    op: str
    name: str
    make_inputs: Callable[[Fill, int], Sequence[Arguments]]
    call: Callable[..., Any]
    check: Callable[[Any, Any, float], None]
    num_bytes: int = 0
    flops: int = 0
    peers: Callable[[Any], Peers] = lambda inputs: {}
    capture: bool = True

    @property
    def key(self) -> str:
        """What tells this case from others."""
        return f"{self.op}: {self.name}"


def assert_close(
    name: str, out: Tensor, exact: Tensor, plain: Tensor, factor: float, least: float = 0.0
) -> None:
    """Raise NotLikeReference unless the largest error of `out` against `exact` (float64) is at most
    `factor` times that of `plain` (the reference in the operation's dtype), or 2 units in the last
    place of the largest value, or `least`."""
    if out.shape != exact.shape:
        raise NotLikeReference(f"{name}: shape {tuple(out.shape)}, not {tuple(exact.shape)}")
    exact = exact.double()
    error, plain_error = ((x.double() - exact).abs().max().item() for x in (out, plain))
    unit = torch.finfo(out.dtype).eps * exact.abs().max().item()
    allowed = max(factor * plain_error, 2 * unit, least)
    if not error <= allowed:
        raise NotLikeReference(f"{name}: off by {error:.3g}, {allowed:.3g} is allowed")


def like(name: str, reference: Callable[..., Any]) -> Callable[[Arguments, Any, float], None]:
    """`OpCase.check` for an operation whose reference takes the same arguments. The exact result is
    the reference's on arguments widened to float64; all results are compared by `assert_close`."""

    def check(arguments: Arguments, out: Any, factor: float) -> None:
        wide = [
            x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
        ]
        outs, exact, plain = (
            (x,) if isinstance(x, Tensor) else x
            for x in (out, reference(*wide), reference(*arguments))
        )
        for found, exactly, plainly in zip(outs, exact, plain, strict=True):
            if exactly is None and found is not None:
                raise NotLikeReference(f"{name}: a result that was not wanted")
            if exactly is not None:
                assert_close(name, found, exactly, plainly, factor)

    return check


def each(make: Callable[[Fill], Arguments]) -> Callable[[Fill, int], list[Arguments]]:
    """`OpCase.make_inputs` for an operation whose calls share no tensor."""
    return lambda tensor, count: [make(tensor) for _ in range(count)]


def gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """What autograd finds for all inputs from gradients of all results; in inference mode too."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, [grad.clone() for grad in grads])


def assert_equal(name: str, out: Tensor, expected: Tensor) -> None:
    """Raise NotLikeReference unless both are the same, NaN being like NaN."""
    out, expected = out.cpu(), expected.cpu()
    same = out.shape == expected.shape and bool(
        ((out == expected) | (out.isnan() & expected.isnan())).all()
    )
    if not same:
        raise NotLikeReference(f"{name}: not equal to the reference")


def calls_on(function: Callable[..., object], sets: Iterable[Sequence[Any]]) -> list[Call]:
    """A call of `function` for each set of arguments."""
    return [partial(function, *arguments) for arguments in sets]


def same_inputs(compare: bool = True, **functions: Callable[..., Any]) -> Callable[[Any], Peers]:
    """`OpCase.peers` that are functions of the same arguments."""

    def peers(inputs: Sequence[Arguments]) -> Peers:
        return {
            name: Peer(partial(calls_on, function, inputs), compare)
            for name, function in functions.items()
        }

    return peers
