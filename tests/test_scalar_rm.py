"""Training of a scalar reward model: pairs, losses, what is left out, and what is written."""

import json
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.command import with_values
from engine.request import Row, make_row
from engine.scalar_judge import ScalarJudge
from engine.verdict import RowFailure
from models import load
from tests.args import args_of
from tests.judges import scores_of
from train import scalar_rm
from train.packing import pack
from train.ranking import losses_of
from train.scalar import all_logits, logits_of
from train.scalar_rm import ReadRow, accuracy, compared, labelled
from train.trajectories import Trajectory
from train.world import BASE
from train.world.rows import split_rows

pytestmark = pytest.mark.usefixtures("one_thread")


ARGS = args_of(scalar_rm.Args,
    steps=4, rows=3, micro_rows=2, lr=1e-3, warmup=1, log_every=1, eval_every=2, eval_rows=6,
    save_every=2,
)  # fmt: skip


@pytest.fixture
def args(tmp_path: Path) -> scalar_rm.Args:
    return with_values(ARGS, out=tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """What a run leaves that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    scalar_rm.train(with_values(ARGS, out=out))
    return out


def some_rows(count: int) -> list[Row]:
    return split_rows("1", "dev", count, "dev", least=2)


labels = st.integers(0, 2) | st.lists(
    st.sampled_from([0.0, 0.5, 3.0]), min_size=3, max_size=3
).filter(lambda gold: gold.count(max(gold)) == 1)
scores_of_three = st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=3, max_size=3)


@given(st.lists(st.tuples(labels, scores_of_three), min_size=1, max_size=4))
def test_the_loss_is_that_of_all_pairs(drawn: list[tuple[int | list[float], list[float]]]) -> None:
    """Of a row's best response and each other, or of each two with different gold scores; and the
    accuracy is the chance of the best among those with the highest score."""
    rows = [make_row("q", ["a", "b", "c"], label=label) for label, _ in drawn]
    lost, right = [], []
    for label, scores in drawn:
        gold = label if isinstance(label, list) else [float(i == label) for i in range(3)]
        for i, j in permutations(range(3), 2):
            if gold[i] > gold[j]:
                lost.append(math.log1p(math.exp(scores[j] - scores[i])))
        top = [i for i in range(3) if scores[i] == max(scores)]
        right.append(top.count(gold.index(max(gold))) / len(top))
    flat = torch.tensor([score for _, scores in drawn for score in scores], dtype=torch.float64)
    found = losses_of(flat, labelled([ReadRow(row, []) for row in rows]), "pairwise")
    assert len(found) == len(lost) and abs(found.sum().item() - sum(lost)) < 1e-12
    assert accuracy(rows, flat) == pytest.approx(sum(right) / len(right))


@given(st.lists(st.tuples(labels, st.lists(st.floats(-9, 9), min_size=6, max_size=6)),
                min_size=1, max_size=3))  # fmt: skip
def test_the_loss_of_comparisons_is_that_of_both_orders(
    drawn: list[tuple[int | list[float], list[float]]],
) -> None:
    """Of all ordered pairs with different gold scores, and of no others."""
    rows, odds, lost = list[ReadRow](), list[float](), list[float]()
    for number, (label, of_pairs) in enumerate(drawn):
        shown = list(permutations(range(3), 2))
        row = make_row("q", ["a", "b", "c"], label=label)
        rows.append(ReadRow(row, [Trajectory([(number,)], (i,)) for i in range(6)], shown))
        gold = label if isinstance(label, list) else [float(i == label) for i in range(3)]
        for (i, j), own in zip(shown, of_pairs, strict=True):
            if gold[i] != gold[j]:
                odds.append(own)
                lost.append(math.log1p(math.exp(-own if gold[i] > gold[j] else own)))
    everyone = compared(rows)
    read = [drawn[int(t.prompt[0][0])][1][int(t.completion[0])] for t in everyone.trajectories]
    assert read == odds and everyone.row.tolist() == [
        int(t.prompt[0][0]) for t in everyone.trajectories
    ]
    found = losses_of(torch.tensor(odds, dtype=torch.float64), everyone, "pointwise")
    assert found.tolist() == pytest.approx(lost, abs=1e-12)


def test_a_model_that_compares_learns_and_scores_as_transformers(args: scalar_rm.Args) -> None:
    """Scores are those whose differences are nearest to what both orders of each pair say."""
    args = with_values(args, reads="pair", steps=6, lr=3e-3, eval_every=0, save_every=6)
    scalar_rm.train(args)
    lines = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0]["loss"] - math.log(2)) < 1e-6 and lines[0]["accuracy"] == 0.5
    assert json.loads((args.out / "judge.json").read_text())["compares"] is True
    theirs = AutoModelForSequenceClassification.from_pretrained(args.out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    (row,) = [row for row in some_rows(30) if len(row.responses) == 3][:1]
    said = "".join(f"{each.role}: {each.content}\n\n" for each in row.messages)
    odds = {}
    for i, j in permutations(range(3), 2):
        text = (
            f"{said}[Response A]\n{row.responses[i]}\n\n[Response B]\n{row.responses[j]}\n\n"
            "Is response A better than response B?"
        )
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=False)
        with torch.no_grad():
            odds[i, j] = theirs(torch.tensor([ids])).logits[0, 0].item()
    assert len(set(odds.values())) == 6
    equations = torch.zeros(7, 3, dtype=torch.float64)  # a score less another; their sum is 0
    for number, (i, j) in enumerate(odds):
        equations[number, i], equations[number, j] = 1, -1
    equations[6] = 1
    wanted = torch.tensor([*odds.values(), 0.0], dtype=torch.float64)
    exact = torch.linalg.lstsq(equations, wanted[:, None]).solution[:, 0].tolist()
    judge = ScalarJudge.load(args.out)
    assert judge.compares
    (found,) = scores_of(judge, [row])
    assert found == pytest.approx(exact, rel=0, abs=1e-5)
    (failure,) = judge.rows([make_row("q", ["a"])])
    assert isinstance(failure, RowFailure) and "the model compares two" in failure.error


def test_it_begins_as_its_decoder_and_learns(args: scalar_rm.Args) -> None:
    """With gradients that do not depend on how rows are put into micro-batches."""
    trainer = scalar_rm.ScalarTrainer(with_values(args, lr=3e-3, weight_decay=0.0, steps=20))
    decoder, _ = load(BASE)
    model = trainer.learner.model
    for ours, theirs in zip(model.model.parameters(), decoder.parameters(), strict=True):
        assert ours.equal(theirs)
    rows, errors = trainer.read(some_rows(3))
    pairs = sum(len(each.trajectories) - 1 for each in rows)
    assert not errors and pairs > 3
    everyone = labelled(rows)
    paths = {
        tuple(each.prompt[: i + 1]): len(segment)
        for each in everyone.trajectories
        for i, segment in enumerate(each.prompt)
    }
    assert pack(everyone.trajectories).num_tokens == sum(paths.values())  # conversations once
    gradients = []
    for micro_rows in (3, 1):
        trainer.args = with_values(trainer.args, micro_rows=micro_rows)
        trainer.learner.optimizer.zero_grad()
        told = trainer.add_gradients(rows)
        assert abs(told["loss"] - math.log(2)) < 1e-6 and told["accuracy"] == 0.5  # scores are 0
        assert told["pairs"] == pairs
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    losses_of(logits_of(model, everyone.trajectories), everyone, "pairwise").mean().backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other, added in zip(*gradients, twice, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
        assert (added - 2 * one).norm() <= 1e-5 * one.norm()
    for step in range(10):
        trainer.learner.optimizer.zero_grad()
        told = trainer.add_gradients(rows)
        trainer.learner.update(step, told["loss"])
    assert told["loss"] < math.log(2) / 3 and told["accuracy"] == 1.0


def test_what_is_written_scores_alike_in_training_the_engine_and_transformers(
    args: scalar_rm.Args, whole: Path
) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [("dev_accuracy" in line) for line in lines] == [True, False, True, False, True]
    assert all(line["pairs"] >= args.rows for line in lines[1:])
    best = json.loads((whole / "best.json").read_text())
    assert best["score"] == max(line.get("dev_accuracy", 0) for line in lines)

    rows = some_rows(4)
    theirs = AutoModelForSequenceClassification.from_pretrained(whole, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    exact = []
    for row in rows:
        turns = [{"role": message.role, "content": message.content} for message in row.messages]
        for text in row.responses:
            chat = [*turns, {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(chat, return_dict=False)
            with torch.no_grad():
                exact.append(theirs(torch.tensor([ids])).logits[0, 0].item())
    found = scores_of(ScalarJudge.load(whole), rows)
    assert [score for scores in found for score in scores] == pytest.approx(exact, rel=0, abs=1e-5)
    assert len(set(exact)) == len(exact)
    trainer = scalar_rm.ScalarTrainer(args)
    packed = all_logits(ScalarJudge.load(whole).model, trainer.read(rows)[0], labelled, 3)
    assert packed.tolist() == pytest.approx(exact, rel=0, abs=1e-5)


def test_an_interrupted_run_ends_as_if_it_never_stopped(
    args: scalar_rm.Args, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = scalar_rm.ScalarTrainer.step

    def stop(self: scalar_rm.ScalarTrainer, number: int) -> Any:
        if number == 3:  # one step past a checkpoint
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(scalar_rm.ScalarTrainer, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            scalar_rm.train(args)
    assert not (args.out / "model.safetensors").exists()
    scalar_rm.train(args)
    for name in ("model.safetensors", "metrics.jsonl", "best/model.safetensors"):
        assert (args.out / name).read_bytes() == (whole / name).read_bytes()


def test_rows_without_a_pair_are_left_out_and_counted(
    args: scalar_rm.Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a file; of the world none are drawn. What cannot be read is counted in its step."""
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": "p", "responses": ["a", "b"], "label": 0},
        {"prompt": "p 2", "responses": ["a"], "label": 1},
        {"prompt": "p 3", "responses": ["a", "b"], "label": "tie"},
        {"prompt": "p 4", "responses": ["a", "b", "c"], "label": [1, 3, 2]},
        {"prompt": "p 5", "responses": ["a"], "label": 0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = with_values(args, data=path, rows=2, eval_every=0, steps=2)
    scalar_rm.train(args)
    told = capsys.readouterr().err
    assert "left out: 2 x one response" in told and "left out: 1 x a tie" in told
    logged = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["pairs"] for line in logged] == [1 + 3] * 2
    path.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(ValueError, match="all 1 labelled rows have one response"):
        scalar_rm.ScalarTrainer(args)

    trainer = scalar_rm.ScalarTrainer(with_values(args, data=None, rows=40))
    assert min(len(row.responses) for row in trainer.rows(0)) == 2
    long = make_row("q", ["a", "x " * 40000], label=0, id="long")
    trainer.rows = lambda _: [*some_rows(2), long]
    metrics, _ = trainer.step(0)
    assert metrics["failed_rows"] == 1
    trainer.rows = lambda _: [long]
    with pytest.raises(
        ValueError, match=r"step 0: no row can be read: row long: .* response 2 has"
    ):
        trainer.step(0)


@pytest.mark.parametrize(
    "change", [{"eval_k": 3}, {"format": "rating"}, {"template": Path("x")}, {"score_max": 5}]
)
def test_options_of_judgements_in_words_are_refused(
    args: scalar_rm.Args, change: dict[str, object]
) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} = .* has no meaning"):
        with_values(args, **change)


def test_evaluations_need_rows_of_several_responses(args: scalar_rm.Args, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "responses": ["a"], "label": 1}) + "\n")
    with pytest.raises(ValueError, match="none of 1 rows of evaluations has two responses"):
        scalar_rm.ScalarTrainer(with_values(args, eval_data=path, eval_rows=1))
