"""results.json as Markdown: what a person reads first."""

from collections.abc import Mapping
from typing import Any

FILTER = ", meta filter "  # what a filter's name has before the number that it keeps


def markdown(found: Mapping[str, Any], seconds_per_row: float | None) -> str:
    """All of a run's figures: `found` is results.json; seconds_per_row: of judging, where known."""
    about = found["about"]
    lines = [f"# {about['title']}", "", *_about(found), ""]
    for name, rule in found["rules"].items():
        items = sum(rule["items"].values())
        lines += [f"## Rule: {name}", "", f"{_sentence(rule['says'])} Of {items} items.", ""]
        lines += [*_ways(rule, found["votes"]), ""]
        lines += [*_sweep(rule, found["votes"]), *_parts(rule, found), ""]
    return "\n".join([*lines, *_facts(found, seconds_per_row)]) + "\n"


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def percent(figure: Mapping[str, float | None]) -> str:
    """A figure's value, in per cent."""
    return "" if figure["value"] is None else f"{100 * figure['value']:.1f}"


def percent_interval(figure: Mapping[str, float | None]) -> str:
    """A figure's interval, in per cent."""
    low, high = figure["low"], figure["high"]
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _about(found: Mapping[str, Any]) -> list[str]:
    about, unread = found["about"], found["unread"]
    models = [f"Model {about['model']}."] if "model" in about else []
    if about.get("meta_model") is not None:
        models.append(f"Meta model {about['meta_model']}.")
    lines = [
        " ".join([*models, f"{found['items']} items, {found['facts']['rows']} rows, "
                           f"{found['votes'][-1]} votes."]),
    ]  # fmt: skip
    if unread["entries"]:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in unread["reasons"].items())
        lines += [
            "",
            f"{unread['entries']} entries could not be read, and count nowhere: {reasons}.",
        ]
    failed = found["facts"]["failed"]
    if failed["rows"]:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in failed["reasons"].items())
        lines += ["", f"{failed['rows']} rows could not be judged: {reasons}."]
    if count := found["facts"]["without_threshold"]:
        lines += [
            "",
            f"The model's scores have no threshold: {count} rows are of one response, and rules "
            "that ask whether it is right have no value.",
        ]
    return lines


def _ways(rule: Mapping[str, Any], votes: list[int]) -> list[str]:
    """Totals: a line for each way to vote."""
    rows = []
    for way, sizes in rule["ways"].items():
        if FILTER not in way:
            totals = [sizes[str(size)]["total"] for size in votes]
            rows.append([way, *map(percent, totals), percent_interval(totals[-1])])
    return table(["vote", *(f"@{size}" for size in votes), "95 %"], rows)


def _sweep(rule: Mapping[str, Any], votes: list[int]) -> list[str]:
    """Totals of all votes, by how many of them a meta model's filter keeps."""
    rows: dict[str, dict[int, str]] = {}
    for way, sizes in rule["ways"].items():
        points, is_filter, kept = way.partition(FILTER)
        if is_filter:
            rows.setdefault(points, {})[int(kept)] = percent(sizes[str(votes[-1])]["total"])
    if not rows:
        return []
    head = [f"the best of {votes[-1]} by the meta model", *map(str, votes)]
    cells = [[points, *(of_kept[size] for size in votes)] for points, of_kept in rows.items()]
    return [*table(head, cells), ""]


def _parts(rule: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Sections and subsets at all votes, by the first way to vote."""
    way, sizes = next(iter(rule["ways"].items()))
    figures = sizes[str(found["votes"][-1])]
    counts = rule["items"]
    rows = []
    for name, figure in figures["sections"].items():
        if name not in counts:
            rows.append([f"**{name}**", "", percent(figure), percent_interval(figure)])
    for name, figure in figures["subsets"].items():
        rows.append([name, str(counts[name]), percent(figure), percent_interval(figure)])
    return table([f"@{found['votes'][-1]}, {way}", "items", "", "95 %"], rows)


def _facts(found: Mapping[str, Any], seconds_per_row: float | None) -> list[str]:
    facts = found["facts"]
    first, flips, longest = facts["first"], facts["flips"], facts["longest"]
    lost = "".join(f", {count} {reason}" for reason, count in facts["invalid"].items())
    rows = [
        ["valid samples", f"{facts['valid']} of {facts['samples']}{lost}"],
        ["rows without a valid sample", str(facts["undecided_rows"])],
        ["samples that tie", _share(facts["tied"])],
        ["the response shown first wins", _beside(first, "samples")],
        ["the two orders disagree", f"{_share(flips['share'])} of {flips['rows']} rows"],
        ["the longest response wins", _beside(longest, "rows")],
        ["the longest response is the best", _share(longest["best"])],
        ["tokens of a judgement", _number(facts["tokens_per_judgement"])],
        ["prompt tokens of a row, shared ones once", _number(facts["prompt_tokens_per_row"])],
    ]  # fmt: skip
    for kind, tokens in found["tokens_per_item"].items():
        costs = ", ".join(f"@{size} {value:,.0f}" for size, value in tokens.items())
        rows.append([f"tokens of an item, {kind}", costs])
    rows += [
        [name.replace("_", " "), f"{each:,}" if isinstance(each, int) else _share(each)]
        for name, each in found["facts_of_items"].items()
    ]
    if seconds_per_row is not None:
        rows.append(["seconds of a row", f"{seconds_per_row:.3g}"])
    return ["## Samples", "", *table(["", ""], rows)]


def _share(share: float | None) -> str:
    return "none to tell by" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _beside(fact: Mapping[str, Any], unit: str) -> str:
    """How often something won, beside what is expected."""
    if fact["won"] is None:
        return "none to tell by"
    low, high = fact["ci95"]
    return (
        f"{_share(fact['won'])} [{100 * low:.1f}, {100 * high:.1f}] of {fact[unit]} {unit}, "
        f"{_share(fact['expected'])} by chance"
    )
