"""Reinforcement learning: rewards, a whole step against dense float64, and runs that resume."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.command import with_values
from engine.judge import Judge
from engine.labels import is_right
from engine.prompt import read_judge_template
from engine.request import Row, make_row
from engine.sample import POCKET
from engine.settings import read_judge_settings
from engine.verdict import Sample, Verdict
from kernels import cpp
from kernels.logprob.policy_loss import LOSSES
from models import load
from models.transformer import Transformer, causal_attend
from tests.args import args_of
from tests.oracles.policy import oracle
from tests.tiny import write_model
from train import grpo, rft
from train.evaluation import EvalArgs, dev_votes, error_correlation, evaluation_rows
from train.learner import Learner
from train.rewards import reward_of
from train.rollout import Group, SamplingArgs, advantages, describe
from train.sources import batches_of, labelled_rows
from train.world.pocket import JUDGE_TEMPLATE
from train.world.rows import dev_rows, world_rows

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


# -- rewards and advantages ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "label", "right"),
    [
        ((7, 3), 0, True),
        ((7, 3), 1, False),
        ((7, 7), 0, False),  # a tie is wrong
        ((1, 9, 9), 1, False),
        ((1, 8, 9), (0.1, 0.2, 0.9), True),
        ((1, 9, 8), (0.1, 0.2, 0.9), False),
        ((6,), 1, True),
        ((5,), 1, False),
        ((5,), 0, True),
        (None, 0, False),
        (None, 1, False),
    ],
)
def test_a_judgement_is_right_when_it_says_so_strictly(
    scores: tuple[int, ...] | None, label: Any, right: bool
) -> None:
    assert is_right(scores, label, 5.5) == right


def rewarded(name: str, label: Any, *scores: tuple[int, ...] | None) -> list[float]:
    n = len(next(each for each in scores if each))
    row = make_row("q", [str(i) for i in range(n)], label=label)
    samples = [Sample((), "", each, None, None, 0, "eos", [], [], []) for each in scores]
    return reward_of(name)(row, samples, 5.5)


def test_rewards() -> None:
    votes = (9, 1), (4, 8), (5, 5), None
    assert rewarded("rule", 0, *votes) == [1, -1, -1, -1]
    assert rewarded("ties", 0, *votes) == [1, -1, 0, -1]
    assert rewarded("ties", 2, (1, 7, 7), (7, 7, 1), (3, 3, 3)) == [0, -1, 0]
    # 18 to 14 is right; without the first it is wrong, without the second still right.
    assert rewarded("leave_one_out", 0, *votes) == [1, 0, 0, 0]
    assert rewarded("leave_one_out", 0, (4, 8), (8, 4), None) == [-0.5, 0.5, 0]
    assert rewarded("leave_one_out", 1, (7,)) == [1] and rewarded("leave_one_out", 0, (7,)) == [0]
    assert rewarded("tests.test_grpo:counted", 0, *votes) == [0, 1, 2, 3]
    for name in ("rules", "tests.test_grpo:nothing", "no.module:rule", ":", ""):
        with pytest.raises(ValueError, match=f"reward = '{name}' is not rule, ties"):
            reward_of(name)


def counted(row: Row, samples: Sequence[Sample], threshold: float) -> list[float]:
    return [float(i) for i in range(len(samples))]


@given(
    st.integers(2, 6).flatmap(
        lambda size: st.lists(
            st.lists(st.sampled_from([-1.0, 1.0]), min_size=size, max_size=size),
            min_size=1,
            max_size=5,
        )
    )
)
def test_advantages(rewards: list[list[float]]) -> None:
    table = np.array(rewards)
    centred = table - table.mean(1, keepdims=True)
    deviation = table.std(1, ddof=1, keepdims=True)
    expected = {
        "none": centred,
        "group": centred / (deviation + 1e-4),
        "batch": centred / (table.std(ddof=1) + 1e-4),
    }
    for scaling, values in expected.items():
        found = advantages(torch.tensor(rewards, dtype=torch.float64), scaling)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.numpy(), values, rtol=1e-12)
        assert not found[torch.tensor(deviation[:, 0] == 0)].any()


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="over itself"):
        advantages(torch.ones(3, 1), "none")


# -- a step ----------------------------------------------------------------------------------------


def a_sample(judge: Judge, order: tuple[int, ...], scores: tuple[int, ...] | None,
             generator: torch.Generator) -> Sample:  # fmt: skip
    size = int(torch.randint(1, 30, (), generator=generator))
    ids = torch.randint(5, 320, (size,), generator=generator).tolist()
    logp = (-torch.rand(size, generator=generator) - 5).tolist()
    return Sample(order, "", scores, None, None, size, "eos", ids, logp, logp)


@pytest.fixture(scope="module", params=["qwen3", "gemma2"])
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """In float64, of a tiny model; one family has soft-caps and windows."""
    directory = tmp_path_factory.mktemp(request.param)
    write_model(directory, request.param)
    (directory / "judge_template.jinja").write_text(JUDGE_TEMPLATE)
    model, tokenizer = load(directory, dtype=torch.float64)
    template, settings = read_judge_template(directory), read_judge_settings(directory)
    return Judge(model, tokenizer, judge_template=template, settings=settings)


def groups_of(judge: Judge) -> list[Group]:
    """Four rows; one group without spread, one with an invalid judgement."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for i, rewards in enumerate(([1, -1, -1], [1, 1, 1], [-1, 1, 1], [-1, -1, 1])):
        row = make_row(f"task {i}", ["a b c", "d e"], id=f"row-{i}", label=i % 2)
        samples = [
            a_sample(
                judge, ((0, 1), (1, 0))[j % 2], None if i == 2 and j == 0 else (1, 2), generator
            )
            for j in range(3)
        ]
        right = [reward > 0 for reward in rewards]
        groups.append(Group(row, samples, right, [float(r) for r in rewards]))
    return groups


