"""Appending to every live sample the token that was drawn for it."""

import random
from copy import deepcopy
from typing import Any

import pytest
import torch

from kernels.accept_token import Cursor, LiveSamples, Records, accept_token, accept_token_ref
from kernels.extract_scores import ScoreAutomaton, extract_scores_ref, scores_of
from kernels.forest_attention.plan import MAX_SPLIT
from kernels.score_grammar import Reason, ScoreRules
from tests.implementations import Implementation
from tests.live_samples import END_IDS, PIECES, SPECIAL_IDS, assert_same, draw_tokens, make_live
from tests.oracles.score_texts import ANY, BYTES, FIRST, LAST, outcomes

BLOCK = 32  # rows of a Triton program
FUNCTIONS = {"torch": {}, "cpp": {"accept_token"}, "triton": {"_accept_token_kernel"}}


def make_cursor(rows: int, device: torch.device) -> Cursor:
    """Samples that are about to come to the end of their first or second block, whose third is not
    there yet, in a table that is wider than what is used of it."""
    generator = torch.Generator().manual_seed(rows)
    length = torch.randint(MAX_SPLIT - 9, MAX_SPLIT + 1, (rows,), generator=generator)
    length += MAX_SPLIT * torch.randint(0, 2, (rows,), generator=generator)
    table = 1000 * torch.randperm(rows * 5, generator=generator).view(rows, 5)
    cursor = Cursor(7 * torch.arange(rows), length, torch.zeros_like(length), table[:, 1:4])
    cursor.cache_index.copy_(cursor.cells(length - 1))
    position, length, cache_index, _ = (column.to(device) for column in cursor)
    return Cursor(position, length, cache_index, table.to(device)[:, 1:4])


def automaton(on: Implementation, rules: ScoreRules = FIRST) -> ScoreAutomaton:
    return ScoreAutomaton(PIECES, SPECIAL_IDS, rules, on.device)


@pytest.mark.parametrize(
    ("batch", "num_ends", "stop_at_box", "moves", "rules", "expects"),
    [
        (0, 3, True, True, FIRST, True),
        (1, 3, True, True, FIRST, True),
        (9, 2, True, True, ANY, False),
        (31, 0, True, True, FIRST, False),
        (32, 1, False, True, LAST, True),
        (33, 1, False, False, ANY, True),
        (70, 3, True, True, FIRST, False),
    ],
)
def test_equals_its_reference(
    on: Implementation,
    batch: int,
    num_ends: int,
    stop_at_box: bool,
    moves: bool,
    rules: ScoreRules,
    expects: bool,
) -> None:
    """Every tensor after every step, until all are finished and beyond."""
    rng = random.Random(batch)
    scores = automaton(on, rules)
    live, records = make_live(batch, 9, scores, finished=batch > 1)
    records.expected = records.logprobs[1].clone() if expects else None
    ends = END_IDS[:num_ends].to(on.device)
    cursor = make_cursor(batch + 5, on.device)
    theirs, their_records, their_cursor = deepcopy((live, records, cursor))
    walked = set()
    with on.counted() as counts:
        for _ in range(11):
            step = draw_tokens(rng, live)
            read = step[0].masked_fill(live.finished | torch.isin(step[0], ends), len(PIECES))
            walks = scores._table[live.scores.control, read] < 0
            walked |= {bool(block.any()) for block in walks.split(BLOCK)}
            arguments = scores, ends, stop_at_box
            expected = torch.rand(batch).to(on.device) if expects else None
            accept_token(live, records, *step, *arguments, cursor if moves else None, expected)
            accept_token_ref(
                theirs, their_records, *step, *arguments, their_cursor if moves else None, expected
            )
            assert_same(live, records, theirs, their_records)
            assert all(a.equal(b) for a, b in zip(cursor, their_cursor, strict=True))
    assert counts == dict.fromkeys(FUNCTIONS[on.name] if batch else (), 11)
    assert live.finished.all() and walked == ({True, False} if batch else {False})


