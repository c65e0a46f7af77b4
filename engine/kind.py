"""What a model directory holds, by the architecture that its config.json names; needs no torch."""

import json
from pathlib import Path
from typing import Literal

Kind = Literal["judge", "scalar", "cloud"]
_CLOUD = ("FeedbackRewardModel", "CLoudRewardModel")  # published, and as its own code calls it


def kind_of(directory: str | Path) -> Kind:
    """A language model, which writes judgements, a sequence classifier, which gives a scalar, or a
    language model with a reward head, which writes critiques.

    A directory that cannot be read is a judge's: loading it says what is wrong.
    """
    path = Path(directory) / "config.json"
    try:
        names = json.loads(path.read_bytes())["architectures"] if path.is_file() else []
    except (ValueError, KeyError, TypeError):
        return "judge"
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if name in _CLOUD:
        return "cloud"
    return "scalar" if str(name).endswith("ForSequenceClassification") else "judge"
