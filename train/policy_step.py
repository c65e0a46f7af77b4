"""One step of policy gradients: micro-batches of groups, their loss, and what is logged of it."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from engine.judge import Judge
from kernels.logprob import linear_logprob
from kernels.logprob.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from kernels.logprob.policy_loss import PolicyLossOptions, token_weights
from models.lora import adapters_off
from models.transformer import Transformer
from train import parallel
from train.packing import PackedBatch, hidden_states, pack
from train.rollout import Group, SamplingArgs, Scaling, advantages, trajectories_of
from train.settings import check_at_least


@dataclass(frozen=True, kw_only=True)
class LossArgs:
    """Rewards and the policy loss."""

    loss: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"  # which policy loss
    clip_low: float = 0.2  # the ratio is clipped this far below 1
    clip_high: float = 0.2  # the ratio is clipped this far above 1
    beta: float = 0.08  # weight of the KL term; 0: none, and no reference
    kl: Literal["k1", "k2", "k3"] = "k3"  # which estimate of the KL divergence
    reward: str = "rule"  # rule, ties, leave_one_out or MODULE:NAME: see train/rewards.py
    drop_zero_spread: bool = False  # groups whose rewards are all alike teach nothing, not even KL
    scaling: Scaling = "group"  # what advantages are divided by: the deviation of rewards
    epochs: int = 1  # times that a step's judgements are learnt from
    minibatches: int = 1  # updates in each of them
    micro_rows: int = 8  # prompts whose gradients are computed together

    def __post_init__(self) -> None:
        check_at_least(1, self, "epochs", "minibatches", "micro_rows")

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
    judge: Judge,
    reference: Reference | None,
    groups: Sequence[Group],
    args: LossArgs,
    sampling: SamplingArgs,
) -> list[list[Micro]]:
    """The groups of a step as the windows of its updates, each of this rank's micro-batches. Sums
    are divided by the judgements or tokens of the groups that are learnt from, of a window's own:
    of all, or without those that have no spread (the first of these, where no group has any)."""
    if args.drop_zero_spread:
        groups = [group for group in groups if len(set(group.rewards)) > 1] or groups[:1]
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
            micro = _micro(
                judge, reference, of_these, advantage[list(some)], counts, args, sampling
            )
            micros.append(micro if counted else micro.without_weight())
        found.append(micros)
    return found


def _micro(
    judge: Judge,
    reference: Reference | None,
    groups: Sequence[Group],
    advantage: Tensor,
    counts: dict[str, int],
    args: LossArgs,
    sampling: SamplingArgs,
) -> Micro:
    device = judge.model.head_weight.device
    batch = pack([t for group in groups for t in trajectories_of(judge, group)], device)
    lengths = torch.tensor(batch.lengths, device=device)
    old = [p for group in groups for sample in group.samples for p in sample.sampling_logprobs]
    return Micro(
        batch,
        lengths,
        advantage.flatten().to(device).repeat_interleave(lengths, output_size=len(old)),
        token_weights(args.loss, lengths, max_tokens=sampling.max_new_tokens, **counts),
        torch.tensor(old, device=device),
        None if reference is None else reference.logp(batch, sampling.temperature),
        len(old),
    )


def add_gradients(
    model: Transformer, window: Sequence[Micro], args: LossArgs, temperature: float
) -> list[LinearPolicyLoss]:
    """Add the gradients of a window's loss to those of the parameters."""
    found = []
    for micro in window:
        result = linear_policy_loss(
            hidden_states(model, micro.batch), model.head_weight, micro.batch.target,
            micro.advantage, micro.weight, args.options,
            old_logp=micro.old_logp, ref_logp=micro.ref_logp,
            lengths=micro.lengths,
            softcap=model.config.final_softcap, temperature=temperature,
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
