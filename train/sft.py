"""Supervised training of a judge on trajectories; resumable bit for bit.

    python -m train.sft --model DIR --out DIR [--data FILE.jsonl] [--steps N] ...
    torchrun --nproc-per-node N -m train.sft ...

--data holds judgements of rows, or chats, of which the assistant's turns are learnt
(`train/trajectories.py`); without it the trajectories are fresh rows of the synthetic world, judged
by its teacher. Loss is the mean cross-entropy over the tokens of judgements and turns. The finished
model is written to OUT as a Hugging Face directory; what else is there, and how a run continues, is
told in `train/run.py`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from engine.judge import Judge
from engine.request import Row
from kernels.logprob import linear_logprob
from models import load
from models.transformer import Transformer
from train import parallel
from train.evaluation import dev_votes, evaluation_rows, hold_out_of
from train.learner import Learner
from train.loop import Trainer, loop
from train.packing import PackedBatch, hidden_states, pack
from train.rollout import JudgementArgs, judge_of
from train.run import Clock, RunArgs, command_line
from train.settings import check_at_least
from train.sources import conversation_of
from train.trajectories import Batches, Trajectory, file_batches, labelled_trajectory_rows
from train.world.rows import world_batches

EXAMPLE = "--model DIR --out runs/sft --data trajectories.jsonl --steps 500"


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs):
    """Supervised training of a judge."""

    command: ClassVar[str] = "train.sft"
    data: Path | None = None  # JSONL of trajectories or chats; the synthetic world when left out
    rows: int = 20  # rows per step
    micro_rows: int = 32  # rows whose gradients are computed together
    autocast: bool = False  # bf16 matmuls over fp32 weights
    sampling: JudgementArgs = JudgementArgs()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "rows", "micro_rows")


def loss_of(model: Transformer, batch: PackedBatch) -> Tensor:
    """Mean cross-entropy (nats) over the batch's target tokens, a scalar with gradient."""
    hidden = hidden_states(model, batch)
    return -linear_logprob(
        hidden, model.head_weight, batch.target, model.config.final_softcap
    ).logp.mean()


def add_gradients(
    model: Transformer, trajectories: Sequence[Trajectory], micro_rows: int, autocast: bool
) -> tuple[float, int]:
    """Add the gradients of the mean loss over all target tokens of trajectories, of which each rank
    takes its share; returns that loss, and how many tokens were run."""
    device = model.head_weight.device
    total = sum(len(trajectory.completion) for trajectory in trajectories)
    losses, tokens = [], []
    for own, counts in parallel.micro_batches(trajectories, micro_rows):
        batch = pack(own, device)
        share = len(batch.target) / total if counts else 0.0
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(model, batch) * share
        (loss * parallel.world_size()).backward()
        losses.append(loss.item())
        tokens.append(batch.num_tokens if counts else 0)
    return sum(parallel.gather(losses)), sum(parallel.gather(tokens))


class SftTrainer(Trainer[Transformer]):
    """The model under training, the batches that it learns from, and its judge for evaluations."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        model, tokenizer = load(args.model, dtype=args.learning.dtype)
        self.args, self.learner = args, Learner(model, args.learning)
        self.judge = judge_of(self.learner.plain, tokenizer, args.model, args.prompts)
        self.dev: list[Row] = []
        held_out: frozenset[str] = frozenset()
        if args.evaluation.eval_every and args.data and not args.evaluation.eval_data:
            rows = labelled_trajectory_rows(args.data)
            _, self.dev = hold_out_of(args.data, rows, args.evaluation)
            held_out = frozenset(map(conversation_of, self.dev))
        elif args.evaluation.eval_every:
            self.dev = evaluation_rows(args.evaluation, "sft")
        self.batches = _batches(args, self.judge, held_out)

    def step(self, number: int) -> tuple[dict[str, float], dict[str, float]]:
        args, learner = self.args, self.learner
        clock = Clock()
        learner.optimizer.zero_grad()
        batch = self.batches(number)
        loss, tokens = add_gradients(learner.model, batch, args.micro_rows, args.autocast)
        told = learner.update(number, loss, [each.name for each in batch])
        clock.lap("update")
        speed = {"tokens_per_s": tokens / clock.seconds["update"]}
        return {"tokens": tokens, "loss": loss, **told}, clock.seconds | speed

    def evaluate(self) -> dict[str, float]:
        self.learner.refresh()
        return dev_votes(self.judge, self.dev, self.args.evaluation, self.args.sampling)


def train(args: Args) -> None:
    """Train to the last step, as `train.loop.loop` does."""
    loop(args, SftTrainer(args))


def _batches(args: Args, judge: Judge, held_out: frozenset[str]) -> Batches:
    config, seed = judge.model.config, args.learning.seed
    if args.data:
        return file_batches(
            judge.prompts, config.eos_token_ids, args.data, args.rows, seed,
            config.max_position_embeddings, held_out,
        )  # fmt: skip
    end_id = judge.tokenizer.end_id(config.eos_token_ids)
    return world_batches(judge.prompts, end_id, args.rows, seed)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train.sft") -> int:
    """Run the command line and return its exit status."""
    return command_line(Args, train, prog=prog, example=EXAMPLE, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
