"""Real rows, real lengths: LLMBar through the engine, none lost. Skips without the data."""

from pathlib import Path

import pytest

from bench.evaluate.benchmark import Item
from bench.evaluate.benchmarks import llmbar
from engine.judge import Judge
from engine.request import Row
from engine.sample import POCKET
from engine.verdict import Verdict

DATA = Path(__file__).parents[2] / "shared" / "data" / "llmbar"


def read_llmbar(folder: Path) -> list[Row]:
    items = [each for each in llmbar.read(folder, "group") if isinstance(each, Item)]
    return [row for item in items for row in item.rows]


@pytest.mark.skipif(not DATA.is_dir(), reason="the LLMBar rows are not here")
@pytest.mark.parametrize("every", [60, pytest.param(1, marks=pytest.mark.soak)])
def test_every_row_of_llmbar_comes_back(every: int) -> None:
    """All 419 in the soak; in the suite every sixtieth, of all five sets."""
    rows = read_llmbar(DATA)
    assert len(rows) == 419
    rows = rows[::every]
    judge = Judge.load(POCKET)
    verdicts = list(judge.rows(rows, k=4, max_new_tokens=32, orders="fixed"))
    assert [v.id for v in verdicts] == [row.id for row in rows]
    for verdict in verdicts:
        assert isinstance(verdict, Verdict), verdict
        assert len(verdict.samples) == 4
        assert all(s.tokens >= 1 and (s.scores is None) != (s.invalid is None)
                   for s in verdict.samples)  # fmt: skip
        assert verdict.tree_tokens < verdict.prompt_tokens
