"""`accept_token` on CPU against its reference, and both against lists of what was drawn."""

import random
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.accept_token import LiveSamples, Records, accept_token, accept_token_ref
from kernels.extract_scores import Reason, ScoreAutomaton, extract_scores_ref, scores_of
from tests.live_samples import (
    END_IDS,
    PIECES,
    SPECIAL_IDS,
    assert_same,
    draw_tokens,
    make_live,
)
from tests.score_texts import ANCHOR

AUTOMATA = {anchor: ScoreAutomaton(PIECES, SPECIAL_IDS, anchor, 1, 10) for anchor in (ANCHOR, None)}


@given(
    seed=st.integers(0, 1 << 32),
    batch=st.integers(0, 9),
    num_ends=st.integers(0, 3),
    stop_at_box=st.booleans(),
    anchor=st.sampled_from([ANCHOR, None]),
    moves=st.booleans(),
    finished=st.booleans(),
)
def test_equals_its_reference(
    seed: int,
    batch: int,
    num_ends: int,
    stop_at_box: bool,
    anchor: str | None,
    moves: bool,
    finished: bool,
) -> None:
    rng = random.Random(seed)
    rules = AUTOMATA[anchor], END_IDS[:num_ends], stop_at_box
    live, records = make_live(batch, 8, AUTOMATA[anchor], finished)
    theirs, their_records = deepcopy((live, records))
    first = torch.arange(batch + 3)
    cursor = first.clone(), 10 * first, 100 * first
    their_cursor = deepcopy(cursor)
    for _ in range(9):
        step = draw_tokens(rng, live)
        accept_token(live, records, *step, *rules, cursor if moves else None)
        accept_token_ref(theirs, their_records, *step, *rules, their_cursor if moves else None)
        assert_same(live, records, theirs, their_records)
        for place, their_place in zip(cursor, their_cursor, strict=True):
            assert place.equal(their_place)
    assert live.finished.all()


@pytest.mark.parametrize("stop_at_box", [True, False])
def test_what_a_sample_leaves_is_what_was_drawn_for_it(stop_at_box: bool) -> None:
    """Replayed from lists: each sample ends by its first end token, decided box or limit, its
    scores are those of the parser on its tokens without the end, and nothing else was written."""
    rng = random.Random(0)
    automaton = AUTOMATA[ANCHOR]
    live, records = make_live(40, 8, automaton)
    place = torch.zeros(45, dtype=torch.int64)
    cursor = place, place + 7, place + 70
    steps = []
    while not live.finished.all():
        steps.append(draw_tokens(rng, live))
        accept_token(live, records, *steps[-1], automaton, END_IDS, stop_at_box, cursor)
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
            reason, expected = extract_scores_ref(
                PIECES, SPECIAL_IDS, read, n, ANCHOR.encode(), 1, 10, token in ends
            )
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
        assert [int(m[b]) for m in cursor] == [count, count + 7, count + 70]
        causes.add(cause)
        written += count
    assert causes == ({"end", "limit", "box"} if stop_at_box else {"end", "limit"})
    assert (records.tokens != -7).sum() == written
    assert (~records.logprobs.isnan()).sum() == 2 * written
    assert all(len(m[40:].unique()) == 1 for m in cursor)


def test_samples_may_be_reordered_and_joined() -> None:
    live, records = make_live(5, 8, AUTOMATA[ANCHOR])
    later, _ = make_live(2, 8, AUTOMATA[ANCHOR])
    step = draw_tokens(random.Random(1), live)
    accept_token(live, records, *step, AUTOMATA[ANCHOR], END_IDS, True)
    before = deepcopy(live)
    joined = live.index_select(torch.tensor([4, 2])).concat(later)
    assert joined.token.tolist() == [*live.token[[4, 2]].tolist(), 0, 0]
    assert joined.count.tolist() == [1, 1, 0, 0]
    assert joined.scores.control[:2].equal(live.scores.control[[4, 2]])
    records = Records.empty(8, 8)
    step = draw_tokens(random.Random(2), joined)
    accept_token(joined, records, *step, AUTOMATA[ANCHOR], END_IDS, True)
    assert_same(live, records, before, records)


def test_wrong_arguments_are_named() -> None:
    live, records = make_live(4, 8, AUTOMATA[ANCHOR])
    token, logprob, sampling_logprob = draw_tokens(random.Random(0), live)

    def take(**change: object) -> None:
        arguments: dict[str, object] = {
            "live": live,
            "records": records,
            "token": token,
            "logprob": logprob,
            "sampling_logprob": sampling_logprob,
            "automaton": AUTOMATA[ANCHOR],
            "end_ids": END_IDS,
            "stop_at_box": True,
        }
        accept_token(**(arguments | change))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"token must be \(4,\) torch.int64, got \(3,\)"):
        take(token=token[:3])
    with pytest.raises(ValueError, match=r" logprob must be .* got \(4,\) torch.float64"):
        take(logprob=logprob.double())
    with pytest.raises(ValueError, match=r"sampling_logprob must be .* got \(4, 1\)"):
        take(sampling_logprob=sampling_logprob[:, None])
    with pytest.raises(ValueError, match=r"end_ids must be .* got \(3,\) torch.int32"):
        take(end_ids=END_IDS.int())
    with pytest.raises(ValueError, match=r"records.logprobs must be \(2, 7, 8\)"):
        take(records=Records(records.tokens, records.logprobs[:1]))
    with pytest.raises(ValueError, match=r"a cursor must be \(at least 4,\) int64, got \(3,\)"):
        take(cursor=(token[:3], token, token))
    with pytest.raises(ValueError, match=r"live.finished must be \(4,\) torch.bool"):
        flags = {**live.tensors(), "finished": token}
        take(live=LiveSamples(**flags, scores=live.scores))
    assert (records.tokens == -7).all() and not live.count.any()
