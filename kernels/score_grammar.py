r"""The language in which a judge writes its scores: the parser, and the same as a table of states.

`parse_scores` is the specification. Only text outside of thinking counts: what follows the last
`</think>`, up to a `<think>`. A line is *anchored* if it begins with the anchor. Around it stands
what instruct models write: any case, blanks, markdown, digits and signs of a list, "final" before
it, an equals sign, a dollar or a box in place of its colon, a plural's s or none.

On an anchored line every box decides anew. Where the line holds no box, the first later one with
valid scores does, up to the next anchored line. So the last anchored line decides, and a box that
was quoted elsewhere does not. Without an anchor the last box of the text does. A judge that writes
one line of scores and nothing else says so (`first`): then the first box decides, valid or not, at
the first byte after which it could not be read.

A box is `boxed`, blanks, `{`, and ends at the first `}` or with its line. Its content is exactly n
integers between commas or semicolons. Around each are blanks, brackets, `*`, `$`, `~` and LaTeX
commands; `8.0` and `8/10` (with the largest score below the line) are 8. Items with labels are not
read: labels may stand in any order. With a nonce (`nonce`) an anchored line holds the row's own
digits after the anchor: no response can have written them.

`transitions` follows the same text byte by byte: `_Grammar.step` says what comes after a state.
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

RESET, PAD, ALPHABET = 256, 257, 258  # after the 256 bytes: a special token, the end of a token
CLOSE, CLOSE_BAD, FORGET, CHECK_NONCE, CHECK_ROOM = 1, 2, 3, 4, 5  # events
# Where a state is: where a number may begin, after digits of one, after its minus; elsewhere 0.
BEGINS, CONTINUES, NEGATIVE = 1, 2, 3
BOUND = 10**17  # of scores and nonces, so that ten times a value fits in int64
_MAX_ANCHOR = 256  # bytes

_BLANKS = b" \t\r\v\f"
_MARKS = _BLANKS + b"#*>_`.)(][$~=|+-0123456789"  # before an anchor; bytes that are not ASCII too
_AFTER = _BLANKS + b"*_`)]"
_COLON = "\uff1a".encode()  # the fullwidth one
_TERMINATORS = b":=\\$\n"
_GAPS = b" \t\r[](){$*~"  # in a box, beside commands
_SPACES = b",;:! "  # after a backslash
_FINAL = b"final"
_TAGS, _BOX = (b"<think>", b"</think>"), b"boxed"
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz")
_DIGITS = frozenset(b"0123456789")


class Reason(IntEnum):
    """Why a sample has no vote (or VALID); UNDECIDED is internal to a running state."""

    UNDECIDED = -1
    VALID = 0
    MISSING = 1
    COUNT = 2
    RANGE = 3
    NOT_AN_INTEGER = 4
    TRUNCATED = 5

    @property
    def label(self) -> str:
        """The reason as it stands in a verdict line."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class ScoreRules:
    """How scores are written (see the module's docstring); anchor None: the last box of the text.

    ValueError for an anchor without a letter or with a character that scores are made of, an empty
    or too large range, or nonces without an anchor.
    """

    score_min: int = 1
    score_max: int = 10
    anchor: str | None = "Scores:"
    first: bool = False
    nonce: bool = False

    def __post_init__(self) -> None:
        low, high, anchor = self.score_min, self.score_max, self.anchor
        if not -BOUND < low <= high < BOUND:
            raise ValueError(
                f"score_min and score_max must be ordered and within +-{BOUND}, "
                f"got {low} and {high}"
            )
        if anchor is None:
            if self.nonce:
                raise ValueError("a nonce needs an anchor")
            return
        if len(anchor.encode()) > _MAX_ANCHOR:
            raise ValueError(f"anchor must have at most {_MAX_ANCHOR} bytes, got {anchor!r}")
        if not self.stem or set(self.stem) & set(b"\n\\{}<"):
            raise ValueError(
                f"anchor must hold a letter and none of \\ {{ }} < and newlines, got {anchor!r}"
            )

    @property
    def stem(self) -> bytes:
        """The anchor, lower case, without marks before it and a colon after it."""
        return (self.anchor or "").encode().lower().lstrip(_MARKS + b":").rstrip(_AFTER + b":=")

    @property
    def core(self) -> bytes:
        """The stem without the s of a plural, which may be missing."""
        return self.stem[:-1] if len(self.stem) > 1 and self.stem.endswith(b"s") else self.stem

    def anchor_line(self, nonce: str | None = None) -> str:
        """The beginning of a line of scores, as a judge is asked to write it."""
        assert self.anchor is not None and (nonce is not None) == self.nonce
        return self.anchor if nonce is None else f"{self.anchor.rstrip(' :')} {nonce}:"


