"""Verdicts for a person to read, as plain text with optional ANSI colour.

All that comes from rows or from the model is untrusted: its control characters, terminal escapes
and direction overrides are written out as escapes, so that no response can steer the terminal. Long
texts are cut. Responses are called [0], [1], ... as in the output lines. Width is counted in
characters, so text in wide scripts may run over.
"""

import math
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from engine.labels import best_of
from engine.request import Row
from engine.verdict import RowFailure, Sample, Verdict

PROMPT_LINES = 12
RESPONSE_LINES = 8
SAMPLE_LINES = 30
BAR_WIDTH = 24
_SUMS = {
    "sum": "Scores, summed over the votes",
    "standardised": "Scores above their judgement's mean, in its deviations, summed over the votes",
    "borda": "Responses scored lower, summed over the votes",
}
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "cyan": "36"}
_JOINERS = "\u200c\u200d"  # part of ordinary words in many scripts, and of emoji


def escape(text: str) -> str:
    """The text with every control, format and surrogate character but newline written out."""
    return "".join(
        character
        if character == "\n"
        or character in _JOINERS
        or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else character.encode("unicode_escape").decode("ascii")
        for character in text.replace("\r\n", "\n").replace("\t", "    ")
    )


def render_verdict(row: Row, verdict: Verdict | RowFailure, width: int, color: bool) -> str:
    """One row's outcome: prompt, responses, one sample, meta scores, score bars, winner, votes, and
    which responses the samples prefer.

    The sample shown agrees with the verdict where one does, has the highest meta score of those,
    and sees the responses in their own order where one of those does. No line is longer than
    `width` characters.
    """
    paint = _Paint(color)
    lines = [paint("dim", "─" * width), paint("bold", _cut(f"Row {escape(row.id)}", width))]
    for message in row.messages:
        lines += _block(message.role.capitalize(), message.content, PROMPT_LINES, width, paint)
    for name, text in (("Reference", row.reference), ("Principles", row.principles)):
        if text is not None:
            lines += _block(name, text, PROMPT_LINES, width, paint)
    for index, response in enumerate(row.responses):
        lines += _block(f"Response [{index}]", response, RESPONSE_LINES, width, paint)
    if isinstance(verdict, RowFailure):
        return "\n".join([*lines, *render_error(verdict, width, color).splitlines()])
    number = _sample_to_show(verdict)
    sample = verdict.samples[number]
    shown = " ".join(f"[{index}]" for index in sample.order)
    saw = f", which saw {shown}" if shown else ""
    title = f"Judgement {number + 1} of {len(verdict.samples)}{saw}"
    end = "…" if sample.finish == "length" and not sample.forced else ""
    if sample.order or sample.text:  # a scalar model writes none
        lines += _block(title, sample.text.strip(), SAMPLE_LINES, width, paint, end)
    if sample.invalid is not None:
        lines.append(paint("red", _cut(f"  No valid scores: {escape(sample.invalid)}", width)))
    lines += _meta_scores(verdict, width, paint)
    lines += _bars(verdict, width, paint)
    lines += _outcome(row, verdict, width, paint)
    lines += _preferences(verdict, width)
    return "\n".join(lines)


def render_error(failure: RowFailure, width: int, color: bool) -> str:
    """A failure's place and reason."""
    place = f"line {failure.line}" if failure.line is not None else "a row"
    text = _wrap(f"Not judged: {place}: {escape(failure.error)}", width)
    return "\n".join(_Paint(color)("red", line) for line in text)