def log_probs(model: Transformer, prompt: list[int], completion: list[int], heat: float) -> Tensor:
    """Of a completion under plain causal attention, on whole logits."""
    ids = torch.tensor([*prompt, *completion])
    hidden = model(ids[:-1], torch.arange(len(ids) - 1), causal_attend(model.config))
    log_p = torch.log_softmax(model.head(hidden) / heat, -1)
    return log_p[torch.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_is_that_of_dense_float64(kind: Any, judge: Judge, tmp_path: Path) -> None:
    """Sampled groups to updated parameters, in two micro-batches of one window, against sequences
    one by one, whole logits, the published formulas and autograd."""
    args = args_of(grpo.Args, loss=kind, beta=0.1, temperature=0.7, micro_rows=3, max_new_tokens=40,
                     clip=0.05, lr=1e-2, warmup=0, weight_decay=0.1)  # fmt: skip
    groups = groups_of(judge)
    start, reference = judge.model, deepcopy(judge.model).requires_grad_(False)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.01)
    dense = deepcopy(start)
    rewards = torch.tensor([g.rewards for g in groups], dtype=torch.float64)
    new, old, ref = [], [], []
    for group in groups:
        for sample in group.samples:
            prompt = judge.prompts.render(group.row, sample.order)
            new.append(log_probs(dense, prompt, sample.token_ids, 0.7))
            ref.append(log_probs(reference, prompt, sample.token_ids, 0.7).detach())
            old.append(torch.tensor(sample.sampling_logprobs, dtype=torch.float64))
    loss = oracle(
        kind, new, old, ref, advantages(rewards, "group").flatten(), args.policy.options, 40
    )
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(dense.parameters(), args.learning.clip))
    plain = torch.optim.AdamW(
        [{"params": [p for p in dense.parameters() if p.dim() > 1], "weight_decay": 0.1},
         {"params": [p for p in dense.parameters() if p.dim() <= 1], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95),
    )  # fmt: skip
    plain.step()

    ours = Judge(deepcopy(start), judge.tokenizer, judge_template=judge.prompts.judge_template,
                 settings=judge.settings)  # fmt: skip
    learner = Learner(ours.model, args.learning)
    frozen = grpo.Reference(reference, adapted=False)
    (window,) = grpo.windows(ours, frozen, groups, args.policy, args.sampling)
    assert [m.batch.lengths for m in window] == [
        tuple(len(s.token_ids) for g in some for s in g.samples)
        for some in (groups[:3], groups[3:])
    ]
    dropping = replace(args.policy, drop_zero_spread=True)
    (informed,) = grpo.windows(ours, frozen, groups, dropping, args.sampling)
    assert (
        [m.batch.lengths for m in informed]
        == [  # the second group's rewards are all alike
            tuple(len(s.token_ids) for g in (groups[0], *groups[2:]) for s in g.samples)
        ]
    )
    if kind in ("grpo", "gspo"):  # a mean over sequences, of 9 now and not of 12
        assert informed[0].weight[0] * 9 == pytest.approx(float(window[0].weight[0]) * 12)
    found = grpo.add_gradients(ours.model, window, args.policy, 0.7)
    metrics = grpo.window_metrics(window, found)
    # Weights of tokens and what the sampler says are float32.
    assert abs(metrics["loss"] - loss.item()) < 1e-6
    told = learner.update(0, metrics["loss"])
    assert abs(told["grad_norm"] - norm) < 1e-5 * norm and told["lr"] == 1e-2
    for mine, theirs in zip(ours.model.parameters(), dense.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()
    for before, mine, theirs in zip(
        start.parameters(), ours.model.parameters(), dense.parameters(), strict=True
    ):
        moved = (theirs - before).norm()
        assert (mine - theirs).norm() <= 1e-3 * moved and moved > 0


def test_what_is_told_of_groups(judge: Judge) -> None:
    told = describe(groups_of(judge))
    assert told["zero_spread"] == 0.25 and told["invalid"] == 1 / 12
    assert told["accuracy"] == 7 / 12 and abs(told["reward"] - 2 / 12) < 1e-6


def test_the_sampler_has_the_trainers_weights(tmp_path: Path) -> None:
    """Log-probs of sampler and trainer agree at every step, after weights have moved: they add in
    another order, so each is off by what float32 is off from float64 (measured on another text,
    so eight times that; weights one update old are off by 0.05)."""
    args = args_of(
        grpo.Args,
        out=tmp_path / "out",
        steps=3,
        rows=3,
        group=3,
        micro_rows=2,
        lr=1e-3,
        warmup=1,
        beta=0,
        max_new_tokens=220,
    )
    trainer = grpo.GrpoTrainer(args)
    model, _ = load(POCKET)
    ids = torch.randint(0, 400, (300,), generator=torch.Generator().manual_seed(0))
    with cpp.torch_only():
        logprobs = model.logits(ids).log_softmax(-1)
        exact = model.double().logits(ids).log_softmax(-1)
    own = float((logprobs - exact).abs().max())
    for step in range(3):
        metrics, seconds = trainer.step(step)
        assert 0 < metrics["logp_difference"] < 8 * own and metrics["ratio_off"] == 0
        assert set(seconds) == {"sample", "reference", "update"}


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture
def args(tmp_path: Path) -> grpo.Args:
    return args_of(grpo.Args,
        out=tmp_path / "out", steps=4, rows=2, group=3, micro_rows=1, minibatches=2, epochs=2,
        lr=1e-4, warmup=1, max_new_tokens=220, save_every=2, eval_every=2, eval_rows=3, eval_k=2,
    )  # fmt: skip


def test_what_is_not_finite_stops_the_run_and_names_its_rows(args: grpo.Args) -> None:
    trainer = grpo.GrpoTrainer(with_values(args, beta=0.0, lr=1e37))
    with pytest.raises(
        FloatingPointError, match=r"step \d: loss .*; rows grpo-0-\d-0, grpo-0-\d-1"
    ):
        for step in range(4):
            trainer.step(step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 1}, "group = 1: a judgement is weighed"),
        ({"rows": 0}, "rows = 0 is less than 1"),
        ({"minibatches": 0}, "minibatches = 0 is less than 1"),
        ({"model": POCKET, "out": POCKET}, "out is the directory of the model"),
    ],
)
def test_settings_out_of_range_are_refused(
    args: grpo.Args, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grpo.train(with_values(args, **change))


# -- rows ------------------------------------------------------------------------------------------


def test_rows_of_a_file(tmp_path: Path) -> None:
    """Bad lines and rows without a label are left out and counted, by reason."""
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "responses": ["a", "b"]}
    lines: list[Any] = [row | {"id": str(i), "label": i % 2} for i in range(5)]
    lines += [row | {"id": "none"}, row | {"id": "tie", "label": [1, 1]}, "junk"]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    found, left_out = labelled_rows(path)
    assert left_out["no label"] == left_out["a tie"] == 1 and sum(left_out.values()) == 3
    assert any("line 8" in reason for reason in left_out)
    rows = batches_of(found, 2, 0)
    epochs = [row.id for number in range(5) for row in rows(number)]
    assert sorted(epochs[:5]) == sorted(epochs[5:]) == ["0", "1", "2", "3", "4"]
    other = batches_of(found, 2, 1)
    assert epochs[:5] != epochs[5:]
    assert epochs != [row.id for number in range(5) for row in other(number)]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="no row with a label"):
        labelled_rows(path)


