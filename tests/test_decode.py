"""The decode step: when its plan is made anew, and what it may not depend on."""

from collections.abc import Callable

import pytest
import torch

from engine.decode import Decoder
from engine.generate import Generator
from kernels.forest_plan import ForestPlan
from models import load
from models.transformer import Transformer
from tests.test_generate import drawn, make_generator, make_groups, run
from tests.tiny import write_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    directory = tmp_path_factory.mktemp("tiny")
    write_model(directory, "qwen3")
    return load(directory)[0]


def plans_of(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The reach of every plan that is made from now on."""
    made: list[int] = []
    inner = generator.decoder._make_plan

    def make_plan(reach: int) -> ForestPlan:
        made.append(reach)
        return inner(reach)

    monkeypatch.setattr(generator.decoder, "_make_plan", make_plan)
    return made


def test_a_plan_lives_until_the_live_set_changes_or_a_split_is_full(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make_generator(tiny, max_new_tokens=300)
    made = plans_of(generator, monkeypatch)
    run(generator, make_groups(2, k=2, longest=10))
    # All of one length: a second plan only for the step that may write the 257th token.
    assert made == [9, 257]
    generator = make_generator(tiny, max_new_tokens=20, max_batch=4)
    made = plans_of(generator, monkeypatch)
    run(generator, make_groups(4, k=2, longest=10))
    assert made == [9, 9]  # two live sets, one after the other


def test_a_plan_that_lives_long_gives_the_same_bits(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(3, longest=30)
    expected = [drawn(result) for result in run(make_generator(tiny, max_new_tokens=40), groups)]

    def forgetful(steps: Callable[..., None]) -> Callable[..., None]:
        def run_and_forget(self: Decoder, plan: ForestPlan, count: int) -> None:
            steps(self, plan, count)
            self._plan = None

        return run_and_forget

    monkeypatch.setattr(Decoder, "_steps", forgetful(Decoder._steps))
    generator = make_generator(tiny, max_new_tokens=40)
    made = plans_of(generator, monkeypatch)
    assert [drawn(result) for result in run(generator, groups)] == expected
    assert len(made) == 5


def test_idle_rows_change_nothing(tiny: Transformer) -> None:
    """What stands in the buffers behind the live samples is of no consequence."""
    groups = make_groups(1, longest=30)
    expected = [drawn(result) for result in run(make_generator(tiny), groups)]
    generator = make_generator(tiny)
    live = generator.decoder._live
    for tensor in (*live.tensors().values(), live.scores.control, live.scores.value):
        tensor.fill_(1)
    generator.decoder._table.fill_(3)
    assert [drawn(result) for result in run(generator, groups)] == expected


def test_steps_are_counted_without_a_look(tiny: Transformer) -> None:
    generator = make_generator(tiny, max_new_tokens=20)
    stream = generator.run(make_groups(1, k=3))
    next(stream)
    assert generator.usage.decode_tokens == 3 * 19
    assert generator.usage.idle_tokens == 0
    assert torch.equal(generator.decoder.records.tokens[:3, :20] > 0, torch.ones(3, 20).bool())
