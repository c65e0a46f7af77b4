"""The paper's chain on the synthetic world: rejective fine-tuning, GRPO, a meta reward model, and
what votes come to after each; beside baselines of the same rows.

    python -m bench.spct [--out runs/spct] [--seeds 0] [--large DIR] [--smoke] [--rows 2000]

    rft     from pocket-base (base), on its own right judgements of fresh rows
    grpo    from that; the best model of dev votes
    meta    a meta model, from the GRPO model, of that model's judgements: scores those of grpo
    scalar  from base: a reward model by Bradley-Terry, which has no say on a single response
    direct  from base, on its teacher's scores without criteria or analysis: token probabilities,
            by expected scores
    index   from base, on judgements that end in the best response: LLM-as-a-judge

All of them, base, and a larger judge (--large: `train.world.pocket --size large`) judge the same
final rows, greedily and k times. What is trained is a folder of OUT/seed-N. A stage that was
stopped continues, and one that is done is not done again (train/run.py, `engine.sample --resume`).
What a seed came to is OUT/outcomes/seed-N.npz: one that has been run elsewhere joins by that file.
OUT/results.json has accuracies and differences with 95 % intervals over seeds and rows,
OUT/results.md and OUT/curve.png show them. Ends in one JSON line.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import study
from bench.provenance import print_json, provenance
from engine import command, sample
from engine.command import with_values
from engine.key import model_fingerprint
from engine.labels import chance_right
from engine.options import PromptOptions
from engine.scalar_judge import ScalarJudge
from engine.settings import read_judge_settings
from engine.verdict import RowFailure
from models import load
from train import grpo, meta_rm, rft, scalar_rm, sft
from train.checkpoint import sha256
from train.directory import replace_text
from train.evaluation import EvalArgs
from train.learner import LearnerArgs
from train.policy_step import LossArgs
from train.rollout import SamplingArgs
from train.sources import labelled_rows
from train.world import BASE, cases

LONGEST = 400  # tokens of a judgement
NO_VERDICT = 3  # the exit status where no row got one
TEACHER_ROWS = 8000  # that direct and index learn from
GUIDED = "borda, weighed"


def n_votes(count: int) -> str:
    """A number of votes, as labels have it."""
    return f"{count} vote" + "s" * (count != 1)


# Of two points, a judge, a way to vote and the number of votes, the first less the second.
ORDERINGS: dict[str, tuple[study.Point, study.Point]] = {
    "grpo: 8 votes over greedy": (("grpo", "all", 8), ("grpo", "greedy", 1)),
    "grpo: 32 votes over 8": (("grpo", "all", 32), ("grpo", "all", 8)),
    **{
        f"grpo: {way} over {plain}, {n_votes(size)}": (("grpo", way, size), ("grpo", plain, size))
        for size in (8, 32)
        for way, plain in (("meta", "all"), ("weighed", "all"), (GUIDED, "borda"), (GUIDED, "all"))
    },
    **{
        f"{one} over {other}, {n_votes(size)}": ((one, "all", size), (other, "all", size))
        for one, other in (("rft", "base"), ("grpo", "rft"), ("grpo", "base"))
        for size in (1, 8, 32)
    },
    **{
        f"base, {n_votes(size)}, over large, greedy": (
            ("base", "all", size),
            ("large", "greedy", 1),
        )
        for size in (2, 4, 8)
    },
    **{
        f"grpo, 8 votes, over {other}": (("grpo", "all", 8), (other, way, size))
        for other, way, size in (("scalar", "greedy", 1), ("direct", "all", 8), ("index", "all", 8))
    },
    "direct: expected scores over those drawn, 1 vote": (
        ("direct", "expected", 1),
        ("direct", "all", 1),
    ),
}


@dataclass(frozen=True)
class Args:
    """Reproduce the paper's chain on the synthetic world."""

    out: Path = Path("runs/spct")
    seeds: tuple[int, ...] = (0,)  # of training: the chain is run with each
    large: Path | None = None  # a larger judge that has learnt the same as base
    ablations: bool = False  # those too, of the first seed and on dev rows
    smoke: bool = False  # all of it in small
    rows: int = 2000  # final rows that are judged
    k: int = 32  # judgements of each

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds: there is none")


