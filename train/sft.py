"""Supervised training of a judge on trajectories; resumable bit for bit.

    python -m train.sft --model DIR --out DIR [--data FILE.jsonl] [--steps N] ...
    torchrun --nproc-per-node N -m train.sft ...

Without --data the trajectories are fresh rows of the synthetic world, judged by its teacher. Loss
is the mean cross-entropy over the tokens of the judgements. The finished model is written to OUT as
a Hugging Face directory; what else is there, and how a run continues, is told in `train/run.py`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.judge import Judge
from kernels.logprob import linear_logprob
from models import load
from models.transformer import Transformer
from train import parallel
from train.evaluation import VoteArgs, dev_votes, evaluation_rows
from train.learner import Learner
from train.packing import PackedBatch, hidden_states, pack
from train.rollout import judge_of
from train.run import Clock, Run, RunArgs, check_args, command_line
from train.trajectories import Batches, Trajectory, file_batches
from train.world.rows import world_batches

EXAMPLE = "--model DIR --out runs/sft --data trajectories.jsonl --steps 500"


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs, VoteArgs):
    """Supervised training of a judge."""

    data: Path | None = None  # a JSONL file of trajectories; the synthetic world when left out
    rows: int = 20  # rows per step
    micro_rows: int = 32  # rows whose gradients are computed together
    autocast: bool = False  # bf16 matmuls over fp32 weights


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


def train(args: Args) -> None:
    """Train to args.steps, resuming where a checkpoint stands; writes the model to args.out.

    Raises ValueError for settings out of range or other than those of the checkpoint, and
    FloatingPointError naming the step and its rows at which loss or gradients are not finite.
    """
    check_args(args, "rows", "micro_rows", "eval_rows", "eval_k")
    model, tokenizer = load(args.model, dtype=args.dtype)
    learner = Learner(model, args)
    judge = judge_of(learner.plain, tokenizer, args.model)
    batches = _batches(args, judge)
    rows = evaluation_rows(args, "sft")
    with Run(args, learner) as run:
        tokens = run.state.get("tokens", 0)
        for step in run.steps():
            clock = Clock()
            learner.optimizer.zero_grad()
            batch = batches(step)
            loss, num_tokens = add_gradients(learner.model, batch, args.micro_rows, args.autocast)
            tokens += num_tokens
            told = learner.update(step, loss, [each.name for each in batch])
            metrics = {"tokens": tokens, "loss": loss, **told}
            clock.lap("update")
            speed = {"tokens_per_s": num_tokens / clock.seconds["update"]}
            if args.is_due(step + 1):
                learner.refresh()
                metrics |= dev_votes(judge, rows, args)
                clock.lap("evaluate")
            run.record(
                step + 1, metrics, clock.seconds | speed, score=metrics.get("dev_vote"),
                tokens=tokens,
            )  # fmt: skip
        run.finish(tokens=tokens)


def _batches(args: Args, judge: Judge) -> Batches:
    end_id = judge.tokenizer.end_id(judge.model.config.eos_token_ids)
    if args.data:
        longest = judge.model.config.max_position_embeddings
        return file_batches(judge.prompts, end_id, args.data, args.rows, args.seed, longest)
    return world_batches(judge.prompts, end_id, args.rows, args.seed)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train.sft") -> int:
    """Run the command line and return its exit status."""
    return command_line(Args, train, prog=prog, example=EXAMPLE, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
