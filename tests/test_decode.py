"""The decode step: when its plan is made anew, and what it may not depend on."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import engine.generate as generate
from engine.decode import Decoder
from engine.forest import Node
from engine.generate import Generator
from kernels.forest_attention.plan import ForestPlan
from models import load
from models.transformer import Transformer
from tests.rows import needs_cpp
from tests.test_generate import drawn, make_generator, make_groups, run
from tests.tiny import VOCAB_SIZE, write_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    directory = tmp_path_factory.mktemp("tiny")
    write_model(directory, "qwen3")
    return load(directory)[0]


def plans_of(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The longest suffix of every plan that is made from now on."""
    made: list[int] = []
    inner = generator.decoder._make_plan

    def make_plan(max_length: int) -> ForestPlan:
        made.append(max_length)
        return inner(max_length)

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
    """What stands in the buffers past the live samples is of no consequence."""
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


@needs_cpp
def test_looking_one_block_late_changes_no_sample(tiny: Transformer) -> None:
    """As on a GPU, where a block of steps runs while the host looks at the one before."""
    groups = make_groups(5, k=3, longest=20)
    ends = torch.tensor(range(0, VOCAB_SIZE, 64))

    def sampled(ahead: int, max_batch: int) -> tuple[list[list[tuple]], Generator]:
        generator = make_generator(tiny, max_new_tokens=50, max_batch=max_batch)
        generator.decoder.end_ids = ends
        generator.ahead = ahead
        return [drawn(result) for result in run(generator, groups)], generator

    expected, prompt = sampled(0, 15)
    for max_batch in (4, 15):
        late, generator = sampled(1, max_batch)
        assert late == expected
        usage = generator.usage
        lengths = [len(tokens) for row in late for tokens, *_ in row]
        assert min(lengths) < 20 and usage.decode_tokens == sum(lengths) - len(lengths)
        assert usage.idle_tokens > prompt.usage.idle_tokens
        assert not generator._polls and not generator._spans


def test_decode_goes_on_between_the_pieces_of_a_prefill(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that join do not stall those that are live; no bit changes, and no prompt is computed
    twice."""
    groups = make_groups(6, k=3, longest=120)
    whole = make_generator(tiny, max_batch=6)
    expected = [drawn(result) for result in run(whole, groups)]
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 64)
    generator = make_generator(tiny, max_batch=6)
    # The second samples of a row end later than the first, so rows join one after the other.
    events: list[str] = []
    prefill, steps = generator._forward_prefill, generator.decoder._steps

    def forward_prefill(pieces: list[tuple[Node, int, int]]) -> Tensor:
        events.append("alone" if not generator.leaves else "piece")
        assert sum(stop - first for _, first, stop in pieces) <= 64
        return prefill(pieces)

    def run_steps(plan: ForestPlan, count: int) -> None:
        events.append("steps")
        steps(plan, count)

    monkeypatch.setattr(generator, "_forward_prefill", forward_prefill)
    monkeypatch.setattr(generator.decoder, "_steps", run_steps)
    generator.decoder.end_ids = torch.tensor(range(0, VOCAB_SIZE, 16))
    ended = [drawn(result) for result in run(generator, groups)]
    for long, short in zip(expected, ended, strict=True):
        for (tokens, *_), (fewer, *_) in zip(long, short, strict=True):
            assert tokens[: len(fewer)] == fewer
    assert "piece" in events and "alone" in events
    assert "piece piece" not in " ".join(events)
    assert generator.usage.prefill_tokens == whole.usage.prefill_tokens
