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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.sample import POCKET
from models import load
from train import parallel
from train.evaluation import dev_votes, evaluation_rows
from train.learner import Learner
from train.policy_step import PolicyArgs, Reference, add_gradients, window_metrics, windows
from train.rejection_log import easy_rows
from train.rewards import reward_of
from train.rollout import describe, judge_of, sample_groups, step_seed
from train.run import Clock, Run, RunArgs, check_args, command_line
from train.sources import Rows, file_rows, tell_left_out
from train.world.rows import world_rows

EXAMPLE = """\
--model DIR --out runs/grpo --data rows.jsonl \\
    --eval-data dev.jsonl --eval-every 50 --steps 200"""


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs, PolicyArgs):
    """Reinforcement learning of a judge on labelled rows."""

    model: Path = POCKET
    out: Path = Path("runs/grpo")
    data: Path | None = None  # a JSONL file of labelled rows; the synthetic world when left out
    skip_easy: Path | None = None  # progress of `train.rft` on that file
    steps: int = 12
    rows: int = 16  # prompts per step
    group: int = 4  # judgements per prompt
    orders: Literal["rotate", "random", "fixed"] = "rotate"  # in which responses are shown
    lr: float = 2e-5
    warmup: int = 2
    weight_decay: float = 0.0
    log_every: int = 1
    save_every: int = 50


class Trainer:
    """The model under training, its judge, and the reference of the KL term."""

    def __init__(self, args: Args) -> None:
        model, tokenizer = load(args.model, dtype=args.dtype)
        self.args, self.learner = args, Learner(model, args)
        self.reference: Reference | None = None
        if args.beta and args.lora_rank:
            self.reference = Reference(self.learner.model, adapted=True)
        elif args.beta:
            frozen = load(args.model, dtype=args.dtype)[0].requires_grad_(False)
            parallel.shard(frozen)
            self.reference = Reference(frozen, adapted=False)
        self.judge = judge_of(self.learner.plain, tokenizer, args.model)
        self.reward = reward_of(args.reward)
        self.left_out: Counter[str] = Counter()
        self.rows: Rows = world_rows("grpo", args.seed, args.rows)
        if args.data is not None:
            skip = easy_rows(args.skip_easy, args.data) if args.skip_easy else frozenset()
            self.rows, self.left_out = file_rows(args.data, args.seed, args.rows, skip)
        self.dev = evaluation_rows(args, "grpo")

    def step(self, number: int) -> tuple[dict[str, float], dict[str, float]]:
        """One step: its metrics, and the seconds of its phases.

        Raises FloatingPointError naming step and rows where loss or gradients are not finite, and
        ValueError where no row of the step could be judged.
        """
        args, learner = self.args, self.learner
        clock = Clock()
        learner.refresh()
        groups, failures = sample_groups(
            self.judge, self.rows(number), step_seed(args.seed, number), self.reward, k=args.group,
            temperature=args.temperature, max_new_tokens=args.max_new_tokens, orders=args.orders,
            deterministic=args.deterministic, stop="eos",
        )  # fmt: skip
        if not groups:
            raise ValueError(f"step {number}: no row could be judged: {failures[0].error}")
        clock.lap("sample")
        parts = windows(self.judge, self.reference, groups, args)
        clock.lap("reference")
        metrics: dict[str, float] = {"failed_rows": len(failures), **describe(groups)}
        named = [group.row.id for group in groups]
        for epoch in range(args.epochs):
            for i, window in enumerate(parts):
                learner.optimizer.zero_grad()
                own = window_metrics(window, add_gradients(learner.model, window, args))
                own |= learner.update(number, own["loss"], named)
                if epoch == i == 0:
                    first = {name: own[name] for name in ("logp_difference", "ratio_off")}
        clock.lap("update")
        return metrics | own | first, clock.seconds

    def votes(self) -> dict[str, float]:
        """Of the model as it is, on dev rows."""
        self.learner.refresh()
        return dev_votes(self.judge, self.dev, self.args)


def train(args: Args) -> None:
    """Train to args.steps, resuming where a checkpoint stands; writes the model to args.out.

    Raises ValueError for settings out of range or other than those of the checkpoint, and as
    `Trainer.step` does.
    """
    check_args(args, "rows", "group", "epochs", "minibatches", "micro_rows", "eval_rows", "eval_k")
    if args.group < 2:
        raise ValueError(f"group = {args.group}: a judgement is weighed against others of its row")
    if not args.temperature > 0:
        raise ValueError(f"temperature = {args.temperature}: greedy judgements are all the same")
    if args.skip_easy and not args.data:
        raise ValueError("skip_easy is about the rows of a file, and there is no data")
    trainer = Trainer(args)
    tell_left_out(trainer.left_out)
    with Run(args, trainer.learner) as run:
        for step in run.steps():
            metrics, timings = trainer.step(step)
            if args.is_due(step + 1):
                clock = Clock()
                metrics |= trainer.votes()
                clock.lap("evaluate")
                timings |= clock.seconds
            shown = ("accuracy", "kl", "loss")
            run.record(step + 1, metrics, timings, shown=shown, score=metrics.get("dev_vote"))
        run.finish(left_out=trainer.left_out.total())


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train.grpo") -> int:
    """Run the command line and return its exit status."""
    return command_line(Args, train, prog=prog, example=EXAMPLE, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
