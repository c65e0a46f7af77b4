"""Training of a meta reward model: which of a judge's judgements are right; resumable.

    python -m train.meta_rm [--model DIR] [--judge DIR] [--out DIR] [--data ROWS.jsonl]
                            [--judgements RFT/judgements.jsonl] ...

The meta model begins as the decoder of --model under a new score weight of zeros. A step samples
judgements of its rows with the judge (by default --model itself), labels the valid ones right or
wrong by the rule of `train/rollout.py`, adds judgements of other rows that `train.rft` kept, if
given, and learns to tell them apart, each read as `engine/meta.py` reads it: the prompt in its
order, the text, the end token. All judgements of a row are packed as one tree. Losses:

    pointwise   binary cross-entropy of every judgement's logit with its label
    pairwise    -log sigmoid(right - wrong), over all pairs of a right and a wrong one of a row

Without --data the rows are fresh ones of the synthetic world. OUT is a sequence classifier with one
label, which `engine.sample --meta-model` and transformers load. Evaluation is on dev rows of the
world, sampled once: the AUC within rows that have right and wrong judgements is what filtering
gains from; the pooled one can be high by telling hard rows from easy ones.

Not done here: several devices; a score read from the judge's own hidden state.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from tqdm import tqdm

from engine.judge import Judge
from engine.meta import MetaModel
from engine.prompt import read_judge_settings, read_judge_template
from engine.request import Row
from engine.sample import POCKET
from models import load
from models.config import read_json
from models.scalar_head import ScalarModel
from models.tokenizer import Tokenizer
from train.data import JudgedRow, Trajectory, file_judgements
from train.grpo import hidden_states
from train.optimizer import cosine_lr, make_optimizer, set_lr
from train.packing import pack
from train.rollout import Group, Rows, dev_rows, file_rows, sample_groups, step_seed, world_rows
from train.run import Run, check_args


@dataclass(frozen=True)
class Args:
    """Training of a meta reward model."""

    model: Path = POCKET  # what it begins as: a causal language model
    judge: Path | None = None  # whose judgements; the model's when left out
    out: Path = Path("runs/meta_rm")
    data: Path | None = None  # a JSONL file of labelled rows; the synthetic world when left out
    steps: int = 100
    rows: int = 16  # per step, to be judged
    samples: int = 4  # judgements per row
    judgements: Path | None = None  # a JSONL file of judgements, right and wrong
    judged_rows: int = 16  # per step, from that file
    temperature: float = 1.0  # of the judgements
    max_new_tokens: int = 512
    loss: Literal["pointwise", "pairwise"] = "pointwise"
    lr: float = 1e-4
    warmup: int = 10
    weight_decay: float = 0.1
    clip: float = 1.0
    eval_every: int = 0  # steps between evaluations; 0: only after the last
    eval_rows: int = 100
    eval_samples: int = 8
    seed: int = 0
    log_every: int = 1
    save_every: int = 50


@dataclass(frozen=True)
class Labelled:
    """Judgements, row by row: trajectories that are read at their last token but one, whether each
    is right, and the number of its row."""

    trajectories: list[Trajectory]
    right: Tensor  # (S,) bool
    row: Tensor  # (S,) int64


def scalar_of(directory: Path) -> tuple[ScalarModel, Tokenizer]:
    """A scalar model with the decoder of a causal language model, in float32; its score is 0."""
    decoder, tokenizer = load(directory, dtype=torch.float32)
    pad = read_json(directory / "config.json").get("pad_token_id")
    model = ScalarModel(replace(decoder.config, tied=True, pad_token_id=pad)).float()
    weights = decoder.state_dict()
    model.model.load_state_dict({k: v for k, v in weights.items() if k != "lm_head.weight"})
    torch.nn.init.zeros_(model.score.weight)
    return model, tokenizer


def judged(groups: Sequence[Group]) -> list[JudgedRow]:
    """The valid judgements of groups."""
    return [
        JudgedRow(
            group.row,
            [
                (sample.order, sample.text, reward > 0)
                for sample, reward in zip(group.samples, group.rewards, strict=True)
                if sample.scores is not None
            ],
        )
        for group in groups
    ]


def labelled(meta: MetaModel, rows: Sequence[JudgedRow]) -> Labelled:
    """The judgements of rows, as the meta model reads them."""
    trajectories, right, numbers = [], [], []
    for number, each in enumerate(rows):
        for order, text, is_right in each.judgements:
            # The last token of a completion is a target only; it is not read.
            completion = (*meta.judgement(text), 0)
            trajectories.append(Trajectory(meta.prompt(each.row, order), completion))
            right.append(is_right)
            numbers.append(number)
    return Labelled(trajectories, torch.tensor(right, dtype=torch.bool), torch.tensor(numbers))


def logits_of(model: ScalarModel, judgements: Labelled) -> Tensor:
    """(S,) float32, with gradient."""
    batch = pack(judgements.trajectories, model.score.weight.device)
    hidden = hidden_states(model.model, batch)
    last = torch.tensor(batch.lengths, device=hidden.device).cumsum(0) - 1
    return model.logits(hidden[last])


def loss_of(logits: Tensor, judgements: Labelled, kind: str) -> Tensor:
    """The mean loss; 0 where there is nothing to tell apart."""
    right = judgements.right.to(logits.device)
    if kind == "pointwise":
        return binary_cross_entropy_with_logits(logits, right.to(logits.dtype))
    better, worse = pairs(judgements)
    if not len(better):
        return 0 * logits.sum()
    return -logsigmoid(logits[better] - logits[worse]).mean()


def pairs(judgements: Labelled) -> tuple[Tensor, Tensor]:
    """Every right judgement with every wrong one of its row, as places: (P,) int64 each."""
    right, row = judgements.right, judgements.row
    found = (right[:, None] & ~right) & (row[:, None] == row)
    better, worse = found.nonzero(as_tuple=True)
    return better, worse


def auc(scores: Tensor, judgements: Labelled) -> dict[str, float]:
    """Chance that a right judgement is scored above a wrong one, a tie being half: of all pairs,
    and the mean over rows that have both of the pairs within. NaN where there is no pair."""
    right = judgements.right
    win = (scores[:, None] > scores).double() + (scores[:, None] == scores).double() / 2
    within = []
    for number in judgements.row.unique():
        mine = judgements.row == number
        if (mine & right).any() and (mine & ~right).any():
            within.append(win[mine & right][:, mine & ~right].mean())
    pooled = win[right][:, ~right]
    return {
        "auc": pooled.mean().item(),
        "auc_within_rows": torch.stack(within).mean().item() if within else math.nan,
        "rows_with_both": len(within),
    }


class Trainer:
    """The meta model under training, and the judge that it reads."""

    def __init__(self, args: Args) -> None:
        model, tokenizer = scalar_of(args.model)
        template, settings = read_judge_template(args.model), read_judge_settings(args.model)
        self.args, self.model = args, model
        self.meta = MetaModel(model, tokenizer, judge_template=template, settings=settings)
        self.judge = Judge.load(args.judge or args.model, dtype=torch.float32)
        self.optimizer = make_optimizer(model, args.lr, args.weight_decay)
        self.rows: Rows = world_rows("meta", args.seed, args.rows)
        self.left_out = 0
        if args.data is not None:
            self.rows, left_out = file_rows(args.data, args.seed, args.rows)
            self.left_out = sum(left_out.values())
        self.kept: Callable[[int], list[JudgedRow]] | None = None
        if args.judgements is not None:
            self.kept = file_judgements(args.judgements, args.judged_rows, args.seed)
        self._dev: Labelled | None = None

    def judge_rows(self, rows: Sequence[Row], seed: int, samples: int) -> list[JudgedRow]:
        """The judge's valid judgements of rows."""
        args = self.args
        if not rows:
            return []
        groups, _ = sample_groups(
            self.judge, rows, seed, k=samples, temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
        )  # fmt: skip
        return judged(groups)

    def step(self, number: int) -> dict[str, float]:
        """One step: its metrics. Raises FloatingPointError naming the step and its rows where loss
        or gradients are not finite, and ValueError where no judgement was valid."""
        args = self.args
        rows = self.judge_rows(self.rows(number), step_seed(args.seed, number), args.samples)
        if self.kept is not None:
            rows += self.kept(number)
        judgements = labelled(self.meta, rows)
        if not judgements.trajectories:
            raise ValueError(f"step {number}: no judgement was valid")
        lr = cosine_lr(number, args.steps, args.lr, args.warmup)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad()
        logits = logits_of(self.model, judgements)
        loss = loss_of(logits, judgements, args.loss)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        if not math.isfinite(loss.item() + norm.item()):
            named = ", ".join(each.row.id for each in rows)
            raise FloatingPointError(
                f"step {number}: loss {loss.item()}, gradient norm {norm.item()}; rows {named}"
            )
        self.optimizer.step()
        right = judgements.right
        return {
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "lr": lr,
            "judgements": len(right),
            "right": right.double().mean().item(),
            "accuracy": ((logits.detach().cpu() > 0) == right).double().mean().item(),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """AUCs on judgements of dev rows of the synthetic world, which are sampled once."""
        args = self.args
        if self._dev is None:
            rows = dev_rows("meta", args.eval_rows)
            found = self.judge_rows(rows, step_seed(args.seed, -1), args.eval_samples)
            self._dev = labelled(self.meta, found)
        dev = self._dev
        scores = []
        for number in range(0, int(dev.row.max()) + 1, args.rows):
            mine = (dev.row >= number) & (dev.row < number + args.rows)
            chosen = mine.nonzero()[:, 0].tolist()
            if chosen:
                some = Labelled(
                    [dev.trajectories[i] for i in chosen], dev.right[mine], dev.row[mine]
                )
                scores.append(logits_of(self.model, some).cpu())
        return {f"dev_{name}": value for name, value in auc(torch.cat(scores), dev).items()}


def train(args: Args) -> None:
    """Train to args.steps, resuming where a checkpoint stands; writes the model to args.out.

    Raises ValueError for settings out of range or other than those of the checkpoint, and as
    `Trainer.step` does.
    """
    check_args(args, "samples", "judged_rows", "eval_rows", "eval_samples")
    if args.rows < (args.judgements is None):
        raise ValueError(f"rows = {args.rows}: there is nothing to learn from")
    trainer = Trainer(args)
    started = time.monotonic()
    last: dict[str, float] = {}
    with Run(args, trainer.model, trainer.optimizer) as run:
        steps = range(run.first, args.steps)
        for step in tqdm(steps, initial=run.first, total=args.steps, unit="step"):
            metrics = trainer.step(step)
            is_last = step + 1 == args.steps
            if is_last or (args.eval_every and (step + 1) % args.eval_every == 0):
                last = trainer.evaluate()
                metrics |= last
            run.record(step + 1, metrics)
        run.finish()
    summary = {"steps": args.steps, "steps_run": args.steps - run.first, **last}
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps(summary | {"left_out": trainer.left_out, "seconds": seconds}), file=sys.stderr)


def main() -> None:
    """The command line."""
    train(tyro.cli(Args, description=Args.__doc__))


if __name__ == "__main__":
    main()