def render_summary(summary: dict[str, Any], width: int) -> str:
    """The run as a whole, from the closing summary's fields."""
    parts = [f"{summary['rows']} rows in {summary['seconds']:.1f} s"]
    if summary["interrupted"]:
        parts.append("interrupted")
    if summary["errors"]:
        parts.append(f"{summary['errors']} not judged")
    decided = summary["accuracy_of_decided"]
    if decided is not None:
        low, high = summary["accuracy_95"]
        share = f"{summary['accuracy']:.0%} agree with the label"
        parts.append(f"{share} (95 % interval {low:.0%} to {high:.0%})")
        if summary["unguided_accuracy"] is not None:
            parts.append(f"{summary['unguided_accuracy']:.0%} would without the meta model")
        if decided != summary["accuracy"]:
            parts.append(f"{decided:.0%} of those with a verdict do")
    if summary["ties"]:
        parts.append(f"{summary['ties_agreed']} of {summary['ties']} ties agree")
    if summary["undecided"]:
        parts.append(f"{summary['undecided']} without a verdict")
    if summary["valid_share"] is not None:
        parts.append(f"{summary['valid_share']:.1%} of samples valid")
    if summary["forced"]:
        parts.append(f"{summary['forced']} of them had their scores forced")
    if summary["invalid"]:
        reasons = ", ".join(f"{count} {name}" for name, count in summary["invalid"].items())
        parts.append(f"the others: {reasons}")
    if summary["cut_while_thinking"]:
        parts.append(f"{summary['cut_while_thinking']} were cut while thinking")
    if summary["unread_line"] is not None:
        parts.append(f"their commonest line of scores: {escape(summary['unread_line'])}")
    if summary["first_wins"] is not None:
        low, high = summary["first_wins_95"]
        parts.append(
            f"the response shown first wins {summary['first_wins']:.0%} of judgements (95 % "
            f"interval {low:.0%} to {high:.0%}; {summary['first_wins_expected']:.0%} expected)"
        )
    computed, naive = summary["tokens_computed"], summary["tokens_naive"]
    tokens = f"{computed:,} tokens computed at {summary['tokens_per_second']:,.0f} tokens/s"
    if computed:
        tokens += (
            f"; a naive sampler, which reads every prompt k times, would compute {naive:,} "
            f"({naive / computed:.1f} times as many)"
        )
    return "\n".join([*_wrap("; ".join(parts) + ".", width), *_wrap(tokens + ".", width)])


class _Paint:
    """Colours a text, or leaves it alone."""

    def __init__(self, color: bool) -> None:
        self.color = color

    def __call__(self, style: str, text: str) -> str:
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self.color else text


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split("\n"))
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    wrapper = textwrap.TextWrapper(
        width, initial_indent=indent, subsequent_indent=indent, replace_whitespace=False
    )
    return [line for paragraph in text.split("\n") for line in wrapper.wrap(paragraph) or [""]]


def _block(
    title: str, text: str, limit: int, width: int, paint: _Paint, end: str = ""
) -> list[str]:
    """A title and an indented text of at most `limit` lines; `end` follows a text shown whole."""
    shown = text[: limit * width]  # more cannot fit; wrapping a megabyte takes seconds
    lines = _wrap(escape(shown) + end, width, "  ") if shown.strip() else [f"  ({_blank(text)})"]
    if len(lines) > limit or len(shown) < len(text):
        lines = lines[: limit - 1]
        lines.append(f"  … ({len(text):,} characters in all)")
    return [paint("cyan", _cut(title, width)), *lines]


def _blank(text: str) -> str:
    return "only whitespace" if text else "empty"


def _sample_to_show(verdict: Verdict) -> int:
    """The sample that speaks best for the verdict: it agrees, then the meta model thinks highly of
    it, then it saw the given order."""

    def rank(number: int) -> tuple[bool, bool, float, bool, int]:
        sample = verdict.samples[number]
        in_order = list(sample.order) == sorted(sample.order)
        agrees = _agrees(sample, verdict)
        return (sample.scores is None, not agrees, -_meta_score(sample), not in_order, number)

    return min(range(len(verdict.samples)), key=rank)


def _agrees(sample: Sample, verdict: Verdict) -> bool:
    if sample.scores is None or verdict.best is None or verdict.mean_scores is None:
        return False
    if len(sample.scores) == 1:  # no winner to agree on: close to the mean
        return abs(sample.scores[0] - verdict.mean_scores[0]) <= 0.5
    top = max(sample.scores)
    return sample.scores[verdict.best] == top and sample.scores.count(top) == 1


def _meta_score(sample: Sample) -> float:
    """The meta score, -inf for a sample that has none."""
    return -math.inf if sample.meta is None or math.isnan(sample.meta) else sample.meta


