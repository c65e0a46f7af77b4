"""Expected scores: which of what the device reads is a score's, and what votes make of them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.decided import samples_to_draw
from engine.expected import UNIT, expected_scores, number_edges
from engine.judge import Judge
from engine.prompt import read_judge_template
from engine.request import make_row
from engine.sample import POCKET, main
from engine.verdict import Sample, to_line
from kernels.expected_score import FIRST, MINUS
from kernels.extract_scores import ScoreAutomaton
from kernels.score_grammar import ScoreRules
from kernels.vote import points_of
from models.tokenizer import Tokenizer
from tests.judges import rebuilt
from tests.rows import needs_cpp
from tests.test_judge import run, world_rows
from tests.tiny import write_tokenizer

DOUBTS = 0.25  # of the logits: scores are less sure; at this temperature draws are as before
ASKED: dict[str, Any] = {
    "score": "expected",
    "temperature": DOUBTS,
    "max_new_tokens": 400,
    "stop": "eos",
}


@pytest.fixture(scope="module")
def judge() -> Judge:
    """The pocket model, in doubt about what it writes."""
    loaded = Judge.load(POCKET)
    loaded.model.norm.weight.data *= DOUBTS
    return loaded


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The same in transformers."""
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    model.model.norm.weight.data *= DOUBTS
    return model


def by_hand(theirs: Any, judge: Judge, prompt: list[int], sample: Sample) -> list[float]:
    """The expected scores in shown order, in plain Python: of every number the chances of those
    that its tokens leave open, from transformers' logits at the token where they part."""
    size = judge.tokenizer.token_bytes
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + sample.token_ids])).logits[0]
    text = b"".join(size[token] for token in sample.token_ids)
    at = text.rindex(b"boxed{") + len(b"boxed{") if b"boxed{" in text else 0  # or in the prompt
    end = text.index(b"}", at)
    found = []
    place = 0
    number: list[int] = []  # places of the tokens of the number under way
    for i, token in enumerate(sample.token_ids):
        place += len(size[token])
        if place <= at:
            continue
        if size[token].strip().isdigit():
            number.append(i)
            continue
        if number:
            found.append(_expected(judge, sample.token_ids, number, logits, len(prompt)))
            number = []
        if place > end:
            break
    return found


def _expected(
    judge: Judge, tokens: list[int], number: list[int], logits: torch.Tensor, first: int
) -> float:
    """Scores are 1 to 10, and 10 is one token after a blank, and two without."""
    size = judge.tokenizer.token_bytes

    def chances(place: int) -> dict[bytes, float]:
        drawn = logits[first + place - 1].softmax(0)
        return {size[token]: float(drawn[token]) for token in range(len(size))}

    begin = chances(number[0])
    if size[tokens[number[0]]] == b"1":
        rest = chances(number[0] + 1)
        return 1 * (1 - rest[b"0"]) + 10 * rest[b"0"]
    ways = {f" {score}".encode(): score for score in range(1, 11)}
    ways |= {str(score).encode(): score for score in range(2, 10)}
    mass = sum(begin[way] for way in ways)
    return sum(begin[way] * score for way, score in ways.items()) / mass


def test_they_are_the_means_that_transformers_gives(judge: Judge, theirs: Any) -> None:
    """Of scores in one token and in two."""
    seen, doubts = set[bytes](), 0
    for row, verdict in zip(world_rows(4), run(judge, world_rows(4), k=8, **ASKED), strict=True):
        for sample in verdict.samples:
            if sample.scores is None:
                assert sample.expected is None
                continue
            assert sample.expected is not None
            prompt = judge.prompts.render(row, sample.order)
            shown = [sample.expected[i] for i in sample.order]
            assert shown == pytest.approx(by_hand(theirs, judge, prompt, sample), abs=2e-3)
            seen |= {judge.tokenizer.token_bytes[token] for token in sample.token_ids}
            doubts += sum(
                abs(a - b) > 0.2 for a, b in zip(sample.expected, sample.scores, strict=True)
            )
    assert {b"1", b" 10", b"0", b"7"} <= seen and doubts > 20


def test_forced_scores_have_those_of_the_choices_that_their_form_leaves(
    judge: Judge, theirs: Any
) -> None:
    found = run(judge, world_rows(3), k=4, **(ASKED | {"max_new_tokens": 6}), force_scores=True)
    doubts = 0
    for row, verdict in zip(world_rows(3), found, strict=True):
        for sample in verdict.samples:
            assert sample.forced and sample.expected is not None and sample.scores is not None
            prompt = judge.prompts.render(row, sample.order)
            tokens = prompt + sample.token_ids
            with torch.no_grad():
                logits = theirs(torch.tensor([tokens])).logits[0]
            text = judge.tokenizer.token_bytes
            at = max(i for i, token in enumerate(tokens) if b"{" in text[token]) + 1
            digits = [judge.tokenizer.encode_text(str(digit))[0] for digit in range(10)]
            for score, response in zip(
                [sample.scores[i] for i in sample.order], sample.order, strict=True
            ):
                chances = logits[at - 1, digits[1:]].softmax(0).tolist()
                if score in (1, 10):
                    ends = judge.tokenizer.encode_text("}" if response == sample.order[-1] else ",")
                    goes_on = logits[at, [digits[0], ends[0]]].softmax(0)[0].item()
                    mean = 10 * goes_on + 1 - goes_on
                else:
                    mean = sum(p * s for s, p in enumerate(chances[1:], 2)) / sum(chances[1:])
                assert sample.expected[response] == pytest.approx(mean, abs=2e-3)
                doubts += abs(mean - score) > 0.2
                at += len(judge.tokenizer.encode_text(str(score)))
                at += len(judge.tokenizer.encode_text(", "))
    assert doubts > 10


