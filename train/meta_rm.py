"""Training of a meta reward model: which of a judge's judgements are right; resumable.

    python -m train.meta_rm [--model DIR] [--judge DIR] [--out DIR] [--data ROWS.jsonl]
                            [--judgements RFT/judgements.jsonl] ...
    torchrun --nproc-per-node N -m train.meta_rm ...

The meta model begins as the decoder of --model under a new score weight of zeros. A step samples
judgements of its rows with the judge (by default --model itself), labels the valid ones by a reward
of `train/rewards.py` (--labels), as a number from 0 to 1, adds judgements of other rows that
`train.rft` kept, if given, and learns to tell them apart, each read as `engine/meta.py` reads it.
All judgements of a row are packed as one tree. Losses:

    pointwise   binary cross-entropy of every judgement's logit with its label
    pairwise    -log sigmoid(better - worse), over all pairs of a row with different labels

Without --data the rows are fresh ones of the synthetic world. OUT is a sequence classifier with one
label, which `engine.sample --meta-model` and transformers load. Rows of evaluations are not trained
on, and are sampled once. What decides is the weighed vote; AUCs are beside it, within rows that
have right and wrong judgements and pooled, where telling hard rows from easy ones counts too.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from engine.judge import Judge
from engine.labels import has_best
from engine.meta import MetaModel
from engine.prompt import read_chat_template, read_judge_template
from engine.request import Row
from engine.sample import POCKET
from engine.settings import read_judge_settings
from engine.verdict import RowFailure
from models.scalar_head import ScalarModel
from train.evaluation import EvalArgs, divide, hold_out_of
from train.judgements import JudgedRow, Judgement, batches_of_judgements, read_judgements
from train.learner import Learner, LearnerArgs
from train.loop import Trainer, loop
from train.ranking import ReadRow, auc, labelled, num_pairs, vote_accuracies, vote_scale
from train.rewards import REWARDS
from train.rollout import NO_SCORES, TRAINING, Group, SamplingArgs, sample_groups, step_seed
from train.run import Clock, LogArgs, RunArgs, command_line
from train.scalar import add_gradients, all_logits, scalar_of
from train.settings import check_at_least
from train.sources import Rows, batches_of, conversation_of
from train.trajectories import Trajectory
from train.world.rows import world_rows

EXAMPLE = """\
--model DIR --out runs/meta_rm \\
    --judgements runs/rft/judgements.jsonl --loss pairwise"""


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs):
    """Training of a meta reward model."""

    command: ClassVar[str] = "train.meta_rm"
    model: Path = POCKET  # what it begins as: a causal language model
    judge: Path | None = None  # whose judgements; the model's when left out
    out: Path = Path("runs/meta_rm")
    data: Path | None = None  # a JSONL file of labelled rows; the synthetic world when left out
    rows: int = 16  # per step, to be judged
    samples: int = 4  # judgements per row
    judgements: Path | None = None  # a JSONL file of judgements, right and wrong
    judged_rows: int = 16  # per step, from that file
    micro_rows: int = 8  # rows whose gradients are computed together
    labels: Literal["rule", "ties", "leave_one_out"] = "rule"  # of judgements: train/rewards.py
    loss: Literal["pointwise", "pairwise"] = "pointwise"  # each by itself, or right above wrong
    sampling: SamplingArgs = SamplingArgs()
    learning: LearnerArgs = LearnerArgs(steps=100, warmup=10)
    evaluation: EvalArgs = EvalArgs(eval_rows=100)
    logging: LogArgs = LogArgs(log_every=1, save_every=50)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "samples", "judged_rows", "micro_rows")
        if self.rows < (self.judgements is None):
            raise ValueError(f"rows = {self.rows}: there is nothing to learn from")


def judged(groups: Sequence[Group]) -> list[JudgedRow]:
    """The valid judgements of groups."""
    return [
        JudgedRow(
            group.row,
            [
                Judgement(sample.order, sample.text, right, (reward + 1) / 2, sample.scores)
                for sample, right, reward in zip(
                    group.samples, group.right, group.rewards, strict=True
                )
                if sample.scores is not None
            ],
        )
        for group in groups
    ]


class MetaTrainer(Trainer[ScalarModel]):
    """The meta model under training, and the judge that it reads."""

    shown = ("loss", "accuracy", "right")
    score = "dev_weighed_vote"
    always_last = True  # the scale of its weights is fitted there

    def __init__(self, args: Args) -> None:
        super().__init__()
        seed, dtype = args.learning.seed, args.learning.dtype
        model, tokenizer = scalar_of(args.model, dtype)
        self.args, self.learner = args, Learner(model, args.learning)
        prompts = args.prompts
        self.meta = MetaModel(
            self.learner.plain,
            tokenizer,
            judge_template=read_judge_template(args.model, prompts.template),
            chat_template=read_chat_template(args.model, prompts.chat_template),
            settings=read_judge_settings(args.model, prompts.settings | TRAINING),
        )
        self.judge = Judge.load(
            args.judge or args.model, dtype=dtype, **prompts.for_load(**TRAINING)
        )
        found, self.dev_rows, self.left_out = divide(
            args.data, args.evaluation, "meta", evaluates=True
        )
        self.rows: Rows = world_rows("meta", seed, args.rows)
        if found is not None:
            self.rows = batches_of(found, args.rows, seed)
        self.kept: Callable[[int], list[JudgedRow]] | None = None
        if args.judgements is not None:
            judged = read_judgements(args.judgements)
            if not args.rows and args.data is None and args.evaluation.eval_data is None:
                labelled = [each.row for each in judged if has_best(each.row.label)]
                _, self.dev_rows = hold_out_of(args.judgements, labelled, args.evaluation)
            held = set(map(conversation_of, self.dev_rows))
            learnt = [each for each in judged if conversation_of(each.row) not in held]
            self.kept = batches_of_judgements(learnt, args.judged_rows, seed)
        self._dev: list[ReadRow] | None = None

    def judge_rows(
        self, rows: Sequence[Row], seed: int, samples: int
    ) -> tuple[list[JudgedRow], list[RowFailure]]:
        """The judge's valid judgements of rows, and the rows that it could not judge."""
        args = self.args
        if not rows:
            return [], []
        groups, failures = sample_groups(
            self.judge, rows, seed, REWARDS[args.labels], k=samples, **vars(args.sampling)
        )
        return judged(groups), failures

    def read(self, rows: Sequence[JudgedRow]) -> tuple[list[ReadRow], int]:
        """Rows with those judgements that fit the meta model's context, and how many do not."""
        longest = self.learner.plain.model.config.max_position_embeddings
        found, too_long = [], 0
        for each in rows:
            fits = ReadRow(each.row, [], [])
            for own in each.judgements:
                prompt = self.meta.prompt(each.row, own.order)
                # The last token of a completion is a target only; it is not read.
                completion = (*self.meta.judgement(own.text), 0)
                if sum(map(len, prompt)) + len(completion) - 1 > longest:
                    too_long += 1
                    continue
                fits.trajectories.append(Trajectory(prompt, completion))
                fits.judgements.append(own)
            if fits.judgements:
                found.append(fits)
        return found, too_long

    def step(self, number: int) -> tuple[dict[str, float], dict[str, float]]:
        args = self.args
        clock = Clock()
        self.learner.optimizer.zero_grad()
        seed = step_seed(args.learning.seed, number)
        drawn, failures = self.judge_rows(self.rows(number), seed, args.samples)
        if self.kept is not None:
            drawn += self.kept(number)
        rows, too_long = self.read(drawn)
        if not rows:
            why = f"; {failures[0].error}" if failures else ""
            raise ValueError(f"step {number}: no judgement was valid and fitted{why}. {NO_SCORES}")
        clock.lap("sample")
        metrics: dict[str, float] = {"failed_rows": len(failures), "too_long": too_long}
        metrics |= self.add_gradients(rows)
        metrics |= self.learner.update(number, metrics["loss"], [each.row.id for each in rows])
        clock.lap("update")
        return metrics, clock.seconds

    def add_gradients(self, rows: Sequence[ReadRow]) -> dict[str, float]:
        """Add the gradients of the mean loss over the judgements of rows, or over their pairs; a
        rank takes its share. Returns that loss, and what the logits say."""
        args, model = self.args, self.learner.model
        rights = [own.right for each in rows for own in each.judgements]
        total = len(rights)
        if args.loss == "pairwise":
            total = sum(num_pairs(each) for each in rows)
        loss, logits = add_gradients(model, rows, labelled, args.loss, args.micro_rows, total)
        hits = (logits > 0) == torch.tensor(rights)
        return {
            "loss": loss,
            "judgements": len(rights),
            "right": sum(rights) / len(rights),
            "accuracy": hits.sum().item() / len(rights),
        }

    def evaluate(self) -> dict[str, float]:
        """On judgements of the rows of evaluations, which are sampled once: AUCs, the scale
        of the logits as weights, which the model's judge.json gets, and what votes come to
        with the model and without."""
        args = self.args
        self.learner.refresh()
        if self._dev is None:
            seed = step_seed(args.learning.seed, -1)
            found, _ = self.judge_rows(self.dev_rows, seed, args.evaluation.eval_k)
            self._dev, _ = self.read(found)
        logits = all_logits(self.learner.plain, self._dev, labelled, args.micro_rows)
        dev = labelled(self._dev)
        scale = vote_scale(self._dev, logits)
        self.judge_settings = {"meta_scale": scale}
        told = auc(logits, dev) | {"scale": scale}
        told |= vote_accuracies(self._dev, logits, scale, self.judge.settings.threshold)
        return {f"dev_{name}": value for name, value in told.items()}


def train(args: Args) -> None:
    """Train to the last step, as `train.loop.loop` does."""
    loop(args, MetaTrainer(args))


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train.meta_rm") -> int:
    """Run the command line and return its exit status."""
    return command_line(Args, train, prog=prog, example=EXAMPLE, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
