"""What a model directory holds, by the architecture that its config.json names; needs no torch."""

import json
from pathlib import Path
from typing import Literal

Kind = Literal["judge", "scalar"]


def kind_of(directory: str | Path) -> Kind:
    """A language model, which writes judgements, or a sequence classifier, which gives a scalar.

    A directory that cannot be read is a judge's: loading it says what is wrong.
    """
    path = Path(directory) / "config.json"
    try:
        names = json.loads(path.read_bytes())["architectures"] if path.is_file() else []
    except (ValueError, KeyError, TypeError):
        return "judge"
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    return "scalar" if str(name).endswith("ForSequenceClassification") else "judge"