def test_easy_rows_of_a_file_are_left_out(tmp_path: Path) -> None:
    """Those that a run of rejective fine-tuning over that very file found right each time."""
    data, sampled = tmp_path / "rows.jsonl", tmp_path / "rft"
    fields = [{"id": r.id, "prompt": r.messages[-1].content, "responses": r.responses,
               "label": r.label} for r in world_rows("easy", 0, 20)(0)
              if len(r.messages) == 1]  # fmt: skip
    data.write_text("".join(json.dumps(each) + "\n" for each in fields))
    rft.sample(
        args_of(rft.Args, out=sampled, data=data, samples=2, hinted=False, max_new_tokens=220)
    )
    done = [json.loads(line) for line in (sampled / "progress.jsonl").open()][1:]
    easy = {d["id"] for d in done if d["samples"] == ["too_easy"] * 2}
    assert 0 < len(easy) < len(fields)
    args = args_of(
        grpo.Args,
        out=tmp_path / "out",
        data=data,
        skip_easy=sampled / "progress.jsonl",
        rows=len(fields),
    )
    trainer = grpo.GrpoTrainer(args)
    assert {row.id for row in trainer.rows(0)} == {each["id"] for each in fields} - easy
    assert trainer.left_out == {"too easy": len(easy)}
    with pytest.raises(ValueError, match="there is no data"):
        grpo.train(with_values(args, data=None))
    data.write_text(data.read_text() + "\n")
    with pytest.raises(ValueError, match=r"progress\.jsonl is not about .*rows\.jsonl"):
        grpo.GrpoTrainer(args)


