"""What adaptive k saves, and how often it changes the winner.

    python -m bench.adaptive [--model DIR] [--data FILE] [--split final] [--rows 1000] [--k 32]
                             [--temperature 0.5] [--until-decided 0.9 0.95 0.98 0.99 0.995]
    python -m bench.adaptive --verdicts FILE

Every row is sampled k times, or FILE holds lines that `engine.sample` wrote with a fixed k and
rotated orders. The stopping rule (engine/decided.py) is then replayed on each row's samples: what
is drawn early is the same as what full k draws first. For each level it gives the share of samples
and of generated tokens used; the *agreement*, which is the share of rows with full k's winner (n =
1: the same side of the threshold); the accuracy beside that of full k; and, for comparison, the
agreement of a fixed k that costs as much. Intervals are 95 %, by a bootstrap over rows. Ends in one
JSON line.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tyro
from tqdm import tqdm

from bench.provenance import print_json
from bench.statistics import interval
from bench.voting import read_labelled
from engine import command
from engine.decided import samples_to_draw
from engine.judge import Judge
from engine.labels import chance_correct
from engine.settings import JudgeSettings, read_judge_settings
from engine.verdict import to_line
from train.world.cases import Split


@dataclass(frozen=True)
class Args:
    """Measure what adaptive k saves, and how often it changes the winner."""

    model: Path = Path("models/pocket")
    verdicts: Path | None = None  # lines of engine.sample; none: sample the rows now
    data: Path | None = None
    split: Split = "final"  # of the judging world, when there is no --data
    rows: int = 1000
    k: int = 32
    temperature: float = 0.5
    max_new_tokens: int = 400
    seed: int = 0
    until_decided: tuple[float, ...] = (0.9, 0.95, 0.98, 0.99, 0.995)


class RecordedSample(msgspec.Struct):
    """What is needed of a sample's line."""

    order: tuple[int, ...]
    scores: tuple[int, ...] | None
    tokens: int


class Recorded(msgspec.Struct):
    """What is needed of a verdict's line: all k samples of a row."""

    samples: list[RecordedSample]
    k: int
    best: int | None
    label: int | tuple[float, ...] | None = None


def lines(args: Args) -> Iterator[bytes]:
    """The verdicts' lines, read or made now."""
    if args.verdicts is not None:
        yield from args.verdicts.read_bytes().splitlines()
        return
    rows = read_labelled(args.data, args.split, args.rows, args.seed)
    outcomes = Judge.load(args.model).rows(
        rows,
        k=args.k,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    yield from map(to_line, tqdm(outcomes, total=len(rows), unit="row"))


def read_recorded(recorded: Iterable[bytes]) -> list[Recorded]:
    """The rows of these lines; raises ValueError for a line that is no verdict of all k samples."""
    rows = []
    for number, line in enumerate(recorded, 1):
        try:
            row = msgspec.json.decode(line, type=Recorded)
        except msgspec.MsgspecError as error:
            raise ValueError(f"line {number} is no verdict: {error}") from None
        if len(row.samples) != row.k:
            raise ValueError(f"line {number} has {len(row.samples)} of {row.k} samples")
        rows.append(row)
    return rows


def replay(row: Recorded, until_decided: float, settings: JudgeSettings) -> int:
    """The samples that the row draws."""
    scores = [sample.scores for sample in row.samples]
    cycle = len({sample.order for sample in row.samples})
    drawn = 0
    while more := samples_to_draw(scores[:drawn], row.k, cycle, until_decided, settings):
        drawn += more
    return drawn


def valid_scores(row: Recorded, drawn: int) -> list[tuple[int, ...]]:
    """The scores of the valid ones of the first samples."""
    return [sample.scores for sample in row.samples[:drawn] if sample.scores is not None]


def agreement(row: Recorded, drawn: int, threshold: float) -> float:
    """The chance that the vote of the first samples falls as that of all k."""
    if drawn == row.k:
        return 1.0
    few, full = valid_scores(row, drawn), valid_scores(row, row.k)
    if not few or row.best is None:
        return float(not full)
    if len(few[0]) > 1:
        return chance_correct(few, row.best, threshold)
    return chance_correct(few, int(chance_correct(full, 1, threshold)), threshold)


def figures(
    rows: Sequence[Recorded], until_decided: float, settings: JudgeSettings
) -> dict[str, Any]:
    """What one level of certainty costs and gives."""
    drawn = [replay(row, until_decided, settings) for row in rows]
    threshold = settings.threshold
    agree = np.array([agreement(r, d, threshold) for r, d in zip(rows, drawn, strict=True)])
    share = np.array([d / row.k for row, d in zip(rows, drawn, strict=True)])
    same_cost = [max(1, round(row.k * share.mean())) for row in rows]
    fixed = [agreement(r, d, threshold) for r, d in zip(rows, same_cost, strict=True)]
    tokens = [np.cumsum([sample.tokens for sample in row.samples]) for row in rows]
    used = sum(int(t[d - 1]) for t, d in zip(tokens, drawn, strict=True))
    labelled = [(row, d) for row, d in zip(rows, drawn, strict=True) if row.label is not None]
    return {
        "until_decided": until_decided,
        "samples": {"mean": float(share.mean()), "ci95": interval(share)},
        "tokens": used / sum(int(t[-1]) for t in tokens),
        "agreement": {"mean": float(agree.mean()), "ci95": interval(agree)},
        "agreement_of_a_fixed_k": float(np.mean(fixed)),
        "accuracy": _accuracy(labelled, threshold),
        "accuracy_of_full_k": _accuracy([(row, row.k) for row, _ in labelled], threshold),
        "rows_with_all_k": sum(d == row.k for row, d in zip(rows, drawn, strict=True)),
    }


def _accuracy(rows: Sequence[tuple[Recorded, int]], threshold: float) -> float | None:
    right = [
        chance_correct(valid_scores(row, drawn), row.label, threshold)
        for row, drawn in rows
        if row.label is not None
    ]
    return float(np.mean(right)) if right else None


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=Args.__doc__)
    settings = read_judge_settings(args.model)
    rows = read_recorded(lines(args))
    levels = [figures(rows, level, settings) for level in args.until_decided]
    for each in levels:
        low, high = each["agreement"]["ci95"]
        print(
            f"{each['until_decided']:<6g} samples {each['samples']['mean']:.3f}  "
            f"agreement {each['agreement']['mean']:.4f} [{low:.4f}, {high:.4f}]  "
            f"fixed k {each['agreement_of_a_fixed_k']:.4f}",
            file=sys.stderr,
        )
    print_json({"model": str(args.model), "rows": len(rows), "levels": levels})


if __name__ == "__main__":
    sys.exit(command.run(main))
