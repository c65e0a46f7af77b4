"""Reinforcement learning of a judge on the rule reward: GRPO and its variants; resumable.

    python -m train.grpo [--model DIR] [--out DIR] [--data ROWS.jsonl] [--steps N] ...
    torchrun --nproc-per-node N -m train.grpo ...

A step samples a group of judgements for each of its rows, with the weights as they are; rewards
them (`train/rollout.py`); packs each group as its tree and takes gradients of the policy loss
without ever holding logits; and updates. Without --data the rows are fresh ones of the synthetic
world; --skip-easy leaves out those rows of --data that a (weak) model has judged right each time,
as OUT/progress.jsonl of `train.rft --sample-only` knows. The reference of the KL term is the model
that the run began with: a frozen copy, or under LoRA the model with its adapters off.

What is written is told in `train/run.py`. On-policy, before the first update of a step, the ratio
is 1 and the loss is near 0 by construction: watch reward, accuracy and dev figures.
`logp_difference` is the largest difference between a token's log-prob as the sampler had it and as
the trainer has it before the first update.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.judge import Judge
from engine.sample import POCKET
from kernels.logprob import linear_logprob
from kernels.logprob.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from kernels.logprob.policy_loss import PolicyLossOptions, token_weights
from models import load
from models.lora import adapters_off
from models.transformer import Transformer
from train import parallel
from train.evaluation import VoteArgs, dev_votes, evaluation_rows
from train.learner import Learner
from train.packing import PackedBatch, hidden_states, pack
from train.rft import easy_rows
from train.rollout import (
    Group,
    Rows,
    Scaling,
    advantages,
    describe,
    file_rows,
    judge_of,
    sample_groups,
    step_seed,
    tell_left_out,
    trajectories_of,
    world_rows,
)
from train.run import Clock, Run, RunArgs, check_args, command_line

EXAMPLE = """\
--model DIR --out runs/grpo --data rows.jsonl \\
    --eval-data dev.jsonl --eval-every 50 --steps 200"""


@dataclass(frozen=True, kw_only=True)
class Args(RunArgs, VoteArgs):
    """Reinforcement learning of a judge on the rule reward."""

    model: Path = POCKET
    out: Path = Path("runs/grpo")
    data: Path | None = None  # a JSONL file of labelled rows; the synthetic world when left out
    skip_easy: Path | None = None  # progress of `train.rft` on that file
    steps: int = 12
    rows: int = 16  # prompts per step
    group: int = 4  # judgements per prompt
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"  # which policy loss
    clip_low: float = 0.2  # the ratio is clipped this far below 1
    clip_high: float = 0.2  # the ratio is clipped this far above 1
    beta: float = 0.08  # weight of the KL term; 0: none, and no reference
    kl: Literal["k1", "k2", "k3"] = "k3"  # which estimate of the KL divergence
    scaling: Scaling = "group"  # what advantages are divided by: the deviation of rewards
    epochs: int = 1  # times that a step's judgements are learnt from
    minibatches: int = 1  # updates in each of them
    micro_rows: int = 8  # prompts whose gradients are computed together
    temperature: float = 1.0  # of the judgements
    orders: Literal["rotate", "random", "fixed"] = "rotate"  # in which responses are shown
    lr: float = 2e-5
    warmup: int = 2
    weight_decay: float = 0.0
    log_every: int = 1
    save_every: int = 50

    @property
    def options(self) -> PolicyLossOptions:
        """Those of the loss."""
        level = "sequence" if self.loss == "gspo" else "token"
        return PolicyLossOptions(self.clip_low, self.clip_high, self.beta, self.kl, level)


@dataclass(frozen=True)
class Micro:
    """Some groups, packed, and what belongs to their R predicted tokens, each (R,) float32."""

    batch: PackedBatch
    lengths: Tensor  # of the trajectories, int64
    advantage: Tensor
    weight: Tensor  # carries the normaliser of the whole window
    old_logp: Tensor
    ref_logp: Tensor | None
    num_tokens: int  # that count, R or 0

    def without_weight(self) -> "Micro":
        """Of no effect: it keeps step with the micro-batches of other ranks."""
        return replace(self, weight=torch.zeros_like(self.weight), num_tokens=0)


class Reference:
    """The model of the KL term: frozen, or the trained one with its adapters off."""

    def __init__(self, model: Transformer, adapted: bool) -> None:
        self._model, self._adapted = model, adapted

    @torch.no_grad()
    def logp(self, batch: PackedBatch, temperature: float) -> Tensor:
        """Of the predicted tokens of a batch, (R,) float32."""
        model = self._model
        with adapters_off(model) if self._adapted else nullcontext():
            return linear_logprob(
                hidden_states(model, batch), model.head_weight, batch.target,
                model.config.final_softcap, temperature,
            ).logp  # fmt: skip


def windows(
    judge: Judge, reference: Reference | None, groups: Sequence[Group], args: Args
) -> list[list[Micro]]:
    """The groups of a step as the windows of its updates, each of this rank's micro-batches."""
    rewards = torch.tensor([group.rewards for group in groups])
    advantage = advantages(rewards, args.scaling)
    found = []
    size = math.ceil(len(groups) / args.minibatches)
    for first in range(0, len(groups), size):
        window = range(first, min(first + size, len(groups)))
        lengths = [len(sample.token_ids) for i in window for sample in groups[i].samples]
        counts = {"num_sequences": len(lengths), "num_tokens": sum(lengths)}
        micros = []
        for some, counted in parallel.micro_batches(window, args.micro_rows):
            of_these = [groups[i] for i in some]
            micro = _micro(judge, reference, of_these, advantage[list(some)], counts, args)
            micros.append(micro if counted else micro.without_weight())
        found.append(micros)
    return found


