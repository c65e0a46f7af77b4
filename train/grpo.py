"""Reinforcement learning of a judge on the rule reward: GRPO and its variants; resumable.

    python -m train.grpo [--model DIR] [--out DIR] [--data ROWS.jsonl] [--steps N] ...

A step samples a group of judgements for each of its rows, with the weights as they are; rewards
them (`train/rollout.py`); packs each group as its tree and takes gradients of the policy loss
without ever holding logits; and updates. Without --data the rows are fresh ones of the synthetic
world. The reference of the KL term is the model that the run began with.

OUT/metrics.jsonl has a line every --log-every steps, OUT/timings.jsonl seconds by phase (it varies
from run to run, so it is no part of what resumes). On-policy, before the first update of a step,
the ratio is 1 and the loss is near 0 by construction: watch reward, accuracy and dev figures.
`logp_difference` is the largest difference between a token's log-prob as the sampler had it and as
the trainer has it before the first update.

Not done here: several devices, LoRA.
"""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from engine.judge import Judge
from engine.prompt import read_judge_settings, read_judge_template
from engine.sample import POCKET
from engine.verdict import Verdict
from kernels.grpo_loss import GRPOLoss, grpo_loss
from kernels.linear_logprob import linear_logprob
from kernels.policy_loss import PolicyLossOptions, token_weights
from models import load
from models.transformer import Transformer
from train.optimizer import cosine_lr, make_optimizer, set_lr
from train.packing import PackedBatch, pack, packed_attention
from train.rollout import (
    Group,
    Rows,
    Scaling,
    advantages,
    describe,
    dev_rows,
    file_rows,
    is_right,
    sample_groups,
    step_seed,
    trajectories_of,
    world_rows,
)
from train.run import Run, check_args


@dataclass(frozen=True)
class Args:
    """Reinforcement learning of a judge on the rule reward."""

    model: Path = POCKET
    out: Path = Path("runs/grpo")
    data: Path | None = None  # a JSONL file of labelled rows; the synthetic world when left out
    steps: int = 12
    rows: int = 16  # prompts per step
    group: int = 4  # judgements per prompt
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.08  # weight of the KL term
    kl: Literal["k1", "k2", "k3"] = "k3"
    scaling: Scaling = "group"  # what advantages are divided by: the deviation of rewards
    epochs: int = 1  # times that a step's judgements are learnt from
    minibatches: int = 1  # updates in each of them
    micro_rows: int = 8  # prompts whose gradients are computed together
    temperature: float = 1.0
    max_new_tokens: int = 512
    orders: Literal["rotate", "random", "fixed"] = "rotate"
    lr: float = 2e-5
    warmup: int = 2
    weight_decay: float = 0.0
    clip: float = 1.0  # of the gradient's norm
    eval_every: int = 0  # steps between votes on dev rows of the synthetic world; 0: never
    eval_rows: int = 200
    eval_k: int = 8
    seed: int = 0
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
    advantage: Tensor
    weight: Tensor  # carries the normaliser of the whole window
    old_logp: Tensor
    ref_logp: Tensor | None


def windows(
    judge: Judge, reference: Transformer | None, groups: Sequence[Group], args: Args
) -> list[list[Micro]]:
    """The groups of a step as the windows of its updates, each of micro-batches."""
    rewards = torch.tensor([group.rewards for group in groups])
    advantage = advantages(rewards, args.scaling)
    found = []
    size = math.ceil(len(groups) / args.minibatches)
    for first in range(0, len(groups), size):
        window = range(first, min(first + size, len(groups)))
        lengths = [len(sample.token_ids) for i in window for sample in groups[i].samples]
        counts = {"num_sequences": len(lengths), "num_tokens": sum(lengths)}
        micros = []
        for start in range(first, window.stop, args.micro_rows):
            some = window[start - first : start - first + args.micro_rows]
            micros.append(
                _micro(judge, reference, [groups[i] for i in some], advantage[list(some)],
                       counts, args)
            )  # fmt: skip
        found.append(micros)
    return found


