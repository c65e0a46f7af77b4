"""The oracle of judge templates: the turns that plain Jinja writes from a row's own content."""

from collections.abc import Sequence

from jinja2 import Environment

from engine.request import Row

_MARK = "\ufdd0"  # no character: no row of the tests holds it


def judge_turns(
    judge: str, row: Row, order: Sequence[int], hint: str | None = None, anchor: str = "Scores:"
) -> tuple[list[dict[str, str]], str]:
    """The messages for the chat template, and the text that the assistant begins with."""
    text = (
        Environment(trim_blocks=True, lstrip_blocks=True)
        .from_string(judge)
        .render(
            messages=[{"role": m.role, "content": m.content} for m in row.messages],
            responses=[row.responses[i] for i in order],
            reference=row.reference,
            principles=row.principles,
            hint=hint,
            anchor=anchor,
            code=None,
            score_min=1,
            score_max=10,
            turn=lambda role: f"{_MARK}{role}{_MARK}",
        )
    )
    first, *others = text.split(_MARK)
    turns = [{"role": "user", "content": first}] if first.strip() else []
    for role, content in zip(others[::2], others[1::2], strict=True):
        turns.append({"role": role, "content": content})
    prefill = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
    return turns, prefill
