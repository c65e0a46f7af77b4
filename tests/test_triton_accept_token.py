"""`accept_token` in Triton against its reference, and its automaton against the plain parser."""

import random
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from kernels.accept_token import accept_token, accept_token_ref
from kernels.extract_scores import (
    Reason,
    ScoreAutomaton,
    extract_scores_ref,
    rows_launch,
)
from kernels.target import TARGETS
from tests.live_samples import (
    END_IDS,
    PIECES,
    SPECIAL_IDS,
    assert_same,
    draw_tokens,
    make_live,
)
from tests.score_texts import ANCHOR, CASES, FRAGMENTS, ITEMS, Outcome, bytes_of, read, run
from tests.triton_device import DEVICE, ON_GPU, counted, on_triton

pytestmark = on_triton

BLOCK = 32  # rows of a program
Pieces = list[bytes | None]


def cut(text: bytes, rng: random.Random) -> list[bytes]:
    """The text in up to 9 pieces, some of them empty."""
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(9)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def shortened(text: bytes) -> bytes:
    """Runs of 5,000 digits become 60 under the interpreter, where a symbol costs milliseconds."""
    return text if ON_GPU else text.replace(b"9" * 4940, b"").replace(b"0" * 4940, b"")


def test_written_cases_under_every_tokenization() -> None:
    rng = random.Random(0)
    texts = [shortened(text) for text, _, _, _ in CASES]
    whole: list[Pieces] = [[text] for text in texts]
    pieces: list[Pieces] = [[*cut(text, rng)] for text in texts]
    n = [n for _, n, _, _ in CASES] * 3
    expected = [(reason, scores) for _, _, reason, scores in CASES] * 3
    with counted() as counts:
        found = run([*texts, *whole, *pieces], n, device=DEVICE)
    assert counts == {"_accept_token_kernel": max(map(len, texts))}
    assert found == expected
    assert max(map(len, texts)) > 75 and {reason for reason, _ in found} > {Reason.RANGE}


def test_long_integers_saturate_on_both_sides() -> None:
    """What is 5 and -5 modulo 2**64 is out of range all the same."""
    digits = b"%d" % (2**64 + 5)
    rows: list[Pieces] = [
        [b"Scores: \\boxed{", sign, digits if long else b"0" * 30 + b"5", b"}"]
        for sign in (b"", b"-")
        for long in (True, False)
    ]
    assert run(rows, 1, bounds=(-9, 9), device=DEVICE) == [
        *((Reason.RANGE, ()), (Reason.VALID, (5,))),
        *((Reason.RANGE, ()), (Reason.VALID, (-5,))),
    ]


def hostile(rng: random.Random, anchor: str | None, n: int) -> Pieces:
    """Fragments; most texts also hold an anchored line with a box of about n plausible items."""

    def fragments(most: int) -> Pieces:
        return [rng.choice([*FRAGMENTS, None]) for _ in range(rng.randrange(most))]

    pieces = fragments(6)
    if rng.randrange(4):
        plausible = ITEMS[:6] if n > 3 or rng.randrange(2) else ITEMS
        items = rng.choices(plausible, k=rng.choice([n, n, n, n + 1]))
        content = [piece for item in items for piece in (b",", item)][1:]
        pieces += [b"\n", (anchor or "").encode(), b" ", b"\\boxed{", *content, b"}"]
        pieces += fragments(4)
    return pieces


