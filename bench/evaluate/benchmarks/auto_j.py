"""Auto-J's pairwise test set (GAIR-NLP/auto-j, arXiv 2310.05470): the better of two answers, or a
tie, in 58 scenarios."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, RowScores, Rule, Total
from bench.evaluate.files import Record, one_of, read_items, records
from bench.evaluate.rules import best_is_drawn, has_one_best, pair_or_tie
from engine.request import make_row

GROUPS = {
    "Summarization": "post_summarization text_summarization note_summarization",
    "Exam Questions": "math_reasoning solving_exam_question_with_math"
    " solving_exam_question_without_math",
    "Code": "code_simplification code_generation explaining_code code_correction_rewriting"
    " code_to_code_translation",
    "Rewriting": "text_simplification language_polishing instructional_rewriting text_correction"
    " paraphrasing",
    "Creative Writing": "writing_song_lyrics writing_social_media_post writing_blog_post"
    " writing_personal_essay creative_writing writing_advertisement writing_marketing_materials"
    " writing_presentation_script counterfactual",
    "Functional Writing": "writing_product_description writing_job_application"
    " writing_news_article writing_biography writing_email writing_legal_document"
    " writing_technical_document writing_scientific_paper functional_writing"
    " writing_cooking_recipe",
    "General Communication": "asking_how_to_question open_question analyzing_general"
    " explaining_general seeking_advice recommendation value_judgement verifying_fact chitchat"
    " roleplay planning brainstorming",
    "NLP Tasks": "ranking text_to_text_translation data_analysis classification_identification"
    " title_generation question_generation reading_comprehension keywords_extraction"
    " information_extraction topic_modeling others",
}
GROUP_OF = {scenario: group for group, names in GROUPS.items() for scenario in names.split()}
GOLD = {"0": 1, "1": -1, "2": 0}  # the sign of the first response's lead
LABELS: dict[int, int | str] = {1: 0, -1: 1, 0: "tie"}


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{scenario, prompt, "response 1", "response 2", label: 0 or 1, the better one, 2 a tie}. A
    subset for each group of scenarios. Of a folder only the English test set."""
    pairs = records(path, only=lambda name: PurePath(name).name == "testdata_pairwise.jsonl")
    return read_items(pairs, _item)


def _item(record: Record) -> Item:
    fields = record.fields
    gold = one_of(fields["label"], GOLD)
    row = make_row(
        fields["prompt"],
        [fields["response 1"], fields["response 2"]],
        id=f"{PurePath(record.source).stem}-{record.line}",
        label=LABELS[gold],
    )
    return Item(row.id, one_of(fields["scenario"], GROUP_OF), (row,), {"gold": gold})


def _verdicts(scores: RowScores) -> np.ndarray:
    """(2, S): of each order the sign of the first response's lead, NaN without a vote."""
    return np.sign(scores.by_first[:, :, 0] - scores.by_first[:, :, 1])


def _agreement(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    return (_verdicts(scores[0]) == item.facts["gold"]).all(0).astype(float)


def _consistency(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    first, second = _verdicts(scores[0])
    return (first == second).astype(float)


TOTAL = Total(over="items")
BENCHMARK = Benchmark(
    "auto_j",
    "Auto-J pairwise",
    "GAIR-NLP/auto-j",
    read,
    (
        Rule(
            "official",
            "in each of both orders the label, also of a tie",
            _agreement,
            TOTAL,
            both_orders=True,
        ),
        Rule(
            "consistency", "the same verdict in both orders", _consistency, TOTAL, both_orders=True
        ),
        Rule("ties", "the vote of both orders is the label, also of a tie", pair_or_tie, TOTAL),
        Rule(
            "vote",
            "of pairs with a better response: the vote is right; a tie is drawn",
            best_is_drawn,
            TOTAL,
            has_one_best,
        ),
    ),
)
