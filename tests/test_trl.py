"""TRL's own GRPOTrainer, rewarded by a judge; where TRL is installed."""

from pathlib import Path
from typing import Any

import pytest

from engine.adapters.trl import QuorumReward
from engine.judge import Judge
from engine.request import Row
from engine.sample import POCKET
from tests.judge_server import serving
from tests.tiny import write_model
from train.world.rows import split_rows

STEPS = 3
SIZE = 4  # completions of a prompt
PROMPTS = 2  # in a step
# What a random policy says is like nothing that the judge has seen, so it is made to give scores.
OPTIONS: dict[str, Any] = {"k": 3, "max_new_tokens": 300, "stop": "box", "force_scores": True}
TOO_LONG = "9 " * 40_000

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("form", ["text", "messages"])
def test_grpo_trainer(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same judge in the process, and served and asked from a coroutine: equal rewards in every
    step, of whole groups. One of the prompts cannot be judged, and the training goes on."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    write_model(tmp_path / "policy")
    rows = split_rows("trl", "final", STEPS * PROMPTS, "row")
    asked = [row.messages[-1].content for row in rows]
    columns = {"solution": [TOO_LONG, *[None, "1 2 3"] * STEPS][: len(asked)]}
    prompts = asked if form == "text" else [[{"role": "user", "content": text}] for text in asked]
    data = datasets.Dataset.from_dict({"prompt": prompts, **columns})

    judge = Judge.load(POCKET, max_batch=32)
    seen: list[Row] = []
    submit = judge.submit

    def noted(entry: Any, **options: Any) -> Any:
        seen.append(entry)
        return submit(entry, **options)

    monkeypatch.setattr(judge, "submit", noted)
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=STEPS, num_generations=SIZE,
        per_device_train_batch_size=SIZE * PROMPTS, max_completion_length=12, logging_steps=1,
        learning_rate=1e-3, use_cpu=True, report_to="none", save_strategy="no", seed=1,
        log_completions=False, disable_tqdm=True,
    )  # fmt: skip
    given: dict[str, Any] = {"num_generations": SIZE, "reference": "solution", **OPTIONS}
    with serving(judge, "secret") as server:
        here = QuorumReward(judge, name="here", **given)
        there = QuorumReward(server.url, name="there", api_key="secret", **given).as_async()
        trainer = trl.GRPOTrainer(
            model=str(tmp_path / "policy"), reward_funcs=[here, there], args=settings,
            train_dataset=data,
        )  # fmt: skip
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        trainer.train()
        assert len(server.bodies) == STEPS * PROMPTS
    judge.close()
    logs = [entry for entry in trainer.state.log_history if "rewards/here/mean" in entry]
    assert len(logs) == STEPS
    for entry in logs:
        for name in ("rewards/{}/mean", "rewards/{}/std", "{}/valid_share", "{}/no_verdict"):
            assert entry[name.format("here")] == entry[name.format("there")]
        assert 1 <= entry["rewards/here/mean"] <= 10
    assert sorted(entry["here/no_verdict"] for entry in logs) == [0, 0, 0.5]
    assert len(seen) == 2 * STEPS * PROMPTS
    assert {len(row.responses) for row in seen} == {SIZE}
    assert {row.reference for row in seen} == {None, "1 2 3", TOO_LONG}
    assert {row.messages[-1].content for row in seen} == set(asked)
    after = trainer.model.parameters()
    assert any((b != a).any() for b, a in zip(before, after, strict=True))