# -- the specification -----------------------------------------------------------------------------

_BOXES = re.compile(rb"boxed[ \t]*\{([^}\n]*)([}\n]|\Z)", re.IGNORECASE)
_GAP = rb"(?:[ \t\r\[\](){$*~]|\\[,;:! ]|\\[A-Za-z]+)*"

Outcome = tuple[Reason, tuple[int, ...]]


class ReadScores(NamedTuple):
    """The reason, and if it is VALID the n scores, with the bytes where each integer stands, from
    its sign or first digit to behind its last."""

    reason: Reason
    scores: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()


def parse_scores(
    data: bytes, n: int, rules: ScoreRules, finished: bool, nonce: int | None = None
) -> Outcome:
    """The specification on plain bytes: the reason, and the n scores if it is VALID.

    data: the bytes of the text (after the last special token); finished: the text ended by itself,
    so that an absent box is MISSING and not TRUNCATED; nonce: of the row, where rules have a nonce.
    """
    return read_scores(data, n, rules, finished, nonce)[:2]


def read_scores(
    data: bytes, n: int, rules: ScoreRules, finished: bool, nonce: int | None = None
) -> ReadScores:
    """What `parse_scores` finds, and where."""
    absent = ReadScores(Reason.MISSING if finished else Reason.TRUNCATED)
    begin = 0
    for end in (*re.finditer(rb"</think>", data, flags=re.IGNORECASE), None):
        stretch = data[begin : end.start() if end else None]
        text = re.split(rb"<think>", stretch, maxsplit=1, flags=re.IGNORECASE)[0]
        if rules.first:
            # A tag ends a box that is open: by its first byte no box can be read.
            whole = end is None and text == stretch
            found = _parse(text if whole else text + b"<", begin, n, rules, nonce)
            if found is not None:
                return found
        elif end is None:
            return _parse(text, begin, n, rules, nonce) or absent
        begin = end.end() if end else begin
    return absent


def _parse(text: bytes, at: int, n: int, rules: ScoreRules, nonce: int | None) -> ReadScores | None:
    """What decides in a text without thinking, which begins at byte `at`; None for nothing."""
    found = None
    reads_on = rules.anchor is None
    for match in re.finditer(rb"[^\n]*\n|[^\n]+", text):
        line, first = match[0], at + match.start()
        start = _after_anchor(line, rules, nonce)
        if start is None and not reads_on:
            continue
        if start is not None:
            reads_on = True
        for box in _BOXES.finditer(line, start or 0):
            outcome = _read_box(
                box[1], first + box.start(1), bool(box[2]), box[2] == b"}", n, rules
            )
            found = outcome or found
            if rules.first and outcome:
                return outcome
            if start is not None:
                reads_on = reads_on and outcome is None
            elif rules.anchor is not None and outcome and outcome.reason == Reason.VALID:
                reads_on = False
                break
    return found


