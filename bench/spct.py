"""The paper's chain on the synthetic world: rejective fine-tuning, GRPO, a meta reward model, and
what votes come to after each.

    python -m bench.spct [--out runs/spct] [--seeds 0] [--smoke] [--rows 2000] [--k 32]

    rft     from the pocket model, on its own right judgements of fresh rows
    grpo    from that; the best model of dev votes
    meta    a meta model, from the GRPO model, of that model's judgements
    then    base, rft and grpo judge the same final rows, greedily and k times; the meta model
            scores the judgements of grpo

Every stage is a folder of OUT/seed-N, made with that seed of training. A stage that was stopped
continues, one that is done is not done again, and one of other settings is refused (train/run.py,
and `engine.sample --resume` for verdicts). OUT/results.json has accuracies and differences with
95 % intervals over seeds and rows, OUT/table.md shows them, and OUT/curve.png draws accuracy
against tokens. --smoke does all of it in small, to see that it runs: its figures mean nothing. Ends
in one JSON line.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import study
from bench.provenance import print_json
from engine import command, sample
from engine.command import with_values
from engine.sample import POCKET
from engine.settings import read_judge_settings
from train import grpo, meta_rm, rft
from train.directory import replace_text
from train.evaluation import EvalArgs
from train.learner import LearnerArgs
from train.policy_step import LossArgs
from train.rollout import SamplingArgs
from train.world import cases

LONGEST = 400  # tokens of a judgement
META = "borda, weighed"
# Of two points, a judge, a way to vote and the number of votes, the first less the second.
ORDERINGS: dict[str, tuple[study.Point, study.Point]] = {
    "Voting@8 over greedy": (("grpo", "all", 8), ("grpo", "greedy", 1)),
    "Voting@32 over Voting@8": (("grpo", "all", 32), ("grpo", "all", 8)),
    **{
        f"{way}@{size} over {plain}@{size}": (("grpo", way, size), ("grpo", plain, size))
        for size in (8, 32)
        for way, plain in (("meta", "all"), ("weighed", "all"), (META, "borda"), (META, "all"))
    },
    **{
        f"{one} over {other} @{size}": ((one, "all", size), (other, "all", size))
        for one, other in (("rft", "base"), ("grpo", "rft"), ("grpo", "base"))
        for size in (1, 8, 32)
    },
}


@dataclass(frozen=True)
class Args:
    """Reproduce the paper's chain on the synthetic world."""

    out: Path = Path("runs/spct")
    seeds: tuple[int, ...] = (0,)  # of training: the chain is run with each
    smoke: bool = False  # all of it in small
    rows: int = 2000  # final rows that are judged
    k: int = 32  # judgements of each

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds: there is none")


def stages(out: Path, seed: int, smoke: bool) -> tuple[rft.Args, grpo.Args, meta_rm.Args]:
    """The settings of a seed's three trainings."""
    sampling = SamplingArgs(max_new_tokens=LONGEST)

    def learning(**own: Any) -> LearnerArgs:
        return LearnerArgs(weight_decay=0.0, seed=seed, **own)

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
        model=out / "grpo" / "best", out=out / "meta", samples=8, loss="pairwise", labels="ties",
        sampling=sampling, evaluation=EvalArgs(eval_every=50, eval_rows=100),
        learning=learning(steps=400, lr=5e-4, warmup=15),
    )  # fmt: skip
    if not smoke:
        return first, second, third
    few = {"steps": 1, "eval_every": 1, "eval_rows": 2, "eval_k": 2}
    return (
        with_values(first, rows=4, steps=1, step_rows=2),
        with_values(second, rows=2, **few),
        with_values(third, rows=2, samples=3, **few),
    )


def judge_rows(
    out: Path, name: str, model: Path, rows: Path, k: int, meta: Path | None = None
) -> tuple[Path, Path]:
    """Verdict lines of rows: of k samples, and greedy. Raises Stopped where a signal has come."""
    out.mkdir(parents=True, exist_ok=True)
    votes, greedy = out / f"{name}.jsonl", out / f"{name}-greedy.jsonl"
    shared = ["--model", model, "--data", rows, "--resume", "--max-new-tokens", LONGEST]
    asked = [*shared, "--k", k, "--temperature", 1.0, "--out", votes]
    asked += [] if meta is None else ["--meta-model", meta]
    for words in (asked, [*shared, "--k", 1, "--temperature", 0.0, "--out", greedy]):
        if status := sample.main([str(word) for word in words]):
            raise SystemExit(status)
    return votes, greedy


def run(args: Args) -> None:
    """Train, judge, write the results down."""
    args.out.mkdir(parents=True, exist_ok=True)
    command.begin_work()
    count, k = (3, 2) if args.smoke else (args.rows, args.k)
    rows = args.out / "final.jsonl"
    words = ["--rows", str(count), "--split", "final", "--seed", "0", "--out", str(rows)]
    if status := cases.main(words):
        raise SystemExit(status)
    files: dict[str, list[tuple[Path, Path]]] = {"base": [], "rft": [], "grpo": []}
    files["base"].append(judge_rows(args.out, "base", POCKET, rows, k))
    scales = []
    for seed in args.seeds:
        out = args.out / f"seed-{seed}"
        first, second, third = stages(out, seed, args.smoke)
        rft.train(first)
        grpo.train(second)
        meta_rm.train(third)
        files["rft"].append(judge_rows(out, "rft-verdicts", first.out / "model", rows, k))
        best, meta = second.out / "best", third.out / "best"
        files["grpo"].append(judge_rows(out, "grpo-verdicts", best, rows, k, meta))
        scales.append(read_judge_settings(meta).meta_scale)
    threshold = read_judge_settings(POCKET).threshold
    judges = {
        name: study.judged(paths, threshold, scales if name == "grpo" else None)
        for name, paths in files.items()
    }
    found = study.results(judges)
    differences = study.orderings(judges, ORDERINGS)
    text = study.markdown(found, differences)
    replace_text(
        args.out / "results.json", json.dumps({"judges": found, "differences": differences}) + "\n"
    )
    replace_text(args.out / "table.md", text)
    study.plot(found, args.out / "curve.png")
    print(text, file=sys.stderr)
    print_json(
        {
            "out": str(args.out),
            "smoke": args.smoke,
            "rows": count,
            "seeds": args.seeds,
            "differences": differences,
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    example = "--out runs/spct --seeds 0 1 2"

    def work() -> None:
        groups = {"study": ("out", "seeds", "smoke", "rows", "k")}
        run(
            command.parse(
                Args, groups, prog="python -m bench.spct", example=example, arguments=arguments
            )
        )

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
