"""Measuring a case, and the figures that come of it.

`measure` checks first, times ours and all peers in turn, and gives a `Figure`; a result that does
not hold gives none.

fraction: floor / time, where the floor is the larger of bytes / bandwidth and operations / matmul
rate, both measured in the same run (`bench/ceilings.py`); what stays in the cache can exceed 1. The
ratio to a peer is the median over rounds of its time / ours: above 1, ours is faster.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.case import Arguments, OpCase, Peer, calls_on
from bench.ceilings import Ceilings
from bench.timing import ON_GPU, Rotation, num_sets, randn, reseed

_ROUNDS = (7, 15) if ON_GPU else (3, 9)
_SECONDS = 1.0  # of ours and all peers together, if that leaves enough rounds
FACTOR, PEERS_FACTOR = 4, 16  # of the error of the reference in the same dtype

# repeat(target, setup, rounds): make rounds of both, of which `target` is what is timed.
Repeat = Callable[[Callable[[], None], Callable[[], None], int], None]


@dataclass
class PeerFigure:
    """A peer's time, or why there is none."""

    ms: float | None = None
    ratio: float | None = None
    captured: bool | None = None
    note: str | None = None


@dataclass
class Figure:
    """What was measured of a case."""

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


def _prepare(case: OpCase, arguments: Arguments, peer: Peer) -> Rotation | str:
    """A peer's rotation, or why it cannot be timed."""
    try:
        calls = peer.make()
        if peer.compare:
            out = calls[0]()
            case.check(arguments, peer.as_ours(out) if peer.as_ours else out, PEERS_FACTOR)
        return Rotation(calls, peer.capture)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if not peer.third_party:
            raise
        return f"{type(error).__name__}: {error}"[:200]


def in_turn(target: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
    """The plain `Repeat`."""
    for _ in range(rounds):
        setup()
        target()


def measure(case: OpCase, ceilings: Ceilings, repeat: Repeat = in_turn) -> Figure:
    """Check the result, then time ours and all peers in turn. Raises NotLikeReference before
    anything is timed."""
    reseed()
    inputs = case.make_inputs(randn, num_sets(case.num_bytes))
    case.check(inputs[0], case.call(*inputs[0]), FACTOR)
    own = Rotation(calls_on(case.call, inputs), case.capture)
    rotations: dict[str, Rotation] = {}
    notes: dict[str, str] = {}
    for name, peer in case.peers(inputs).items():
        found = peer if isinstance(peer, str) else _prepare(case, inputs[0], peer)
        if isinstance(found, str):
            notes[name] = found
        else:
            rotations[name] = found
    everyone = [own, *rotations.values()]
    first = sum(each.time_ms() * len(each.calls) for each in everyone)
    least, most = _ROUNDS
    rounds = min(most, max(least, int(1e3 * _SECONDS / first)))

    our_times: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in rotations}

    def time_peers() -> None:
        for name, rotation in rotations.items():
            times[name].append(rotation.time_ms())

    repeat(lambda: our_times.append(own.time_ms()), time_peers, rounds)
    peers = {name: PeerFigure(note=note) for name, note in notes.items()}
    for name, rotation in rotations.items():
        peers[name] = PeerFigure(
            ms=statistics.median(times[name]),
            ratio=statistics.median(b / a for a, b in zip(our_times, times[name], strict=True)),
            captured=rotation.captured,
        )
    ms = statistics.median(our_times)
    floor_ms, bound = ceilings.floor_ms(case.num_bytes, case.flops)
    gb_per_s, tflop_per_s = case.num_bytes / ms * 1e-6, case.flops / ms * 1e-9
    return Figure(
        op=case.op,
        case=case.name,
        num_bytes=case.num_bytes,
        flops=case.flops,
        ms=ms,
        gb_per_s=gb_per_s,
        tflop_per_s=tflop_per_s,
        floor_ms=floor_ms,
        bound=bound,
        fraction=floor_ms / ms,
        bandwidth_fraction=gb_per_s / ceilings.gb_per_s,
        matmul_fraction=tflop_per_s / ceilings.matmul_tflop_per_s,
        input_sets=len(inputs),
        captured=own.captured,
        peers=peers,
    )


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


def summary(ceilings: Ceilings, figures: Sequence[Figure]) -> dict[str, Any]:
    """What the JSON line of `make bench` says."""
    found = {
        figure.key: {
            "ms": round(figure.ms, 5),
            "fraction": round(figure.fraction, 4),
            "ratios": {n: round(p.ratio, 3) for n, p in figure.peers.items() if p.ratio},
        }
        for figure in figures
    }
    return {"ceilings": asdict(ceilings), "figures": found}
