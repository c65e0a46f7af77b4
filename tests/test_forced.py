"""Scores that a sample is made to write."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.forced import ForcedScores, ScoreForm
from engine.judge import Judge
from engine.request import make_row
from engine.sample import POCKET
from engine.verdict import RowFailure, Verdict
from kernels.score_grammar import Reason, ScoreRules, parse_scores
from models.tokenizer import Tokenizer
from tests.rows import needs_cpp
from tests.test_judge import drawn, run, world_rows
from tests.tiny import write_tokenizer

FORCED: dict[str, Any] = {"force_scores": True, "temperature": 1.0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(POCKET)


def all_ways(form: ScoreForm, n: int) -> dict[tuple[int, ...], str]:
    """Every way to fill in a form: the scores, and the text that says so."""
    found: dict[tuple[int, ...], str] = {}
    waiting: list[list[int]] = [[]]
    while waiting:
        chosen = waiting.pop()
        scores, written = ForcedScores(form, n), list[int]()
        for token in chosen:
            assert token in scores.choices()
            written += scores.take(token)
        if not scores.is_full:
            waiting += [[*chosen, token] for token in scores.choices()]
            continue
        assert tuple(scores.scores) not in found, "two ways to say the same"
        found[tuple(scores.scores)] = form._tokenizer.decode(written)
    return found


@pytest.mark.parametrize("kind", ["unigram", "bpe", "sentencepiece"])
@pytest.mark.parametrize(("low", "high", "n"), [(1, 10, 2), (-2, 3, 3), (0, 1, 1), (7, 12, 2)])
def test_a_form_has_one_way_to_say_each_score(
    tmp_path: Path, kind: str, low: int, high: int, n: int
) -> None:
    write_tokenizer(tmp_path, kind)
    rules = ScoreRules(low, high)
    form = ScoreForm(Tokenizer(tmp_path), rules)
    found = all_ways(form, n)
    assert set(found) == set(product(range(low, high + 1), repeat=n))
    opening = form._tokenizer.decode(form.opening([]))
    assert opening.endswith("Scores: \\boxed{")
    for scores, text in found.items():
        data = (opening + text).encode()
        assert parse_scores(data, n, rules, True) == (Reason.VALID, scores)
    longest = max(len(form._tokenizer.encode_text(text)) for text in found.values())
    assert form.most_tokens(n) >= len(form.opening([])) + longest


def test_an_opening_ends_thinking_and_shows_the_nonce(judge: Judge) -> None:
    form = ScoreForm(judge.tokenizer, ScoreRules(nonce=True))
    for text, begun, expected in (
        ("a", b"", "\n\nScores 12: \\boxed{"),
        ("<think>a", b"", "\n</think>\n\nScores 12: \\boxed{"),
        ("a", b"<think>\n", "\n</think>\n\nScores 12: \\boxed{"),
        ("a</think>b", b"<think>\n", "\n\nScores 12: \\boxed{"),
    ):
        tokens = form.opening(judge.tokenizer.encode_text(text), begun, "12")
        assert judge.tokenizer.decode(tokens) == expected
    with pytest.raises(ValueError, match="1001 of them, at most 1000"):
        ScoreForm(judge.tokenizer, ScoreRules(0, 1000))


def test_every_sample_votes_and_says_what_is_counted(judge: Judge) -> None:
    """Samples that are cut, in the middle of anything; with them, some that need no help."""
    rules = judge.settings.rules("eos", False)
    rows = world_rows(6)
    for limit in (1, 6, 110):
        verdicts = run(judge, rows, force_scores=True, max_new_tokens=limit)
        for row, verdict in zip(rows, verdicts, strict=True):
            assert verdict.valid == verdict.votes == 4
            for sample in verdict.samples:
                shown = tuple(sample.scores[i] for i in sample.order)  # type: ignore[index]
                text = sample.text.encode()
                assert parse_scores(text, len(row.responses), rules, True) == (Reason.VALID, shown)
                assert len(sample.token_ids) == len(sample.logprobs) == sample.tokens
                assert sample.forced == (sample.finish == "length")
    assert {s.forced for v in verdicts for s in v.samples} == {True, False}


@needs_cpp
def test_forced_scores_are_the_same_in_any_company(judge: Judge) -> None:
    rows = world_rows(9)
    together = [drawn(verdict) for verdict in run(judge, rows, **FORCED)]
    assert [drawn(verdict) for verdict in run(judge, rows, max_batch=3, **FORCED)] == together
    assert drawn(run(judge, [rows[4]], **FORCED)[0]) == together[4]
    assert drawn(run(judge, [rows[4]], k=9, **FORCED)[0], 4) == together[4]


def test_a_small_cache_changes_nothing(judge: Judge) -> None:
    """Where segments that a forced sample needs have to make room for others."""
    rows = world_rows(6)
    wide = run(judge, rows, **FORCED)
    small = Judge(
        judge.model,
        judge.tokenizer,
        judge_template=judge.prompts.judge_template,
        settings=judge.settings,
        max_batch=4,
        cache_bytes=1_500_000,
    )
    narrow = [*small.rows(rows, k=4, **FORCED)]
    assert [v.scores for v in narrow if isinstance(v, Verdict)] == [v.scores for v in wide]


def test_a_form_costs_its_own_tokens_and_no_prompt_again(judge: Judge) -> None:
    fresh = Judge(
        judge.model, judge.tokenizer, judge_template=judge.prompts.judge_template,
        settings=judge.settings,
    )  # fmt: skip
    (verdict,) = fresh.rows(world_rows(1), k=4, **FORCED)
    assert isinstance(verdict, Verdict) and verdict.tree_tokens > verdict.decode_tokens / 2
    assert fresh.usage.prefill_tokens <= verdict.tree_tokens + verdict.decode_tokens


def test_greedy_scores_are_the_likeliest_that_the_form_allows(judge: Judge) -> None:
    """Against transformers, which runs the whole text for every token that is chosen."""
    theirs = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    form = ScoreForm(judge.tokenizer, judge.settings.rules("eos", False))
    for row, verdict in zip(
        world_rows(3), run(judge, world_rows(3), **(FORCED | {"temperature": 0.0})), strict=True
    ):
        for sample in verdict.samples[:2]:
            prompt = judge.prompts.render(row, sample.order)
            tokens = sample.token_ids[:6]
            tokens += form.opening(tokens)
            scores = ForcedScores(form, len(row.responses))
            while not scores.is_full:
                with torch.no_grad():
                    logits = theirs(torch.tensor([prompt + tokens])).logits[0, -1]
                choices = scores.choices()
                tokens += scores.take(choices[int(logits[choices].argmax())])
            assert sample.token_ids == tokens
            assert [sample.scores[i] for i in sample.order] == scores.scores  # type: ignore[index]


def test_the_summary_and_the_line_say_what_was_forced(judge: Judge) -> None:
    from engine.summary import Tally
    from engine.verdict import to_line

    tally = Tally()
    for verdict in run(judge, world_rows(2), **FORCED):
        tally.add(verdict)
        assert b'"forced":true' in to_line(verdict)
    assert tally.facts()["forced"] == 8
    plain = run(judge, world_rows(1), max_new_tokens=300)[0]
    assert b"forced" not in to_line(plain)


def test_a_prompt_that_leaves_no_room_for_a_form_says_so(judge: Judge) -> None:
    """It would fit without one."""
    context = judge.model.config.max_position_embeddings
    row = make_row("p", ["a", "b"])
    empty = len(judge.prompts.render(row, [0, 1]))
    one = len(judge.tokenizer.encode_text("word word ")) - len(judge.tokenizer.encode_text("word "))
    words = "word " * ((context - 6 - empty) // one)
    (failure,) = run(judge, [make_row(words, ["a", "b"])], k=1, max_new_tokens=1, force_scores=True)
    assert isinstance(failure, RowFailure)
    assert f"context is {context}, " in failure.error and "kept for forced scores" in failure.error
