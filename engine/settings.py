"""What a judge declares of its scores, in the judge.json of its directory."""

import math
from dataclasses import dataclass
from pathlib import Path

from models.config import read_json

_SETTING_TYPES: dict[str, tuple[type, ...]] = {
    "score_min": (int,),
    "score_max": (int,),
    "threshold": (int, float),
    "anchor": (str, type(None)),
}


@dataclass(frozen=True)
class JudgeSettings:
    """What a model directory's judge.json declares of its scores.

    Scores are integers in [score_min, score_max]; `threshold` splits right from wrong for n = 1;
    `anchor` starts the line after which the deciding box stands (None: the last box of the text).
    """

    score_min: int = 1
    score_max: int = 10
    threshold: float = 5.5
    anchor: str | None = "Scores:"


def read_judge_settings(directory: str | Path) -> JudgeSettings:
    """Read judge.json, or the defaults where there is none.

    Raises ValueError naming the file for unknown or repeated keys, wrong types, an empty range of
    scores, a threshold that no score or every score passes, or an anchor that is not one line.
    """
    path = Path(directory) / "judge.json"
    if not path.exists():
        return JudgeSettings()
    declared = read_json(path)
    for key, value in declared.items():
        if key not in _SETTING_TYPES:
            raise ValueError(f"{path}: unknown key {key!r}")
        if isinstance(value, bool) or not isinstance(value, _SETTING_TYPES[key]):
            raise ValueError(f"{path}: {key} = {value!r} has the wrong type")
    settings = JudgeSettings(**declared)
    low, high, threshold = settings.score_min, settings.score_max, settings.threshold
    if low >= high:
        raise ValueError(f"{path}: score_min {low} >= score_max {high}")
    if not math.isfinite(threshold) or not low <= threshold < high:
        raise ValueError(f"{path}: threshold {threshold} is not from {low} to below {high}")
    if settings.anchor is not None and (not settings.anchor or "\n" in settings.anchor):
        raise ValueError(f"{path}: anchor {settings.anchor!r} must be one non-empty line or null")
    return settings
