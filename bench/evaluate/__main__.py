"""A reward model on a published benchmark: its rows judged, its rules applied, what votes gain.

    python -m bench.evaluate NAME --data PATH --model DIR --out DIR [--meta-model DIR] [--k 32]
    python -m bench.evaluate compare DIR DIR
    python -m bench.evaluate report DIR ...

PATH is a file or a folder as the benchmark's authors publish it. The same command continues a run
that was stopped. OUT/results.md has the figures, OUT/results.json all of them; OUT/curve.png shows
what votes gain, OUT/page.html every judgement. Beside them are OUT/rows.jsonl (what was judged),
OUT/verdicts.jsonl (lines of `engine.sample`), OUT/items.jsonl (each item's value by each rule),
OUT/unread.jsonl (entries that could not be read) and OUT/times.jsonl.

Exit status: as of `engine.sample`; 1 too where entries could not be read.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.evaluate import compare, report, results
from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout
from bench.evaluate.benchmarks import BENCHMARKS, plain
from bench.evaluate.page import write_page
from bench.provenance import provenance
from engine import command, sample
from engine.kind import kind_of
from engine.options import JudgeOptions
from engine.reading import Columns
from engine.sample import GROUPS, MOST_ROW_BYTES, Options, RunOptions
from engine.settings import read_judge_settings
from train.directory import replace_text

EXAMPLE = "--data PATH --model DIR --k 32 --out runs/evaluation"
OTHERS = {"compare": compare.main, "report": report.main}
JUDGED = (0, 1, 3)  # exit statuses of a run that went through all rows


@dataclass(frozen=True)
class Args(RunOptions):
    """Judge a published benchmark and score the verdicts by its rules."""

    data: Path | None = None
    """The published file, or the folder of files."""
    out: Path | None = None
    """Directory of the evaluation; an earlier one of the same rows and options is continued."""
    k: int = 32
    """Judgements per row; a scalar model gives its scores once."""
    layout: Layout | None = None
    """How an entry of many responses is shown: all at once (group), in pairs, one by one (single),
    or some so and some so (mixed); none is as the benchmark has it."""
    limit: int | None = None
    """Judge the first so many entries of each subset."""
    columns: str | None = None
    """Where rows of one's own (plain) have what is needed, as for `engine.sample`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "out"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is missing")
        if self.until_decided is not None:
            raise ValueError("until_decided: a curve needs all k judgements of every row")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit} is less than 1")


def evaluate(benchmark: Benchmark, args: Args) -> int:
    """Judge, score, write everything to OUT; returns the exit status."""
    out, data = args.out, args.data
    assert out is not None and data is not None
    layout = args.layout or benchmark.layouts[0]
    if layout not in benchmark.layouts:
        raise ValueError(
            f"layout = {layout!r}: {benchmark.title} has {', '.join(benchmark.layouts)}"
        )
    if args.columns is not None:
        if benchmark is not plain.BENCHMARK:
            raise ValueError(f"columns: those of {benchmark.title} are known")
        own = partial(plain.read, columns=Columns.parse(args.columns))
        benchmark = benchmark._replace(read=own)
    inner, outer = out.resolve(), data.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ValueError(f"--out {out} and --data {data}: one is within the other")
    items, unread = read(benchmark, args, layout)
    if not items:
        raise ValueError(f"{data} has no entry of {benchmark.title}: {_first_error(unread)}")
    prepare(out, items, unread)
    if kind_of(args.model) == "scalar":
        args = dataclasses.replace(args, k=JudgeOptions.k)
    shared = {each.name: getattr(args, each.name) for each in dataclasses.fields(RunOptions)}
    rows, verdicts = out / "rows.jsonl", out / "verdicts.jsonl"
    before = _count_lines(verdicts)
    status, summary = sample.judge(
        Options(
            **shared, data=str(rows), out=str(verdicts), resume=True, max_row_bytes=MOST_ROW_BYTES
        )
    )
    if summary is not None and (judged := _count_lines(verdicts) - before) > 0:
        add_time(out / "times.jsonl", judged, summary)
    if status not in JUDGED or summary is None:
        return status
    settings = read_judge_settings(args.model, args.settings)
    scale = None if args.meta_model is None else read_judge_settings(args.meta_model).meta_scale
    results.write(out, benchmark, items, settings.threshold, scale, about(benchmark, args, layout))
    write_page(out, scale if scale is not None and args.meta_vote == "weight" else 1.0)
    print((out / "results.md").read_text(encoding="utf-8"))
    return status or int(bool(unread))


