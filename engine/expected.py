"""Expected scores of samples: the mean of the distribution that each score was drawn from.

`kernels/expected_score.py` reads it on the device, at every token that may belong to a number in a
box. Here are the edges that it needs, by a tokenizer, and the choice among its results: a score's
is the first one from the number's first token to the token after it. There is none where a token
holds more than the number, or where the number is not spelled as the tokenizer would spell it: then
the score that was drawn stands. Expected scores are whole thousandths, so that votes are exact.
"""

import math
from collections.abc import Sequence

import torch

from engine.forced import MOST_SCORES
from kernels.device import to_device
from kernels.expected_score import FIRST, MINUS, NumberEdges
from kernels.extract_scores import ScoreAutomaton
from kernels.score_grammar import Reason, ScoreRules, read_scores
from models.tokenizer import Tokenizer

UNIT = 1000  # of an expected score, as votes count it


def number_edges(
    tokenizer: Tokenizer, rules: ScoreRules, device: torch.device | str = "cpu"
) -> NumberEdges:
    """The edges of all scores in range, as the tokenizer writes them with a blank before them and
    without. ValueError for more scores than that is meant for."""
    scores = range(rules.score_min, rules.score_max + 1)
    if len(scores) > MOST_SCORES:
        raise ValueError(
            f"scores from {rules.score_min} to {rules.score_max} have no expected ones: "
            f"{len(scores)} of them, at most {MOST_SCORES}"
        )
    texts: dict[tuple[int, ...], str] = {}  # of what a number's tokens begin with
    inner = set()  # of those, the ones after which a number goes on
    for score in scores:
        for blank in ("", " "):
            tokens = tokenizer.encode_text(f"{blank}{score}")
            for count in range(1, len(tokens) + 1):
                part = tuple(tokens[:count])
                data = b"".join(tokenizer.token_bytes[token] for token in part)
                texts[part] = data.decode("ascii", "replace").strip()
                if count < len(tokens):
                    inner.add(part)
    texts[()] = ""
    edges: dict[tuple[int, int], tuple[int, bool]] = {}
    for part, text in texts.items():
        if text and _is_number(text, texts[part[:-1]]):
            place = _prefix(texts[part[:-1]]), part[-1]
            is_open = part in inner or (place in edges and edges[place][1])
            edges[place] = (0 if text == "-" else int(text)), is_open
    rows = [(*place, *edge) for place, edge in edges.items()]
    columns = torch.tensor(rows, dtype=torch.int64).view(-1, 4).T.contiguous()
    prefix, token, value, is_open = to_device(columns, torch.device(device))
    return NumberEdges(prefix, token, value, is_open.bool())


def _is_number(text: str, before: str) -> bool:
    """Whether both are the beginning of a number: a tokenizer may write bytes of its own."""
    return all(each.lstrip("-").isdecimal() or each in ("", "-") for each in (text, before))


def _prefix(text: str) -> int:
    return FIRST if not text else MINUS if text == "-" else int(text)


def expected_scores(
    automaton: ScoreAutomaton,
    tokens: Sequence[int],
    expected: Sequence[float],
    scores: Sequence[int],
    opening: bytes = b"",
    nonce: int | None = None,
) -> tuple[int, ...]:
    """The expected scores of a sample whose scores are valid, in units of 1 / UNIT.

    tokens: without the end token; expected: for each of them what `expected_score` gave; scores: in
    shown order; opening, nonce: as the sample's automaton began.
    """
    data, first, ends = bytearray(opening), 0, [len(opening)]
    for i, token in enumerate(tokens):
        if token in automaton.special_ids:
            data, first, ends = bytearray(), i + 1, [0]
        else:
            data += automaton.token_bytes[token]
            ends.append(len(data))
    read = read_scores(bytes(data), len(scores), automaton.rules, True, nonce)
    if read.reason != Reason.VALID or read.scores != tuple(scores):
        return tuple(score * UNIT for score in scores)
    found = []
    for score, (start, stop) in zip(scores, read.spans, strict=True):
        at = [i for i in range(len(ends) - 1) if start < ends[i + 1] and ends[i] <= stop]
        known = [expected[first + i] for i in at if not math.isnan(expected[first + i])]
        found.append(round(known[0] * UNIT) if known else score * UNIT)
    return tuple(found)
