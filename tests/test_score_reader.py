"""Samples out of generated tokens: the order undone, parts joined, other formats read."""

import pytest
import torch
from transformers import Qwen3Config

from engine.generate import Generation
from engine.judge import Judge
from engine.request import make_row
from engine.sample import POCKET
from engine.score_reader import ScoreReader
from engine.settings import JudgeSettings
from kernels.score_grammar import Reason, ScoreRules, parse_scores
from models.tokenizer import Tokenizer
from tests.oracles.score_texts import outcomes, read


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(POCKET)


def reader(judge: Judge, settings: JudgeSettings) -> ScoreReader:
    return ScoreReader(judge.tokenizer, settings, judge.model)


def wrote(judge: Judge, text: str, scores: tuple[int, ...] | None = None) -> Generation:
    tokens = judge.tokenizer.encode_text(text)
    reason = Reason.MISSING if scores is None else Reason.VALID
    return Generation(tokens, [-1.0] * len(tokens), [-2.0] * len(tokens), "eos", reason, scores)


def test_another_format_is_read_from_the_text_and_put_in_row_order(judge: Judge) -> None:
    pairwise = reader(judge, JudgeSettings(format="pairwise"))
    orders = [(1, 0), (0, 1), (1, 0)]
    texts = ["so <answer>[[A]]</answer>", "[[A]]", "I cannot tell"]
    samples = pairwise.samples(orders, orders, [wrote(judge, text) for text in texts])
    assert [sample.scores for sample in samples] == [(1, 10), (10, 1), None]
    assert [sample.invalid for sample in samples] == [None, None, "missing"]
    assert [sample.order for sample in samples] == orders
    assert [sample.text for sample in samples] == texts


def test_a_judge_in_another_format_has_no_box_to_stop_at_or_force(judge: Judge) -> None:
    rated = Judge(
        judge.model,
        judge.tokenizer,
        judge_template=judge.prompts.judge_template,
        settings=JudgeSettings(format="rating", score_max=5),
    )
    row = make_row("p", ["a"])
    for options in ({"stop": "box"}, {"force_scores": True}):
        with pytest.raises(ValueError, match="no box to stop at, to force, or"):
            rated.rows([row], **options)
    (verdict,) = rated.rows([row], k=2, max_new_tokens=5)
    assert {s.invalid for s in verdict.samples} == {"truncated"}  # type: ignore[union-attr]


def test_parts_are_joined_and_one_without_scores_leaves_none(judge: Judge) -> None:
    boxed = reader(judge, JudgeSettings())
    orders = [(2, 0, 1), (1, 2, 0)]
    shown = [(2, 0), (1,), (1, 2), (0,)]
    judgements = [
        wrote(judge, "a b", (5, 6)),
        wrote(judge, "c", (7,)),
        wrote(judge, "d", (8, 9)),
        wrote(judge, "e"),
    ]
    first, second = boxed.samples(orders, shown, judgements)
    assert first.scores == (6, 7, 5) and first.text == "a b\n\nc" and first.invalid is None
    assert second.scores is None and second.invalid == "missing"
    assert first.tokens == len(first.token_ids) == len(first.logprobs)
    assert len(boxed.samples(orders, shown, judgements[:3])) == 1  # the second is not whole yet


def test_thinking_counts_as_thinking_where_its_tags_are_special_tokens(
    tmp_path_factory: pytest.TempPathFactory, judge: Judge
) -> None:
    """Any other special token makes the text start anew; these two do not."""
    from tests.tiny import write_tokenizer

    directory = tmp_path_factory.mktemp("think")
    made = write_tokenizer(directory)
    made.add_special_tokens(["<think>", "</think>"])
    made.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer(directory)
    opening = tokenizer.encode_template("<think>")
    assert len(opening) == 1 and opening[0] in tokenizer.special_ids

    class Model:
        config = Qwen3Config(vocab_size=tokenizer.size + 3)
        head_weight = torch.zeros(1)

    rules = ScoreRules()
    automaton = ScoreReader(tokenizer, JudgeSettings(), Model()).automaton(rules)  # type: ignore[arg-type]
    texts = [
        "<think>Scores: \\boxed{1}",
        "<think>Scores: \\boxed{1}</think>Scores: \\boxed{2}",
        "Scores: \\boxed{2}<think>Scores: \\boxed{1}",
    ]
    rows = [tokenizer.encode_template(text) for text in texts]
    found = outcomes(read(automaton, rows, torch.tensor([1, 1, 1])), True)
    assert found == [parse_scores(text.encode(), 1, rules, True) for text in texts]
    assert found[1] == found[2] == (Reason.VALID, (2,))