def read(benchmark: Benchmark, args: Args, layout: Layout) -> tuple[list[Item], list[BadItem]]:
    """The items to judge, and the entries that could not be read."""
    assert args.data is not None
    items: list[Item] = []
    unread: list[BadItem] = []
    taken: Counter[str] = Counter()
    for item in benchmark.read(args.data, layout):
        if isinstance(item, BadItem):
            unread.append(item)
            continue
        taken[item.subset] += 1
        if args.limit is None or taken[item.subset] <= args.limit:
            items.append(item)
    return items, unread


def prepare(out: Path, items: Sequence[Item], unread: Sequence[BadItem]) -> None:
    """Write OUT/rows.jsonl and OUT/unread.jsonl. Raises ValueError where OUT has other rows, or
    files of something else."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / "rows.jsonl").exists():
        raise ValueError(f"{out} holds something else than an evaluation")
    text = "".join(line + "\n" for item in items for line in row_lines(item))
    rows = out / "rows.jsonl"
    if rows.exists() and rows.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} is an evaluation of other rows: the data or the options changed")
    replace_text(rows, text)
    replace_text(
        out / "unread.jsonl",
        "".join(json.dumps(each._asdict()) + "\n" for each in unread),
    )


def row_lines(item: Item) -> Iterator[str]:
    """An item's rows as lines of JSON; `meta` says which item they are of."""
    meta = {"item": item.id, "subset": item.subset, "facts": dict(item.facts)}
    for row in item.rows:
        fields: dict[str, Any] = {
            "id": row.id,
            "prompt": [{"role": each.role, "content": each.content} for each in row.messages],
            "responses": row.responses,
            "label": row.label,
            "reference": row.reference,
            "principles": row.principles,
            "meta": meta,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        yield json.dumps(given, ensure_ascii=False)


def add_time(path: Path, judged: int, summary: dict[str, Any]) -> None:
    """Add a line of what this process has judged, and on which machine."""
    usage = summary["usage"]
    line = {
        "rows": judged,
        "seconds": summary["seconds"],
        "tokens": usage["prefill_tokens"] + usage["decode_tokens"],
        **provenance(),
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def about(benchmark: Benchmark, args: Args, layout: Layout) -> dict[str, Any]:
    """What was evaluated, and how: part of the results."""
    values = command.flat(args) | {"benchmark": benchmark.name, "layout": layout}
    shown = {
        name: str(value) if isinstance(value, Path) else value for name, value in values.items()
    }
    left_out = ("data", "out", "show_prompt", "drain_seconds", "max_batch")
    return {name: value for name, value in sorted(shown.items()) if name not in left_out}


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _first_error(unread: Sequence[BadItem]) -> str:
    if not unread:
        return "it is empty"
    first = unread[0]
    return f"{first.source}, line {first.line}: {first.error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return command.run(lambda: _run(words))


def _run(words: list[str]) -> int | None:
    name, *rest = words or ["--help"]
    if name in OTHERS:
        return OTHERS[name](rest)
    if name not in BENCHMARKS:
        if name not in ("-h", "--help"):
            raise ValueError(f"there is no benchmark {name!r}: {', '.join(BENCHMARKS)}")
        print(__doc__)
        width = max(map(len, BENCHMARKS))
        for each in BENCHMARKS.values():
            print(f"    {each.name:{width}}  {each.title} ({each.source})")
        return 0
    own = ("data", "columns", "out", "layout", "limit")
    others = {title: [each for each in names if each not in own] for title, names in GROUPS.items()}
    groups = {"benchmark": own, **others}
    args = command.parse(
        Args, groups, prog=f"python -m bench.evaluate {name}", example=EXAMPLE, arguments=rest
    )
    return evaluate(BENCHMARKS[name], args)


if __name__ == "__main__":
    sys.exit(main())
