"""Rejective fine-tuning: a judge learns from those of its own judgements that are right.

    python -m train.rft [--model DIR] [--out DIR] [--data ROWS.jsonl] [--rows N] ...

Each row is judged --samples times. All of them right: the row is too easy and nothing of it is
kept. Otherwise a row of two or more responses is judged once more with the best response as a hint,
shown where that sample's order puts it, and every right judgement is kept, hinted or not. So the
hinted sample of a row that is too easy, which would go with its row, is not drawn. Right is as in
`train/rewards.py`: strictly. What becomes of a judgement is told in `train/rejection.py`.

    OUT/trajectories.jsonl   what was kept, as `train/trajectories.py` reads it
    OUT/judgements.jsonl     every valid judgement without a hint, right or wrong, and which of the
                             two: what `train.meta_rm --judgements` learns from
    OUT/progress.jsonl       the settings; then a line for each row: the fates of its judgements,
                             the hinted one's by itself, and where its lines in the files end
    OUT/counts.json          how many rows and judgements had which fate
    OUT/dev.jsonl            the rows of evaluations, which are not sampled
    OUT/model                the model fine-tuned on them by `train.sft`, with its checkpoints

A row's lines in a file are one write, its line of progress another, after them. A killed run
continues with the next row and ends with the very same bytes; with other settings, model or data it
is refused. The hint is left out of the prompt that is learnt from, unless --keep-hint: no one gives
a hint to the finished judge.
"""

import json
import signal
import sys
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from engine import command
from engine.command import with_values
from engine.judge import Judge
from engine.labels import has_best
from engine.reading import open_rows, read_rows
from engine.request import BadRow, Row
from engine.stopping import Stopped, Stopping
from engine.verdict import RowFailure, Verdict
from train import parallel, sft
from train.directory import RunDirectory, replace_text
from train.evaluation import divide
from train.learner import LearnerArgs
from train.rejection import Rule, best_hint, fate, fates, judgement_line, row_line
from train.rejection_log import JUDGEMENTS, TRAJECTORIES, Counts, Done, Lines, RejectionLog
from train.rollout import NO_SCORES, TRAINING, SamplingArgs, seed_of
from train.run import LogArgs, RunArgs, command_line
from train.settings import check_at_least, settings_of
from train.sources import conversation_of
from train.world import BASE
from train.world.rows import world_rows

WORLD_ROWS = 256  # of the synthetic world, where neither --data nor --rows says how many
_WORLD_BATCH = 64
DEV = "dev.jsonl"


EXAMPLE = "--model DIR --out runs/rft --data rows.jsonl --steps 250"


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs):
    """Rejective fine-tuning of a judge on its own judgements of labelled rows."""

    command: ClassVar[str] = "train.rft"
    model: Path = BASE
    out: Path = Path("runs/rft")
    data: Path | None = None  # a JSONL file of labelled rows; the synthetic world when left out
    rows: int | None = None  # labelled rows at most; all of --data, or 256 of the synthetic world
    samples: int = 3  # judgements per row, without the hinted one
    hinted: bool = True  # one more judgement with the best response as a hint
    keep_hint: bool = False  # learn from hinted judgements with the hint in their prompt
    rejection: bool = True  # no: judgements are kept whether they are right or not
    chunk_rows: int = 32  # rows judged together; what a killed run may have to judge again
    sample_only: bool = False  # no training
    step_rows: int = 16  # trajectories per step
    micro_rows: int = 16  # trajectories whose gradients are computed together
    autocast: bool = False  # bf16 matmuls over fp32 weights, in training
    sampling: SamplingArgs = SamplingArgs()
    learning: LearnerArgs = LearnerArgs(steps=50, lr=2e-5, warmup=5, weight_decay=0.0)
    logging: LogArgs = LogArgs(log_every=10, save_every=50)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "samples", "chunk_rows", "step_rows", "micro_rows")
        if self.rows is not None:
            check_at_least(1, self, "rows")

    @property
    def trajectories(self) -> Path:
        """The file of what was kept."""
        return self.out / TRAJECTORIES

    @property
    def judgements(self) -> Path:
        """The file of all valid judgements, right and wrong."""
        return self.out / JUDGEMENTS

    @property
    def deciding(self) -> dict[str, Any]:
        """All that decides what is kept, besides the model."""
        names = "data", "rows", "samples", "hinted", "keep_hint", "rejection"
        learning = {name: getattr(self.learning, name) for name in ("dtype", "seed")}
        own = {name: getattr(self, name) for name in names}
        return own | learning | vars(self.sampling) | vars(self.prompts)

    @property
    def fine_tuning(self) -> sft.Args:
        """The settings of `train.sft`."""
        return sft.Args(
            model=self.model, out=self.out / "model", data=self.trajectories, rows=self.step_rows,
            micro_rows=self.micro_rows, autocast=self.autocast, prompts=self.prompts,
            sampling=self.sampling, learning=self.learning, evaluation=self.evaluation,
            logging=self.logging,
        )  # fmt: skip


