"""Where a text thinks: between `<think>` and `</think>`, in any case.

Scores are read outside of thinking, on the device by the same rule (`kernels/score_grammar.py`).
Needs no torch.
"""

import re

_TAGS = re.compile(r"</?think>", re.IGNORECASE)
_END = re.compile(r"</think>", re.IGNORECASE)
_BEGIN = re.compile(r"<think>", re.IGNORECASE)


def open_thinking(text: str) -> int | None:
    """Where the `<think>` begins inside of which the text ends; None outside of one."""
    tags = list(_TAGS.finditer(text))
    return tags[-1].start() if tags and not tags[-1][0].startswith("</") else None


def after_thinking(text: str) -> str:
    """What counts of a text: after its last `</think>`, up to a `<think>`."""
    return _BEGIN.split(_END.split(text)[-1], maxsplit=1)[0]
