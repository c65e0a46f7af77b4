"""A synthetic world of small judging tasks whose truth is known: rows to judge, and a teacher.

A row asks for one small task (add, sort, reverse, count, copy) and states five demands on how the
answer is put. Its responses meet or miss each of eight criteria. *Which* criteria matter is never
said: it follows from three cue words of the query (who asks, where, when). Each cue word gives one
point of weight to three criteria; the weights add up to 9, so the true score of a response is

    1 + sum of the weights of the criteria that it meets          (1 .. 10).

Four to eight criteria carry weight, mostly five to seven, but a judgement lists exactly three. The
teacher draws its three in proportion to the hidden weights, gives the heaviest 5, the next 3 and
the last 1, checks them without error and adds up from 1. So no single judgement sees everything,
however good it is, and a vote over many sees more: the same reason for which voting helps a judge
that writes its own principles.

The split of a row (train, dev, final) is a hash of its content. One in nine combinations of cue
words is kept out of train; in the other splits `meta.novel` tells these rows.

    python -m train.world.cases --rows 1000 --seed 0 --split final --out rows.jsonl

With --judgements each row has the teacher's judgement beside it, as `train.sft --data` reads it.
"""

import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from engine import command

Split = Literal["train", "dev", "final"]
Judgements = Literal["full", "direct", "index"]
Principles = Literal["oracle", "fixed", "wrong"]

CRITERIA = ("answer", "opening", "closing", "brackets", "name", "color", "calm", "polite")
LISTED = 3
LISTED_WEIGHTS = (5, 3, 1)
CLOSE_ROWS = 0.7  # share of rows whose responses differ in few criteria
PASS_SCORE = 6  # a single response is right when its true score reaches this

ASKERS = (
    "nurse", "pilot", "baker", "farmer", "painter", "tailor", "sailor", "teacher", "doctor",
    "lawyer", "coach", "poet", "chef", "clerk", "guard", "singer",
)  # fmt: skip
PLACES = (
    "bank", "park", "school", "farm", "hotel", "museum", "station", "market", "library", "harbor",
    "office", "theater", "garden", "studio", "castle", "beach",
)  # fmt: skip
TIMES = (
    "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "spring",
    "summer", "autumn", "winter", "dawn", "noon", "dusk", "midnight", "weekend",
)  # fmt: skip
CUE_WORDS = (ASKERS, PLACES, TIMES)

