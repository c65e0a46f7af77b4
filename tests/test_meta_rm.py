"""Training of a meta reward model: what it reads, its losses, its AUCs, and runs that resume."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from engine.command import with_values
from engine.judge import Judge
from engine.meta import MetaModel, MetaScorer
from engine.request import Row, make_row
from engine.sample import POCKET
from engine.settings import read_judge_settings
from engine.verdict import Verdict
from models import load
from tests.args import args_of
from train import meta_rm
from train.judgements import Judgement
from train.ranking import (
    Labelled,
    ReadRow,
    auc,
    labelled,
    losses_of,
    pairs,
    vote_accuracies,
    vote_scale,
)
from train.rewards import REWARDS
from train.scalar import logits_of, scalar_of
from train.world.rows import dev_rows

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def args(tmp_path: Path) -> meta_rm.Args:
    return args_of(meta_rm.Args,
        out=tmp_path / "out", steps=2, rows=3, samples=3, lr=1e-3, warmup=1, max_new_tokens=220,
        eval_every=2, eval_rows=4, eval_k=3, save_every=2,
    )  # fmt: skip


def some_rows(count: int) -> list[Row]:
    return dev_rows("1", count)


def fabricated(right: list[bool], row: list[int]) -> Labelled:
    targets = torch.tensor(right, dtype=torch.float32)
    return Labelled([], torch.tensor(right, dtype=torch.bool), targets, torch.tensor(row))


judged = st.lists(
    st.tuples(st.booleans(), st.integers(0, 3), st.sampled_from([-1.0, 0.0, 0.5, 2.0])),
    min_size=1,
    max_size=12,
)


@given(judged)
def test_losses_and_aucs_are_those_of_all_pairs(samples: list[tuple[bool, int, float]]) -> None:
    samples = sorted(samples, key=lambda each: each[1])
    right, row, scores = (list(column) for column in zip(*samples, strict=True))
    judgements, logits = fabricated(right, row), torch.tensor(scores, dtype=torch.float64)
    pointwise = [math.log1p(math.exp(-s if r else s)) for r, _, s in samples]
    expected = sum(pointwise) / len(samples)
    assert abs(losses_of(logits, judgements, "pointwise").mean().item() - expected) < 1e-12

    everyone = [(a, b) for a in samples for b in samples if a[0] and not b[0]]
    within = [(a, b) for a, b in everyone if a[1] == b[1]]
    better, worse = pairs(judgements)
    assert len(better) == len(worse) == len(within)
    lost = [math.log1p(math.exp(b[2] - a[2])) for a, b in within]
    assert abs(losses_of(logits, judgements, "pairwise").sum().item() - sum(lost)) < 1e-12

    def share(found: list[tuple[Any, Any]]) -> float:
        wins = [1.0 if a[2] > b[2] else 0.5 if a[2] == b[2] else 0.0 for a, b in found]
        return sum(wins) / len(wins) if wins else math.nan

    by_row = [[p for p in within if p[0][1] == number] for number in range(4)]
    rows = [share(found) for found in by_row if found]
    told = auc(logits, judgements)
    assert told["rows_with_both"] == len(rows)
    for found, wanted in (
        (told["auc"], share(everyone)),
        (told["auc_within_rows"], sum(rows) / len(rows) if rows else math.nan),
    ):
        assert found == pytest.approx(wanted, nan_ok=True)


def test_soft_labels() -> None:
    """A tie is above what is wrong, and below what is right; a judgement may be half right."""
    target, row = torch.tensor([1.0, 0.5, 0.0, 0.5, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    judgements = Labelled([], target == 1, target, row)
    assert list(zip(*(x.tolist() for x in pairs(judgements)), strict=True)) == [
        (0, 1), (0, 2), (1, 2), (4, 3),
    ]  # fmt: skip
    logits = torch.tensor([0.3, -0.2, 0.1, 2.0, 0.0])
    found = losses_of(logits, judgements, "pointwise")
    p = torch.sigmoid(logits)
    torch.testing.assert_close(found, -target * p.log() - (1 - target) * (1 - p).log())


def test_votes_with_a_meta_model() -> None:
    """Two rows of three judgements, added up by hand."""
    made = [
        ReadRow(
            make_row("q", ["a", "b"], label=0), [],
            [Judgement((0, 1), "", False, 0.0, scores) for scores in judged],
        )
        for judged in ([(9, 1), (4, 6), (1, 8)], [(5, 5), (2, 9), (3, 8)])
    ]  # fmt: skip
    logits = torch.tensor([2.0, -1.0, 1.0, 3.0, 0.0, 0.0])
    # 14 to 15; the first and the third: 10 to 9; weights 1, .05, .37: 9.6 to 4.2. Then a tie less.
    assert vote_accuracies(made, logits, 1.0, 5.5) == {
        "vote": 0.0, "filtered_vote": 0.5, "weighed_vote": 0.5,
    }  # fmt: skip
    assert vote_accuracies(made, -logits, 1.0, 5.5)["filtered_vote"] == 0.0


@pytest.mark.parametrize("labels", ["ties", "leave_one_out"])
def test_labels_are_those_of_the_reward(args: meta_rm.Args, labels: Any) -> None:
    trainer = meta_rm.MetaTrainer(with_values(args, labels=labels))
    found, _ = trainer.judge_rows(some_rows(4), 3, 4)
    verdicts = trainer.judge.rows(some_rows(4), seed=3, k=4, **vars(args.sampling))
    for each, verdict in zip(found, verdicts, strict=True):
        assert isinstance(verdict, Verdict)
        rewards = REWARDS[labels](each.row, verdict.samples, trainer.judge.settings.threshold)
        expected = [(r + 1) / 2 for r, s in zip(rewards, verdict.samples, strict=True) if s.scores]
        assert [own.target for own in each.judgements] == expected
    assert len({own.target for each in found for own in each.judgements}) > 1


def test_the_scale_of_votes() -> None:
    """Against a grid, of judgements that are righter where their logits are high; where there is
    nothing to fit."""
    rng = np.random.default_rng(0)
    rows, logits = [], []
    for i in range(40):
        own = rng.normal(size=4)
        good = rng.random(4) < 1 / (1 + np.exp(-own))
        judged = [Judgement((0, 1), "", bool(g), float(g), (9, 4) if g else (5, 7)) for g in good]
        rows.append(ReadRow(make_row(f"{i}", ["a", "b"], label=0), [], judged))
        logits += own.tolist()
    found = vote_scale(rows, torch.tensor(logits))
    best, at = -math.inf, 0.0
    z = np.array(logits).reshape(40, 4)
    scores = np.array([[own.scores for own in each.judgements] for each in rows])
    for a in np.exp(np.linspace(-2, 2, 201)):
        weights = np.exp(a * z) / np.exp(a * z).sum(1, keepdims=True)
        lead = (weights[:, :, None] * scores).sum(1) @ [1, -1]
        for t in np.exp(np.linspace(-3, 3, 151)):
            value = -np.log1p(np.exp(-t * lead)).sum() - (np.log(a) ** 2 + np.log(t) ** 2) / 2
            best, at = max((best, at), (value, a))
    assert 0.2 < found < 5 and found == pytest.approx(at, rel=0.03)
    single = [ReadRow(make_row("x", ["a"], label=1), [], rows[0].judgements[:1])]
    assert vote_scale(single, torch.tensor(logits[:1])) == vote_scale([], torch.tensor([])) == 1


def test_judgements_are_read_as_the_engine_reads_them(args: meta_rm.Args) -> None:
    """Logits of a packed batch are the scores of `engine.meta`; invalid judgements are left out."""
    trainer = meta_rm.MetaTrainer(args)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        trainer.learner.model.score.weight.normal_(0, 0.05, generator=generator)
    rows = some_rows(3)
    short = with_values(args, max_new_tokens=115)  # some are cut off before their scores
    trainer.args = short
    judgements = labelled(trainer.read(trainer.judge_rows(rows, 5, 4)[0])[0])
    scorer = MetaScorer(trainer.meta)
    verdicts = list(trainer.judge.rows(rows, seed=5, k=4, temperature=1.0, max_new_tokens=115))
    expected: list[float] = []
    for row, verdict in zip(rows, verdicts, strict=True):
        assert isinstance(verdict, Verdict)
        valid = [(s.order, s.text) for s in verdict.samples if s.scores is not None]
        expected += scorer.scores(row, valid)
    assert 0 < len(expected) < 12 and len(judgements.right) == len(expected)
    found = logits_of(trainer.learner.model, judgements.trajectories)
    assert (found - torch.tensor(expected)).abs().max() < 1e-5
    assert len(set(judgements.row.tolist())) > 1


def test_it_learns_to_tell_judgements_apart(args: meta_rm.Args) -> None:
    """With gradients that do not depend on how rows are put into micro-batches, and are those of
    the mean loss."""
    for kind in ("pointwise", "pairwise"):  # the latter goes on to learn
        trainer = meta_rm.MetaTrainer(
            with_values(args, lr=3e-3, loss=kind, weight_decay=0.0, steps=20)
        )
        rows, _ = trainer.read(trainer.judge_rows(some_rows(3), 3, 4)[0])
        judgements = labelled(rows)
        assert len(pairs(judgements)[0]) > 0
        model, gradients = trainer.learner.model, []
        for micro_rows in (3, 1):
            trainer.args = with_values(trainer.args, micro_rows=micro_rows)
            trainer.learner.optimizer.zero_grad()
            told = trainer.add_gradients(rows)
            assert abs(told["loss"] - math.log(2)) < 1e-6  # all logits are 0
            assert told["judgements"] == len(judgements.right)
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        losses_of(logits_of(model, judgements.trajectories), judgements, kind).mean().backward()
        twice = [p.grad for p in model.parameters() if p.grad is not None]
        for one, other, added in zip(*gradients, twice, strict=True):
            assert (one - other).norm() <= 1e-5 * one.norm()
            assert (added - 2 * one).norm() <= 1e-5 * one.norm()
    for step in range(10):
        trainer.learner.optimizer.zero_grad()
        loss = trainer.add_gradients(rows)["loss"]
        trainer.learner.update(step, loss)
    assert loss < math.log(2) / 3
    told = auc(logits_of(model, judgements.trajectories).detach(), judgements)
    assert told["auc_within_rows"] > 0.9


def test_judgements_of_a_file_are_learnt_from_too(args: meta_rm.Args, tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    row = {"prompt": "p", "responses": ["a", "b"], "label": 0}
    texts = [("Scores: \\boxed{9, 1}", True), ("Scores: \\boxed{1, 9}", False)]
    lines = [
        row | {"prompt": f"p{i}", "judgement": text, "order": [1, 0], "right": right}
        for i in range(6)
        for text, right in texts
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone = with_values(args, judgements=path, rows=0, judged_rows=2, loss="pairwise")
    metrics, _ = meta_rm.MetaTrainer(alone).step(0)
    assert (metrics["judgements"], metrics["right"]) == (4, 0.5)
    both, _ = meta_rm.MetaTrainer(with_values(alone, rows=2)).step(0)
    assert 4 < both["judgements"] <= 4 + 2 * args.samples
    with pytest.raises(ValueError, match="nothing to learn from"):
        meta_rm.train(with_values(args, rows=0))
    path.write_text(json.dumps(row | {"judgement": "Scores: "}) + "\n")
    with pytest.raises(ValueError, match="line 1: it does not say whether its judgement is right"):
        meta_rm.train(alone)


def test_what_is_written_judges_in_the_engine_and_in_transformers(args: meta_rm.Args) -> None:
    meta_rm.train(args)
    lines = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
    assert [("dev_auc" in line) for line in lines] == [True, False, True]
    meta = MetaModel.load(args.out)
    theirs = AutoModelForSequenceClassification.from_pretrained(args.out, dtype=torch.float32)
    row = some_rows(1)[0]
    order, text = tuple(range(len(row.responses))), "Scores: \\boxed{7}"
    (score,) = MetaScorer(meta).scores(row, [(order, text)])
    ids = [t for segment in meta.prompt(row, order) for t in segment] + [*meta.judgement(text)]
    with torch.no_grad():
        logit = theirs(torch.tensor([ids])).logits[0, 0].item()
    assert abs(score - logit) < 1e-5 and score != 0
    scale = meta.settings.meta_scale
    assert scale == lines[-1]["dev_scale"] != 1
    meta_rm.train(args)  # nothing is left to do, nor forgotten
    assert read_judge_settings(args.out).meta_scale == scale
    judge = Judge.load(POCKET, meta=args.out)
    verdict = next(judge.rows([row], k=4, k_meta=2, max_new_tokens=220))
    assert isinstance(verdict, Verdict) and verdict.votes == min(2, verdict.valid)
    assert meta.settings.meta_scale == lines[-1]["dev_scale"] and meta.settings.stop == "box"


def test_what_does_not_fit_or_cannot_be_judged_is_counted(args: meta_rm.Args) -> None:
    trainer = meta_rm.MetaTrainer(args)
    rows, failures = trainer.judge_rows(some_rows(3), 0, 3)
    meta = trainer.meta
    lengths = [
        sum(map(len, meta.prompt(each.row, own.order))) + len(meta.judgement(own.text))
        for each in rows
        for own in each.judgements
    ]
    everything, too_long = trainer.read(rows)
    assert not failures and too_long == 0
    assert [each.row.id for each in everything] == [each.row.id for each in rows]
    assert [each.judgements for each in everything] == [each.judgements for each in rows]
    middle = sorted(lengths)[len(lengths) // 2]
    decoder = trainer.learner.plain.model
    decoder.config = replace(decoder.config, max_position_embeddings=middle)
    fitting, too_long = trainer.read(rows)
    assert too_long == sum(length > middle for length in lengths) > 0
    assert sum(len(each.trajectories) for each in fitting) == len(lengths) - too_long
    decoder.config = replace(decoder.config, max_position_embeddings=4096)
    trainer.rows = lambda _: [make_row("p " * 40000, ["a", "b"], label=0), *some_rows(2)]
    metrics, _ = trainer.step(0)
    assert (metrics["failed_rows"], metrics["too_long"]) == (1, 0)
    trainer.rows = lambda _: [make_row("p " * 40000, ["a", "b"], label=0)]
    with pytest.raises(ValueError, match=r"no judgement was valid and fitted; .*tokens"):
        trainer.step(0)


def test_it_begins_as_its_decoder_and_says_nothing(args: meta_rm.Args) -> None:
    model, _ = scalar_of(POCKET)
    decoder, _ = load(POCKET)
    for ours, theirs in zip(model.model.parameters(), decoder.parameters(), strict=True):
        assert ours.equal(theirs)
    assert not model.score.weight.any()


def test_no_valid_judgement_is_an_error(args: meta_rm.Args) -> None:
    trainer = meta_rm.MetaTrainer(with_values(args, max_new_tokens=3))
    with pytest.raises(ValueError, match=r"step 0: no judgement was valid .*\. Begin with train"):
        trainer.step(0)


def test_what_is_not_finite_stops_the_run_and_names_its_rows(args: meta_rm.Args) -> None:
    trainer = meta_rm.MetaTrainer(with_values(args, lr=1e37))
    with pytest.raises(FloatingPointError, match=r"step \d: loss .*; rows meta-0-\d-0, meta-0"):
        for step in range(4):
            trainer.step(step)
