"""The oracle of judge templates: the turns that plain Jinja writes from a row's own content."""

from collections.abc import Sequence

from jinja2 import Environment

from engine.request import Row


def judge_turns(
    judge: str, row: Row, order: Sequence[int], hint: str | None = None, anchor: str = "Scores:"
) -> tuple[list[dict[str, str]], str]:
    """The messages for the chat template, and the text that the assistant begins with. `turn`
    collects what has been written in a list of its own: the text is streamed."""
    begun: list[tuple[str, list[str]]] = [("user", [])]

    def turn(role: str) -> str:
        begun.append((role, []))
        return ""

    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    stream = environment.from_string(judge).generate(
        messages=[{"role": m.role, "content": m.content} for m in row.messages],
        responses=[row.responses[i] for i in order],
        reference=row.reference,
        principles=row.principles,
        hint=hint,
        anchor=anchor,
        code=None,
        score_min=1,
        score_max=10,
        turn=turn,
    )
    for text in stream:
        begun[-1][1].append(text)
    turns = [{"role": role, "content": "".join(texts)} for role, texts in begun]
    if not turns[0]["content"].strip():
        del turns[0]
    prefill = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
    return turns, prefill