def entries(
    data: Path | None, rows: int | None, seed: int, held_out: Set[str] = frozenset()
) -> Iterator[Row | BadRow]:
    """The rows to sample, up to so many with a label, and what lies between them; without those of
    conversations that are held out."""
    if data is None:
        batch = world_rows("rft", seed, _WORLD_BATCH)
        fresh = (row for number in count() for row in batch(number))
        yield from islice(fresh, WORLD_ROWS if rows is None else rows)
        return
    labelled = 0
    with open_rows(data) as stream:
        for entry in read_rows(stream):
            if isinstance(entry, Row) and conversation_of(entry) in held_out:
                continue
            yield entry
            labelled += isinstance(entry, Row) and has_best(entry.label)
            if labelled == rows:
                return


def hinted_seed(seed: int) -> int:
    """The seed of hinted judgements: their draws are not those of the others."""
    return seed_of(f"quorum-rft-hinted-{seed}")


def judged(judge: Judge, chunk: Sequence[Row | BadRow], args: Args) -> Iterator[tuple[Done, Lines]]:
    """What becomes of each row of a chunk, and its lines."""

    def draw(rows: Sequence[Row], **more: Any) -> dict[str, Verdict | RowFailure]:
        outcomes = judge.rows(rows, stop="eos", **vars(args.sampling), **more)
        return dict(zip([row.id for row in rows], outcomes, strict=True))

    asked = [row for row in chunk if isinstance(row, Row) and has_best(row.label)]
    plain = draw(asked, k=args.samples, seed=args.learning.seed)
    several = [row for row in asked if args.hinted and len(row.responses) > 1]
    hard = [row for row in several if not _too_easy(judge, row, plain[row.id], args.rejection)]
    hinted = draw(hard, k=1, seed=hinted_seed(args.learning.seed), hint=best_hint)
    for row in chunk:
        if isinstance(row, BadRow):
            yield (
                Done(id=row.id, row="bad_line", error=f"line {row.line}: {row.error}"),
                Lines([], []),
            )
        elif not has_best(row.label):
            yield Done(id=row.id, row="no_label"), Lines([], [])
        else:
            yield _decide(judge, row, plain[row.id], hinted.get(row.id), args)


def _rule(judge: Judge, row: Row, rejects: bool) -> Rule:
    assert row.label is not None
    return Rule(row.label, judge.settings.threshold, rejects)


def _too_easy(judge: Judge, row: Row, outcome: Verdict | RowFailure, rejects: bool) -> bool:
    """Whether there is nothing that a hint could add: a row that fails counts, too."""
    return isinstance(outcome, RowFailure) or "too_easy" in fates(
        outcome.samples, _rule(judge, row, rejects), judge.tokenizer
    )


def _decide(
    judge: Judge,
    row: Row,
    plain: Verdict | RowFailure,
    hinted: Verdict | RowFailure | None,
    args: Args,
) -> tuple[Done, Lines]:
    if isinstance(plain, RowFailure):
        return Done(id=row.id, row="failed", error=plain.error), Lines([], [])
    rule = _rule(judge, row, args.rejection)
    found = fates(plain.samples, rule, judge.tokenizer)
    kept = [
        judgement_line(row, sample)
        for sample, each in zip(plain.samples, found, strict=True)
        if each == "kept"
    ]
    valid = [
        judgement_line(row, sample, right=rule.is_right(sample))
        for sample in plain.samples
        if sample.scores is not None
    ]
    done = Done(id=row.id, row="too_easy", samples=found)
    if isinstance(hinted, RowFailure):
        done.hinted, done.error = "failed", f"with the hint: {hinted.error}"
    elif hinted is not None:
        (sample,) = hinted.samples
        done.hinted = fate(sample, rule, judge.tokenizer)
        if done.hinted == "kept":
            hint = best_hint(row, sample.order) if args.keep_hint else None
            kept.append(judgement_line(row, sample, hint=hint))
    if "too_easy" not in found:
        done.row = "kept" if kept else "none_kept"
    return done, Lines(kept, valid)