@needs_cpp
def test_they_change_nothing_that_is_drawn_and_are_the_same_in_any_company(judge: Judge) -> None:
    rows = world_rows(4)
    plain = run(judge, rows, **(ASKED | {"score": "drawn"}))
    together = run(judge, rows, **ASKED)
    alone = run(judge, rows[2:3], **ASKED)[0]
    for drawn, expected in zip(plain, together, strict=True):
        texts = [(s.text, s.scores) for s in drawn.samples]
        assert texts == [(s.text, s.scores) for s in expected.samples]
        assert all(s.expected is None for s in drawn.samples) and drawn.key != expected.key
    assert to_line(alone) == to_line(together[2]) == to_line(run(judge, rows, 3, **ASKED)[2])


@pytest.mark.parametrize("vote", ["sum", "standardised", "borda"])
def test_votes_count_them(judge: Judge, vote: Any) -> None:
    """Sums, means and the best response, for several responses and for one."""
    rows = [*world_rows(3), make_row("1 + 1", ["2"], label=1)]
    for verdict in run(judge, rows, k=5, vote=vote, **ASKED):
        votes = [
            points_of([round(score * UNIT) for score in sample.expected], vote)
            for sample in verdict.samples
            if sample.expected is not None
        ]
        unit = UNIT if vote == "sum" or len(votes[0]) == 1 else 1
        totals = [sum(column) / unit for column in zip(*votes, strict=True)]
        assert verdict.scores == pytest.approx(totals, abs=1e-9)
        means = [total / verdict.votes for total in totals]
        assert verdict.mean_scores == pytest.approx(means, abs=1e-9)
        assert verdict.best == totals.index(max(totals))
        line = json.loads(to_line(verdict))
        assert line["score"] == "expected" and line["scores"] == verdict.scores
        for sample, fields in zip(verdict.samples, line["samples"], strict=True):
            assert fields.get("expected") == (sample.expected and [*sample.expected])


def test_rows_are_decided_by_them(judge: Judge) -> None:
    rows = world_rows(3)
    whole = run(judge, rows, k=16, **ASKED)
    decided = run(judge, rows, k=16, until_decided=0.9, **ASKED)
    for row, full, early in zip(rows, whole, decided, strict=True):
        assert early.k_used is not None
        seen = [s.expected for s in early.samples]
        cycle = min(len(row.responses), 16)
        assert not samples_to_draw(seen, 16, cycle, 0.9, judge.settings)
        assert seen == [s.expected for s in full.samples[: early.k_used]]
    assert any(len(verdict.samples) < 16 for verdict in decided)


def test_responses_that_are_judged_in_parts(judge: Judge) -> None:
    row = make_row("1 + 1", [str(i) for i in range(5)])
    options = ASKED | {"max_new_tokens": 6, "force_scores": True}
    samples = run(judge, [row], k=3, max_shown=2, **options)[0].samples
    assert all(s.expected is not None and len(s.expected) == 5 for s in samples)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "sentencepiece"])
@pytest.mark.parametrize(("low", "high"), [(1, 10), (-2, 13), (0, 100), (7, 12)])
def test_edges_lead_to_every_score(tmp_path: Path, kind: str, low: int, high: int) -> None:
    """By the tokens that the tokenizer writes it in, with a blank before it and without; and only
    the last one is closed, unless what it has said may end there."""
    write_tokenizer(tmp_path, kind)
    tokenizer = Tokenizer(tmp_path)
    edges = number_edges(tokenizer, ScoreRules(low, high))
    known = {
        (prefix, token): (value, is_open)
        for prefix, token, value, is_open in zip(*(x.tolist() for x in edges), strict=True)
    }
    assert len(known) == len(edges.token)
    for score in range(low, high + 1):
        for text in (str(score), f" {score}"):
            said, prefix = "", FIRST
            tokens = tokenizer.encode_text(text)
            for i, token in enumerate(tokens):
                said = (said + tokenizer.token_bytes[token].decode()).strip()
                if not said:
                    continue
                value, is_open = known.pop((prefix, token), (None, None))
                if value is not None:
                    assert value == (0 if said == "-" else int(said))
                    assert is_open or i == len(tokens) - 1
                prefix = MINUS if said == "-" else int(said)
            assert said == str(score)
    assert not known
    with pytest.raises(ValueError, match="0 to 1000 have no expected ones: 1001 of them"):
        number_edges(tokenizer, ScoreRules(0, 1000))