@dataclass(frozen=True)
class Stages:
    """The settings of a seed's trainings."""

    rft: rft.Args
    grpo: grpo.Args
    meta: meta_rm.Args
    scalar: scalar_rm.Args
    direct: sft.Args
    index: sft.Args

    def train(self) -> None:
        """All of them, one after another."""
        rft.train(self.rft)
        grpo.train(self.grpo)
        meta_rm.train(self.meta)
        scalar_rm.train(self.scalar)
        sft.train(self.direct)
        sft.train(self.index)

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Those of every training, but for where files lie."""
        return [
            {name: value for name, value in of_stage.items() if not isinstance(value, Path)}
            for of_stage in map(command.flat, vars(self).values())
        ]

    @property
    def judges(self) -> dict[str, Path]:
        """The directories of those that judge in words."""
        return {
            "rft": self.rft.out / "model",
            "grpo": self.grpo.out / "best",
            "direct": self.direct.out,
            "index": self.index.out,
        }


def stages(root: Path, seed: int, smoke: bool) -> Stages:
    """The settings of a seed; root: the study's directory, which has the teacher's judgements."""
    out, sampling = root / f"seed-{seed}", SamplingArgs(max_new_tokens=LONGEST)

    def learning(**own: Any) -> LearnerArgs:
        return LearnerArgs(weight_decay=0.0, seed=seed, **own)

    def taught(kind: str, **prompts: Any) -> sft.Args:
        return sft.Args(
            model=BASE, out=out / kind, data=root / f"{kind}.jsonl", rows=32, sampling=sampling,
            prompts=PromptOptions(**prompts), learning=learning(steps=500, lr=5e-4, warmup=20),
        )  # fmt: skip

    found = Stages(
        rft.Args(
            out=out / "rft", rows=4000, sampling=sampling,
            learning=learning(steps=250, lr=5e-5, warmup=5),
        ),
        grpo.Args(
            model=out / "rft" / "model", out=out / "grpo", rows=64, sampling=sampling,
            policy=LossArgs(reward="ties", beta=0.04, drop_zero_spread=True),
            evaluation=EvalArgs(eval_every=20, eval_rows=500),
            learning=learning(steps=120, lr=1e-4, warmup=5),
        ),
        meta_rm.Args(
            model=out / "grpo" / "best", out=out / "meta", samples=8, loss="pairwise",
            labels="ties", sampling=sampling, evaluation=EvalArgs(eval_every=80, eval_rows=300),
            learning=learning(steps=600, lr=4e-4, warmup=20),
        ),
        scalar_rm.Args(out=out / "scalar", learning=learning(steps=500, lr=1e-3, warmup=20)),
        taught("direct"),
        taught("index", format="rating"),
    )  # fmt: skip
    if not smoke:
        return found
    few = {"steps": 1, "warmup": 1}
    some = few | {"rows": 2, "eval_every": 1, "eval_rows": 2}
    return Stages(
        with_values(found.rft, **few, rows=4, step_rows=2),
        with_values(found.grpo, **some, eval_k=2),
        with_values(found.meta, **some, eval_k=2, samples=3),
        with_values(found.scalar, **some),
        with_values(found.direct, **few, rows=2),
        with_values(found.index, **few, rows=2),
    )


def world(path: Path, count: int, split: str, *more: str) -> Path:
    """Rows of the synthetic world, by the options of `train.world.cases`."""
    words = ["--rows", str(count), "--split", split, "--out", str(path)]
    if status := cases.main([*words, *more]):
        raise SystemExit(status)
    return path


def scalar_chances(directory: Path, rows: Path) -> np.ndarray:
    """(rows,): the chance that the response with the highest score is the best, of several drawn;
    1/2 for a single response, on which such a model has no say."""
    judge, labelled = ScalarJudge.load(directory), labelled_rows(rows)[0]
    found = []
    for row, verdict in zip(labelled, judge.rows(labelled), strict=True):
        if isinstance(verdict, RowFailure):
            raise ValueError(f"row {row.id}: {verdict.error}")
        scores = verdict.mean_scores
        assert row.label is not None and scores is not None
        found.append(0.5 if len(scores) == 1 else chance_right(scores, row.label, 0.0))
    return np.array(found)


def judge_rows(
    out: Path, name: str, model: Path, rows: Path, k: int, *more: str | Path
) -> tuple[Path, Path]:
    """The files of verdict lines: of k samples, and greedy. Raises SystemExit after a signal, and
    where a row has failed."""
    out.mkdir(parents=True, exist_ok=True)
    votes, greedy = out / f"{name}.jsonl", out / f"{name}-greedy.jsonl"
    shared = ["--model", model, "--data", rows, "--resume", "--max-new-tokens", LONGEST]
    asked = [*shared, *more, "--k", k, "--temperature", 1.0, "--out", votes]
    for words in (asked, [*shared, "--k", 1, "--temperature", 0.0, "--out", greedy]):
        status = sample.main([str(word) for word in words])
        if status not in (0, NO_VERDICT):
            raise SystemExit(status)
    return votes, greedy


def parameters_of(directory: Path) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in load(directory)[0].parameters())


def ablate(args: Args, made: Stages) -> None:
    """Judge dev rows with one thing changed, on the chain of one seed; writes OUT/ablations.json
    and OUT/ablations.md, whose differences are to what is not changed."""
    rft.train(made.rft)
    grpo.train(made.grpo)
    count, k = (3, 2) if args.smoke else (500, 8)
    out = made.grpo.out.parent
    rows = {
        kind: world(args.out / f"dev-{kind or 'rows'}.jsonl", count, "dev", *words)
        for kind, words in (
            ("", ()),
            *((kind, ("--principles", kind)) for kind in ("oracle", "fixed", "wrong")),
        )
    }  # fmt: skip
    unhinted = with_values(made.rft, out=out / "rft-unhinted", hinted=False)
    unrejected = with_values(made.rft, out=out / "rft-unrejected", rejection=False)
    for each in (unhinted, unrejected):
        rft.train(each)
    best = made.grpo.out / "best"
    asked: dict[str, tuple[Path, Path, tuple[str, ...]]] = {
        "grpo": (best, rows[""], ()),
        **{
            f"grpo, {kind} principles": (best, rows[kind], ())
            for kind in ("oracle", "fixed", "wrong")
        },
        "grpo, random orders": (best, rows[""], ("--orders", "random")),
        "grpo, one order": (best, rows[""], ("--orders", "fixed")),
        "rft": (made.rft.out / "model", rows[""], ()),
        "rft, no hints": (unhinted.out / "model", rows[""], ()),
        "rft, no rejection": (unrejected.out / "model", rows[""], ()),
    }
    threshold = read_judge_settings(BASE).threshold
    judges = {
        name: study.judged(
            *judge_rows(out / "ablations", name.replace(", ", "-").replace(" ", "-"), model, data,
                        k, *more),
            threshold, parameters_of(BASE),
        )
        for name, (model, data, more) in asked.items()
    }  # fmt: skip
    pairs = {
        f"{name}, {n_votes(size)}": ((name, "all", size), (name.partition(",")[0], "all", size))
        for name in asked for size in (1, k) if "," in name
    }  # fmt: skip
    control = "grpo, wrong principles"  # where all judgements err alike, votes should gain nothing
    pairs |= {
        f"{name}, {n_votes(k)} over one": ((name, "all", k), (name, "all", 1))
        for name in ("grpo", control)
    }
    write(args.out, "ablations", judges, pairs)


def write(
    out: Path,
    name: str,
    judges: Mapping[str, study.Judged],
    pairs: Mapping[str, tuple[study.Point, study.Point]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write accuracies and differences as OUT/NAME.json and OUT/NAME.md; returns them."""
    found, differences = study.results(judges), study.orderings(judges, pairs)
    text = json.dumps({"judges": found, "differences": differences, "run": provenance()}) + "\n"
    replace_text(out / f"{name}.json", text)
    replace_text(out / f"{name}.md", study.markdown(found, differences))
    return found, differences