def sample(args: Args, dev: Sequence[Row] = ()) -> Counts:
    """Sample all rows but those of the conversations of `dev`, continuing where an earlier run
    stopped; writes all but OUT/model.

    Raises ValueError for settings other than those of the earlier run.
    """
    counts = Counts()
    held_out = set(map(conversation_of, dev))
    with ExitStack() as stack:
        files: RejectionLog | None = None
        if parallel.is_first():
            stack.enter_context(closing(RunDirectory(args.out, args.command)))
            files = stack.enter_context(closing(RejectionLog(args.out)))
        stopping = stack.enter_context(Stopping())
        settings = settings_of(args.deciding, args.model) | {"held_out": len(held_out)}
        done = parallel.from_first(files.resume(settings) if files else [])
        if files is not None and dev:
            replace_text(args.out / DEV, b"".join(map(row_line, dev)).decode())
        source = entries(args.data, args.rows, args.learning.seed, held_out)
        for each in done:
            entry = next(source, None)
            if entry is None or entry.id != each.id:
                raise ValueError(f"row {each.id!r} of an earlier run is not in its place now")
            counts.add(each)
        judge: Judge | None = None
        hidden = None if files else True  # None: but on a terminal
        bar = stack.enter_context(
            tqdm(total=_total(args), initial=len(done), unit="row", disable=hidden)
        )
        while chunk := list(islice(source, args.chunk_rows)):
            judge = judge or Judge.load(
                args.model, dtype=args.learning.dtype, **args.prompts.for_load(**TRAINING)
            )
            command.begin_work()
            own = list(judged(judge, parallel.share(chunk), args))
            for each, lines in parallel.gather(own):
                counts.add(each)
                if files is not None:
                    files.write(each, lines)
                    if each.error is not None:
                        bar.write(f"row {each.id!r}: {each.error}", file=sys.stderr)
                bar.update()
            bar.set_postfix(kept=counts.kept)
            if any(parallel.gather([stopping.number is not None])):
                bar.write("stopped after a whole row: the same command continues", file=sys.stderr)
                raise Stopped(stopping.number or signal.SIGTERM)
    if parallel.is_first():
        replace_text(args.out / "counts.json", json.dumps(counts.table(), indent=2) + "\n")
    parallel.barrier()
    return counts


def _total(args: Args) -> int:
    """Of the progress bar: rows, or lines of the file where they are fewer."""
    if args.data is None:
        return WORLD_ROWS if args.rows is None else args.rows
    with args.data.open("rb") as lines:
        found = sum(1 for _ in lines)
    return found if args.rows is None else min(found, args.rows)


def train(args: Args) -> None:
    """Sample, then fine-tune, each continuing where an earlier run stopped.

    Raises ValueError for settings out of range or other than those of the earlier run, where there
    is no trajectory to train on, and as `train.sft.train` does.
    """
    fine_tuning = args.fine_tuning
    dev: list[Row] = []
    if args.evaluation.eval_every and args.evaluation.eval_data is None:
        _, dev, _ = divide(args.data, args.evaluation, "sft", evaluates=True)
        fine_tuning = with_values(fine_tuning, eval_data=args.out / DEV)
    counts = sample(args, dev)
    if parallel.is_first():
        print(json.dumps(counts.table()), file=sys.stderr)
    if args.sample_only:
        return
    if not counts.kept:
        raise ValueError(f"no trajectory was kept: {json.dumps(counts.table())}. {NO_SCORES}")
    sft.train(fine_tuning)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train.rft") -> int:
    """Run the command line and return its exit status."""
    return command_line(Args, train, prog=prog, example=EXAMPLE, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
