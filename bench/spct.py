"""The paper's chain on the synthetic world: rejective fine-tuning, GRPO, a meta reward model, and
what votes come to after each.

    python -m bench.spct [--out runs/spct] [--smoke] [--seed 0]

    rft     from the pocket model, on its own right judgements of fresh rows
    grpo    from that, on the rule reward
    meta    a meta model, from the GRPO model, of that model's judgements
    then    base, rft and grpo judge the same final rows, greedily once and k times

Every stage is a folder of OUT. A stage that was stopped continues, one that is done is not done
again, and one of other settings is refused (train/run.py). OUT/results.json has the accuracies with
95 % intervals over rows, OUT/table.md shows them, and OUT/curve.png draws accuracy against tokens
that were generated or read by the meta model. --smoke does all of it in small, to see that it runs:
its figures mean nothing. Ends in one JSON line.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.filters import NAMES, row_curves, table
from bench.provenance import print_json
from bench.voting import interval
from engine import command
from engine.command import with_values
from engine.judge import Judge
from engine.key import line_key, model_fingerprint
from engine.request import Row
from engine.sample import POCKET
from engine.verdict import Verdict
from train import grpo, meta_rm, rft
from train.directory import replace_text
from train.evaluation import EvalArgs
from train.learner import LearnerArgs
from train.policy_step import LossArgs
from train.rollout import SamplingArgs
from train.world.rows import split_rows

SHOWN = ("all", "meta", "weighed", "standardised", "borda", "borda, weighed")


@dataclass(frozen=True)
class Args:
    """Reproduce the paper's chain on the synthetic world."""

    out: Path = Path("runs/spct")
    smoke: bool = False  # all of it in small
    seed: int = 0  # of training
    rows: int = 2000  # final rows that are judged
    k: int = 32  # judgements of each


def stages(args: Args) -> tuple[rft.Args, grpo.Args, meta_rm.Args]:
    """The settings of the three trainings."""
    out, sampling = args.out, SamplingArgs(max_new_tokens=400)

    def learning(**own: Any) -> LearnerArgs:
        return LearnerArgs(weight_decay=0.0, seed=args.seed, **own)

    first = rft.Args(
        out=out / "rft", rows=4000, sampling=sampling,
        learning=learning(steps=250, lr=5e-5, warmup=5),
    )  # fmt: skip
    second = grpo.Args(
        model=out / "rft" / "model", out=out / "grpo", rows=64, sampling=sampling,
        policy=LossArgs(drop_zero_spread=True), evaluation=EvalArgs(eval_every=20),
        learning=learning(steps=120, lr=3e-5, warmup=5),
    )  # fmt: skip
    third = meta_rm.Args(
        model=out / "grpo", out=out / "meta", samples=8, loss="pairwise", labels="ties",
        sampling=sampling, evaluation=EvalArgs(eval_every=50, eval_rows=100),
        learning=learning(steps=400, lr=5e-4, warmup=15),
    )  # fmt: skip
    if not args.smoke:
        return first, second, third
    few = {"steps": 1, "eval_every": 0}
    return (
        with_values(first, rows=4, steps=1, step_rows=2),
        with_values(second, rows=2, **few),
        with_values(third, rows=2, samples=3, eval_rows=2, eval_k=2, **few),
    )