def _micro(
    judge: Judge,
    reference: Transformer | None,
    groups: Sequence[Group],
    advantage: Tensor,
    counts: dict[str, int],
    args: Args,
) -> Micro:
    device = judge.model.head_weight.device
    batch = pack([t for group in groups for t in trajectories_of(judge, group)], device)
    lengths = torch.tensor(batch.lengths, device=device)
    old = [p for group in groups for sample in group.samples for p in sample.sampling_logprobs]
    ref_logp = None
    if reference is not None:
        with torch.no_grad():
            config = reference.config
            ref_logp = linear_logprob(
                hidden_states(reference, batch), reference.head_weight, batch.target,
                config.final_softcap, args.temperature,
            ).logp  # fmt: skip
    return Micro(
        batch,
        advantage.flatten().to(device).repeat_interleave(lengths),
        token_weights(args.loss, lengths, max_tokens=args.max_new_tokens, **counts),
        torch.tensor(old, device=device),
        ref_logp,
    )


def hidden_states(model: Transformer, batch: PackedBatch) -> Tensor:
    """Of the tokens before those predicted, (R, H)."""
    attend = packed_attention(model.config, batch)
    return model(batch.token_ids, batch.positions, attend)[batch.predicting]


def add_gradients(model: Transformer, window: Sequence[Micro], args: Args) -> list[GRPOLoss]:
    """Add the gradients of a window's loss to those of the parameters."""
    found = []
    for micro in window:
        device = micro.advantage.device
        result = grpo_loss(
            hidden_states(model, micro.batch), model.head_weight, micro.batch.target,
            micro.advantage, micro.weight, args.options,
            old_logp=micro.old_logp, ref_logp=micro.ref_logp,
            lengths=torch.tensor(micro.batch.lengths, device=device),
            softcap=model.config.final_softcap, temperature=args.temperature,
        )  # fmt: skip
        result.loss.backward()
        found.append(result)
    return found


def window_metrics(window: Sequence[Micro], found: Sequence[GRPOLoss]) -> dict[str, float]:
    """Of one update: sums of the loss, means over tokens, extremes."""
    tokens = torch.tensor([len(micro.advantage) for micro in window], dtype=torch.float64)
    share = tokens / tokens.sum()

    def mean(values: list[Tensor]) -> float:
        return float((torch.stack([v.double().cpu() for v in values]) * share).sum())

    terms = [each.terms for each in found]
    return {
        "loss": sum(each.loss.item() for each in found),
        "entropy": mean([each.entropy.mean() for each in found]),
        "kl": mean([term.kl for term in terms]),
        "clipped_low": mean([term.clipped_low for term in terms]),
        "clipped_high": mean([term.clipped_high for term in terms]),
        "ratio_min": min(term.ratio_min.item() for term in terms),
        "ratio_max": max(term.ratio_max.item() for term in terms),
    }


def difference_metrics(window: Sequence[Micro], found: Sequence[GRPOLoss]) -> dict[str, float]:
    """How far the trainer's log-probs are from the sampler's."""
    gap = torch.cat([each.logp - m.old_logp for m, each in zip(window, found, strict=True)])
    ratio = gap.exp()
    return {
        "logp_difference": gap.abs().max().item(),
        "ratio_off": ((ratio < 0.9) | (ratio > 1.1)).double().mean().item(),
    }