def judged_untrained(
    out: Path, name: str, model: Path, rows: Path, k: int
) -> dict[str, study.Judged]:
    """By its name, what a judge that no seed trains comes to on the final rows."""
    files, threshold = judge_rows(out, name, model, rows, k), read_judge_settings(BASE).threshold
    return {name: study.judged(*files, threshold, parameters_of(model))}


def judged_seed(made: Stages, rows: Path, k: int) -> dict[str, study.Judged]:
    """Train all that a seed trains; what its judges come to on the final rows."""
    made.train()
    meta = made.meta.out / "best"
    more: dict[str, tuple[str | Path, ...]] = {
        "grpo": ("--meta-model", meta), "direct": ("--score", "expected"),
    }  # fmt: skip
    threshold = read_judge_settings(BASE).threshold
    found = {}
    for name, model in made.judges.items():
        verdicts = made.grpo.out.parent / "verdicts"
        found[name] = study.judged(
            *judge_rows(verdicts, name, model, rows, k, *more.get(name, ())),
            threshold, parameters_of(model),
            read_judge_settings(meta).meta_scale if name == "grpo" else None,
            expects=name == "direct",
        )  # fmt: skip
    chances = scalar_chances(made.scalar.out / "best", rows)
    found["scalar"] = study.Judged({"greedy": {1: chances[None]}})
    return found


