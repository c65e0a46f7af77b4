"""What a benchmark measures, and the figures that come of it.

A `Work` is one operation on one shape: the bytes that it has to move and the floating-point
operations that it has to do (an exponential counts as one), its calls on several input sets, a
check of its result and its peers. `measure` checks first, times all contenders in turn, and gives a
`Figure`; a result that does not hold gives none.

fraction: floor / time, where the floor is the larger of bytes / bandwidth and operations / matmul
rate, both measured in the same run (`bench/ceilings.py`); what stays in the cache can exceed 1. The
ratio to a peer is the median over rounds of its time / ours: above 1, ours is faster.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.ceilings import Ceilings
from bench.timing import ON_GPU, Call, Rotation

_ROUNDS = (7, 15) if ON_GPU else (3, 9)
_SECONDS = 1.0  # of all contenders together, if that leaves enough rounds
_FACTOR, _PEERS_FACTOR = 4, 16  # of the error of the reference in the same dtype


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


@dataclass
class Work:
    """An operation on a shape. check(out, factor) raises NotLikeReference unless the result of the
    first call is that of the reference, within `factor` times the error of the reference in the
    operation's dtype. absent: why a peer that one would look for is not there. capture: see
    `Rotation`."""

    op: str
    case: str
    num_bytes: int
    flops: int
    calls: Sequence[Call]
    check: Callable[[Any, float], None]
    peers: dict[str, Peer] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    capture: bool = True


@dataclass
class PeerFigure:
    """A peer's time, or why there is none."""

    ms: float | None = None
    ratio: float | None = None
    captured: bool | None = None
    note: str | None = None


@dataclass
class Figure:
    """What was measured of a `Work`."""

    op: str
    case: str
    num_bytes: int
    flops: int
    ms: float
    gb_per_s: float
    tflop_per_s: float
    floor_ms: float
    bound: str  # "memory" or "compute"
    fraction: float
    bandwidth_fraction: float
    matmul_fraction: float
    input_sets: int
    captured: bool  # in a CUDA graph
    peers: dict[str, PeerFigure]

    @property
    def key(self) -> str:
        """What tells this figure from others."""
        return f"{self.op}: {self.case}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Figure":
        """From what `as_dict` gave."""
        peers = {name: PeerFigure(**peer) for name, peer in data["peers"].items()}
        return Figure(**{**data, "peers": peers})

    def ratio(self, peer: str) -> float | None:
        """How many times as long the peer takes; None where it was not measured."""
        return self.peers[peer].ratio if peer in self.peers else None


def assert_close(name: str, out: Tensor, exact: Tensor, plain: Tensor, factor: float) -> None:
    """Raise NotLikeReference unless the largest error of `out` against `exact` (float64) is at most
    `factor` times that of `plain` (the reference in the operation's dtype), or 2 units in the last
    place of the largest value."""
    if out.shape != exact.shape:
        raise NotLikeReference(f"{name}: shape {tuple(out.shape)}, not {tuple(exact.shape)}")
    exact = exact.double()
    error, plain_error = ((x.double() - exact).abs().max().item() for x in (out, plain))
    unit = torch.finfo(out.dtype).eps * exact.abs().max().item()
    allowed = max(factor * plain_error, 2 * unit)
    if not error <= allowed:
        raise NotLikeReference(f"{name}: off by {error:.3g}, {allowed:.3g} is allowed")


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


def calls_on(function: Callable[..., object], sets: Sequence[Sequence[Any]]) -> list[Call]:
    """A call of `function` for each set of arguments."""
    return [partial(function, *arguments) for arguments in sets]


def _prepare(work: Work, peer: Peer) -> Rotation | str:
    """A peer's rotation, or why it cannot be timed."""
    try:
        calls = peer.make()
        if peer.compare:
            out = calls[0]()
            work.check(peer.as_ours(out) if peer.as_ours else out, _PEERS_FACTOR)
        return Rotation(calls, peer.capture)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if not peer.third_party:
            raise
        return f"{type(error).__name__}: {error}"[:200]


def measure(work: Work, ceilings: Ceilings, benchmark: BenchmarkFixture) -> Figure:
    """Check the result, then time ours and all peers in turn. The table of pytest-benchmark shows
    whole rotations of ours. Raises NotLikeReference before anything is timed."""
    work.check(work.calls[0](), _FACTOR)
    own = Rotation(work.calls, work.capture)
    notes: dict[str, str] = dict(work.absent)
    rivals: dict[str, Rotation] = {}
    for name, peer in work.peers.items():
        prepared = _prepare(work, peer)
        if isinstance(prepared, str):
            notes[name] = prepared
        else:
            rivals[name] = prepared
    everyone = [own, *rivals.values()]
    first = sum(each.time_ms() * len(each.calls) for each in everyone)
    least, most = _ROUNDS
    rounds = min(most, max(least, int(1e3 * _SECONDS / first)))

    our_times: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in rivals}

    def time_rivals() -> None:
        for name, rotation in rivals.items():
            times[name].append(rotation.time_ms())

    benchmark.pedantic(
        lambda: our_times.append(own.time_ms()), setup=time_rivals, rounds=rounds, iterations=1
    )
    peers = {name: PeerFigure(note=note) for name, note in notes.items()}
    for name, rotation in rivals.items():
        peers[name] = PeerFigure(
            ms=statistics.median(times[name]),
            ratio=statistics.median(b / a for a, b in zip(our_times, times[name], strict=True)),
            captured=rotation.captured,
        )
    ms = statistics.median(our_times)
    floor_ms, bound = ceilings.floor_ms(work.num_bytes, work.flops)
    gb_per_s, tflop_per_s = work.num_bytes / ms * 1e-6, work.flops / ms * 1e-9
    figure = Figure(
        op=work.op,
        case=work.case,
        num_bytes=work.num_bytes,
        flops=work.flops,
        ms=ms,
        gb_per_s=gb_per_s,
        tflop_per_s=tflop_per_s,
        floor_ms=floor_ms,
        bound=bound,
        fraction=floor_ms / ms,
        bandwidth_fraction=gb_per_s / ceilings.gb_per_s,
        matmul_fraction=tflop_per_s / ceilings.matmul_tflop_per_s,
        input_sets=len(work.calls),
        captured=own.captured,
        peers=peers,
    )
    benchmark.extra_info.update(figure.as_dict())
    return figure


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table, a line for each figure: time, fraction of the ceiling, ratios to peers."""
    lines = ["| op | shape | ms | of ceiling | peers' time / ours |", "|---|---|---|---|---|"]
    for figure in figures:
        ratios = [
            f"{name} {peer.ratio:.2f}" if peer.ratio is not None else f"{name}: {peer.note}"
            for name, peer in figure.peers.items()
        ]
        ms = f"{figure.ms:.4f}" + ("" if figure.captured or not ON_GPU else " (no graph)")
        share = f"{100 * figure.fraction:.1f} % ({figure.bound})"
        lines.append(f"| {figure.op} | {figure.case} | {ms} | {share} | {', '.join(ratios)} |")
    return "\n".join(lines)


def json_line(ceilings: Ceilings, figures: Sequence[Figure]) -> str:
    """The one line that a benchmark ends in."""
    line = {
        figure.key: {
            "ms": round(figure.ms, 5),
            "fraction": round(figure.fraction, 4),
            "ratios": {n: round(p.ratio, 3) for n, p in figure.peers.items() if p.ratio},
        }
        for figure in figures
    }
    return json.dumps({"ceilings": asdict(ceilings), "figures": line})
