"""What a judge declares of its scores, in the judge.json of its directory."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engine.formats import FORMATS
from engine.options import MAX_K
from kernels.score_grammar import ScoreRules
from models.files import read_json

_TYPES: dict[str, tuple[type, ...]] = {
    "score_min": (int,),
    "score_max": (int,),
    "threshold": (int, float),
    "anchor": (str, type(None)),
    "anchor_nonce": (bool, type(None)),
    "stop": (str,),
    "format": (str,),
    "join_blanks": (bool,),
    "meta_scale": (int, float),
    "compares": (bool,),
}
_MOST_SCORE = (2**63 - 1) // MAX_K  # so that the sum of all votes fits in int64


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge writes its scores, as the judge.json of its directory declares it.

    Scores are integers in [score_min, score_max]; `threshold`, by default the middle of the range,
    splits right from wrong for n = 1. `anchor` starts the line on which the deciding box stands
    (None: the last box of the text), and `anchor_nonce` asks for a random number in that line which
    no response holds (None: where the template shows the anchor). stop: "box" for a judge that
    writes its scores once and nothing after them: the first box decides and ends a sample; "eos"
    for any other. format: how scores are written, a box or a name of `engine/formats.py`.
    join_blanks: blanks of a template right before a text of the row are tokenized with that text,
    as most models are trained; False: by themselves. meta_scale, of a meta model: a vote's
    weight is exp of its score times this. compares, of a scalar model: it reads two responses, and
    its scalar is the log-odds that the first is better.
    Raises ValueError for wrong types, scores whose sum over all votes could pass 2^63, an empty
    range of scores, a threshold that no score or every score passes, an anchor that cannot begin a
    line, a stop or nonce that a format has not, and a scale that is no positive number.
    """

    score_min: int = 1
    score_max: int = 10
    threshold: float = math.nan
    anchor: str | None = "Scores:"
    anchor_nonce: bool | None = False
    stop: Literal["box", "eos"] = "eos"
    format: str = "boxed"
    join_blanks: bool = True
    meta_scale: float = 1.0
    compares: bool = False

    def __post_init__(self) -> None:
        for name, types in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ValueError(f"{name} = {value!r} has the wrong type")
        for name in ("score_min", "score_max", "threshold"):
            if abs(getattr(self, name)) > _MOST_SCORE:  # the number may have thousands of digits
                raise ValueError(f"{name} is not within +-{_MOST_SCORE}")
        low, high = self.score_min, self.score_max
        if low >= high:
            raise ValueError(f"score_min {low} >= score_max {high}")
        if math.isnan(self.threshold):
            object.__setattr__(self, "threshold", (low + high) / 2)
        if not low <= self.threshold < high:
            raise ValueError(f"threshold {self.threshold} is not from {low} to below {high}")
        if not (self.meta_scale > 0 and math.isfinite(self.meta_scale)):
            raise ValueError(f"meta_scale = {self.meta_scale} is not a positive number")
        if self.stop not in ("box", "eos"):
            raise ValueError(f"stop = {self.stop!r} is not box or eos")
        if self.format != "boxed" and self.format not in FORMATS:
            raise ValueError(f"format = {self.format!r} is not boxed, {', '.join(FORMATS)}")
        if self.format != "boxed" and (self.stop == "box" or self.anchor_nonce):
            raise ValueError(f"format = {self.format!r} has no box and no anchor")
        self.rules(self.stop, bool(self.anchor_nonce))

    def of_judges(self) -> dict[str, Any]:
        """All but what is said of scalar models alone."""
        return {name: value for name, value in asdict(self).items() if name != "compares"}

    def rules(self, stop: str, nonce: bool) -> ScoreRules:
        """What is read of a sample, which ends by `stop`, of a row with or without a nonce."""
        first = "box" in (stop, self.stop)
        return ScoreRules(self.score_min, self.score_max, self.anchor, first=first, nonce=nonce)


def read_judge_settings(
    directory: str | Path, changes: Mapping[str, Any] | None = None
) -> JudgeSettings:
    """Read judge.json, or the defaults where there is none; `changes` replace what they say.

    Without a judge.json nobody has trained the model to write its scores in one form, so the
    template asks for a nonce where it can. Raises ValueError naming the file for unknown or
    repeated keys, and for what `JudgeSettings` refuses.
    """
    path = Path(directory) / "judge.json"
    if not path.exists():
        return JudgeSettings(**({"anchor_nonce": None} | dict(changes or {})))
    declared = read_json(path)
    for key in declared:
        if key not in _TYPES:
            raise ValueError(f"{path}: unknown key {key!r}")
    try:
        threshold = declared.get("threshold")
        if isinstance(threshold, float) and math.isnan(threshold):
            raise ValueError("threshold nan is not a number")
        settings = JudgeSettings(**declared)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not changes:
        return settings
    if "threshold" not in changes and {"score_min", "score_max"} & set(changes):
        changes = {**changes, "threshold": math.nan}
    return JudgeSettings(**{**asdict(settings), **changes})
