"""The score automaton, which reads tokens as `accept_token` takes them, against its parser."""

import random
import re
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import accept_token, extract_scores
from kernels.extract_scores import ScoreAutomaton, extract_scores_ref
from kernels.launch import INTERPRETED
from kernels.score_grammar import Outcome, Reason, ScoreRules, _integer, parse_scores, read_scores
from kernels.target import TARGETS
from tests.implementations import Implementation
from tests.live_samples import PIECES, SPECIAL_IDS
from tests.oracles.score_texts import (
    ALL_CASES,
    ANY,
    BYTES,
    FIRST,
    FRAGMENTS,
    ITEMS,
    LAST,
    NONCE,
    SPECIAL,
    UNREAD,
    Case,
    Pieces,
    outcomes,
    read,
    run,
    singly,
)

MISSING, THREE = (Reason.MISSING, ()), (Reason.VALID, (3,))
# Called once for each token of the longest text.
FUNCTIONS = {"torch": {}, "cpp": {"accept_token"}, "triton": {"_accept_token_kernel"}}


@pytest.fixture(autouse=True)
def _one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, where a program takes milliseconds for a symbol, one has all rows."""
    if INTERPRETED:
        one = {"ROWS": 512, "num_warps": 1}
        monkeypatch.setattr(accept_token, "rows_launch", lambda target: one)


def check(
    on: Implementation,
    texts: list[Pieces],
    n: int | list[int],
    expected: list[Outcome],
    rules: ScoreRules = LAST,
    finished: bool = True,
    opening: bytes = b"",
) -> None:
    with on.counted() as counts:
        found = run(texts, n, rules, finished, on.device, opening)
    assert counts == dict.fromkeys(FUNCTIONS[on.name], max(map(len, texts)))
    assert found == expected


def cut(text: bytes, rng: random.Random) -> Pieces:
    """The text in up to 9 pieces, some of them empty."""
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(9)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


# -- the language ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rules", "case"), ALL_CASES)
def test_reference_reads_the_written_cases(rules: ScoreRules, case: Case) -> None:
    text, n, reason, scores = case
    nonce = NONCE if rules.nonce else None
    assert parse_scores(text, n, rules, True, nonce) == (reason, scores)
    reason = Reason.TRUNCATED if reason == Reason.MISSING else reason
    assert parse_scores(text, n, rules, False, nonce) == (reason, scores)


@pytest.mark.parametrize("text", UNREAD)
def test_lines_that_could_mean_something_else_are_not_read(text: bytes) -> None:
    assert parse_scores(text, 2, LAST, True)[0] != Reason.VALID


def test_written_cases_reach_every_reason() -> None:
    reached = {case[2] for _, case in ALL_CASES} | {Reason.TRUNCATED, Reason.UNDECIDED}
    assert reached == set(Reason)
    assert [reason.label for reason in Reason] == [
        *("undecided", "valid", "missing", "count", "range", "not an integer", "truncated")
    ]


@pytest.mark.parametrize("rules", [*dict.fromkeys(rules for rules, _ in ALL_CASES)], ids=str)
def test_written_cases_under_every_tokenization(on: Implementation, rules: ScoreRules) -> None:
    """Runs of 5,000 digits are 60 where a symbol is a step, or takes milliseconds."""
    rng = random.Random(0)
    cases = [case for theirs, case in ALL_CASES if theirs is rules]
    if INTERPRETED:
        cases = [case for case in cases if len(case[0]) < 60]
    texts = [text for text, _, _, _ in cases]
    short = [text.replace(b"9" * 4940, b"").replace(b"0" * 4940, b"") for text in texts]
    tokenizations: list[Pieces] = [
        *map(singly, short),
        *(cast(Pieces, [text]) for text in (short if INTERPRETED else texts)),
        *(cut(text, rng) for text in short),
    ]
    numbers = [n for _, n, _, _ in cases]
    expected = [(reason, scores) for _, _, reason, scores in cases]
    check(on, tokenizations, numbers * 3, expected * 3, rules)


def test_a_special_token_resets_but_not_a_decided_row(on: Implementation) -> None:
    box, line = rb"\boxed{3}", rb"Scores: \boxed{3}"

    def check_texts(texts: dict[bytes, Outcome], rules: ScoreRules) -> None:
        """Of pieces with a | for each special token."""
        pieces = (re.split(rb"(\|)", text) for text in texts)
        rows: list[Pieces] = [[None if x == b"|" else x for x in row] for row in pieces]
        check(on, rows, 1, [*texts.values()], rules)

    anchored = {
        b"Scores:|" + box: MISSING,
        b"Scores: \\boxed{1|3}": MISSING,
        b"Scores: \\bo|xed{3}": MISSING,
        b"no line |" + line: THREE,
        b"Sco|res: \\boxed{3}": MISSING,
        b"Scores: \\boxed{|" + line: THREE,
        b"<think>|" + line: THREE,
    }
    check_texts(anchored | {line + b"|Scores: \\boxed{4}": THREE}, FIRST)
    check_texts(anchored | {line + b"|": MISSING, b"Scores: \\boxed{4}|" + line: THREE}, LAST)
    check_texts({box + b"|": MISSING, box + b"|x": MISSING, box + b"|" + box: THREE}, ANY)


def test_an_opening_is_read_before_the_tokens(on: Implementation) -> None:
    """What a prompt ends with: thinking that it opens, or the beginning of a judgement."""
    draft, line = b"Scores: \\boxed{1}\n", b"Scores: \\boxed{3}"
    for opening, text, expected in (
        (b"<think>\n", draft, MISSING),
        (b"<think>\n", draft + b"</think>\n" + line, THREE),
        (b"<think>\n</think>\n", line, THREE),
        (b"Scores: \\boxed{", b"3}", THREE),
        (b"Scores: \\boxed{1} or \\boxed{", b"3}", THREE),
    ):
        check(on, [[text], singly(text)], 1, [expected] * 2, opening=opening)


def automaton_of_bytes(on: Implementation, rules: ScoreRules) -> ScoreAutomaton:
    return ScoreAutomaton([*BYTES, b"<s>"], {SPECIAL}, rules, on.device)


def test_decided_the_moment_the_box_closes_and_never_after(on: Implementation) -> None:
    box, more = [*rb"Scores: \boxed{4, 5}"], [*b"\nScores: \\boxed{9, 9}", SPECIAL, *b"Scores: x"]
    text = box + more
    rows = [text[:length] for length in range(len(text) + 1)]
    n = torch.tensor([2] * len(text) + [3])  # the last one has room for three scores
    state = read(automaton_of_bytes(on, FIRST), rows, n)
    assert state.decided.tolist() == [len(row) >= len(box) for row in rows]
    decided = outcomes(state, True)[len(box) :]
    assert decided == [(Reason.VALID, (4, 5))] * len(more) + [(Reason.COUNT, ())]
    twice = [*rb"Scores: \boxed{4}\boxed{5}"]
    for rules in (LAST, ANY):
        state = read(automaton_of_bytes(on, rules), [twice[:17], twice], torch.tensor([1, 1]))
        assert not state.decided.any()
        assert outcomes(state, True) == [(Reason.VALID, (4,)), (Reason.VALID, (5,))]


def test_more_items_than_there_is_room_for(on: Implementation) -> None:
    """Rows beside each other, each with its own n; what is too many must not reach a neighbour."""
    texts: list[Pieces] = []
    expected: list[Outcome] = []
    numbers = (0, 1, 2, 3, 4, 20)
    for n in numbers:
        for items in (n, 21, 45):
            scores = [1 + i % 9 for i in range(items)]
            texts.append([b"Scores: \\boxed{", b",".join(b"%d" % x for x in scores), b"}"])
            expected.append((Reason.VALID, tuple(scores)) if items == n else (Reason.COUNT, ()))
    check(on, texts, [n for n in numbers for _ in range(3)], expected)


@pytest.mark.implementations("cpp")
def test_a_megabyte_without_end(on: Implementation) -> None:
    plain, digits, blanks = b"x" * 1000, b"1" * 100, b" \t" * 500
    texts: list[Pieces] = [
        [plain] * 1000,
        [b"Scores: ", *[plain] * 1000],
        [b"Scores: \\boxed{x", *[plain] * 1000],
        [b"Scores: \\boxed{", *[digits] * 50],
        [b"Scores: \\boxed{", *[b"7, " * 20] * 20],
        [*[b"\nScores " * 140] * 1000],
        [b"Scores: \\boxed{", *[blanks] * 1000, b"6}"],
    ]
    expected: list[Outcome] = [(Reason.TRUNCATED, ())] * 6 + [(Reason.VALID, (6,))]
    check(on, texts, 1, expected, finished=False)


def hostile(rng: random.Random, rules: ScoreRules, n: int) -> Pieces:
    """Fragments; most texts also hold an anchored line with a box of about n plausible items."""

    def fragments(most: int) -> Pieces:
        choices = [*FRAGMENTS, None, rng.randbytes(rng.randrange(4))]
        return [rng.choice(choices) for _ in range(rng.randrange(most))]

    pieces = fragments(6)
    if rng.randrange(4):
        plausible = ITEMS[:6] if n > 3 or rng.randrange(2) else ITEMS
        items = rng.choices(plausible, k=rng.choice([n, n, n, n + 1]))
        content = [piece for item in items for piece in (b",", item)][1:]
        anchor = (
            "" if rules.anchor is None else rules.anchor_line(str(NONCE) if rules.nonce else None)
        )
        pieces += [b"\n", anchor.encode(), b" ", b"\\boxed{", *content, b"}"]
        pieces += fragments(4)
    return pieces


def segments(pieces: Pieces) -> list[bytes]:
    """The texts between special tokens."""
    texts = [b""]
    for piece in pieces:
        texts = [*texts, b""] if piece is None else [*texts[:-1], texts[-1] + piece]
    return texts


def parsed(pieces: Pieces, n: int, rules: ScoreRules, finished: bool) -> Outcome:
    """The reference; it parses between special tokens: the first text that decides counts where
    the first box does, else the last one."""
    nonce = NONCE if rules.nonce else None
    verdicts = [parse_scores(text, n, rules, finished, nonce) for text in segments(pieces)]
    for text in segments(pieces):
        _, scores, spans = read_scores(text, n, rules, finished, nonce)
        assert [_integer(text[first:last]) for first, last in spans] == [*scores]
    absent = Reason.MISSING if finished else Reason.TRUNCATED
    deciding = [v for v in verdicts if v[0] != absent] if rules.first else []
    expected = deciding[0] if deciding else verdicts[-1]
    special = {i for i, piece in enumerate(pieces) if piece is None}
    vocabulary = [b"" if piece is None else piece for piece in pieces]
    arguments = n, rules, finished, nonce
    assert extract_scores_ref(vocabulary, special, range(len(pieces)), *arguments) == expected
    return expected


RULES = [
    (LAST, False),
    (ScoreRules(-5, 10, None), True),
    (ScoreRules(nonce=True), False),
    (ScoreRules(first=True), True),
    (ScoreRules(-5, 7), True),
    (ScoreRules(anchor=None, first=True), False),
    (ScoreRules(anchor="SS:"), False),
    (ScoreRules(anchor="Final bob verdicts"), True),
    (ScoreRules(anchor="\u8bc4\u5206\uff1a"), True),
    (ScoreRules(1, 100, "### [Rating 1]:", first=True, nonce=True), True),
]


@pytest.mark.parametrize(("rules", "finished"), RULES[:3] if INTERPRETED else RULES, ids=str)
def test_hostile_texts_under_every_tokenization(
    on: Implementation, rules: ScoreRules, finished: bool
) -> None:
    """With special tokens, and with more items than a row expects."""
    rng = random.Random(len(rules.anchor or "none") + finished)
    tokenizations: list[tuple[Pieces, ...]] = []
    numbers: list[int] = []
    expected: list[Outcome] = []
    while len(numbers) < (30 if INTERPRETED else 100):
        n = rng.choice([0, 1, 2, 3, 7])
        text = hostile(rng, rules, n)
        if sum(len(piece or b"x") for piece in text) > (40 if INTERPRETED else 200):
            continue
        single: Pieces = []
        pieces: Pieces = []
        for segment in segments(text):
            single += [None, *singly(segment)]
            pieces += [None, *cut(segment, rng)]
        tokenizations.append((single[1:], pieces[1:], text))
        numbers.append(n)
        expected.append(parsed(text, n, rules, finished))
    texts = [row for each in zip(*tokenizations, strict=True) for row in each]
    assert len({reason for reason, _ in expected}) > 3
    check(on, texts, numbers * 3, expected * 3, rules, finished)


# `on` has no state
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.implementations("torch", "cpp")
@given(data=st.data())
def test_no_text_crashes_a_reader(on: Implementation, data: st.DataObject) -> None:
    """Any bytes, and any words of the language in any order, in eight rows."""
    rules, finished = data.draw(st.sampled_from(RULES))
    words = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(b"".join)
    texts = [data.draw(st.one_of(words, st.binary(max_size=30))) for _ in range(8)]
    nonce = NONCE if rules.nonce else None
    expected = [parse_scores(text, 2, rules, finished, nonce) for text in texts]
    assert run([singly(text) for text in texts], 2, rules, finished, on.device) == expected


# -- the automaton ---------------------------------------------------------------------------------


def test_ordinary_text_is_one_look_up_per_token(on: Implementation) -> None:
    """With symbols that are all wrong plain words still end where they should; a box does not."""
    words = [i for i, piece in enumerate(PIECES) if not set(piece) & set(b"0123456789,}{")]
    box = [PIECES.index(piece) for piece in (b"Scores: ", b"\\boxed{", b"1", b"}")]
    generator = torch.Generator().manual_seed(0)
    plain = torch.tensor(words)[torch.randint(len(words), (4, 30), generator=generator)]
    boxed = torch.tensor([box] * 4)
    right, wrong = (ScoreAutomaton(PIECES, SPECIAL_IDS, FIRST, on.device) for _ in "ab")
    wrong._symbols.fill_(ord("x"))
    wrong._transitions = torch.ones_like(wrong._transitions)
    wrong._transitions[:, 0] = right._transitions[:, 0]

    def control(automaton: ScoreAutomaton, tokens: Tensor) -> Tensor:
        return read(automaton, tokens.tolist(), torch.ones(4, dtype=torch.int64)).control

    assert control(right, plain).equal(control(wrong, plain))
    assert control(right, boxed).unique().numel() == 1
    assert not control(right, boxed).equal(control(wrong, boxed))


def test_tokens_that_lead_to_the_same_states_share_a_column() -> None:
    words = [b"one", b"two", b" three", b"four.", *PIECES]
    automaton = ScoreAutomaton(words, {len(words) - 1}, LAST)
    columns = automaton._column.tolist()
    assert columns[0] == columns[1] and columns[0] != columns[words.index(b"\n")]
    assert automaton._table.shape[1] <= len(set(columns)) + sum(map(len, words))


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"anchor": "Scores\nhere"}, "newlines"),
        ({"anchor": "\\boxed{"}, "newlines"),
        ({"anchor": "## :"}, "a letter"),
        ({"anchor": "a" * 257}, "at most 256 bytes"),
        ({"score_min": 5, "score_max": 4}, "got 5 and 4"),
        ({"score_max": 10**17}, "got 1 and 100000000000000000"),
        ({"anchor": None, "nonce": True}, "needs an anchor"),
    ):
        with pytest.raises(ValueError, match=message):
            ScoreRules(**arguments)
    with pytest.raises(ValueError, match=r"below 256, got \[256\]"):
        ScoreAutomaton(BYTES, {256}, LAST)
    automaton = ScoreAutomaton(BYTES, set(), LAST)
    with pytest.raises(ValueError, match=r"in \[0, 2\]"):
        automaton.start(torch.tensor([3]), 2)
    with pytest.raises(ValueError, match="nonces are for rules"):
        automaton.start(torch.tensor([1]), 2, [5])


# -- Triton alone ----------------------------------------------------------------------------------


@pytest.mark.implementations("triton")
def test_one_row_a_thread(on: Implementation) -> None:
    """Registers are stored and loaded without a barrier, which holds for one row a thread."""
    for target in TARGETS.values():
        options = extract_scores.rows_launch(target)
        assert options["num_warps"] * (64 if target.is_hip else 32) == options["ROWS"]