@pytest.mark.parametrize("anchor", [ANCHOR, None, "", "A\\boxed{"])
def test_hostile_texts_under_every_tokenization(anchor: str | None) -> None:
    """With special tokens, and with more items than a row expects."""
    rng = random.Random(len(anchor or "none"))
    bounds = rng.choice([(1, 10), (-5, 10)])
    tokenizations: list[tuple[Pieces, Pieces, Pieces]] = []
    numbers: list[int] = []
    expected: list[Outcome] = []
    for _ in range(20):
        n = rng.choice([0, 1, 2, 3, 7])
        text = hostile(rng, anchor, n)
        while sum(len(piece or b"x") for piece in text) > 52:
            text = hostile(rng, anchor, n)
        vocabulary = [b"" if piece is None else piece for piece in text]
        special = {i for i, piece in enumerate(text) if piece is None}
        arguments = (n, None if anchor is None else anchor.encode(), *bounds, False)
        verdict = extract_scores_ref(vocabulary, special, range(len(text)), *arguments)
        single: Pieces = []
        pieces: Pieces = []
        for piece in text:
            single += [None] if piece is None else bytes_of(piece)
            pieces += [None] if piece is None else cut(piece, rng)
        tokenizations.append((single, pieces, text))
        numbers.append(n)
        expected.append(verdict)
    rows = [row for each in zip(*tokenizations, strict=True) for row in each]
    with counted() as counts:
        found = run(rows, numbers * 3, anchor, False, bounds, DEVICE)
    assert counts == {"_accept_token_kernel": max(map(len, rows))}
    assert found == expected * 3
    assert len({reason for reason, _ in found}) > 3


def test_more_items_than_there_is_room_for() -> None:
    """Rows beside each other, each with its own n; what is too many must not reach a neighbour."""
    rows: list[bytes | Pieces] = []
    expected: list[Outcome] = []
    numbers = (0, 1, 2, 3, 4, 20)
    for n in numbers:
        for items in (n, 21, 45):
            rows.append(
                [b"Scores: \\boxed{", b",".join(b"%d" % (1 + i % 9) for i in range(items)), b"}"]
            )
            valid = tuple(1 + i % 9 for i in range(n))
            expected.append((Reason.VALID, valid) if items == n else (Reason.COUNT, ()))
    assert run(rows, [n for n in numbers for _ in range(3)], device=DEVICE) == expected


def automaton(anchor: str | None = ANCHOR) -> ScoreAutomaton:
    return ScoreAutomaton(PIECES, SPECIAL_IDS, anchor, 1, 10, DEVICE)


def test_only_a_walk_reads_symbols_and_registers() -> None:
    """The branch is the block's: with symbols that are all wrong, plain words still end where they
    should, and a box does not."""
    words = [i for i, piece in enumerate(PIECES) if not set(piece) & set(b"0123456789,}{")]
    box = [PIECES.index(piece) for piece in (b"Scores: ", b"\\boxed{", b"1", b"}")]
    generator = torch.Generator().manual_seed(0)
    plain = torch.tensor(words)[torch.randint(len(words), (4, 30), generator=generator)]
    boxed = torch.tensor([box] * 4)
    right, wrong = automaton(), automaton()
    wrong._symbols.fill_(ord("x"))
    wrong._transitions[:, 1:] = 1

    def control(scores: ScoreAutomaton, tokens: Tensor) -> Tensor:
        return read(scores, tokens.tolist(), torch.ones(4, dtype=torch.int64)).control

    assert control(right, plain).equal(control(wrong, plain))
    assert control(right, boxed).unique().numel() == 1
    assert not control(right, boxed).equal(control(wrong, boxed))


def test_what_is_not_contiguous_is_refused() -> None:
    live, records = make_live(4, 5, automaton())
    step = draw_tokens(random.Random(0), live)
    live.scores.items = live.scores.items.T.contiguous().T
    with pytest.raises(ValueError, match="items must be contiguous"):
        accept_token(live, records, *step, automaton(), END_IDS.to(DEVICE), True)
    live, records = make_live(4, 5, automaton())
    records.logprobs = records.logprobs.transpose(1, 2)
    records.tokens = records.tokens.T
    with pytest.raises(ValueError, match="records must be contiguous"):
        accept_token(live, records, *step, automaton(), END_IDS.to(DEVICE), True)
    live, records = make_live(4, 5, automaton())
    live.count = torch.zeros(4, 2, dtype=torch.int64, device=DEVICE)[:, 0]
    with pytest.raises(ValueError, match=r"contiguous, got shape \(4,\)"):
        accept_token(live, records, *step, automaton(), END_IDS.to(DEVICE), True)


def test_one_row_a_thread() -> None:
    """Registers are stored and loaded without a barrier, which holds for one row a thread."""
    for target in TARGETS.values():
        options = rows_launch(target)
        assert options["num_warps"] * (64 if target.is_hip else 32) == options["ROWS"]