@pytest.mark.parametrize(("stop_at_box", "rules"), [(True, FIRST), (False, ANY), (False, LAST)])
def test_what_a_sample_leaves_is_what_was_drawn_for_it(
    on: Implementation, stop_at_box: bool, rules: ScoreRules
) -> None:
    """Replayed from lists: each sample ends by its first end token, decided box or limit, its
    scores are those of the parser on its tokens without the end, and nothing else was written."""
    rng = random.Random(0)
    scores_automaton = automaton(on, rules)
    live, records = make_live(40, 8, scores_automaton)
    cursor = make_cursor(45, on.device)
    start, jumps = deepcopy(cursor), 0
    steps = []
    while not live.finished.all():
        steps.append(draw_tokens(rng, live))
        end_ids = END_IDS.to(on.device)
        accept_token(live, records, *steps[-1], scores_automaton, end_ids, stop_at_box, cursor)
    scores, reasons = scores_of(live.scores, live.ended)
    ends, causes, written = set(END_IDS.tolist()), set(), 0
    for b in range(40):
        drawn = [int(token[b]) for token, _, _ in steps]
        n, limit = int(live.scores.n[b]), int(live.limit[b])
        kept: list[int] = []
        cause = "limit"
        for token in drawn[:limit]:
            kept.append(token)
            read = [t for t in kept if t not in ends]
            arguments = n, rules, token in ends
            reason, expected = extract_scores_ref(PIECES, SPECIAL_IDS, read, *arguments)
            decided = reason not in (Reason.MISSING, Reason.TRUNCATED)
            if token in ends or (stop_at_box and decided):
                cause = "end" if token in ends else "box"
                break
        slot, count = int(live.slot[b]), len(kept)
        assert int(live.count[b]) == count and int(live.token[b]) == kept[-1]
        assert records.tokens[slot, :count].tolist() == kept
        for record, which in zip(records.logprobs, (1, 2), strict=True):
            assert record[slot, :count].tolist() == [float(s[which][b]) for s in steps[:count]]
        assert bool(live.ended[b]) == (cause == "end")
        assert Reason(int(reasons[b])) == reason
        assert scores[b, :n].tolist() == (list(expected) if reason == Reason.VALID else [0] * n)
        position, length, cell = (int(column[b]) for column in start[:3])
        for key in range(length, length + count):  # cells of the keys up to the next token's
            jumps += key % MAX_SPLIT == 0
            cell = int(start.blocks[b, key // MAX_SPLIT]) if key % MAX_SPLIT == 0 else cell + 1
        moved = [position + count, length + count, cell]
        assert [int(column[b]) for column in cursor[:3]] == moved
        causes.add(cause)
        written += count
    assert causes == ({"end", "limit", "box"} if stop_at_box else {"end", "limit"})
    assert (records.tokens != -7).sum() == written
    assert (~records.logprobs.isnan()).sum() == 2 * written
    assert all(a[40:].equal(b[40:]) for a, b in zip(cursor, start, strict=True)) and jumps > 9


@pytest.mark.parametrize("rules", [FIRST, LAST, ANY])
def test_samples_may_be_reordered_retired_and_replaced(
    on: Implementation, rules: ScoreRules
) -> None:
    """In one batch, which changes after every token, each leaves what its own text says, also in a
    slot that another has left."""
    texts = [
        rb"Scores: \boxed{1, 2} and more of it",
        rb"Scores: \boxed{1, 2, 3} and more",
        rb"well   \boxed{3} \boxed{7, x   } more",
        rb"Scores: \boxed{ 10 , 9 } \boxed{5,5",
        rb"Scores: \boxed{9999999999999999999, 1}",
    ]
    scores = ScoreAutomaton(BYTES, (), rules, on.device)
    records = Records.empty(3, 40, on.device)
    no_ends = torch.empty(0, dtype=torch.int64, device=on.device)
    generator, seen, text_of = torch.Generator().manual_seed(1), set(), dict[int, bytes]()

    def start(slot: int) -> LiveSamples:
        text_of[slot] = texts.pop()
        limit, slots = (torch.tensor([x], device=on.device) for x in (len(text_of[slot]), slot))
        return LiveSamples.start(limit, slots, scores.start(torch.tensor([2]), 4))

    live = start(1).concat(start(0)).concat(start(2))
    while len(live.token):
        at = zip(live.slot.tolist(), live.count.tolist(), strict=True)
        token = torch.tensor([text_of[slot][count] for slot, count in at], device=on.device)
        logprob = torch.zeros(len(token), device=on.device)
        accept_token(live, records, token, logprob, logprob, scores, no_ends, False)
        order = torch.randperm(len(token), generator=generator).to(on.device)
        going, found = live.index_select(order[~live.finished[order]]), outcomes(live.scores, True)
        for row in live.finished.nonzero()[:, 0].tolist():
            slot, text = int(live.slot[row]), text_of[int(live.slot[row])]
            assert bytes(records.tokens[slot, : len(text)].tolist()) == text
            assert found[row] == extract_scores_ref(BYTES, (), text, 2, rules, True)
            seen.add(found[row])
            if texts:
                going = start(slot).concat(going)
        live = going
    assert len(seen) > 3 and not texts


def refuse(arguments: dict[str, Any], message: str, **change: Any) -> None:
    with pytest.raises(ValueError, match=message):
        accept_token(**(arguments | change))


def good_arguments(on: Implementation) -> dict[str, Any]:
    live, records = make_live(4, 8, automaton(on))
    step = draw_tokens(random.Random(0), live)
    rules = {"automaton": automaton(on), "end_ids": END_IDS.to(on.device), "stop_at_box": True}
    names = "live", "records", "token", "logprob", "sampling_logprob"
    return dict(zip(names, (live, records, *step), strict=True)) | rules


def test_bad_arguments_change_nothing(on: Implementation) -> None:
    good = good_arguments(on)
    live, records, token, logprob = (good[x] for x in ("live", "records", "token", "logprob"))
    refuse(good, r"token must be \(4,\) torch.int64, got \(3,\)", token=token[:3])
    refuse(good, r" logprob must be .* got \(4,\) torch.float64", logprob=logprob.double())
    refuse(good, r"sampling_logprob .* got \(4, 1\)", sampling_logprob=logprob[:, None])
    refuse(good, r"end_ids must be .* got \(3,\) torch.int32", end_ids=END_IDS.int())
    short = Records(records.tokens, records.logprobs[:1])
    refuse(good, r"records.logprobs must be \(2, 7, 8\)", records=short)
    refuse(good, "expected scores and room for them go together", expected=logprob)
    roomy = Records(records.tokens, records.logprobs, records.logprobs[0])
    refuse(good, "expected scores and room for them go together", records=roomy)
    refuse(good, r"expected must be \(4,\)", records=roomy, expected=logprob[:3])
    blocks = token[:, None]
    short_cursor = Cursor(token[:3], token, token, blocks)
    refuse(good, r"\(at least 4,\) int64, .* got \(3,\)", cursor=short_cursor)
    flat = Cursor(token, token, token, token)
    refuse(good, r"blocks \(at least 4, J\), got \(4,\)", cursor=flat)
    apart = Cursor(token, token, token, blocks.repeat(1, 4)[:, ::2])
    refuse(good, r"rows of blocks must be contiguous, got \(4, 2\)", cursor=apart)
    flags = LiveSamples(**{**live.tensors(), "finished": token}, scores=live.scores)
    refuse(good, r"live.finished must be \(4,\) torch.bool", live=flags)
    assert (records.tokens == -7).all() and not live.count.any()


@pytest.mark.implementations("cpp", "triton")
def test_what_is_not_contiguous_is_refused(on: Implementation) -> None:
    good = good_arguments(on)
    live, records = good["live"], good["records"]
    for tokens, logprobs in (
        (records.tokens.T.contiguous().T, records.logprobs),
        (records.tokens, records.logprobs.mT.contiguous().mT),
    ):
        refuse(good, r"must be contiguous, got \(", records=Records(tokens, logprobs))
    turned = deepcopy(live)
    turned.scores.items = turned.scores.items.T.contiguous().T
    refuse(good, "items must be contiguous", live=turned)
    live.count = torch.zeros(4, 2, dtype=torch.int64, device=on.device)[:, 0]
    refuse(good, r"contiguous, got .*\(2,\)")


# -- Triton alone ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.implementations("triton")
def test_a_captured_graph_takes_tokens_too(on: Implementation) -> None:
    rng = random.Random(0)
    scores = automaton(on)
    live, records = make_live(33, 9, scores)
    theirs, their_records = deepcopy((live, records))
    ends = END_IDS.to(on.device)
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