def test_votes_on_rows_of_a_file(tmp_path: Path) -> None:
    """Counted by hand; a row that cannot be judged is wrong."""
    rows = dev_rows("votes", 5)
    rows.append(make_row("p " * 40000, ["a", "b"], label=0))
    args = EvalArgs(eval_every=1, eval_k=3)
    judge = Judge.load(POCKET, dtype=torch.float32)
    told = dev_votes(judge, rows, args, SamplingArgs(max_new_tokens=220))
    votes, singles = 0, 0.0
    for row in rows[:5]:
        (verdict,) = judge.rows([row], k=3, temperature=1.0, max_new_tokens=220)
        assert isinstance(verdict, Verdict)
        votes += bool(verdict.correct)
        assert row.label is not None
        singles += sum(is_right(s.scores, row.label, 5.5) for s in verdict.samples) / 3
    assert told["dev_vote"] == votes / 6 and votes > 0
    assert abs(told["dev_single"] - singles / 6) < 1e-12
    assert -1 <= told["dev_error_correlation"] <= 1 and 0 < told["dev_criteria_entropy"] < 1.1
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{i}", "responses": ["a", "b"], "label": i % 2} for i in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    from_file = replace(args, eval_data=path, eval_rows=3)
    assert [row.label for row in evaluation_rows(from_file, "")] == [0, 1, 0]
    assert len(evaluation_rows(replace(from_file, eval_rows=9), "")) == 4  # all there are


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=5), min_size=1, max_size=4))
def test_the_correlation_of_errors(rights: list[list[bool]]) -> None:
    """Of all pairs of a row's samples, by brute force."""
    single = np.mean([np.mean(own) for own in rights])
    both = np.mean([np.mean([a and b for a, b in combinations(own, 2)]) for own in rights])
    found = error_correlation(rights)
    if single in (0, 1):
        assert found == 0
    else:
        assert found == pytest.approx((both - single**2) / (single - single**2))


def test_rows_of_the_world_are_fresh_and_the_same_again() -> None:
    rows = world_rows("grpo", 3, 4)
    assert rows(1) == rows(1) == world_rows("grpo", 3, 4)(1) != rows(2)
    assert [row.id for row in rows(1)] == [f"grpo-3-1-{i}" for i in range(4)]
    assert all(row.label is not None for row in rows(0))