# -- accept_token --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "num_ends", "stop_at_box", "moves"),
    [
        (1, 3, True, True),
        (31, 0, True, True),
        (32, 1, False, True),
        (33, 3, True, False),
        (33, 1, False, False),
        (70, 3, True, True),
    ],
)
def test_accept_token_equals_its_reference(
    batch: int, num_ends: int, stop_at_box: bool, moves: bool
) -> None:
    """Every tensor after every step, until all are finished and beyond."""
    rng = random.Random(batch)
    scores = automaton()
    live, records = make_live(batch, 9, scores, finished=batch > 1)
    ends = END_IDS[:num_ends].to(DEVICE)
    first = torch.arange(batch + 5, device=DEVICE)
    cursor = first.clone(), 10 * first, 100 * first
    theirs, their_records, their_cursor = deepcopy((live, records, cursor))
    walked = set()
    with counted() as counts:
        for _ in range(11):
            step = draw_tokens(rng, live)
            read = step[0].masked_fill(live.finished | torch.isin(step[0], ends), len(PIECES))
            walks = scores._table[live.scores.control, read] < 0
            walked |= {bool(block.any()) for block in walks.split(BLOCK)}
            rules = scores, ends, stop_at_box
            accept_token(live, records, *step, *rules, cursor if moves else None)
            accept_token_ref(theirs, their_records, *step, *rules, their_cursor if moves else None)
            assert_same(live, records, theirs, their_records)
            assert all(a.equal(b) for a, b in zip(cursor, their_cursor, strict=True))
    assert counts == {"_accept_token_kernel": 11}
    assert live.finished.all() and walked == {True, False}
    if batch > 1:
        assert bool(live.ended.any()) == (num_ends > 0)
    assert live.scores.decided.any()
    made = live.count.sum().item()
    assert (records.tokens == -7).sum() == records.tokens.numel() - made
    assert records.logprobs.isnan().sum() == 2 * (records.tokens.numel() - made)
    assert (cursor[0] - first).sum() == (made if moves else 0)


def test_a_slot_passes_on_nothing_but_its_records() -> None:
    """A sample that joins where a decided one was starts like any other."""
    scores = automaton()
    live, records = make_live(3, 9, scores)
    fresh, _ = make_live(1, 9, scores)
    fresh.slot.copy_(live.slot[1])
    for samples in (live, fresh):
        samples.limit.fill_(9)
        samples.scores.n.fill_(1)
    box = [PIECES.index(piece) for piece in (b"Scores: ", b"\\boxed{", b"7", b"}")]

    def take(token: int) -> None:
        tokens, logprob = torch.full((3,), token, device=DEVICE), torch.zeros(3, device=DEVICE)
        accept_token(live, records, tokens, logprob, logprob, scores, END_IDS.to(DEVICE), True)

    for token in box:
        take(token)
    assert live.finished.all() and live.scores.decided.all()
    live = fresh.concat(live.index_select(torch.tensor([2, 0], device=DEVICE)))
    for token in box[:3]:
        take(token)
    assert live.finished.tolist() == [False, True, True] and live.count.tolist() == [3, 4, 4]
    assert live.scores.reason.tolist() == [Reason.UNDECIDED, Reason.VALID, Reason.VALID]
    take(box[3])
    assert live.finished.all() and live.scores.scores.tolist() == [[7, 0, 0]] * 3


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_captured_graph_takes_tokens_too() -> None:
    rng = random.Random(0)
    scores = automaton()
    live, records = make_live(33, 9, scores)
    theirs, their_records = deepcopy((live, records))
    ends = END_IDS.to(DEVICE)
    static = draw_tokens(rng, live)
    accept_token(deepcopy(live), deepcopy(records), *static, scores, ends, True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accept_token(live, records, *static, scores, ends, True)
    for _ in range(9):
        for buffer, value in zip(static, draw_tokens(rng, live), strict=True):
            buffer.copy_(value)
        graph.replay()
        accept_token_ref(theirs, their_records, *static, scores, ends, True)
        assert_same(live, records, theirs, their_records)
