"""Groups of judgements sampled with the trainer's own weights, their rewards and advantages.

A judgement of a labelled row is right when it says so strictly: with n >= 2 responses the labelled
best alone has the highest score; with one response its score is on the label's side of the
threshold. The reward is +1 or -1; an invalid judgement gets -1, and is counted. Reward and
advantage are two things:

    advantage = (reward - mean of its group) / std        of the group, of the batch, or 1

with the sample standard deviation (over G - 1, as trl has it) plus 1e-4; where all rewards of a
group are equal it is 0.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engine.judge import Judge
from engine.labels import has_best, is_right
from engine.prompt import read_judge_template
from engine.reading import open_rows, read_rows
from engine.request import BadRow, Row, make_row
from engine.settings import read_judge_settings
from engine.verdict import RowFailure, Sample
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from train import parallel
from train.data import Trajectory, epochs, prompt_segments
from train.world import Split, cases

Rows = Callable[[int], list[Row]]  # batch number -> its rows
Scaling = Literal["none", "group", "batch"]
_EPS = 1e-4


@dataclass(frozen=True)
class Group:
    """A row, its judgements and their rewards."""

    row: Row
    samples: list[Sample]
    rewards: list[float]


def world_rows(name: str, seed: int, rows: int) -> Rows:
    """Fresh rows of the synthetic world's train split, the same for the same name and seed."""

    def batch(number: int) -> list[Row]:
        stream = f"{name}-{seed}-{number}"
        return split_rows(stream, "train", rows, stream)

    return batch


def dev_rows(name: str, rows: int) -> list[Row]:
    """Rows of the synthetic world's dev split, the same for the same name."""
    return split_rows(name, "dev", rows, "dev")


def split_rows(stream: str | int, split: Split, rows: int, prefix: str) -> list[Row]:
    """The first labelled rows of a stream of the synthetic world's cases; ids are PREFIX-NUMBER."""
    drawn = (case.row() for case in islice(cases(stream, split), rows))
    return [
        make_row(row["prompt"], row["responses"], id=f"{prefix}-{i}", label=row["label"])
        for i, row in enumerate(drawn)
    ]


def file_rows(
    path: Path, seed: int, rows: int, skip: frozenset[str] = frozenset()
) -> tuple[Rows, Counter[str]]:
    """Rows of a JSONL file, in a new seeded permutation every epoch, without those whose ids are in
    `skip`; and how many lines were left out for which reason. Raises ValueError where no row is
    left."""
    found, left_out = labelled_rows(path)
    kept = [row for row in found if row.id not in skip]
    left_out["too easy"] = len(found) - len(kept)
    if not kept:
        raise ValueError(f"{path}: all {len(found)} rows are to be skipped")
    return lambda number: epochs(kept, number, rows, seed), +left_out


def tell_left_out(left_out: Counter[str]) -> None:
    """Say what lines of a file were left out, and why."""
    for reason, count in left_out.most_common() if parallel.is_first() else ():
        print(f"left out: {count} x {reason}", file=sys.stderr)


def labelled_rows(path: Path) -> tuple[list[Row], Counter[str]]:
    """The labelled rows of a file, and how many lines were left out for which reason: bad rows, and
    rows without a label or with a tie. Raises ValueError where there is no labelled row."""
    kept: list[Row] = []
    left_out: Counter[str] = Counter()
    with open_rows(path) as stream:
        for row in read_rows(stream):
            if isinstance(row, BadRow):
                left_out[f"line {row.line}: {row.error}"] += 1
            elif not has_best(row.label):
                left_out["no label" if row.label is None else "a tie"] += 1
            else:
                kept.append(row)
    if not kept:
        raise ValueError(f"{path} holds no row with a label: {dict(left_out)}")
    return kept, left_out


def sample_groups(
    judge: Judge, rows: Iterable[Row], seed: int, **options: Any
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
        rewards = [
            1.0 if is_right(sample.scores, row.label, judge.settings.threshold) else -1.0
            for sample in outcome.samples
        ]
        groups.append(Group(row, outcome.samples, rewards))
    return parallel.gather(groups), parallel.gather(failures)


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


def judge_of(model: Transformer, tokenizer: Tokenizer, directory: Path) -> Judge:
    """The judge that a model under training is, with the templates of where it began."""
    template, settings = read_judge_template(directory), read_judge_settings(directory, TRAINING)
    return Judge(model, tokenizer, judge_template=template, settings=settings)


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
        "accuracy": (rewards > 0).double().mean().item(),
        "zero_spread": (rewards == rewards[:, :1]).all(1).double().mean().item(),
        "invalid": sum(sample.scores is None for sample in samples) / len(samples),
        "truncated": sum(sample.finish == "length" for sample in samples) / len(samples),
        "tokens_mean": sum(lengths) / len(lengths),
        "tokens_max": max(lengths),
    }