def _after_anchor(line: bytes, rules: ScoreRules, nonce: int | None) -> int | None:
    """Where a line goes on after its anchor, the terminator included unless a box begins with it;
    None for a line that is not anchored."""
    if rules.anchor is None:
        return None
    stem = rules.stem
    marks = rb"[" + re.escape(_MARKS) + (b"" if stem[0] >= 0x80 else rb"\x80-\xff") + b"]"
    final = b"" if stem.startswith(_FINAL[:1]) else rb"(?:final" + marks + rb"+)*"
    name = re.escape(rules.core) + (b"s?" if rules.core != stem else b"")
    after = b"[" + re.escape(_AFTER) + b"]*"
    digits = rb"([0-9]+)" + after if rules.nonce else b"()"
    pattern = marks + b"*" + final + name + after + digits + rb"(?:\xef\xbc\x9a|[:=\\$]|(?=\n))"
    match = re.match(pattern, line, re.IGNORECASE)
    if match is None or (rules.nonce and _integer(match[1]) != nonce):
        return None
    return match.end()


def _read_box(
    content: bytes, at: int, ended: bool, complete: bool, n: int, rules: ScoreRules
) -> ReadScores | None:
    """The outcome of a box whose content begins at byte `at`; None for one that goes on past the
    end of the text."""
    largest = str(rules.score_max).encode()
    integer = rb"([+-]?[0-9]+)(?:\.0*)?(?:/" + re.escape(largest) + rb")?"
    items: list[int] = []
    spans: list[tuple[int, int]] = []
    place, going = 0, re.fullmatch(_GAP, content) is None
    bad = ended and not complete
    while going:
        item = re.compile(_GAP + integer + _GAP + rb"([,;]|\Z)").match(content, place)
        if item is None:
            # What could go on: a sign, a command, or an integer before the whole of its "/10".
            over = b"|".join(re.escape(largest[:k]) for k in range(len(largest)))
            part = rb"\\|[+-]|[+-]?[0-9]+(?:\.0*)?/(?:" + over + b")|" + integer + _GAP + rb"\\"
            goes_on = re.fullmatch(_GAP + b"(?:" + part + b")?", content[place:])
            bad = bad or ended or goes_on is None
            break
        items.append(_integer(item[1]))
        spans.append((at + item.start(1), at + item.end(1)))
        place, going = item.end(), bool(item[2])
        if rules.first and going and len(items) >= n:
            return ReadScores(Reason.COUNT)
    if bad:
        return ReadScores(Reason.NOT_AN_INTEGER) if ended or rules.first else None
    if not ended:
        return None
    if len(items) != n:
        return ReadScores(Reason.COUNT)
    if not all(rules.score_min <= item <= rules.score_max for item in items):
        return ReadScores(Reason.RANGE)
    return ReadScores(Reason.VALID, tuple(items), tuple(spans))


def _integer(item: bytes) -> int:
    """The integer; one of the same sign out of every range for many digits: int() refuses 5000."""
    digits = item.lstrip(b"+-").lstrip(b"0") or b"0"
    magnitude = int(digits) if len(digits) < 18 else BOUND
    return -magnitude if item.startswith(b"-") else magnitude


# -- the table -------------------------------------------------------------------------------------

_State = tuple[Any, ...]
# (value scale, digit, count scale, ended, event): value := value * scale + digit, and count alike.
_KEEP, _OPEN, _ENDED = (1, 0, 1, 0, 0), (0, 0, 0, 0, 0), (0, 0, 1, 1, 0)
_DECIDED: _State = ("decided",)
_Edge = tuple[_State, tuple[int, ...], _State]  # next state, operations, the state if a check fails


