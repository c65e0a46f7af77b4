"""Training of a scalar reward model, the baseline of the field; resumable.

    python -m train.scalar_rm [--model DIR] [--out DIR] [--data ROWS.jsonl] [--steps N] ...
    torchrun --nproc-per-node N -m train.scalar_rm ...

The model begins as the decoder of --model under a new score weight of zeros. It reads a
conversation as `engine/scalar_judge.py` does, with one response, which gets a score r, or (--reads
pair) with two, and gives the log-odds c that the first is better. Losses, means over all pairs:

    response    -log sigmoid(r(better) - r(worse)), Bradley-Terry
    pair        -log sigmoid(c(better, worse)) and -log sigmoid(-c(worse, better))

A pair is two responses of a row that its label puts in an order: the best and any other or, where
the label is gold scores, any two that differ in theirs. All that is read of a row is packed as one
tree. A row of one response has no pair: in a file such rows are left out and counted, and of the
synthetic world, which rows come from without --data, none are drawn.

OUT is a sequence classifier with one label, which `ScalarJudge` and transformers load. Which model
is best, `dev_accuracy` decides: the share of evaluation rows of several responses in which the best
one has the highest score. A tie counts as a draw would: half, of two.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from engine.command import flat
from engine.labels import Label, chance_right
from engine.options import PromptOptions
from engine.prompt import read_chat_template
from engine.request import Row
from engine.scalar_judge import ScalarJudge
from engine.settings import read_judge_settings
from models.scalar_head import ScalarModel
from train.evaluation import EvalArgs, divide
from train.learner import Learner, LearnerArgs
from train.loop import Trainer, loop
from train.ranking import Labelled, losses_of, pairs
from train.run import Clock, LogArgs, RunArgs, command_line
from train.scalar import add_gradients, all_logits, scalar_of
from train.settings import check_at_least
from train.sources import Rows, batches_of
from train.trajectories import Trajectory
from train.world import BASE
from train.world.rows import world_rows

EXAMPLE = "--model DIR --out runs/scalar_rm --data rows.jsonl --steps 200"
# Options of all training that are about judgements in words.
_OF_JUDGEMENTS = (
    "template", "anchor", "score_min", "score_max", "threshold", "format", "eval_k",
    "eval_temperature",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs):
    """Training of a scalar reward model."""

    command: ClassVar[str] = "train.scalar_rm"
    model: Path = BASE  # what it begins as: a causal language model
    out: Path = Path("runs/scalar_rm")
    data: Path | None = None  # a JSONL file of labelled rows; the synthetic world when left out
    reads: Literal["response", "pair"] = "response"  # scores one, or compares two
    rows: int = 32  # per step
    micro_rows: int = 16  # rows whose gradients are computed together
    learning: LearnerArgs = LearnerArgs(steps=300, lr=1e-3, warmup=20)
    evaluation: EvalArgs = EvalArgs(eval_every=50, eval_rows=400)
    logging: LogArgs = LogArgs(log_every=10, save_every=50)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "rows", "micro_rows")
        given, default = flat(self), {**vars(PromptOptions()), **vars(EvalArgs())}
        for name in _OF_JUDGEMENTS:
            if given[name] != default[name]:
                raise ValueError(
                    f"{name} = {given[name]} has no meaning for a model that gives only a score"
                )


class ReadRow(NamedTuple):
    """A labelled row of several responses, what is read of it, and which responses each shows."""

    row: Row
    trajectories: list[Trajectory]
    shown: Sequence[tuple[int, ...]] = ()


def gold_scores(row: Row) -> list[float]:
    """What a row's label says of each of its responses, of which there are several."""
    label: Label | None = row.label
    assert label is not None and len(row.responses) > 1
    if isinstance(label, int):
        return [float(place == label) for place in range(len(row.responses))]
    return list(label)


def labelled(rows: Sequence[ReadRow]) -> Labelled:
    """The responses of rows, side by side."""
    gold = [gold_scores(each.row) for each in rows]
    return Labelled(
        [own for each in rows for own in each.trajectories],
        torch.tensor([score == max(own) for own in gold for score in own]),
        torch.tensor([score for own in gold for score in own], dtype=torch.float64),
        torch.tensor([number for number, own in enumerate(gold) for _ in own]),
    )


def compared(rows: Sequence[ReadRow]) -> Labelled:
    """The ordered pairs of rows' responses that differ in their gold scores, side by side; the
    target is 1 where the first is better, and else 0."""
    pairs = [
        (trajectory, gold[first] - gold[second], number)
        for number, each in enumerate(rows)
        for gold in [gold_scores(each.row)]
        for trajectory, (first, second) in zip(each.trajectories, each.shown, strict=True)
        if gold[first] != gold[second]
    ]
    trajectories, differences, numbers = zip(*pairs, strict=True)
    right = torch.tensor(differences, dtype=torch.float64) > 0
    return Labelled(list(trajectories), right, right.float(), torch.tensor(numbers))


def everything(rows: Sequence[ReadRow]) -> Labelled:
    """All that is read of rows, side by side, without targets."""
    trajectories = [own for each in rows for own in each.trajectories]
    none = torch.zeros(len(trajectories))
    return Labelled(trajectories, none > 0, none, none.long())


