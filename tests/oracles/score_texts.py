"""Texts that try the score automaton, and what has to be read in them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.accept_token import LiveSamples, Records, accept_token
from kernels.extract_scores import Reason, ScoreAutomaton, ScoreState, scores_of

ANCHOR = "Scores:"
BYTES = [bytes([byte]) for byte in range(256)]
SPECIAL = 256  # an id just after the bytes
FIVE_THOUSAND = b"9" * 5000

Outcome = tuple[Reason, tuple[int, ...]]
Pieces = list[bytes | None]  # None is a special token


def run(
    texts: list[Pieces],
    n: int | list[int],
    anchor: str | None = ANCHOR,
    finished: bool = True,
    bounds: tuple[int, int] = (1, 10),
    device: torch.device | str = "cpu",
) -> list[Outcome]:
    """Outcomes of texts in pieces; n of all texts or of each."""
    vocabulary = sorted({piece for text in texts for piece in text if piece is not None})
    ids: dict[bytes | None, int] = {piece: i for i, piece in enumerate(vocabulary)}
    ids[None] = len(vocabulary)
    automaton = ScoreAutomaton([*vocabulary, b"<s>"], {ids[None]}, anchor, *bounds, device)
    expected = torch.tensor([n] * len(texts) if isinstance(n, int) else n)
    state = read(automaton, [[ids[piece] for piece in text] for text in texts], expected)
    return outcomes(state, finished)


def read(automaton: ScoreAutomaton, rows: Sequence[Sequence[int]], n: Tensor) -> ScoreState:
    """The state after rows of tokens, of any lengths, which expect n (B,) scores: each row is a
    sample that `accept_token` gives its tokens, one a step, up to its length."""
    state = automaton.start(n, max(n.tolist(), default=0))
    device = state.control.device
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
    longest = max(map(len, rows), default=0)
    tokens = torch.tensor(
        [[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device
    ).reshape(len(rows), longest)
    live = LiveSamples.start(lengths, torch.arange(len(rows), device=device), state)
    live.finished.copy_(lengths == 0)
    records = Records.empty(len(rows), max(longest, 1), device)
    logprob = torch.zeros(len(rows), device=device)
    no_ends = torch.empty(0, dtype=torch.int64, device=device)
    for token in tokens.T.contiguous():
        accept_token(live, records, token, logprob, logprob, automaton, no_ends, False)
    return state


def singly(text: bytes) -> Pieces:
    return [text[i : i + 1] for i in range(len(text))]


def outcomes(state: ScoreState, finished: bool) -> list[Outcome]:
    scores, reasons = scores_of(state, torch.full_like(state.n, finished, dtype=torch.bool))
    results = []
    for row, code, n in zip(scores.tolist(), reasons.tolist(), state.n.tolist(), strict=True):
        valid = code == Reason.VALID
        assert not any(row[n if valid else 0 :]), "scores of no meaning must be 0"
        results.append((Reason(code), tuple(row[:n]) if valid else ()))
    return results


_QUOTED = b'It says "Scores: \\boxed{9}",\n> Scores: \\boxed{9}\n- Scores: \\boxed{9}\n'

# Every expected value here was written by hand, not computed.
CASES: list[tuple[bytes, int, Reason, tuple[int, ...]]] = [
    (rb"Scores: \boxed{8, 10}", 2, Reason.VALID, (8, 10)),
    (rb"Scores:\boxed{8,10}", 2, Reason.VALID, (8, 10)),
    (b"Scores: \\boxed{ +8 ,\t-0\r\n, 0010 }", 3, Reason.RANGE, ()),
    (b"Scores: \\boxed{ +8 ,\t007\r\n, 0010 }", 3, Reason.VALID, (8, 7, 10)),
    (b"Analysis: none\nScores: \\boxed{3}", 1, Reason.VALID, (3,)),
    (b"Analysis: none\r\nScores: are\n\n \\boxed{3}", 1, Reason.VALID, (3,)),
    (b"Scores: \\boxed{3}\nScores: \\boxed{4}", 1, Reason.VALID, (3,)),
    (b"Scores: \\boxed{x}\nScores: \\boxed{4}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"\boxed{3}", 1, Reason.MISSING, ()),
    (rb"so Scores: \boxed{3}", 1, Reason.MISSING, ()),
    (b"\rScores: \\boxed{3}", 1, Reason.MISSING, ()),
    (b" Scores: \\boxed{3}", 1, Reason.MISSING, ()),
    (b"\nScore: \\boxed{3}", 1, Reason.MISSING, ()),
    (b"ScoScores: \\boxed{3}", 1, Reason.MISSING, ()),
    (rb"Scores: \\boxed{3}", 1, Reason.VALID, (3,)),
    (rb"Scores: \bo\boxed{3}", 1, Reason.VALID, (3,)),
    (rb"Scores: \boxed {3}", 1, Reason.MISSING, ()),
    (rb"Scores: \boxed{3", 1, Reason.MISSING, ()),
    (rb"Scores: \boxed{\boxed{3}}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{}", 2, Reason.COUNT, ()),
    (b"Scores: \\boxed{ \t}", 1, Reason.COUNT, ()),
    (rb"Scores: \boxed{}", 0, Reason.VALID, ()),
    (rb"Scores: \boxed{1}", 0, Reason.COUNT, ()),
    (rb"Scores: \boxed{1, 2}", 3, Reason.COUNT, ()),
    (rb"Scores: \boxed{1, 2, 3, 4}", 3, Reason.COUNT, ()),
    (rb"Scores: \boxed{1, 2, 99}", 2, Reason.COUNT, ()),
    (rb"Scores: \boxed{1, x, 3}", 2, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{,}", 2, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{1,}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{,1}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{1 0}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{+}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{+-5}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{- 5}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{5-}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{8.5}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{7/10}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{nan}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{1e9}", 1, Reason.NOT_AN_INTEGER, ()),
    (b"Scores: \\boxed{5\x00}", 1, Reason.NOT_AN_INTEGER, ()),
    (b"Scores: \\boxed{5\x0b}", 1, Reason.NOT_AN_INTEGER, ()),
    ("Scores: \\boxed{\uff15}".encode(), 1, Reason.NOT_AN_INTEGER, ()),  # a fullwidth 5
    ("Scores: \\boxed{\u00a05}".encode(), 1, Reason.NOT_AN_INTEGER, ()),  # a no-break space
    (rb"Scores: \boxed{-5}", 1, Reason.RANGE, ()),
    (rb"Scores: \boxed{0}", 1, Reason.RANGE, ()),
    (rb"Scores: \boxed{10, 11}", 2, Reason.RANGE, ()),
    (b"Scores: \\boxed{" + FIVE_THOUSAND + b"}", 1, Reason.RANGE, ()),
    (b"Scores: \\boxed{-" + FIVE_THOUSAND + b", 1}", 2, Reason.RANGE, ()),
    (b"Scores: \\boxed{1" + b"0" * 64 + b"5}", 1, Reason.RANGE, ()),  # 5 modulo 2**64
    (b"Scores: \\boxed{" + b"0" * 5000 + b"7}", 1, Reason.VALID, (7,)),
    (b"", 1, Reason.MISSING, ()),
    (_QUOTED, 2, Reason.MISSING, ()),
    (_QUOTED + b"Scores: \\boxed{2, 9}\n", 2, Reason.VALID, (2, 9)),
]

FRAGMENTS = [
    *(b"Scores:", b"Scores: ", b"\nScores:", b"Sco", b"res:", b"S", b":", b"\n", b"\r\n", b" "),
    *(b"\\boxed{", b"\\boxed{", b"\\boxed", b"\\bo", b"\\", b"{", b"}", b"}", b",", b", "),
    *(b"1", b"7", b"10", b"0", b"11", b"-", b"+", b"-5", b"007", b"8.5", b"7/10", b"nan", b"1e9"),
    *(b"\t", b"x", b"\x00", b"\xff", b"9" * 40, b"1, 2", b"3}", b"\\boxed{4, 5}", b"\\boxed{3}"),
    *("\uff15".encode(), b"A\\boxed{", b"Scores: \\boxed{2, 3}", b"\nScores: \\boxed{6}"),
]

ITEMS = [
    *(b"1", b" 7", b"10 ", b"3", b"\t007", b"+3", b"-5", b"0", b"11", b"9" * 30, b"x", b"", b"1 0"),
]
