"""What the kernels are to reach on a GPU, beside what was measured.

Shares of measured ceilings and ratios within one run hold on any device. Times and TFLOP/s are set
for one device; on another the same share of its own ceilings is wanted. Nothing here is a
measurement: what has no figure is "not measured".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.figures import Figure
from bench.ops.accept_token import step
from bench.ops.forest_attention import (
    PACKED,
    PREFILL_8K,
    QWEN,
    ROOT_ALONE,
    THREE_LEVELS,
    backward,
    decode,
    packed,
    pair,
    prefill,
)
from bench.ops.linear_logprob import log_probs, loss
from bench.shapes import SHAPES

STEP_FLOOR_MS = 4.22  # of a Qwen3-8B decode step at k=32, prefix 4096, suffix 512 on an H200
CASCADE = "flashinfer cascade"


@dataclass(frozen=True)
class Goal:
    """`read` takes the value, in `unit`, from the figure with this key."""

    name: str
    key: str
    wanted: float
    unit: str
    read: Callable[[Figure], float | None]
    at_most: bool = False
    device: str | None = None  # part of the name of the one device that it is set for
    share: float | None = None  # of the ceiling in percent, wanted of other devices
    peer: str | None = None  # whose note says why there is no value

    def on(self, device: str) -> "Goal":
        """What is wanted of a device."""
        if self.device is None or self.device in device:
            return self
        assert self.share is not None
        name = f"{self.name}: share of the ceiling"
        return Goal(name, self.key, self.share, "%", lambda f: 100 * f.fraction)

    def describe(self) -> str:
        """What is wanted."""
        return f"{'<=' if self.at_most else '>='} {self.wanted:g} {self.unit}"

    def met_by(self, value: float) -> bool:
        """Whether a value will do."""
        return value <= self.wanted if self.at_most else value >= self.wanted


def _ratio(peer: str) -> Callable[[Figure], float | None]:
    return lambda figure: figure.ratio(peer)


def _microseconds(figure: Figure) -> float:
    return 1e3 * figure.ms


_K8, _K32, _K64, _K64_LONG = (
    decode(pair(k, prefix, suffix), QWEN).key
    for k, prefix, suffix in ((8, 4096, 128), (32, 4096, 512), (64, 4096, 512), (64, 8192, 512))
)
_THREE_LEVELS = decode(*THREE_LEVELS).key
_QWEN_HEAD, _GEMMA_HEAD = ((SHAPES[name], 8192) for name in ("qwen3-8b", "gemma2-27b"))

GOALS = [
    Goal(
        "decode, k=64, prefix 4096, suffix 512: share of bandwidth",
        _K64, 80, "%", lambda f: 100 * f.bandwidth_fraction,
    ),
    Goal(
        "decode, three levels 1->8->64: share of the ceiling",
        _THREE_LEVELS, 70, "%", lambda f: 100 * f.fraction,
    ),
    Goal(
        "without sharing / ours, k=32, prefix 4096",
        _K32, 5, "x", _ratio("unshared"), peer="unshared",
    ),
    Goal(
        "without sharing / ours, k=64, prefix 8192",
        _K64_LONG, 10, "x", _ratio("unshared"), peer="unshared",
    ),
    Goal(
        "FlashInfer cascade / ours, two levels, k=64, prefix 4096",
        _K64, 1.1, "x", _ratio(CASCADE), peer=CASCADE,
    ),
    Goal(
        "FlashInfer cascade / ours, three levels",
        _THREE_LEVELS, 1.5, "x", _ratio(CASCADE), peer=CASCADE,
    ),
    Goal(
        "prefill of 8192 tokens, d 128: share of the matmul ceiling",
        prefill(*PREFILL_8K).key, 60, "%",
        lambda f: 100 * f.matmul_fraction,
    ),
    Goal(
        "backward of attention, 8192 tokens, d 128: share of the matmul ceiling",
        backward(*PREFILL_8K).key, 33, "%",
        lambda f: 100 * f.matmul_fraction,
    ),
    Goal(  # 2.45 times as many products; what is left of that is how well short runs do
        "without sharing / ours, forward + backward, prompt 4096, 4 x 512",
        packed(*PACKED).key, 2.08, "x",
        _ratio("unshared"), peer="unshared",
    ),
    Goal(
        "Liger's fused GRPO / ours, head 4096 x 151936, 8192 tokens",
        loss(*_QWEN_HEAD).key, 1, "x", _ratio("liger"), peer="liger",
    ),
    Goal(
        f"sampling and extraction, 32 rows: share of a step of {STEP_FLOOR_MS} ms",
        step(SHAPES["qwen3-8b"], 32).key, 3, "%",
        lambda f: 100 * f.ms / STEP_FLOOR_MS, at_most=True,
    ),
    Goal(
        "decode, k=64, prefix 4096, suffix 512",
        _K64, 44, "us", _microseconds, at_most=True, device="H200", share=80,
    ),
    Goal(
        "decode, k=8, prefix 4096, suffix 128",
        _K8, 10, "us", _microseconds, at_most=True, device="H200", share=49,
    ),
    Goal(
        "decode, k=128, prefix 16384: the root alone",
        decode(*ROOT_ALONE).key, 420, "TFLOP/s", lambda f: f.tflop_per_s, device="H200", share=53,
    ),
    *(
        Goal(
            f"{case.op}, {case.name}", case.key, wanted, "ms",
            lambda f: f.ms, at_most=True, device="H200", share=share,
        )
        for case, wanted, share in (
            (log_probs(*_GEMMA_HEAD), 32, 76),
            (loss(*_GEMMA_HEAD), 88, 83),
            (log_probs(*_QWEN_HEAD), 16.5, 78),
            (loss(*_QWEN_HEAD), 46.5, 83),
        )
    ),
]  # fmt: skip


# Decode end to end: of the floor's speed in percent, and on an H200 tokens per second, by shape,
# samples and prefix.
DECODE_SHARE = 75
DECODE_RATES = {
    ("qwen3-8b", 32, 4096): 5680,
    ("qwen3-8b", 64, 8192): 9530,
    ("qwen3-8b", 128, 8192): 14650,
}
# Gigabytes that the policy loss of 8192 tokens may take above what was there.
LOSS_GB = {
    "gemma2-27b": {"fused in place": 2.5, "fused small": 0.6},
    "qwen3-8b": {"fused in place": 1.6, "fused small": 0.6},
}


@dataclass(frozen=True)
class Outcome:
    """A goal as its device has it, its value (None: not measured), why there is none, and whether
    it is met (None: not measured)."""

    goal: Goal
    value: float | None
    note: str | None
    met: bool | None


def compare(figures: Sequence[Figure], device: str, goals: Sequence[Goal]) -> list[Outcome]:
    """Every goal beside its figure."""
    found = {figure.key: figure for figure in figures}
    outcomes = []
    for goal in (each.on(device) for each in goals):
        figure = found.get(goal.key)
        value = None if figure is None else goal.read(figure)
        note = None
        if value is None and figure is not None and goal.peer in figure.peers:
            note = figure.peers[goal.peer].note
        met = None if value is None else goal.met_by(value)
        outcomes.append(Outcome(goal, value, note, met))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table, a line for each goal."""
    lines = ["| goal | wanted | measured | met |", "|---|---|---|---|"]
    for outcome in outcomes:
        goal = outcome.goal
        if outcome.value is None:
            measured = "not measured" + (f" ({outcome.note})" if outcome.note else "")
        else:
            measured = f"{outcome.value:.3g} {goal.unit}"
        met = {True: "yes", False: "no", None: ""}[outcome.met]
        lines.append(f"| {goal.name} | {goal.describe()} | {measured} | {met} |")
    return "\n".join(lines)
