"""Reinforcement learning of a judge on labelled rows: GRPO and its variants; resumable.

    python -m train.grpo [--model DIR] [--out DIR] [--data ROWS.jsonl] [--steps N] ...
    torchrun --nproc-per-node N -m train.grpo ...

A step samples a group of judgements for each of its rows, with the weights as they are; rewards
them (`train/rewards.py`); packs each group as its tree and takes gradients of the policy loss
without ever holding logits; and updates. Without --data the rows are fresh ones of the synthetic
world; --skip-easy leaves out those rows of --data that a (weak) model has judged right each time,
as OUT/progress.jsonl of `train.rft --sample-only` knows. The reference of the KL term is the model
that the run began with: a frozen copy, or under LoRA the model with its adapters off.

What is written is told in `train/run.py`. On-policy, before the first update of a step, the ratio
is 1 and the loss is near 0 by construction: watch reward, accuracy and dev figures.
`logp_difference` is the largest difference between a token's log-prob as the sampler had it and as
the trainer has it before the first update.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from engine.request import Row
from models import load
from models.transformer import Transformer
from train import parallel
from train.evaluation import dev_votes, divide
from train.learner import Learner, LearnerArgs
from train.loop import Trainer, loop
from train.policy_step import LossArgs, Reference, add_gradients, window_metrics, windows
from train.rejection_log import easy_rows
from train.rewards import reward_of
from train.rollout import (
    SamplingArgs,
    describe,
    judge_of,
    sample_groups,
    step_seed,
    tell_if_none_is_valid,
)
from train.run import Clock, LogArgs, RunArgs, command_line
from train.settings import check_at_least
from train.sources import Rows, batches_of
from train.world import BASE
from train.world.rows import world_rows

EXAMPLE = """\
--model DIR --out runs/grpo --data rows.jsonl \\
    --eval-data dev.jsonl --eval-every 50 --steps 200"""


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs):
    """Reinforcement learning of a judge on labelled rows."""

    command: ClassVar[str] = "train.grpo"
    model: Path = BASE
    out: Path = Path("runs/grpo")
    data: Path | None = None  # a JSONL file of labelled rows; the synthetic world when left out
    skip_easy: Path | None = None  # progress of `train.rft` on that file
    rows: int = 16  # prompts per step
    group: int = 4  # judgements per prompt
    sampling: SamplingArgs = SamplingArgs()
    policy: LossArgs = LossArgs()
    learning: LearnerArgs = LearnerArgs(steps=12, lr=2e-5, warmup=2, weight_decay=0.0)
    logging: LogArgs = LogArgs(log_every=1, save_every=50)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "rows")
        if self.group < 2:
            raise ValueError(
                f"group = {self.group}: a judgement is weighed against others of its row"
            )
        if self.skip_easy and not self.data:
            raise ValueError("skip_easy is about the rows of a file, and there is no data")


class GrpoTrainer(Trainer[Transformer]):
    """The model under training, its judge, and the reference of the KL term."""

    shown = ("reward", "accuracy", "kl", "entropy", "loss")

    def __init__(self, args: Args) -> None:
        super().__init__()
        model, tokenizer = load(args.model, dtype=args.learning.dtype)
        self.args, self.learner = args, Learner(model, args.learning)
        self.reference: Reference | None = None
        if args.policy.beta and args.learning.lora_rank:
            self.reference = Reference(self.learner.model, adapted=True)
        elif args.policy.beta:
            frozen = load(args.model, dtype=args.learning.dtype)[0].requires_grad_(False)
            parallel.shard(frozen)
            self.reference = Reference(frozen, adapted=False)
        self.judge = judge_of(self.learner.plain, tokenizer, args.model, args.prompts)
        self.reward = reward_of(args.policy.reward)
        found, self.dev, self.left_out = divide(
            args.data, args.evaluation, "grpo", evaluates=args.evaluation.eval_every > 0
        )
        self.rows = self._rows(found)

    def _rows(self, found: list[Row] | None) -> Rows:
        """Batches of the rows of a file that are not too easy, or of the world."""
        args = self.args
        if found is None or args.data is None:
            return world_rows("grpo", args.learning.seed, args.rows)
        skip = easy_rows(args.skip_easy, args.data) if args.skip_easy else frozenset()
        kept = [row for row in found if row.id not in skip]
        if len(kept) < len(found):
            self.left_out["too easy"] = len(found) - len(kept)
        if not kept:
            raise ValueError(f"{args.data}: all {len(found)} rows are to be skipped")
        return batches_of(kept, args.rows, args.learning.seed)

    def step(self, number: int) -> tuple[dict[str, float], dict[str, float]]:
        args, learner = self.args, self.learner
        clock = Clock()
        learner.refresh()
        groups, failures = sample_groups(
            self.judge, self.rows(number), step_seed(args.learning.seed, number), self.reward,
            k=args.group, stop="eos", **vars(args.sampling),
        )  # fmt: skip
        if not groups:
            raise ValueError(f"step {number}: no row could be judged: {failures[0].error}")
        tell_if_none_is_valid(number, groups)
        clock.lap("sample")
        parts = windows(self.judge, self.reference, groups, args.policy, args.sampling)
        clock.lap("reference")
        metrics: dict[str, float] = {"failed_rows": len(failures), **describe(groups)}
        named = [group.row.id for group in groups]
        for epoch in range(args.policy.epochs):
            for i, window in enumerate(parts):
                learner.optimizer.zero_grad()
                found = add_gradients(learner.model, window, args.policy, args.sampling.temperature)
                own = window_metrics(window, found)
                own |= learner.update(number, own["loss"], named)
                if epoch == i == 0:
                    first = {name: own[name] for name in ("logp_difference", "ratio_off")}
        clock.lap("update")
        return metrics | own | first, clock.seconds

    def evaluate(self) -> dict[str, float]:
        self.learner.refresh()
        return dev_votes(self.judge, self.dev, self.args.evaluation, self.args.sampling)


def train(args: Args) -> None:
    """Train to the last step, as `train.loop.loop` does."""
    loop(args, GrpoTrainer(args))


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train.grpo") -> int:
    """Run the command line and return its exit status."""
    return command_line(Args, train, prog=prog, example=EXAMPLE, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
