"""What the kernels are to reach on a GPU, beside what was measured.

Times in microseconds and TFLOP/s are set for one device and judged on it alone; shares of measured
ceilings and ratios within one run hold on any. Nothing here is a measurement: what has no figure is
"not measured".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.bench_forest_attention import (
    PACKED,
    PREFILL_8K,
    QWEN,
    ROOT_ALONE,
    THREE_LEVELS,
    Case,
    pair,
)
from bench.figures import Figure

STEP_FLOOR_MS = 4.22  # of a Qwen3-8B decode step at k=32, prefix 4096, suffix 512 on an H200
CASCADE = "flashinfer cascade"


@dataclass(frozen=True)
class Target:
    """`read` takes the value, in `unit`, from the figure with this key."""

    name: str
    key: str
    wanted: float
    unit: str
    read: Callable[[Figure], float | None]
    at_most: bool = False
    device: str | None = None  # part of the name of the one device that it is set for
    peer: str | None = None  # whose note says why there is no value

    def describe(self) -> str:
        """What is wanted."""
        return f"{'<=' if self.at_most else '>='} {self.wanted:g} {self.unit}"

    def met_by(self, value: float) -> bool:
        """Whether a value will do."""
        return value <= self.wanted if self.at_most else value >= self.wanted


def _decode(case: Case) -> str:
    return f"decode attention: {case.decode_name}"


def _ratio(peer: str) -> Callable[[Figure], float | None]:
    return lambda figure: figure.ratio(peer)


def _microseconds(figure: Figure) -> float:
    return 1e3 * figure.ms


_K8, _K32 = Case(pair(8, 4096, 128), QWEN), Case(pair(32, 4096, 512), QWEN)
_K64, _K64_LONG = Case(pair(64, 4096, 512), QWEN), Case(pair(64, 8192, 512), QWEN)

TARGETS = [
    Target(
        "decode, k=64, prefix 4096, suffix 512: share of bandwidth",
        _decode(_K64), 80, "%", lambda f: 100 * f.bandwidth_fraction,
    ),
    Target(
        "decode, three levels 1->8->64: share of the ceiling",
        _decode(THREE_LEVELS), 70, "%", lambda f: 100 * f.fraction,
    ),
    Target(
        "without sharing / ours, k=32, prefix 4096",
        _decode(_K32), 5, "x", _ratio("unshared"), peer="unshared",
    ),
    Target(
        "without sharing / ours, k=64, prefix 8192",
        _decode(_K64_LONG), 10, "x", _ratio("unshared"), peer="unshared",
    ),
    Target(
        "FlashInfer cascade / ours, two levels, k=64, prefix 4096",
        _decode(_K64), 1.1, "x", _ratio(CASCADE), peer=CASCADE,
    ),
    Target(
        "FlashInfer cascade / ours, three levels",
        _decode(THREE_LEVELS), 1.5, "x", _ratio(CASCADE), peer=CASCADE,
    ),
    Target(
        "prefill of 8192 tokens, d 128: share of the matmul ceiling",
        f"prefill attention: {PREFILL_8K.prefill_name}", 60, "%",
        lambda f: 100 * f.matmul_fraction,
    ),
    Target(
        "backward of attention, 8192 tokens, d 128: share of the matmul ceiling",
        f"attention backward: {PREFILL_8K.prefill_name}", 33, "%",
        lambda f: 100 * f.matmul_fraction,
    ),
    Target(  # 2.45 times as many products; what is left of that is how well short runs do
        "without sharing / ours, forward + backward, prompt 4096, 4 x 512",
        f"attention forward + backward, packed: {PACKED.prefill_name}", 2.08, "x",
        _ratio("unshared"), peer="unshared",
    ),
    Target(
        "Liger's fused GRPO / ours, head 4096 x 151936, 8192 tokens",
        "policy loss: qwen3-8b head, 8192 tokens", 1, "x", _ratio("liger"), peer="liger",
    ),
    Target(
        f"sampling and extraction, 32 rows: share of a step of {STEP_FLOOR_MS} ms",
        "sample_token + accept_token: qwen3-8b 32 rows", 3, "%",
        lambda f: 100 * f.ms / STEP_FLOOR_MS, at_most=True,
    ),
    Target(
        "decode, k=64, prefix 4096, suffix 512",
        _decode(_K64), 44, "us", _microseconds, at_most=True, device="H200",
    ),
    Target(
        "decode, k=8, prefix 4096, suffix 128",
        _decode(_K8), 10, "us", _microseconds, at_most=True, device="H200",
    ),
    Target(
        "decode, k=128, prefix 16384: the root alone",
        _decode(ROOT_ALONE), 420, "TFLOP/s", lambda f: f.tflop_per_s, device="H200",
    ),
    *(
        Target(
            f"{op}, {name} head, 8192 tokens", f"{op}: {name} head, 8192 tokens", wanted, "ms",
            lambda f: f.ms, at_most=True, device="H200",
        )
        for op, name, wanted in (
            ("linear_logprob", "gemma2-27b", 32),
            ("policy loss", "gemma2-27b", 88),
            ("linear_logprob", "qwen3-8b", 16.5),
            ("policy loss", "qwen3-8b", 46.5),
        )
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A target, its value (None: not measured), why there is none, and whether it is met (None:
    not measured, or set for another device)."""

    target: Target
    value: float | None
    note: str | None
    met: bool | None


def compare(figures: Sequence[Figure], device: str, targets: Sequence[Target]) -> list[Outcome]:
    """Every target beside its figure."""
    found = {figure.key: figure for figure in figures}
    outcomes = []
    for target in targets:
        figure = found.get(target.key)
        value = None if figure is None else target.read(figure)
        note = None
        if value is None and figure is not None and target.peer in figure.peers:
            note = figure.peers[target.peer].note
        judged = value is not None and (target.device is None or target.device in device)
        met = target.met_by(value) if value is not None and judged else None
        outcomes.append(Outcome(target, value, note, met))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table, a line for each target."""
    lines = ["| target | wanted | measured | met |", "|---|---|---|---|"]
    for outcome in outcomes:
        target = outcome.target
        if outcome.value is None:
            measured = "not measured" + (f" ({outcome.note})" if outcome.note else "")
        else:
            measured = f"{outcome.value:.3g} {target.unit}"
        met = {True: "yes", False: "no", None: ""}[outcome.met]
        if outcome.met is None and outcome.value is not None:
            met = f"set for {target.device}"
        lines.append(f"| {target.name} | {target.describe()} | {measured} | {met} |")
    return "\n".join(lines)