OPENINGS = ("Sure", "Hello", "Well", "Yes", "Okay")
CLOSINGS = ("Bye", "Thanks", "Cheers", "Done", "Enjoy")
BRACKETS = ("( )", "[ ]", "{ }", "< >")
NAMES = ("Anna", "Ben", "Carl", "Dora", "Emma", "Finn")
COLORS = ("red", "blue", "green", "black", "white", "gold")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _cue_criteria(slot: int, index: int) -> list[int]:
    """The three criteria of a cue word: every criterion is first for two words of each slot."""
    first = (index + 3 * slot) % len(CRITERIA)
    step = 1 + (index // len(CRITERIA) * 2 + index * (slot + 2)) % (len(CRITERIA) - 1)
    others = [(first + step + i * (slot + 1)) % len(CRITERIA) for i in range(len(CRITERIA))]
    return [first, *[c for c in dict.fromkeys(others) if c != first][:2]]


@dataclass(frozen=True)
class Task:
    """A small verifiable task: its wording, the working of a correct judge, the answer's items."""

    wording: str
    work: str
    answer: tuple[str, ...]
    numeric: bool  # items are digits of one number and are written without blanks

    def write(self, items: tuple[str, ...]) -> str:
        """Items as a response writes them."""
        return ("" if self.numeric else " ").join(items)


@dataclass(frozen=True)
class Response:
    """One response: its text, and what it shows for each criterion."""

    text: str
    shown: dict[str, str]
    answer: tuple[str, ...]
    met: tuple[bool, ...]  # in the order of CRITERIA


@dataclass(frozen=True)
class Case:
    """A row together with everything that the teacher knows of it."""

    history: tuple[dict[str, str], ...]
    query: str
    task: Task
    demands: dict[str, str]
    weights: tuple[int, ...]  # hidden, in the order of CRITERIA
    responses: tuple[Response, ...]
    novel: bool

    @property
    def true_scores(self) -> list[int]:
        """The score of each response, 1 to 10, by the hidden weights."""
        return [
            1 + sum(w for w, met in zip(self.weights, r.met, strict=True) if met)
            for r in self.responses
        ]

    @property
    def label(self) -> int:
        """The index of the best response; for one response, 1 if its score passes, else 0."""
        scores = self.true_scores
        if len(scores) == 1:
            return int(scores[0] >= PASS_SCORE)
        return scores.index(max(scores))

    @property
    def split(self) -> Split:
        """Where the case belongs: 84 in 100 train, 8 dev, 8 final, whatever the order shown."""
        content = json.dumps([self.query, sorted(r.text for r in self.responses)])
        bucket = hashlib.sha256(content.encode()).digest()[0]
        return "train" if bucket < 216 else "dev" if bucket < 236 else "final"

    def row(self) -> dict[str, Any]:
        """The row as `engine.sample` reads it, without an id."""
        prompt: Any = self.query
        if self.history:
            prompt = [*self.history, {"role": "user", "content": self.query}]
        return {
            "prompt": prompt,
            "responses": [r.text for r in self.responses],
            "label": self.label,
            "meta": {"novel": self.novel, "true_scores": self.true_scores},
        }


def _symbol(rng: random.Random) -> str:
    """A printable character from anywhere in Unicode, so that no byte is new to the model."""
    while True:
        low, high = rng.choice(((0x21, 0x7F), (0xA1, 0x800), (0x800, 0x10000), (0x10000, 0x110000)))
        char = chr(rng.randrange(low, high))
        if not 0xD800 <= ord(char) < 0xE000 and not char.isspace():
            return char


def _make_task(rng: random.Random) -> Task:
    family = rng.choice(("add", "reverse", "sort", "count", "copy"))
    if family == "add":
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        steps, carry = [], 0
        for power in (1, 10, 100):
            left, right = a // power % 10, b // power % 10
            total = left + right + carry
            steps.append(f"{left}+{right}{'+1' if carry else ''}={total}")
            carry = total // 10
        work = f"{' '.join(steps)} so {a + b}"
        return Task(f"add {a} and {b}", work, tuple(str(a + b)), True)
    if family == "count":
        letter = rng.choice(LETTERS)
        others = [c for c in LETTERS if c != letter]
        items = [letter if rng.random() < 0.5 else rng.choice(others) for _ in range(8)]
        marks, seen = [], 0
        for item in items:
            seen += item == letter
            marks.append(f"{item}={seen}")
        work = " ".join(marks) + f" so {seen}"
        return Task(f"count {letter} in {' '.join(items)}", work, (str(seen),), True)
    if family == "sort":
        items = [str(d) for d in rng.sample(range(10), rng.randrange(4, 8))]
        result = tuple(sorted(items))
    else:
        items = rng.sample(LETTERS, rng.randrange(4, 8))
        if family == "copy" and rng.random() < 0.15:
            items = [_symbol(rng) for _ in range(3)]
        result = tuple(items if family == "copy" else reversed(items))
    return Task(f"{family} {' '.join(items)}", " ".join(result), result, False)


def _wrong_answer(task: Task, rng: random.Random) -> tuple[str, ...]:
    items = list(task.answer)
    i = rng.randrange(len(items))
    if len(items) > 1 and rng.random() < 0.4:
        j = i - 1 if i else 1
        items[i], items[j] = items[j], items[i]
    elif items[i].isdecimal() and items[i].isascii():
        items[i] = str((int(items[i]) + rng.choice((-2, -1, 1, 2))) % 10)
    else:
        items[i] = rng.choice(LETTERS)
    if tuple(items) == task.answer or (task.numeric and len(items) > 1 and items[0] == "0"):
        return _wrong_answer(task, rng)
    return tuple(items)


def _make_response(
    task: Task, demands: dict[str, str], met: list[bool], rng: random.Random
) -> Response:
    passed = dict(zip(CRITERIA, met, strict=True))
    choices = {"opening": OPENINGS, "closing": CLOSINGS, "brackets": BRACKETS}
    choices |= {"name": NAMES, "color": COLORS}
    shown = {
        name: demands[name]
        if passed[name]
        else rng.choice([option for option in options if option != demands[name]])
        for name, options in choices.items()
    }
    shown["calm"] = "." if passed["calm"] else "!"
    shown["polite"] = "please" if passed["polite"] else "just"
    answer = task.answer if passed["answer"] else _wrong_answer(task, rng)
    left, right = shown["brackets"].split()
    text = (
        f"{shown['opening']} {shown['name']}, {shown['polite']} take "
        f"{left} {task.write(answer)} {right} in {shown['color']}. "
        f"{shown['closing']}{shown['calm']}"
    )
    return Response(text, shown, answer, tuple(met))


def make_case(rng: random.Random) -> Case:
    """Draw one case; the best response is strictly best by the hidden weights."""
    cues = [rng.randrange(16) for _ in range(3)]
    weights = [0] * len(CRITERIA)
    for slot, cue in enumerate(cues):
        for criterion in _cue_criteria(slot, cue):
            weights[criterion] += 1
    novel = hashlib.sha256(bytes(cues)).digest()[0] < 32
    task = _make_task(rng)
    asker, place, time = (words[c] for words, c in zip(CUE_WORDS, cues, strict=True))
    demands = {
        "opening": rng.choice(OPENINGS),
        "closing": rng.choice(CLOSINGS),
        "brackets": rng.choice(BRACKETS),
        "name": rng.choice(NAMES),
        "color": rng.choice(COLORS),
    }
    query = (
        f"A {asker} at the {place} this {time} asks: {task.wording}. "
        f"Open with {demands['opening']}, close with {demands['closing']}, "
        f"use {demands['brackets']}, name {demands['name']}, mention {demands['color']}."
    )
    if rng.random() < 0.03:
        junk = "".join(chr(rng.randrange(32)) + _symbol(rng) for _ in range(4))
        query += f" PS {junk}{chr(127)}"
    history: tuple[dict[str, str], ...] = ()
    if rng.random() < 0.03:
        history = (
            {"role": "user", "content": f"Hello, my name is {demands['name']}."},
            {"role": "assistant", "content": "Hello, please ask."},
        )
    elif rng.random() < 0.03:
        history = ({"role": "system", "content": "Please close with thanks."},)
    n = rng.choices((1, 2, 3, 4), (0.15, 0.40, 0.25, 0.20))[0]
    weighted = [i for i, weight in enumerate(weights) if weight]
    close = n > 1 and rng.random() < CLOSE_ROWS
    while True:
        met = [[rng.random() < 0.55 for _ in CRITERIA] for _ in range(n)]
        if close:  # all responses are the first one but for one or two criteria
            for i in range(1, n):
                met[i] = list(met[0])
                for flip in rng.sample(weighted, rng.randrange(1, 3)):
                    met[i][flip] = not met[i][flip]
        rng.shuffle(met)
        responses = tuple(_make_response(task, demands, m, rng) for m in met)
        case = Case(history, query, task, demands, tuple(weights), responses, novel)
        scores = case.true_scores
        if n == 1 or scores.count(max(scores)) == 1:
            return case


def list_criteria(case: Case, rng: random.Random) -> list[tuple[str, int]]:
    """Draw the three criteria of one judgement by hidden weight, without replacement.

    Returns (name, listed weight), the heaviest first.
    """
    left = {i: w for i, w in enumerate(case.weights) if w}
    drawn: list[int] = []
    while len(drawn) < LISTED:
        pick = rng.choices(list(left), list(left.values()))[0]
        del left[pick]
        drawn.append(pick)
    drawn.sort(key=lambda i: (-case.weights[i], i))
    return [(CRITERIA[i], w) for i, w in zip(drawn, LISTED_WEIGHTS, strict=True)]


def _check(case: Case, response: Response, name: str) -> str:
    if name == "answer":
        pairs = zip(case.task.answer, response.answer, strict=True)
        return "answer " + " ".join(f"{a}={b}" for a, b in pairs)
    if name in case.demands:
        return f"{name} {case.demands[name]}={response.shown[name]}"
    return f"{name} {response.shown[name]}"


def judge(case: Case, listed: list[tuple[str, int]]) -> tuple[str, list[int]]:
    """The teacher's judgement of a case by the listed criteria: its text and its scores."""
    lines = ["Specific Criteria: " + ", ".join(f"{name} {weight}" for name, weight in listed)]
    if any(name == "answer" for name, _ in listed):
        lines.append(f"Work: {case.task.work}")
    lines.append("Analysis:")
    scores = []
    for number, response in enumerate(case.responses, 1):
        met = dict(zip(CRITERIA, response.met, strict=True))
        checks = [
            f"{_check(case, response, name)} {'yes' if met[name] else 'no'}" for name, _ in listed
        ]
        points = [1] + [weight for name, weight in listed if met[name]]
        scores.append(sum(points))
        total = f"{'+'.join(map(str, points))}={sum(points)}"
        lines.append(f"Response {number}: {', '.join(checks)}, {total}")
    lines.append(f"Scores: \\boxed{{{', '.join(map(str, scores))}}}")
    return "\n".join(lines), scores


def principles_of(case: Case, kind: Principles) -> str:
    """Principles to judge a case by: the three criteria that weigh most (oracle), for all cases the
    same three (fixed), or the three that weigh least (wrong), so that all judgements err alike."""
    sign = {"oracle": 1, "fixed": 0, "wrong": -1}[kind]
    weights = [sign * weight for weight in case.weights]
    heaviest = sorted(range(len(CRITERIA)), key=lambda i: (-weights[i], i))[:LISTED]
    listed = zip(heaviest, LISTED_WEIGHTS, strict=True)
    return ", ".join(f"{CRITERIA[i]} {weight}" for i, weight in listed)


def short_judgement(case: Case, kind: Judgements, rng: random.Random) -> str:
    """The teacher's judgement by criteria that it draws: all of it, or a shorter form of the same.

    full: criteria, analysis, scores. direct: the line of scores alone. index: criteria and
    analysis, then which response is best, in place of their scores (drawn where several are) or,
    of one response, its score: the format `rating` of `engine/formats.py`.
    """
    text, scores = judge(case, list_criteria(case, rng))
    analysis, _, line = text.rpartition("\n")
    if kind == "full":
        return text
    if kind == "direct":
        return line
    best = rng.choice([place for place, score in enumerate(scores) if score == max(scores)])
    verdict = str(scores[0]) if len(scores) == 1 else "ABCD"[best]
    return f"{analysis}\n[RESULT] {verdict}"


def cases(seed: int | str, split: Split) -> Iterator[Case]:
    """An endless, seeded stream of the split's cases."""
    rng = random.Random(f"quorum-world-{seed}")
    while True:
        case = make_case(rng)
        if case.split == split and not (split == "train" and case.novel):
            yield case


EXAMPLE = "--rows 1000 --split dev --seed 1 --out rows.jsonl"


@dataclass
class Args:
    """Write rows of the synthetic judging world as JSON lines."""

    rows: int = 1000  # how many
    seed: int = 0  # of all draws
    split: Split = "final"  # which rows: those to train on, to tune by or to measure with
    out: Path | None = None  # standard output when left out
    principles: Principles | None = None
    """Principles that each row gives its judge: the criteria that weigh most there (oracle), the
    same ones for all rows (fixed), or those that weigh least (wrong)."""
    judgements: Judgements | None = None
    """The teacher's judgement beside each row, which train.sft learns from: criteria, analysis and
    scores (full), scores alone (direct), or criteria, analysis and the best response's letter
    (index), which a judge with --format rating writes."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train.world.cases") -> int:
    """Run the command line and return its exit status."""
    return command.run(lambda: _write(arguments, prog))


def _write(arguments: Sequence[str] | None, prog: str) -> None:
    groups = {"rows": ("rows", "split", "seed", "principles", "judgements", "out")}
    args = command.parse(Args, groups, prog=prog, example=EXAMPLE, arguments=arguments)
    if args.rows < 1:
        raise ValueError(f"rows = {args.rows} is less than 1")
    stream = cases(args.seed, args.split)
    if args.out is None:
        command.check_stream(1)
    with args.out.open("wb") if args.out else nullcontext(sys.stdout.buffer) as sink:
        command.begin_work()
        for index in tqdm(range(args.rows), disable=None, unit="row"):
            case, name = next(stream), f"{args.split}-{args.seed}-{index}"
            row = {"id": name, **case.row()}
            if args.principles is not None:
                row["principles"] = principles_of(case, args.principles)
            if args.judgements is not None:
                rng = random.Random(f"quorum-judgement-{name}")
                row["judgement"] = short_judgement(case, args.judgements, rng)
            sink.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
