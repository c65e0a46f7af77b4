"""Judges that differ from one another in a single respect, and what they say."""

from collections.abc import Sequence
from typing import Any

from engine.judge import Judge
from engine.request import Row
from engine.scalar_judge import ScalarJudge
from engine.verdict import Verdict


def rebuilt(judge: Judge, **changes: Any) -> Judge:
    """A judge of the same model, templates and fingerprint, with changes."""
    arguments: dict[str, Any] = {
        "judge_template": judge.prompts.judge_template,
        "settings": judge.settings,
        "fingerprint": judge.fingerprint,
    }
    return Judge(judge.model, judge.tokenizer, **(arguments | changes))


def scores_of(judge: ScalarJudge, rows: Sequence[Row]) -> list[list[float]]:
    """The scores of rows that can all be judged."""
    found = []
    for verdict in judge.rows(rows):
        assert isinstance(verdict, Verdict), verdict
        found.append(list(verdict.samples[0].scores or ()))
    return found