@lru_cache(maxsize=16)
def transitions(rules: ScoreRules) -> tuple[Tensor, int, Tensor]:
    """The table (C, ALPHABET, 7) int64 over control states and symbols, the first state, and the
    place of each state in a number, (C,) int64.

    Last dimension: next state; scale and digit of the value; scale and ended of the count; event;
    the next state if the event's check fails (CLOSE: the box is not valid; CHECK_NONCE: the value
    is not the row's nonce; CHECK_ROOM: all n items are there). State 0 is decided. Callers share
    the table and must not change it.
    """
    grammar = _Grammar(rules)
    classes, representatives = _symbol_classes(rules)
    numbers: dict[_State, int] = {_DECIDED: 0, grammar.start: 1}
    states = [*numbers]
    table: list[list[tuple[int, ...]]] = []
    for state in states:  # grows meanwhile
        edges = []
        for symbol in representatives:
            following, operations, otherwise = grammar.step(state, symbol)
            for other in (following, otherwise):
                if other not in numbers:
                    numbers[other] = len(states)
                    states.append(other)
            edges.append((numbers[following], *operations, numbers[otherwise]))
        table.append(edges)
    places = torch.tensor([_place(state) for state in states])
    return torch.tensor(table)[:, torch.tensor(classes)], 1, places


def _place(state: _State) -> int:
    """Where in a number a state is."""
    if state[0] != "box":
        return 0
    places = dict.fromkeys(("first", "item", "plus"), BEGINS)
    places |= {"digits": CONTINUES, "-digits": CONTINUES, "minus": NEGATIVE}
    return places.get(state[2], 0)


def _symbol_classes(rules: ScoreRules) -> tuple[list[int], list[int]]:
    """The class of each symbol, and a symbol of each class: symbols of one class never differ."""
    named = {*_MARKS, *_AFTER, *_TERMINATORS, *_COLON, *_GAPS, *_SPACES, *b"+-,;}/", *rules.stem}
    named |= {*_FINAL, *_TAGS[1], *_BOX}
    kinds: dict[object, int] = {}
    classes, representatives = [], []
    for symbol in range(ALPHABET):
        kind: object = symbol if symbol >= RESET else _lower(symbol)[0]
        if symbol < RESET and kind not in named:
            kind = "high" if symbol >= 0x80 else "letter" if kind in _LETTERS else "other"
        if kind not in kinds:
            kinds[kind] = len(kinds)
            representatives.append(symbol)
        classes.append(kinds[kind])
    return classes, representatives


