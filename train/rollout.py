"""Groups of judgements sampled with the trainer's own weights, their rewards and advantages.

Rewards are those of `train/rewards.py`. Reward and advantage are two things:

    advantage = (reward - mean of its group) / std        of the group, of the batch, or 1

with the sample standard deviation (over G - 1, as trl has it) plus 1e-4; where all rewards of a
group are equal it is 0.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from engine.judge import Judge
from engine.labels import is_right
from engine.options import PromptOptions
from engine.prompt import read_chat_template, read_judge_template
from engine.request import Row
from engine.settings import read_judge_settings
from engine.verdict import RowFailure, Sample
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from train import parallel
from train.rewards import Reward, rule
from train.settings import check_at_least, check_positive
from train.trajectories import Trajectory, prompt_segments

Scaling = Literal["none", "group", "batch"]
_EPS = 1e-4


@dataclass(frozen=True, kw_only=True)
class JudgementArgs:
    """The judgements that are sampled."""

    max_new_tokens: int = 512  # longest judgement, in tokens
    deterministic: bool = True  # what is sampled has the same bits in every run on a GPU too

    def __post_init__(self) -> None:
        check_at_least(1, self, "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class SamplingArgs(JudgementArgs):
    """The judgements that are sampled, and how."""

    temperature: float = 1.0  # of the judgements
    orders: Literal["rotate", "random", "fixed"] = "rotate"  # in which responses are shown

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "temperature")


@dataclass(frozen=True)
class Group:
    """A row, its judgements, which of them are right, and their rewards."""

    row: Row
    samples: list[Sample]
    right: list[bool]
    rewards: list[float]


def sample_groups(
    judge: Judge, rows: Iterable[Row], seed: int, reward: Reward = rule, **options: Any
) -> tuple[list[Group], list[RowFailure]]:
    """The judgements of labelled rows, k of each, with their rewards; and the rows that could not
    be judged. Every rank samples its share and has the groups of all. options: those of
    `Judge.rows`."""
    groups: list[Group] = []
    failures: list[RowFailure] = []
    asked = parallel.share(list(rows))
    for row, outcome in zip(asked, judge.rows(asked, seed=seed, **options), strict=True):
        if isinstance(outcome, RowFailure):
            failures.append(outcome)
            continue
        assert row.label is not None
        threshold = judge.settings.threshold
        right = [is_right(sample.scores, row.label, threshold) for sample in outcome.samples]
        rewards = reward(row, outcome.samples, threshold)
        groups.append(Group(row, outcome.samples, right, rewards))
    judge.close()  # the gradients that follow need the room of its cache
    return parallel.gather(groups), parallel.gather(failures)


def tell_if_none_is_valid(step: int, groups: Sequence[Group]) -> None:
    """Say so where not one judgement of a step has scores, why, and what helps."""
    reasons = Counter(sample.invalid for group in groups for sample in group.samples)
    if None in reasons or not parallel.is_first():
        return
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    tqdm.write(
        f"step {step}: no judgement has scores that could be read ({counted}), so there is nothing "
        f"to learn. {NO_SCORES}",
        file=sys.stderr,
    )


# What helps a model that does not write its scores.
NO_SCORES = (
    "Begin with train.sft on judgements in the form that the template asks for, or give another "
    "--template or a larger --max-new-tokens."
)


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's draws."""
    return seed_of(f"quorum-step-{seed}-{step}")


def seed_of(name: str) -> int:
    """The seed of draws that have a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def advantages(rewards: Tensor, scaling: Scaling) -> Tensor:
    """Of rewards (groups, G): (groups, G). Raises ValueError for groups of one."""
    if rewards.shape[1] < 2:
        raise ValueError("a group of one judgement has no advantage over itself")
    centred = rewards - rewards.mean(1, keepdim=True)
    if scaling == "group":
        return centred / (rewards.std(1, keepdim=True) + _EPS)
    if scaling == "batch":
        return centred / (rewards.std() + _EPS)
    return centred


# Judge settings of all that training samples: a model learns the anchor line without a nonce.
TRAINING = {"anchor_nonce": False}


def judge_of(
    model: Transformer, tokenizer: Tokenizer, directory: Path, prompts: PromptOptions
) -> Judge:
    """The judge that a model under training is, with the templates of the directory where it began,
    or with those of `prompts` in their place."""
    return Judge(
        model,
        tokenizer,
        judge_template=read_judge_template(directory, prompts.template),
        chat_template=read_chat_template(directory, prompts.chat_template),
        chat_template_kwargs=prompts.variables,
        date=prompts.date,
        settings=read_judge_settings(directory, prompts.settings | TRAINING),
    )


def trajectories_of(judge: Judge, group: Group) -> list[Trajectory]:
    """What is learnt from: each judgement after the prompt of its own order."""
    return [
        Trajectory(prompt_segments(judge.prompts, group.row, sample.order), sample.token_ids)
        for sample in group.samples
    ]


def describe(groups: Sequence[Group]) -> dict[str, float]:
    """Shares over all judgements, and over groups that of those without spread."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = torch.tensor([group.rewards for group in groups])
    lengths = [sample.tokens for sample in samples]
    return {
        "reward": rewards.mean().item(),
        "accuracy": sum(sum(group.right) for group in groups) / len(samples),
        "zero_spread": (rewards == rewards[:, :1]).all(1).double().mean().item(),
        "invalid": sum(sample.scores is None for sample in samples) / len(samples),
        "truncated": sum(sample.finish == "length" for sample in samples) / len(samples),
        "tokens_mean": sum(lengths) / len(lengths),
        "tokens_max": max(lengths),
    }