class Trainer:
    """The model under training, its judge, and the reference of the KL term."""

    def __init__(self, args: Args) -> None:
        model, tokenizer = load(args.model, dtype=torch.float32)
        self.args, self.model = args, model
        self.reference: Transformer | None = None
        if args.beta:
            self.reference = load(args.model, dtype=torch.float32)[0].requires_grad_(False)
        self.optimizer = make_optimizer(model, args.lr, args.weight_decay)
        self.judge = Judge(
            model,
            tokenizer,
            judge_template=read_judge_template(args.model),
            settings=read_judge_settings(args.model),
        )
        self.left_out: Counter[str] = Counter()
        self.rows: Rows = world_rows("grpo", args.seed, args.rows)
        if args.data is not None:
            self.rows, self.left_out = file_rows(args.data, args.seed, args.rows)

    def step(self, number: int) -> tuple[dict[str, float], dict[str, float]]:
        """One step: its metrics, and the seconds of its phases.

        Raises FloatingPointError naming step and rows where loss or gradients are not finite, and
        ValueError where no row of the step could be judged.
        """
        args = self.args
        clock = Clock()
        groups, failures = sample_groups(
            self.judge, self.rows(number), step_seed(args.seed, number), k=args.group,
            temperature=args.temperature, max_new_tokens=args.max_new_tokens, orders=args.orders,
            stop="eos",
        )  # fmt: skip
        if not groups:
            raise ValueError(f"step {number}: no row could be judged: {failures[0].error}")
        clock.lap("sample")
        parts = windows(self.judge, self.reference, groups, args)
        clock.lap("reference")
        lr = cosine_lr(number, args.steps, args.lr, args.warmup)
        set_lr(self.optimizer, lr)
        metrics: dict[str, float] = {"failed_rows": len(failures), **describe(groups)}
        for epoch in range(args.epochs):
            for i, window in enumerate(parts):
                self.optimizer.zero_grad()
                found = add_gradients(self.model, window, args)
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
                own = window_metrics(window, found) | {"grad_norm": norm.item()}
                if not math.isfinite(own["loss"] + own["grad_norm"]):
                    named = ", ".join(group.row.id for group in groups)
                    raise FloatingPointError(
                        f"step {number}: loss {own['loss']}, gradient norm {own['grad_norm']}; "
                        f"rows {named}"
                    )
                if epoch == i == 0:
                    metrics |= difference_metrics(window, found)
                self.optimizer.step()
        clock.lap("update")
        return metrics | own | {"lr": lr}, clock.seconds

    def dev_votes(self) -> dict[str, float]:
        """Share of dev rows of the synthetic world that a vote of `eval_k` gets right, and that one
        judgement does."""
        args = self.args
        rows = dev_rows("grpo", args.eval_rows)
        threshold = self.judge.settings.threshold
        votes, singles = 0, 0.0
        for row, outcome in zip(
            rows, self.judge.rows(rows, k=args.eval_k, temperature=args.temperature), strict=True
        ):
            assert isinstance(outcome, Verdict) and row.label is not None
            votes += bool(outcome.correct)
            right = [is_right(sample.scores, row.label, threshold) for sample in outcome.samples]
            singles += sum(right) / len(right)
        return {"dev_vote": votes / len(rows), "dev_single": singles / len(rows)}


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """What has passed since the last lap belongs to this phase."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def train(args: Args) -> None:
    """Train to args.steps, resuming where a checkpoint stands; writes the model to args.out.

    Raises ValueError for settings out of range or other than those of the checkpoint, and as
    `Trainer.step` does.
    """
    check_args(args, "rows", "group", "epochs", "minibatches", "micro_rows", "eval_rows", "eval_k")
    if args.group < 2:
        raise ValueError(f"group = {args.group}: a judgement is weighed against others of its row")
    trainer = Trainer(args)
    started = time.monotonic()
    for reason, count in trainer.left_out.most_common():
        print(f"left out: {count} x {reason}", file=sys.stderr)
    with (
        Run(args, trainer.model, trainer.optimizer) as run,
        (args.out / "timings.jsonl").open("a", encoding="utf-8") as timings,
    ):
        steps = range(run.first, args.steps)
        for step in tqdm(steps, initial=run.first, total=args.steps, unit="step"):
            metrics, seconds = trainer.step(step)
            if args.eval_every and (step + 1) % args.eval_every == 0:
                metrics |= trainer.dev_votes()
            timings.write(json.dumps({"step": step + 1, **seconds}) + "\n")
            run.record(step + 1, metrics)
        run.finish()
    summary = {"steps": args.steps, "steps_run": args.steps - run.first}
    left_out = sum(trainer.left_out.values())
    seconds = {"seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(summary | {"left_out": left_out} | seconds), file=sys.stderr)


def main() -> None:
    """The command line."""
    train(tyro.cli(Args, description=Args.__doc__))


if __name__ == "__main__":
    main()