def evaluate(
    name: str, directory: Path, meta: Path, rows: Sequence[Row], k: int, out: Path
) -> dict[str, Any]:
    """The accuracies of a judge on rows, greedy and of votes, kept in OUT/NAME.json."""
    path = out / f"{name}.json"
    prints = f"{model_fingerprint(directory)} {model_fingerprint(meta)}"
    key = line_key(rows[0], {"rows": len(rows), "k": k}, prints)
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == key:
            return found
    judge = Judge.load(directory, meta=meta)
    assert judge.meta is not None
    threshold, scale = judge.settings.threshold, judge.meta.settings.meta_scale
    rng = np.random.default_rng(0)
    curves, greedy, samples, tokens = [], [], 0, 0
    for outcome in tqdm(
        judge.rows(rows, k=k, temperature=1.0, max_new_tokens=400), total=len(rows), desc=name
    ):
        assert isinstance(outcome, Verdict), outcome
        curves.append(row_curves(outcome, k, threshold, rng, scale))
        samples += len(outcome.samples)
        tokens += outcome.decode_tokens
    meta_tokens = judge.usage.meta_tokens
    for outcome in judge.rows(rows, k=1, temperature=0.0, max_new_tokens=400):
        assert isinstance(outcome, Verdict), outcome
        greedy.append(float(bool(outcome.correct)))
    right = np.array(greedy)
    found = {
        "key": key,
        "judge": name,
        "rows": len(rows),
        "tokens_per_sample": tokens / samples,
        "meta_tokens_per_sample": meta_tokens / samples,
        "greedy": {"mean": float(right.mean()), "ci95": interval(right)},
        "votes": table(curves),
    }
    replace_text(path, json.dumps(found) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The accuracies, a line for each judge and way to vote, with intervals at the largest k."""
    sizes = list(results[0]["votes"]["all"])
    lines = [
        "| judge | vote | greedy | " + " | ".join(f"@{size}" for size in sizes) + " | 95 % |",
        "|---" * (len(sizes) + 4) + "|",
    ]
    for found in results:
        for way in SHOWN:
            entries = found["votes"][way]
            means = " | ".join(f"{entries[size]['mean']:.3f}" for size in sizes)
            low, high = entries[sizes[-1]]["ci95"]
            lines.append(
                f"| {found['judge']} | {way} | {found['greedy']['mean']:.3f} | {means} | "
                f"{low:.3f} to {high:.3f} |"
            )
    return "\n".join(lines) + "\n"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against the tokens of a row, of all votes and of weighed ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for found in results:
        for way, style in (("all", "-"), ("borda, weighed", "--")):
            cost = found["tokens_per_sample"]
            if way != "all":
                cost += found["meta_tokens_per_sample"]
            sizes = [int(size) for size in found["votes"][way]]
            entries = list(found["votes"][way].values())
            means = np.array([entry["mean"] for entry in entries])
            bounds = np.array([entry["ci95"] for entry in entries]).T
            axes.errorbar(
                [size * cost for size in sizes], means, abs(bounds - means), linestyle=style,
                marker="o", markersize=3, capsize=2, label=f"{found['judge']}, {way}",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("tokens of a row, those that the meta model reads included")
    axes.set_ylabel("accuracy")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(args: Args) -> None:
    """Train, evaluate, write the results down."""
    assert set(SHOWN) <= set(NAMES)
    first, second, third = stages(args)
    args.out.mkdir(parents=True, exist_ok=True)
    command.begin_work()
    rft.train(first)
    grpo.train(second)
    meta_rm.train(third)
    size, k = (2, 2) if args.smoke else (args.rows, args.k)
    rows = split_rows("spct", "final", size, "final")
    judges = {"base": POCKET, "rft": first.out / "model", "grpo": second.out}
    results = [
        evaluate(name, directory, third.out, rows, k, args.out)
        for name, directory in judges.items()
    ]
    replace_text(args.out / "results.json", json.dumps(results) + "\n")
    replace_text(args.out / "table.md", markdown(results))
    plot(results, args.out / "curve.png")
    print(markdown(results), file=sys.stderr)
    print_json(
        {
            "out": str(args.out),
            "smoke": args.smoke,
            "rows": size,
            **{
                found["judge"]: {way: list(found["votes"][way].values())[-1] for way in SHOWN}
                for found in results
            },
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    example = "--out runs/spct"

    def work() -> None:
        groups = {"study": ("out", "smoke", "seed", "rows", "k")}
        run(
            command.parse(
                Args, groups, prog="python -m bench.spct", example=example, arguments=arguments
            )
        )

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