def _micro(
    judge: Judge,
    reference: Reference | None,
    groups: Sequence[Group],
    advantage: Tensor,
    counts: dict[str, int],
    args: Args,
) -> Micro:
    device = judge.model.head_weight.device
    batch = pack([t for group in groups for t in trajectories_of(judge, group)], device)
    lengths = torch.tensor(batch.lengths, device=device)
    old = [p for group in groups for sample in group.samples for p in sample.sampling_logprobs]
    return Micro(
        batch,
        lengths,
        advantage.flatten().to(device).repeat_interleave(lengths, output_size=len(old)),
        token_weights(args.loss, lengths, max_tokens=args.max_new_tokens, **counts),
        torch.tensor(old, device=device),
        None if reference is None else reference.logp(batch, args.temperature),
        len(old),
    )


def add_gradients(
    model: Transformer, window: Sequence[Micro], args: Args
) -> list[LinearPolicyLoss]:
    """Add the gradients of a window's loss to those of the parameters."""
    found = []
    for micro in window:
        result = linear_policy_loss(
            hidden_states(model, micro.batch), model.head_weight, micro.batch.target,
            micro.advantage, micro.weight, args.options,
            old_logp=micro.old_logp, ref_logp=micro.ref_logp,
            lengths=micro.lengths,
            softcap=model.config.final_softcap, temperature=args.temperature,
        )  # fmt: skip
        (result.loss * parallel.world_size()).backward()
        found.append(result)
    return found


def window_metrics(window: Sequence[Micro], found: Sequence[LinearPolicyLoss]) -> dict[str, float]:
    """Of one update, over all ranks: sums of the loss, means over tokens, extremes; and how far the
    trainer's log-probs are from the sampler's."""
    own = [
        _micro_metrics(micro, each) | {"tokens": micro.num_tokens}
        for micro, each in zip(window, found, strict=True)
        if micro.num_tokens
    ]
    parts = parallel.gather(own)
    tokens = sum(part["tokens"] for part in parts)

    def of(name: str) -> float:
        values = [part[name] for part in parts]
        if name == "loss":
            return sum(values)
        if name in _EXTREMES:
            return _EXTREMES[name](values)
        return sum(v * part["tokens"] for v, part in zip(values, parts, strict=True)) / tokens

    return {name: of(name) for name in parts[0] if name != "tokens"}


_EXTREMES: dict[str, Callable[[list[float]], float]] = {
    "ratio_min": min,
    "ratio_max": max,
    "logp_difference": max,
}


def _micro_metrics(micro: Micro, found: LinearPolicyLoss) -> dict[str, float]:
    terms, gap = found.terms, found.logp - micro.old_logp
    ratio = gap.exp()
    values = {
        "loss": found.loss,
        "entropy": found.entropy.mean(),
        "kl": terms.kl,
        "clipped_low": terms.clipped_low,
        "clipped_high": terms.clipped_high,
        "ratio_min": terms.ratio_min,
        "ratio_max": terms.ratio_max,
        "logp_difference": gap.abs().max(),
        "ratio_off": ((ratio < 0.9) | (ratio > 1.1)).double().mean(),
    }
    told = torch.stack([value.double() for value in values.values()]).tolist()  # one host sync
    return dict(zip(values, told, strict=True))


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
            self.judge, self.rows(number), step_seed(args.seed, number), k=args.group,
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
