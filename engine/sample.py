"""`python -m engine.sample`: rows in, verdicts out. The command line and its wiring, nothing else.

A judge writes judgements (`engine/judge.py`). Where the model's directory holds a sequence
classifier, its scores are the verdict (`engine/scalar_judge.py`); where it holds a language model
with a reward head, the rewards of its critiques are (`engine/cloud.py`).

Without --out the verdicts are printed for a person; with it they are lines of JSON, in input order,
and a summary of one JSON line goes to standard error. Input is read as the judge asks for it.

Exit status: 0 when every row was judged; 1 when a line could not be judged or written; 2 for wrong
options, an unreadable model, or an output that is refused; 3 when rows were judged and none of them
got a verdict; 130, 143 and 129 after SIGINT, SIGTERM and SIGHUP. The first such signal ends the
input: rows in flight are finished and written, those that take longer than --drain-seconds are
dropped. The second one kills.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `Drain`: no traceback of half an import

import dataclasses
import io
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tqdm import tqdm

from engine import command
from engine.kind import kind_of
from engine.options import JudgeOptions, PromptOptions, meaningless
from engine.output import LineFacts, Output, resume
from engine.reading import MAX_ROW_BYTES, Columns, Pipe, RowFiles, open_rows, read_rows
from engine.request import BadRow, Row
from engine.stopping import STOP_SIGNALS
from engine.summary import Tally
from engine.verdict import RowFailure, Verdict, to_line
from engine.view import escape, render_error, render_summary, render_verdict

if TYPE_CHECKING:
    from engine.cloud import CloudJudge
    from engine.judge import Judge
    from engine.scalar_judge import ScalarJudge

    AnyJudge = Judge | ScalarJudge | CloudJudge

POCKET = Path(__file__).parent.parent / "models" / "pocket"
BUNDLED_ROWS = Path(__file__).with_name("rows.jsonl")
MOST_ROW_BYTES = 1 << 30
_MOST_TAKEN = 1 << 14  # entries whose lines are not written yet: bad ones behind a row need no room
_ALARM_SECONDS = 0.1  # from one look at the end of a drain to the next
GROUPS = {
    "model": ("model", "meta_model", "dtype", "device", "numerics"),
    "rows": ("data", "columns", "max_row_bytes"),
    "scores": ("anchor_nonce", "stop", "force_scores"),
    "output": ("out", "resume", "drain_seconds", "show_prompt"),
    "judging": (
        "k",
        "score",
        "vote",
        "meta_vote",
        "k_meta",
        "until_decided",
        "orders",
        "max_orders",
        "max_shown",
        "seed",
    ),
    "sampling": ("temperature", "top_p", "top_k", "min_p", "max_new_tokens"),
    "speed": ("max_batch", "cache_bytes", "memory_fraction", "attention", "deterministic"),
}
# Options that have no meaning without judgements, beside those of sampling.
_OF_JUDGEMENTS = (
    "meta_model", "anchor_nonce", "anchor", "score_min", "score_max", "threshold", "format",
)  # fmt: skip
EXAMPLE = "--model DIR --data rows.jsonl --out verdicts.jsonl --k 32"
T = TypeVar("T")


@dataclass(frozen=True)
class LoadOptions(JudgeOptions):
    """What loading a judge takes, and what its rows are judged with."""

    model: Path = POCKET
    """Model directory in Hugging Face layout."""
    meta_model: Path | None = None
    """Directory of a meta reward model, which scores judgements; see --meta-vote."""
    anchor_nonce: Literal["on", "off"] | None = None
    """Ask for a random number in that line, which no response can hold, and read no line without;
    by default on for models without a judge.json whose template shows the anchor."""
    prompts: PromptOptions = PromptOptions()
    dtype: str = "auto"
    """Of weights and cache: auto, float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu or cuda."""
    numerics: Literal["portable", "fast"] = "portable"
    """portable has the same bits on every CPU; fast may use instructions that have not."""
    max_batch: int | None = None
    """Most samples decoded together."""
    cache_bytes: int | None = None
    """Most bytes of keys and values; none is what memory allows."""
    memory_fraction: float | None = None
    """In place of that: a fraction of the memory that is free once the weights are loaded."""
    drain_seconds: float = 60.0
    """How long a signal lets the rows under way go on; those not finished by then are dropped."""

    @property
    def judging(self) -> dict[str, Any]:
        """The options of `Judge.rows`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(JudgeOptions)}

    @property
    def settings(self) -> dict[str, Any]:
        """What is said in place of judge.json."""
        nonce = self.anchor_nonce
        return self.prompts.settings | ({} if nonce is None else {"anchor_nonce": nonce == "on"})