class _Grammar:
    """States as tuples, and the step from one to the next. Kinds of state:

    ("decided",)                  nothing later counts
    ("think", seen)               inside of thinking; seen: how much of `</think>` has come
    ("line", phase, part, seen)   at the beginning of a line, which may be anchored
    ("text", phase, seen)         anywhere else; seen: how much of a tag or of `boxed` has come
    ("box", phase, item)          in a box; item: where in the list of integers
    ("bad", phase, seen)          in a box that cannot be read

    Phases: "skip" (no box counts), "on" (an anchored line), "on+" (where a box was), "seek" (after
    an anchored line without a box), "any" (there is no anchor).
    """

    def __init__(self, rules: ScoreRules) -> None:
        self.rules = rules
        self.stem, self.core = rules.stem, rules.core
        self.marks = frozenset(_MARKS)
        if self.stem[:1] < b"\x80":
            self.marks |= frozenset(range(0x80, 0x100))
        self.largest = str(rules.score_max).encode()
        self.start = self._newline("any" if rules.anchor is None else "skip")

    def step(self, state: _State, symbol: int) -> _Edge:
        if state == _DECIDED or symbol == PAD:
            return _edge(state)
        if symbol == RESET:
            return _edge(self.start, (1, 0, 1, 0, FORGET))
        if state[0] == "think":
            seen = _longest(state[1] + _lower(symbol), _TAGS[1:])
            return self._after_tag() if seen == _TAGS[1] else _edge(("think", seen))
        if state[0] == "line":
            return self._line(state[1], state[2], state[3], symbol)
        if state[0] == "text":
            return self._text(state[1], state[2], symbol)
        if state[0] == "box":
            return self._box(state[1], state[2], symbol)
        return self._bad(state[1], state[2], symbol)

    def _newline(self, phase: str) -> _State:
        if phase == "any":
            return "text", "any", b""
        return "line", {"on": "seek", "on+": "skip"}.get(phase, phase), "prefix", b""

    def _after_tag(self) -> _Edge:
        return _edge(self.start, (1, 0, 1, 0, FORGET))

    def _text(self, phase: str, seen: bytes, symbol: int) -> _Edge:
        if symbol == ord("\n"):
            return _edge(self._newline(phase))
        if seen == _BOX and symbol in b" \t":
            return _edge(("text", phase, seen))
        if seen == _BOX and symbol == ord("{"):
            return _edge(("box", "on" if phase == "on+" else phase, "first"), _OPEN)
        patterns = _TAGS if phase == "skip" else (*_TAGS, _BOX)
        seen = _longest(seen + _lower(symbol), patterns)
        if seen == _TAGS[0]:
            return _edge(("think", b""))
        return self._after_tag() if seen == _TAGS[1] else _edge(("text", phase, seen))

    def _line(self, phase: str, part: str, seen: bytes, symbol: int) -> _Edge:
        byte = _lower(symbol)
        if part == "prefix":
            if self.core.startswith(byte):
                return self._line_goes_on(phase, "stem", byte)
            if byte == _FINAL[:1]:
                return _edge(("line", phase, "final", byte))
            if symbol in self.marks:
                return _edge(("line", phase, "prefix", b""))
        elif part == "final":
            if seen == _FINAL and symbol in self.marks:
                return _edge(("line", phase, "prefix", b""))
            if _FINAL.startswith(seen + byte):
                return _edge(("line", phase, "final", seen + byte))
        elif part == "stem":
            if self.core.startswith(seen + byte):
                return self._line_goes_on(phase, "stem", seen + byte)
        else:
            return self._after_stem(phase, part, seen, symbol)
        return self._text(phase, _longest(seen, (*_TAGS, _BOX)), symbol)

    def _line_goes_on(self, phase: str, part: str, seen: bytes) -> _Edge:
        if seen != self.core:
            return _edge(("line", phase, part, seen))
        return _edge(("line", phase, "plural" if self.core != self.stem else "after", seen))

    def _after_stem(self, phase: str, part: str, seen: bytes, symbol: int) -> _Edge:
        """After the anchor's word: its s, marks, the nonce, and what ends the anchor. The parts of
        a fullwidth colon carry the part that they follow."""
        if part.startswith("colon"):
            _, count, before = part.split(" ", 2)
            if symbol == _COLON[int(count)]:
                if int(count) + 1 < len(_COLON):
                    return _edge(("line", phase, f"colon {int(count) + 1} {before}", b""))
                return self._anchored(phase, before, ("text", "on", b""), ("text", phase, b""))
            return self._text(phase, b"", symbol)
        if part == "plural" and _lower(symbol) == b"s":
            return _edge(("line", phase, "after", seen + b"s"))
        if symbol in _DIGITS and self.rules.nonce and part != "after nonce":
            digit, scale = symbol - ord("0"), 10 if part == "nonce" else 0
            return _edge(("line", phase, "nonce", b""), (scale, digit, 1, 0, 0))
        if symbol in _AFTER:
            return _edge(("line", phase, "after nonce" if "nonce" in part else "after", b""))
        if symbol == _COLON[0]:
            return _edge(("line", phase, f"colon 1 {part}", b""))
        if symbol in _TERMINATORS:
            anchored: _State = ("text", "on", b"")
            if symbol == ord("\n"):
                anchored = self._newline("on")
            failed = self._text(phase, b"", symbol)[0]
            return self._anchored(phase, part, anchored, failed)
        return self._text(phase, _longest(seen, (*_TAGS, _BOX)), symbol)

    def _anchored(self, phase: str, part: str, anchored: _State, failed: _State) -> _Edge:
        if not self.rules.nonce:
            return _edge(anchored)
        if "nonce" not in part:
            return _edge(failed)
        return anchored, (1, 0, 1, 0, CHECK_NONCE), failed

    def _box(self, phase: str, item: str, symbol: int) -> _Edge:
        """item: first, item, plus, minus, digits, -digits, dot, "/" and what has come of the
        largest score, after; first, item and after with a backslash or a command's letters."""
        if item.endswith("\\"):  # a command begins
            if _lower(symbol)[0] in _LETTERS:
                return _edge(("box", phase, item[:-1] + "\\a"))
            if symbol in _SPACES:
                return _edge(("box", phase, item[:-1]))
            return self._enter_bad(phase, symbol)
        if item.endswith("\\a"):
            if _lower(symbol)[0] in _LETTERS:
                return _edge(("box", phase, item))
            item = item[:-2]
        ends = item in ("digits", "-digits", "dot", "after") or item == f"/{self.largest.decode()}"
        if symbol == ord("}"):
            if ends or item == "first":
                return self._close(phase, (1, 0, 1, int(ends), CLOSE), b"")
            return self._close(phase, (1, 0, 1, 0, CLOSE_BAD), b"")
        if symbol in b",;" and ends:
            if self.rules.first:
                return ("box", phase, "item"), (*_ENDED[:4], CHECK_ROOM), _DECIDED
            return _edge(("box", phase, "item"), _ENDED)
        if symbol in _GAPS or symbol == ord("\\"):
            resting = "after" if ends else item
            if resting in ("first", "item", "after"):
                return _edge(("box", phase, resting + "\\" * (symbol == ord("\\"))))
        elif symbol in _DIGITS and item in ("first", "item", "plus", "digits"):
            return _edge(("box", phase, "digits"), (10, symbol - ord("0"), 1, 0, 0))
        elif symbol in _DIGITS and item in ("minus", "-digits"):
            return _edge(("box", phase, "-digits"), (10, ord("0") - symbol, 1, 0, 0))
        if symbol in b"+-" and item in ("first", "item"):
            return _edge(("box", phase, "plus" if symbol == ord("+") else "minus"))
        if symbol == ord(".") and item in ("digits", "-digits"):
            return _edge(("box", phase, "dot"))
        if symbol == ord("0") and item == "dot":
            return _edge(("box", phase, "dot"))
        if symbol == ord("/") and item in ("digits", "-digits", "dot"):
            return _edge(("box", phase, "/"))
        if item.startswith("/") and self.largest.startswith(item[1:].encode() + bytes([symbol])):
            return _edge(("box", phase, item + chr(symbol)))
        return self._enter_bad(phase, symbol)

    def _enter_bad(self, phase: str, symbol: int) -> _Edge:
        if self.rules.first:
            return _edge(_DECIDED, (1, 0, 1, 0, CLOSE_BAD))
        return self._bad(phase, b"", symbol)

    def _bad(self, phase: str, seen: bytes, symbol: int) -> _Edge:
        if symbol in b"}\n":
            return self._close(phase, (1, 0, 1, 0, CLOSE_BAD), bytes([symbol]))
        seen = _longest(seen + _lower(symbol), _TAGS)
        if seen == _TAGS[0]:
            return _edge(("think", b""))
        return self._after_tag() if seen == _TAGS[1] else _edge(("bad", phase, seen))

    def _close(self, phase: str, operations: tuple[int, ...], ending: bytes) -> _Edge:
        """The end of a box by a brace, or by a newline."""
        if self.rules.first:
            return _edge(_DECIDED, operations)
        if phase == "seek":
            valid, other = "skip", "seek"
        else:
            valid = other = "on+" if phase == "on" else phase
        if ending == b"\n":
            return _edge(self._newline(other), operations)
        if operations[-1] == CLOSE_BAD:
            return _edge(("text", other, b""), operations)
        return ("text", valid, b""), operations, ("text", other, b"")


def _edge(state: _State, operations: tuple[int, ...] = _KEEP) -> _Edge:
    return state, operations, state


def _lower(symbol: int) -> bytes:
    return bytes([symbol]).lower()


def _longest(text: bytes, patterns: tuple[bytes, ...]) -> bytes:
    """The longest end of a text with which a pattern begins."""
    ends = (text[i:] for i in range(len(text)))
    return next((end for end in ends if any(p.startswith(end) for p in patterns)), b"")