def _meta_scores(verdict: Verdict, width: int, paint: _Paint) -> list[str]:
    if all(sample.meta is None for sample in verdict.samples):
        return []
    title = f"Meta scores of the samples; the highest {verdict.votes} vote"
    if verdict.meta_vote == "weight":
        title = "Meta scores of the samples; the higher, the more a vote weighs"
    scores = map(_meta_score, verdict.samples)
    shown = "  ".join("none" if score == -math.inf else f"{score:.2f}" for score in scores)
    return [paint("cyan", _cut(title, width)), *_wrap(shown, width, "  ")]


def _number(total: float) -> str:
    """A sum of votes: an integer, or two decimals."""
    return str(total) if isinstance(total, int) else f"{total:.2f}"


def _bars(verdict: Verdict, width: int, paint: _Paint) -> list[str]:
    if verdict.scores is None or verdict.mean_scores is None or verdict.best is None:
        return []
    low, high = min(0, *verdict.scores), max(0, *verdict.scores)
    title = _SUMS[verdict.vote if len(verdict.scores) > 1 else "sum"]  # one keeps its score
    lines = [paint("cyan", _cut(title, width))]
    shown = [_number(score) for score in verdict.scores]
    digits = max(map(len, shown))
    for index, (score, mean) in enumerate(zip(verdict.scores, verdict.mean_scores, strict=True)):
        length = round(BAR_WIDTH * (score - low) / (high - low)) if high > low else 0
        bar = "█" * length + "░" * (BAR_WIDTH - length)
        mark = ""
        if len(verdict.scores) > 1 and index == verdict.best:
            mark = "  <- best (drawn from a tie)" if verdict.tie else "  <- best"
        text = f"  {f'[{index}]':>4} {bar} {shown[index]:>{digits}}  mean {mean:.2f}{mark}"
        lines.append(paint("bold", _cut(text, width)) if mark else _cut(text, width))
    return lines


def _outcome(row: Row, verdict: Verdict, width: int, paint: _Paint) -> list[str]:
    votes = f"{verdict.valid} of {len(verdict.samples)} samples valid"
    if verdict.votes != verdict.valid:
        votes += f", {verdict.votes} of them voted"
    if len(verdict.samples) < verdict.k:
        votes += f", decided before the other {verdict.k - len(verdict.samples)}"
    if verdict.best is None or verdict.mean_scores is None:
        text = "No verdict: no sample voted"
    elif len(row.responses) == 1:
        text = f"Mean score {verdict.mean_scores[0]:.2f}"
    else:
        text = f"Best: [{verdict.best}]"
        if verdict.unguided_best not in (None, verdict.best):
            votes += f"; all alike would have chosen [{verdict.unguided_best}]"
    if verdict.label is not None:
        label = _label_text(verdict.label, len(row.responses))
        good = verdict.correct or verdict.agrees
        if verdict.best is None or verdict.correct is verdict.agrees is None:
            text += f", where the label says {label}"
        else:
            text += ", as labelled" if good else f", but the label says {label}"
    style = "bold" if verdict.correct is verdict.agrees is None else "green" if good else "red"
    return [paint(style, line) for line in _wrap(f"{text}; {votes}.", width)]


def _preferences(verdict: Verdict, width: int) -> list[str]:
    """How many valid samples score each response highest, and by how much the sum decides."""
    if verdict.scores is None or verdict.best is None or len(verdict.scores) == 1:
        return []
    preferred: Counter[int] = Counter()
    tied = 0
    for sample in verdict.samples:
        if sample.scores is not None:
            top = max(sample.scores)
            if sample.scores.count(top) == 1:
                preferred[sample.scores.index(top)] += 1
            else:
                tied += 1
    counts = [f"[{index}] {count}" for index, count in preferred.most_common()]
    counts += [f"tied {tied}"] if tied else []
    text = "Samples prefer: " + "  ".join(counts)
    if not verdict.tie:
        best, second = sorted(verdict.scores, reverse=True)[:2]
        text += f"; [{verdict.best}] leads the sum by {_number(best - second)} of {_number(best)}"
    return _wrap(f"{text}.", width)


def _label_text(label: int | Sequence[float], num_responses: int) -> str:
    if num_responses == 1:
        return "right" if label else "wrong"
    return " or ".join(f"[{index}]" for index in best_of(label))