def outcomes(
    path: Path, inputs: Any, judge: Callable[[], dict[str, study.Judged]]
) -> dict[str, study.Judged]:
    """What judges came to: read from the file, or found and written there. inputs: what decides it.
    Raises ValueError for a file that other inputs made."""
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        study.save(path, judge(), key)
    return study.load(path, key)


def run(args: Args) -> None:
    """Train, judge, write the results down."""
    args.out.mkdir(parents=True, exist_ok=True)
    command.begin_work()
    count, k = (3, 2) if args.smoke else (args.rows, args.k)
    rows = world(args.out / "final.jsonl", count, "final")
    taught = 20 if args.smoke else TEACHER_ROWS
    of_teacher = [
        world(args.out / f"{kind}.jsonl", taught, "train", "--judgements", kind)
        for kind in ("direct", "index")
    ]
    final, base = [sha256(rows), k, LONGEST], model_fingerprint(BASE)
    judges: dict[str, study.Judged] = {}
    for name, model in (("base", BASE), ("large", args.large)):
        if model is not None:
            judges |= outcomes(
                args.out / "outcomes" / f"{name}.npz", [final, model_fingerprint(model)],
                partial(judged_untrained, args.out, name, model, rows, k),
            )  # fmt: skip
    seeds = []
    for seed in args.seeds:
        made = stages(args.out, seed, args.smoke)
        inputs = [final, base, made.settings, *map(sha256, of_teacher)]
        path = args.out / "outcomes" / f"seed-{seed}.npz"
        seeds.append(outcomes(path, inputs, partial(judged_seed, made, rows, k)))
    judges |= {name: study.joined([each[name] for each in seeds]) for name in seeds[0]}
    found, differences = write(args.out, "results", judges, ORDERINGS)
    study.plot(found, args.out / "curve.png")
    print((args.out / "results.md").read_text(), file=sys.stderr)
    if args.ablations:
        ablate(args, stages(args.out, args.seeds[0], args.smoke))
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
        groups = {"study": ("out", "seeds", "large", "ablations", "smoke", "rows", "k")}
        run(
            command.parse(
                Args, groups, prog="python -m bench.spct", example=example, arguments=arguments
            )
        )

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