PIECES = [b"Scores: ", b"\\boxed{", b"7", b", ", b"7,", b" 10", b"1", b"0", b"}", b"\n", b"<s>",
          b"{8", b"boxed", b" and "]  # fmt: skip
NONE = math.nan


@pytest.mark.parametrize(
    ("pieces", "expected", "scores", "found"),
    [
        ([0, 1, 2, 3, 2, 8], {2: 6.5, 4: 3.25}, (7, 7), (6500, 3250)),
        ([0, 1, 4, 5, 8], {3: 9.5}, (7, 10), (7000, 9500)),  # a token that holds more
        ([0, 1, 6, 7, 3, 6, 8], {3: 8.0, 6: 2.5}, (10, 1), (8000, 2500)),  # after the next one
        ([0, 1, 2, 8, 9, 0, 1, 5, 8], {2: 1.0, 7: 9.25}, (10,), (9250,)),  # the last box
        ([0, 1, 2, 8, 13, 2, 3], {2: 6.25, 5: 1.0}, (7,), (6250,)),  # not what follows
        ([0, 1, 2, 10, 0, 1, 5, 8], {2: 1.0, 6: 9.75}, (10,), (9750,)),  # after a special token
        ([0, 12, 11, 8], {3: 5.0}, (8,), (5000,)),  # known where it is written on
        ([0, 1, 2, 8], {2: 1.5}, (9,), (9000,)),  # not what was read: the score stands
    ],
)
def test_which_of_a_samples_tokens_are_its_scores(
    pieces: list[int], expected: dict[int, float], scores: tuple[int, ...], found: tuple[int, ...]
) -> None:
    automaton = ScoreAutomaton(PIECES, {10}, ScoreRules())
    read = [expected.get(i, NONE) for i in range(len(pieces))]
    assert expected_scores(automaton, pieces, read, scores) == found


def test_they_are_found_after_an_opening_and_a_nonce() -> None:
    automaton = ScoreAutomaton(PIECES, {10}, ScoreRules(nonce=True))
    read = [6.5, NONE, NONE]
    for nonce, found in ((12, (6500,)), (13, (7000,))):
        opening = b"Scores 12: \\boxed{"
        assert expected_scores(automaton, [2, 8, 9], read, (7,), opening, nonce) == found


def test_what_has_no_box_has_none(judge: Judge) -> None:
    rated = rebuilt(judge, settings=replace(judge.settings, format="rating", stop="eos"))
    with pytest.raises(ValueError, match="format 'rating' has no box"):
        rated.rows([], score="expected")
    with pytest.raises(ValueError, match="score = 'mean' is not drawn or expected"):
        judge.rows([], score="mean")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "verdicts.jsonl"
    words = ["--k", "2", "--temperature", "1", "--score", "expected", "--out", str(out)]
    assert main(words) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(line["score"] == "expected" for line in lines) and len(lines) > 2
    assert any("expected" in sample for line in lines for sample in line["samples"])


def test_a_box_that_the_prompt_opens_is_asked_for_token_probabilities(
    judge: Judge, theirs: Any
) -> None:
    """As the direct template opens it: no word is written before the scores. Each order is judged
    once, nothing is drawn, and every score has the mean that transformers gives."""
    assert read_judge_template(POCKET, "direct").endswith(
        '{{- turn("assistant") -}}\n{{ line }} \\boxed{\n{#- the judgement goes on from here #}\n'
    )
    begun = (
        "Specific Criteria: closing 5, color 3, opening 1\nAnalysis:\n"
        "Response 1: color blue=black no, opening Yes=Yes yes, 1+1=2\n"
        "Response 2: color blue=blue yes, opening Yes=Yes yes, 1+5+3=9\nScores: \\boxed{"
    )
    template = f"{judge.prompts.judge_template.rstrip()}{{{{ turn('assistant') }}}}{begun}"
    direct = rebuilt(judge, judge_template=template)
    options = ASKED | {"k": 2, "temperature": 0.0, "stop": "box", "max_new_tokens": 16}
    rows = [row for row in world_rows(24) if len(row.responses) == 2]
    verdicts = run(direct, rows, **options)
    valid = 0
    for row, verdict in zip(rows, verdicts, strict=True):
        assert {sample.order for sample in verdict.samples} == {(0, 1), (1, 0)}
        for sample in verdict.samples:
            if sample.expected is None:
                continue
            valid += 1
            prompt = direct.prompts.render(row, sample.order)
            assert direct.tokenizer.show(prompt).endswith("\\boxed{")
            assert sample.text.endswith("}") and sample.tokens < 9
            shown = [sample.expected[i] for i in sample.order]
            assert shown == pytest.approx(by_hand(theirs, direct, prompt, sample), abs=2e-3)
    assert valid > 5
    assert list(map(to_line, run(direct, rows, **options))) == list(map(to_line, verdicts))