@dataclass(frozen=True)
class RunOptions(LoadOptions):
    """What a run takes, wherever its rows come from."""

    show_prompt: bool = False
    """Print the first row's prompt, as its first sample sees it, and judge nothing."""


@dataclass(frozen=True)
class RowOptions(RunOptions):
    """What a run takes, and where its rows come from."""

    data: str | None = None
    """Rows: lines or an array of JSON, gzipped or not, or Parquet, or a directory of such files; -
    is standard input, none the bundled rows."""
    columns: str | None = None
    """Where a table in another layout has what a row needs: JSON or a file of it, such as
    {"prompt": "input", "responses": ["a", "b"], "label": {"column": "y", "values": {"1": 0}}}."""
    max_row_bytes: int = MAX_ROW_BYTES
    """Longest input line, in bytes; a longer one is an error line."""


@dataclass(frozen=True)
class Options(RowOptions):
    """Judge responses with a generative reward model: k judgements a row, then a vote."""

    out: str | None = None
    """Where verdicts go, one JSON line each; - is standard output, none prints for a person."""
    resume: bool = False
    """Continue --out where an earlier run of the same rows and options was cut off."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m engine.sample") -> int:
    """Run the command line and return its exit status."""
    return command.run(lambda: _judge(arguments, prog))


def _judge(arguments: Sequence[str] | None, prog: str) -> int:
    options = command.parse(Options, GROUPS, prog=prog, example=EXAMPLE, arguments=arguments)
    status, summary = judge(options)
    if summary is not None and options.out is None:
        print("─" * _width() + "\n" + render_summary(summary, _width()))
    elif summary is not None:
        print(json.dumps(summary), file=sys.stderr)
    if status == 3:
        assert summary is not None
        print(in_vain(summary), file=sys.stderr)
    return status


def judge(options: Options) -> tuple[int, dict[str, Any] | None]:
    """Judge as the options say; the exit status, and what the closing summary is made of, None
    where no row was to be judged."""
    with ExitStack() as stack:
        drain = stack.enter_context(closing(Drain(options.drain_seconds)))
        try:
            if options.show_prompt:
                print(first_prompt(options, stack))
                return 0, None
            run = _Run(options, drain, stack)
        except Interrupted:
            assert drain.signal is not None
            return 128 + drain.signal, None
        command.begin_work()
        summary = run.judge_rows()
        return run.status, summary


class Interrupted(KeyboardInterrupt):
    """A signal came while loading or waiting for input, or a drain has taken too long."""


class Drain:
    """Ends the input at the first signal; the second one does what it does by default.

    The signal may find the run loading a model or blocked in reading a pipe, where a flag alone
    would be seen late: there the handler raises. Once rows are judged it sets an alarm, which
    raises when `seconds` have passed. While a line is written nothing raises, nor while libraries
    are imported: some go on with half of what they are.
    """

    def __init__(self, seconds: float, tell: Callable[[], object] | None = None) -> None:
        """tell: called when the signal comes, once rows are judged."""
        if not (seconds >= 0 and math.isfinite(seconds)):
            raise ValueError(f"--drain-seconds {seconds} is not a number of at least 0")
        self.seconds = seconds
        self._tell = tell
        self.signal: int | None = None  # that has come
        self._has_loaded = False
        self._may_end = False  # nothing is lost if the run ends here
        self._judging = False
        self._deadline = math.inf
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._look)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._has_loaded:
            with suppress(OSError):
                os.write(2, b"\nfinishing the rows under way; a second signal stops at once\n")
            self._deadline = time.monotonic() + self.seconds
            if self._tell is not None:
                with suppress(OSError):  # the disk is full, say: then nobody is told
                    self._tell()
            signal.setitimer(signal.ITIMER_REAL, _ALARM_SECONDS, _ALARM_SECONDS)
        if self._may_end:
            raise Interrupted

    def _look(self, number: int, frame: FrameType | None) -> None:
        if self._judging and time.monotonic() >= self._deadline:
            raise Interrupted

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Inside, a signal ends the run, one that has come before it too; from its end on rows are
        judged, and those under way finish."""
        self._may_end = True
        if self.signal is not None:
            raise Interrupted
        yield
        self._may_end, self._has_loaded = False, True

    def read(self, source: Iterator[Row | BadRow]) -> Row | BadRow | None:
        """The source's next entry; None where there is none, or a signal came."""
        if self.signal is not None:
            return None
        try:
            try:
                self._may_end = True
                return next(source, None)
            finally:
                self._may_end = False
        except Interrupted:
            return None

    def judge(self, outcomes: Iterator[T]) -> T | None:
        """The next outcome; None where there is none, or a drain has taken too long."""
        try:
            try:
                self._judging = True
                return next(outcomes, None)
            finally:
                self._judging = False
        except Interrupted:
            return None

    def close(self) -> None:
        """Put the previous handlers back."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Run:
    """One run: the open ends, the judge, and what has been counted."""

    def __init__(self, options: Options, drain: Drain, stack: ExitStack) -> None:
        """Open the output first, the model after it; raises ValueError or OSError for the user."""
        self.options = options
        self.drain = drain
        self.tally = Tally()
        self.naive_tokens = 0
        self.output: Output | None = None
        if options.out is not None:
            self.output = Output(options.out, resume=options.resume)
            stack.enter_context(closing(self.output))
        elif options.resume:
            raise ValueError("--resume needs --out FILE")
        if options.out in (None, "-"):
            command.check_stream(1)
        self.entries, self.is_ready = open_data(options, stack)
        load = loader(options)
        self.sampling = options.judging
        with drain.loading():
            self.judge = load()
            done = 0
            if self.output is not None and options.resume:
                done = resume(self.output, self.entries, self._key, self._count)
        self.taken: deque[Row | BadRow] = deque()  # by the judge, and not yet back
        self.outcomes = self.judge.rows(self._entries(), **self.sampling)
        self.bar = stack.enter_context(
            tqdm(
                total=_count_lines(str(BUNDLED_ROWS) if options.data is None else options.data),
                initial=done,
                unit="row",
                disable=None,
            )
        )
        self.width = _width()
        self.color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def judge_rows(self) -> dict[str, Any]:
        """Judge all rows, write their lines, and return what there is to sum up."""
        if self.output is None and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        start = time.perf_counter()
        while (outcome := self.drain.judge(self.outcomes)) is not None:
            self._emit(self.taken.popleft(), outcome)
        if self.taken:  # the drain took too long
            print(f"rows under way that were dropped: {len(self.taken)}", file=sys.stderr)
        self.bar.close()
        return self._summary(time.perf_counter() - start)

    @property
    def status(self) -> int:
        if self.drain.signal is not None:
            return 128 + self.drain.signal
        if self.tally.is_in_vain:
            return 3
        return 1 if self.tally.errors else 0

    def _key(self, entry: Row | BadRow) -> str:
        return self.judge.key(entry, **self.sampling)

    def _entries(self) -> Iterator[Row | BadRow | None]:
        """What there is to judge; None while rows are under way and no other has come."""
        while True:
            waits = len(self.taken) >= _MOST_TAKEN or (self.taken and not self.is_ready())
            if waits and self.drain.signal is None:
                yield None
                continue
            entry = self.drain.read(self.entries)
            if entry is None:
                return
            self.taken.append(entry)
            yield entry

    def _emit(self, entry: Row | BadRow, outcome: Verdict | RowFailure) -> None:
        if self.output is not None:
            self.output.write(to_line(outcome))
        elif isinstance(entry, Row):
            self._print(render_verdict(entry, outcome, self.width, self.color))
        else:
            assert isinstance(outcome, RowFailure)
            self._print(render_error(outcome, self.width, self.color))
        if isinstance(outcome, Verdict):
            self.naive_tokens += outcome.prompt_tokens + outcome.decode_tokens
        self._count(outcome, entry)
        if self.tally.samples:
            share = self.tally.valid / self.tally.samples
            self.bar.set_postfix_str(f"{share:.0%} of samples valid", refresh=False)
        self.bar.update()

    def _count(self, outcome: Verdict | RowFailure | LineFacts, entry: Row | BadRow) -> None:
        count(self.tally, self.judge, outcome, entry, self.options.seed)

    def _print(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _summary(self, seconds: float) -> dict[str, Any]:
        usage = dataclasses.asdict(self.judge.usage)
        is_cut = self.drain.signal is not None
        return summary_of(self.tally, usage, self.naive_tokens, seconds, is_cut)


def count(
    tally: Tally,
    judge: "AnyJudge",
    outcome: Verdict | RowFailure | LineFacts,
    entry: Row | BadRow,
    seed: int,
) -> None:
    """Add an outcome, or a line that an earlier run wrote, and its entry to a tally."""
    samples = [] if isinstance(outcome, RowFailure) else outcome.samples
    cut = any(sample.invalid == "truncated" for sample in samples)
    tally.add(outcome, cut and isinstance(entry, Row) and judge.opens_thinking(entry, seed))


def summary_of(
    tally: Tally, usage: Mapping[str, Any], naive_tokens: int, seconds: float, interrupted: bool
) -> dict[str, Any]:
    """What the closing summary is made of. usage: the fields of `engine.generate.Usage`;
    naive_tokens: what would be computed if no samples shared their prompt."""
    useful = usage["prefill_tokens"] + usage["decode_tokens"]
    return {
        **tally.facts(),
        "interrupted": interrupted,
        "seconds": round(seconds, 3),
        "tokens_computed": useful + usage["idle_tokens"],
        "tokens_naive": naive_tokens,
        "tokens_per_second": round(useful / seconds, 1),
        "usage": usage,
    }


def loader(options: LoadOptions) -> "Callable[[], AnyJudge]":
    """Loads what judges with the model, with all libraries imported. Raises ValueError for options
    that have no meaning for it."""
    prompts = options.prompts
    place: dict[str, Any] = {
        "dtype": options.dtype,
        "device": options.device,
        "numerics": options.numerics,
        "cache_bytes": options.cache_bytes,
        "memory_fraction": options.memory_fraction,
    }
    kind = kind_of(options.model)
    if kind == "judge":
        given = prompts.for_load(**options.settings)
        from engine.judge import Judge  # loads torch: not for --help, nor for a refused output

        place |= {"max_batch": options.max_batch, "meta": options.meta_model}
        return partial(Judge.load, options.model, **place, **given)
    of_judges, values = ("template", "max_batch") if kind == "scalar" else (), command.flat(options)
    for name in (*_OF_JUDGEMENTS, *of_judges):
        if values[name] is not None:
            raise meaningless(name, values[name])
    place |= {
        "chat_template": prompts.chat_template,
        "chat_template_kwargs": prompts.variables,
        "date": prompts.date,
    }
    if kind == "cloud":
        from engine.cloud import CloudJudge

        place |= {"template": prompts.template, "max_batch": options.max_batch}
        return partial(CloudJudge.load, options.model, **place)
    from engine.scalar_judge import ScalarJudge

    return partial(ScalarJudge.load, options.model, **place)


def open_data(
    options: RowOptions, stack: ExitStack
) -> tuple[Iterator[Row | BadRow], Callable[[], bool]]:
    """The rows of --data, and whether one can be read without waiting."""
    if not 1 <= options.max_row_bytes <= MOST_ROW_BYTES:
        raise ValueError(
            f"--max-row-bytes {options.max_row_bytes} is not from 1 to {MOST_ROW_BYTES}"
        )
    columns = None if options.columns is None else Columns.parse(options.columns)
    if options.data == "-":
        command.check_stream(0)
        pipe = Pipe(0, options.max_row_bytes)
        return read_rows(pipe, options.max_row_bytes, columns), pipe.ready
    path = Path(BUNDLED_ROWS if options.data is None else options.data)
    source = RowFiles(path) if path.is_dir() else stack.enter_context(open_rows(path))
    return read_rows(source, options.max_row_bytes, columns), lambda: True


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)


def in_vain(summary: Mapping[str, Any]) -> str:
    """What is said of a run without any verdict: why, and what helps."""
    reasons = ", ".join(f"{count} {name}" for name, count in summary["invalid"].items())
    if summary["cut_while_thinking"]:
        reasons += f", {summary['cut_while_thinking']} of these while thinking"
        advice = (
            "Try a larger --max-new-tokens, --chat-template-kwargs "
            """'{"enable_thinking": false}', or --force-scores."""
        )
    else:
        longer = "a larger --max-new-tokens, " if "truncated" in summary["invalid"] else ""
        advice = (
            f"Try {longer}another --template, or --force-scores; --show-prompt shows what the "
            "judge is asked."
        )
    return (
        f"error: no row got a verdict: none of {summary['samples']} samples has scores that could "
        f"be read ({reasons}). {advice}"
    )


def first_prompt(options: RowOptions, stack: ExitStack) -> str:
    """What the first sample of the first row would see, without loading weights."""
    loader(options)  # refuses options without a meaning
    entries, _ = open_data(options, stack)
    row = next(entries, None)
    if row is None:
        raise ValueError("there is no row to show")
    if isinstance(row, BadRow):
        raise ValueError(f"line {row.line}: {row.error}")
    text = _prompt_of(options, row)
    return escape(text) if sys.stdout.isatty() else text


def _prompt_of(options: RunOptions, row: Row) -> str:
    """The first prompt of a row."""
    from engine.cloud import CritiquePrompts, read_critique_template  # these load torch
    from engine.orders import draw_orders, parts_of, seen_by
    from engine.prompt import PromptBuilder, read_chat_template, read_judge_template
    from engine.scalar_judge import ScalarPrompts
    from engine.settings import read_judge_settings
    from models.tokenizer import Tokenizer

    given, tokenizer = options.prompts, Tokenizer(options.model)
    chat: dict[str, Any] = {
        "chat_template": read_chat_template(options.model, given.chat_template),
        "chat_template_kwargs": given.variables,
        "date": given.date,
    }
    kind = kind_of(options.model)
    if kind == "cloud":
        template = read_critique_template(given.template)
        return CritiquePrompts(tokenizer, template, **chat).show(row, [0])
    settings = read_judge_settings(options.model, options.settings)
    if kind == "scalar":
        shown = range(min(2, len(row.responses)) if settings.compares else 1)
        return ScalarPrompts(tokenizer, settings, **chat).show(row, shown)
    template = read_judge_template(options.model, given.template)
    prompts = PromptBuilder(tokenizer, template, settings, **chat)
    part = parts_of(draw_orders(row, options)[0], options.max_shown)[0]
    return prompts.show(*seen_by(row, part), nonce=prompts.nonce(row, options.seed))


def _count_lines(path: str) -> int | None:
    """The lines of a file, for the progress bar; None for a stream or where no bar is shown."""
    if not sys.stderr.isatty() or not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        if not file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return None  # packed, or an array
        file.seek(0)
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


if __name__ == "__main__":
    sys.exit(main())
