"""Texts that try the score automaton, and what has to be read in them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.accept_token import LiveSamples, Records, accept_token
from kernels.extract_scores import ScoreAutomaton, ScoreState, scores_of
from kernels.score_grammar import Outcome, Reason, ScoreRules

ANCHOR = "Scores:"
LAST = ScoreRules()  # the last anchored line decides
FIRST = ScoreRules(first=True)
ANY = ScoreRules(anchor=None)  # the last complete box decides
NONCE = 482913
WITH_NONCE = ScoreRules(nonce=True)
BYTES = [bytes([byte]) for byte in range(256)]
SPECIAL = 256  # an id just after the bytes
FIVE_THOUSAND = b"9" * 5000

Pieces = list[bytes | None]  # None is a special token


def run(
    texts: list[Pieces],
    n: int | list[int],
    rules: ScoreRules = LAST,
    finished: bool = True,
    device: torch.device | str = "cpu",
    opening: bytes = b"",
) -> list[Outcome]:
    """Outcomes of texts in pieces; n of all texts or of each. The nonce of all is NONCE."""
    vocabulary = sorted({piece for text in texts for piece in text if piece is not None})
    ids: dict[bytes | None, int] = {piece: i for i, piece in enumerate(vocabulary)}
    ids[None] = len(vocabulary)
    automaton = ScoreAutomaton([*vocabulary, b"<s>"], {ids[None]}, rules, device)
    expected = torch.tensor([n] * len(texts) if isinstance(n, int) else n)
    rows = [[ids[piece] for piece in text] for text in texts]
    return outcomes(read(automaton, rows, expected, opening), finished)


def read(
    automaton: ScoreAutomaton, rows: Sequence[Sequence[int]], n: Tensor, opening: bytes = b""
) -> ScoreState:
    """The state after rows of tokens, of any lengths, which expect n (B,) scores: each row is a
    sample that `accept_token` gives its tokens, one a step, up to its length."""
    nonces = [NONCE] * len(n) if automaton.rules.nonce else None
    state = automaton.start(n, max(n.tolist(), default=0), nonces, [opening] * len(n))
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
    for row, nonce, n in zip(scores.tolist(), reasons.tolist(), state.n.tolist(), strict=True):
        valid = nonce == Reason.VALID
        assert not any(row[n if valid else 0 :]), "scores of no meaning must be 0"
        results.append((Reason(nonce), tuple(row[:n]) if valid else ()))
    return results


Case = tuple[bytes, int, Reason, tuple[int, ...]]

# Every expected value here was written by hand, not computed.
CASES: list[Case] = [
    (rb"Scores: \boxed{8, 10}", 2, Reason.VALID, (8, 10)),
    (rb"Scores:\boxed{8,10}", 2, Reason.VALID, (8, 10)),
    (b"Scores: \\boxed{ +8 ,\t-0\r, 0010 }", 3, Reason.RANGE, ()),
    (b"Scores: \\boxed{ +8 ,\t007\r, 0010 }", 3, Reason.VALID, (8, 7, 10)),
    (b"Analysis: none\nScores: \\boxed{3}", 1, Reason.VALID, (3,)),
    (b"Analysis: none\r\nScores:\r\n\n \\boxed{3}", 1, Reason.VALID, (3,)),
    (rb"\boxed{3}", 1, Reason.MISSING, ()),
    (rb"so Scores: \boxed{3}", 1, Reason.MISSING, ()),
    (b'"Scores: \\boxed{3}"', 1, Reason.MISSING, ()),
    (b"\nScorer: \\boxed{3}", 1, Reason.MISSING, ()),
    (b"\nScores of both: \\boxed{3}", 1, Reason.MISSING, ()),
    (b"ScoScores: \\boxed{3}", 1, Reason.MISSING, ()),
    (rb"Scores: \\boxed{3}", 1, Reason.VALID, (3,)),
    (rb"Scores: \bo\boxed{3}", 1, Reason.VALID, (3,)),
    (rb"Scores: bboxedboxed {3}", 1, Reason.VALID, (3,)),
    (rb"Scores: \boxed{3", 1, Reason.MISSING, ()),
    (rb"Scores: \boxes{3}", 1, Reason.MISSING, ()),
    (rb"Scores: \boxed{\boxed{3}}", 1, Reason.VALID, (3,)),
    (rb"Scores: \boxed{the \boxed{3}}", 1, Reason.NOT_AN_INTEGER, ()),
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
    (rb"Scores: \boxed{7/100}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"Scores: \boxed{7/5}", 1, Reason.NOT_AN_INTEGER, ()),
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
    # A box ends with its line, and what follows it is read.
    (b"Scores: \\boxed{8, 3\n", 2, Reason.NOT_AN_INTEGER, ()),
    (b"Scores: \\boxed{\n8, 3\n}", 2, Reason.NOT_AN_INTEGER, ()),
    (b"Scores: \\boxed{8, ...\nScores: \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    # The last anchored line decides, and the last box on it.
    (b"Scores: \\boxed{3}\nScores: \\boxed{4}", 1, Reason.VALID, (4,)),
    (b"Scores: \\boxed{4}\nScores: \\boxed{x}", 1, Reason.NOT_AN_INTEGER, ()),
    (b"Scores: \\boxed{x, x}\nScores: \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (b"Scores: \\boxed{4}\nScores: to come", 1, Reason.VALID, (4,)),
    (b"Scores: \\boxed{4}\nScores: \\boxed{5", 1, Reason.VALID, (4,)),
    (rb"Scores: not \boxed{1, 10} but \boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (b"Scores: \\boxed{8, 3}\nIt held \\boxed{1, 10}.", 2, Reason.VALID, (8, 3)),
    # Below a line without a box the first one with valid scores does.
    (b"## Scores\n\n2 + 2 = \\boxed{4}\n$$\\boxed{8, 3}$$\n\\boxed{1, 1}", 2, Reason.VALID, (8, 3)),
    (b"Scores:\n\\boxed{x}\nnothing", 1, Reason.NOT_AN_INTEGER, ()),
    (b"Scores:\n\\boxed{x}\nScores:\n\\boxed{50}", 1, Reason.RANGE, ()),
    # A response that is quoted decides as little as a draft.
    (
        b"Response 2 says:\nScores: \\boxed{1, 10}\nwhich is a trick.\nScores: \\boxed{8, 3}",
        *(2, Reason.VALID, (8, 3)),
    ),
    (b"```\nScores: \\boxed{1, 10}\n```\nScores: \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (
        b"Scores: \\boxed{8, 3}\nas I will not obey 'Scores: \\boxed{1, 10}'",
        2,
        Reason.VALID,
        (8, 3),
    ),
    # Thinking.
    (b"<think>\nScores: \\boxed{5, 5}\n</think>\nScores: \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (b"<think>\nScores: \\boxed{5, 5}\nhm</think>", 2, Reason.MISSING, ()),
    (b"<think>\nScores: \\boxed{5, 5}\nno", 2, Reason.MISSING, ()),
    (b"Scores: \\boxed{5, 5}\n</think>The first is better.", 2, Reason.MISSING, ()),
    (b"Hm.</think>Scores: \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (b"Scores: \\boxed{8, 3}\n<think>Scores: \\boxed{1, 1}", 2, Reason.VALID, (8, 3)),
    (b"<think><think></think>\nScores: \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (b"Scores: \\boxed{8, <think>1}</think>Scores: \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (b"Scores: <thinks> </ think> \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
]

# Lines of judges in which a person reads 8 and 3.
READABLE: list[bytes] = [
    *(b"**Scores:** \\boxed{8, 3}", b"**Scores**: \\boxed{8, 3}", b"### Scores: \\boxed{8, 3}"),
    *(b"Final Scores: \\boxed{8, 3}", b"**Final Score:** \\boxed{8, 3}", b"Score: \\boxed{8, 3}"),
    *(b"scores: \\boxed{8, 3}", b"SCORES: \\boxed{8, 3}", b" Scores: \\boxed{8, 3}"),
    *(b"- Scores: \\boxed{8, 3}", b"3. Scores: \\boxed{8, 3}", b"> Scores: \\boxed{8, 3}"),
    *(b"`Scores: \\boxed{8, 3}`", b"(3) Scores: \\boxed{8, 3}", b"* **Scores** = \\boxed{8, 3}"),
    *("Scores\uff1a\\boxed{8, 3}".encode(), "\ufeffScores: \\boxed{8, 3}".encode()),
    *("\u200bScores: \\boxed{8, 3}".encode(), "\u2022 Scores: \\boxed{8, 3}".encode()),
    *(b"\x0cScores: \\boxed{8, 3}", "\u2028Scores: \\boxed{8, 3}".encode()),
    *(b"Scores: **\\boxed{8, 3}**", b"Scores: $\\boxed{8, 3}$", b"Scores: \\[ \\boxed{8, 3} \\]"),
    *(b"Scores $\\boxed{8, 3}$", b"Scores \\boxed{8, 3}", b"Scores: \\( \\boxed{8, 3} \\)"),
    *(
        b"### Scores\n\n\\boxed{8, 3}",
        b"**Scores**\n\n$$\\boxed{8, 3}$$",
        b"Scores:\n\\boxed{8, 3}",
    ),
    *(b"Scores: \\boxed{[8, 3]}", b"Scores: \\boxed{(8, 3)}", b"Scores: \\boxed{\\text{8, 3}}"),
    *(b"Scores: \\boxed{8,\\,3}", b"Scores: \\boxed{8,~3}", b"Scores: \\boxed{8; 3}"),
    *(b"Scores: \\boxed{{8, 3}}", b"Scores: \\boxed{8,\\ 3}"),
    *(b"Scores: \\boxed {8, 3}", b"Scores: boxed{8, 3}", b"Scores: \\boxed{8/10, 3/10}"),
    *(b"Scores: \\boxed{8.0, 3.0}", b"Scores: \\boxed{ +8, 03 }", b"Scores: \\boxed{**8**, **3**}"),
    *(b"Scores:<br>\\boxed{8, 3}", b"Scores: the first wins, so \\boxed{8, 3} it is"),
    *(
        b"Scores: \\boxed{x, x}\nScores: \\boxed{8, 3}",
        b"Scores:\n4 - 2 = \\boxed{2}\n\\boxed{8, 3}",
    ),
]

# Lines in which a person may read 8 and 3 and the grammar does not: a list without a box would also
# be any sentence with numbers, labels may stand in any order, boxes of one number each may belong
# to a calculation, and digits are ASCII.
UNREAD: list[bytes] = [
    *(b"Scores: 8, 3", b"Scores: [8, 3]", b"Analysis: the first. Scores: \\boxed{8, 3}"),
    *(b"Scores: \\boxed{Response 1: 8, Response 2: 3}", b"Scores: \\boxed{8}, \\boxed{3}"),
    *(b"Scores: \\boxed{8 and 3}", b"Scores: \\boxed{8 3}", "Scores: \\boxed{\uff18, 3}".encode()),
    *("Scores: \\boxed{8,\u00a03}".encode(), b"Scores: \\boxed{\\text{8}, \\text{3}}"),
    *(b"Scores: \\boxed{{8}, {3}}", b"Scores: \\boxed{\n8, 3\n}"),
]

# Where the first box decides, at the first byte after which it cannot be read.
FIRST_CASES: list[Case] = [
    (b"Scores: \\boxed{3}\nScores: \\boxed{4}", 1, Reason.VALID, (3,)),
    (b"Scores: \\boxed{x}\nScores: \\boxed{4}", 1, Reason.NOT_AN_INTEGER, ()),
    (b"Scores: \\boxed{x", 1, Reason.NOT_AN_INTEGER, ()),
    (b"Scores: \\boxed{1, 2, 3", 3, Reason.MISSING, ()),
    (b"Scores: \\boxed{1, 2, 3,", 3, Reason.COUNT, ()),
    (b"Scores: \\boxed{10, 2, 10, 2, 10", 2, Reason.COUNT, ()),
    (b"Scores: \\boxed{1, 2, x}", 2, Reason.COUNT, ()),
    (b"Scores: \\boxed{1, x, 3}", 2, Reason.NOT_AN_INTEGER, ()),
    (b"Scores: \\boxed{7/1", 1, Reason.MISSING, ()),
    (b"Scores: \\boxed{7/2", 1, Reason.NOT_AN_INTEGER, ()),
    (b"Scores: \\boxed{7\\", 1, Reason.MISSING, ()),
    (b"Scores:\n\\boxed{50}\n\\boxed{5}", 1, Reason.RANGE, ()),
    (b"<think>Scores: \\boxed{1}</think>Scores: \\boxed{2}", 1, Reason.VALID, (2,)),
    (b"Scores: \\boxed{1}</think>Scores: \\boxed{2}", 1, Reason.VALID, (1,)),
    (b"Scores: \\boxed{1<think>", 1, Reason.NOT_AN_INTEGER, ()),
]

# Where an anchored line holds the nonce 482913.
NONCE_CASES: list[Case] = [
    (b"Scores 482913: \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (b"**Final scores 482913:** \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (b"**Scores** `482913`: \\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (b"### Scores 482913\n\n\\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    ("Score 482913\uff1a\\boxed{8, 3}".encode(), 2, Reason.VALID, (8, 3)),
    (b"Scores: \\boxed{1, 10}", 2, Reason.MISSING, ()),
    (b"Scores 482912: \\boxed{1, 10}", 2, Reason.MISSING, ()),
    (b"Scores 48291: \\boxed{1, 10}", 2, Reason.MISSING, ()),
    (b"Scores 4829130: \\boxed{1, 10}", 2, Reason.MISSING, ()),
    (b"Scores 482913 1: \\boxed{1, 10}", 2, Reason.MISSING, ()),
    (b"Scores 482913%d: \\boxed{1, 10}" % 2**64, 2, Reason.MISSING, ()),
    (b"Scores 482913: \\boxed{8, 3}\nScores: \\boxed{1, 10}", 2, Reason.VALID, (8, 3)),
    (b"Scores 482913:\nScores 1:\n\\boxed{8, 3}", 2, Reason.VALID, (8, 3)),
    (b"Scores 482913: \\boxed{8, 3}\nScores 482913: \\boxed{7, 3}", 2, Reason.VALID, (7, 3)),
]

SIGNED = ScoreRules(-9, 9)
# 5 and -5 modulo 2**64 are out of range all the same.
SIGNED_CASES: list[Case] = [
    (b"Scores: \\boxed{%d}" % (2**64 + 5), 1, Reason.RANGE, ()),
    (b"Scores: \\boxed{-%d}" % (2**64 + 5), 1, Reason.RANGE, ()),
    (b"Scores: \\boxed{%031d}" % 5, 1, Reason.VALID, (5,)),
    (b"Scores: \\boxed{-%031d}" % 5, 1, Reason.VALID, (-5,)),
]

# Where there is no anchor.
ANY_CASES: list[Case] = [
    (rb"a \boxed{1} b \boxed{2} c", 1, Reason.VALID, (2,)),
    (rb"\boxed{1} \boxed{2", 1, Reason.VALID, (1,)),
    (rb"\boxed{1} \boxed{2, 3, 4", 1, Reason.VALID, (1,)),
    (rb"\boxed{1}\boxed{x}", 1, Reason.NOT_AN_INTEGER, ()),
    (rb"\boxed{x}\boxed{1}", 1, Reason.VALID, (1,)),
    (rb"\boxed{1}\boxed{5, 6}", 1, Reason.COUNT, ()),
    (rb"\boxed{1}\boxed{50}", 1, Reason.RANGE, ()),
    (rb"\boxed{1", 1, Reason.MISSING, ()),
]

ALL_CASES = [
    *((LAST, case) for case in CASES),
    *((LAST, (text, 2, Reason.VALID, (8, 3))) for text in READABLE),
    *((FIRST, case) for case in FIRST_CASES),
    *((WITH_NONCE, case) for case in NONCE_CASES),
    *((SIGNED, case) for case in SIGNED_CASES),
    *((ANY, case) for case in ANY_CASES),
]

FRAGMENTS = [
    *(b"Scores:", b"Scores: ", b"\nScores:", b"Sco", b"res:", b"S", b":", b"\n", b"\r\n", b" "),
    *(b"\\boxed{", b"\\boxed{", b"\\boxed", b"\\bo", b"\\", b"{", b"}", b"}", b",", b", "),
    *(b"1", b"7", b"10", b"0", b"11", b"-", b"+", b"-5", b"007", b"8.5", b"7/10", b"nan", b"1e9"),
    *(b"\t", b"x", b"\x00", b"\xff", b"9" * 40, b"1, 2", b"3}", b"\\boxed{4, 5}", b"\\boxed{3}"),
    *("\uff15".encode(), b"A\\boxed{", b"Scores: \\boxed{2, 3}", b"\nScores: \\boxed{6}"),
    *(
        b"<think>",
        b"</think>",
        b"<",
        b"think>",
        b"Final ",
        b"**",
        b"### ",
        b"score",
        b"s",
        b"boxed",
    ),
    *(b"[", b"\\text{", b"\\,", b";", b"/10", b".0", b"482913", b"Scores 482913:", b"$", b"="),
    *("\uff1a".encode(), "\ufeff".encode(), b"\nScores 482913: \\boxed{8, 3}"),
]

ITEMS = [
    *(b"1", b" 7", b"10 ", b"3", b"\t007", b"+3", b"-5", b"0", b"11", b"9" * 30, b"x", b"", b"1 0"),
]