class ScalarTrainer(Trainer[ScalarModel]):
    """The scalar model under training, and the rows that it reads."""

    shown = ("loss", "accuracy")
    score = "dev_accuracy"

    def __init__(self, args: Args) -> None:
        super().__init__()
        model, tokenizer = scalar_of(args.model, args.learning.dtype)
        self.args, self.learner = args, Learner(model, args.learning)
        prompts, self.compares = args.prompts, args.reads == "pair"
        self.judge = ScalarJudge(
            self.learner.plain,
            tokenizer,
            chat_template=read_chat_template(args.model, prompts.chat_template),
            chat_template_kwargs=prompts.variables,
            date=prompts.date,
            settings=read_judge_settings(args.model, {"compares": self.compares}),
        )
        self.judge_settings: dict[str, Any] = {"compares": True} if self.compares else {}
        found, dev, self.left_out = divide(
            args.data, args.evaluation, "scalar", evaluates=args.evaluation.eval_every > 0
        )
        self.rows = self._rows(found)
        self.dev, _ = self.read([row for row in dev if len(row.responses) > 1])
        if dev and not self.dev:
            raise ValueError(f"none of {len(dev)} rows of evaluations has two responses that fit")

    def _rows(self, found: list[Row] | None) -> Rows:
        """Batches of the rows of a file that have pairs, or of the world."""
        args = self.args
        if found is None:
            return world_rows("scalar", args.learning.seed, args.rows, least=2)
        kept = [row for row in found if len(row.responses) > 1]
        if len(kept) < len(found):
            self.left_out["one response, which is better than none"] = len(found) - len(kept)
        if not kept:
            raise ValueError(f"{args.data}: all {len(found)} labelled rows have one response")
        return batches_of(kept, args.rows, args.learning.seed)

    def read(self, rows: Sequence[Row]) -> tuple[list[ReadRow], list[str]]:
        """Those rows that the model can read, and for each of the others why not."""
        found: list[ReadRow] = []
        errors: list[str] = []
        for row in rows:
            try:
                sequences = self.judge.sequences(row)
            except ValueError as error:
                errors.append(f"row {row.id}: {error}")
                continue
            # The last token of a completion is a target only; it is not read.
            trajectories = [Trajectory(each, (0,)) for each in sequences]
            found.append(ReadRow(row, trajectories, self.judge.reads_of(row)))
        return found, errors

    def step(self, number: int) -> tuple[dict[str, float], dict[str, float]]:
        clock = Clock()
        rows, errors = self.read(self.rows(number))
        if not rows:
            raise ValueError(f"step {number}: no row can be read: {errors[0]}")
        self.learner.optimizer.zero_grad()
        metrics: dict[str, float] = {"failed_rows": len(errors)}
        metrics |= self.add_gradients(rows)
        named = [each.row.id for each in rows]
        metrics |= self.learner.update(number, metrics["loss"], named)
        clock.lap("update")
        return metrics, clock.seconds

    def add_gradients(self, rows: Sequence[ReadRow]) -> dict[str, float]:
        """Add the gradients of the mean loss over the pairs of rows; a rank takes its share.
        Returns that loss, and the share of pairs that the scores put in the right order."""
        model, micro_rows = self.learner.model, self.args.micro_rows
        if self.compares:
            right = compared(rows).right
            loss, odds = add_gradients(model, rows, compared, "pointwise", micro_rows, len(right))
            leads = torch.where(right, odds, -odds)
        else:
            better, worse = pairs(labelled(rows))
            loss, scores = add_gradients(model, rows, labelled, "pairwise", micro_rows, len(better))
            leads = scores[better] - scores[worse]
        ordered = (leads > 0).double() + (leads == 0).double() / 2
        return {"loss": loss, "pairs": len(leads), "accuracy": ordered.mean().item()}

    def evaluate(self) -> dict[str, float]:
        """On those rows of evaluations that have several responses and can be read: the loss, how
        many they are, and the accuracy."""
        self.learner.refresh()
        scalars = all_logits(self.learner.plain, self.dev, everything, self.args.micro_rows)
        own = scalars.split([len(each.trajectories) for each in self.dev])
        scores = torch.tensor([
            score
            for each, of_row in zip(self.dev, own, strict=True)
            for score in self.judge.scores_of(each.row, of_row.tolist())
        ])  # fmt: skip
        return {
            "dev_loss": losses_of(scores, labelled(self.dev), "pairwise").mean().item(),
            "dev_rows": len(self.dev),
            "dev_accuracy": accuracy([each.row for each in self.dev], scores),
        }


def accuracy(rows: Sequence[Row], scores: Tensor) -> float:
    """The chance that the response with the highest score is the best, a mean over rows of several
    responses, ties being drawn. scores: of all responses, one row after another."""
    found = []
    own = scores.split([len(row.responses) for row in rows])
    for row, each in zip(rows, own, strict=True):
        assert row.label is not None
        found.append(chance_right(each.tolist(), row.label, math.nan))
    return sum(found) / len(found)


def train(args: Args) -> None:
    """Train to the last step, as `train.loop.loop` does."""
    loop(args, ScalarTrainer(args))


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train.scalar_rm") -> int:
    """Run the command line and return its exit status."""
    return command_line(Args, train, prog=prog, example=EXAMPLE, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
