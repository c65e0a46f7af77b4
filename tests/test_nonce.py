"""The nonce in the anchor line: no response can have written it, no line without it counts."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.judge import Judge
from engine.orders import draw_nonce
from engine.request import make_row
from engine.sample import POCKET
from engine.settings import JudgeSettings
from engine.verdict import Verdict
from kernels.score_grammar import Reason, parse_scores
from tests.test_judge import world_rows

TEMPLATE = """{% for m in messages %}{{ m.content }}
{% endfor %}{% for r in responses %}{{ r }}
{% endfor %}Write {{ anchor }}{{ turn("assistant") }}"""


@given(st.lists(st.text(max_size=8), min_size=1, max_size=3), st.integers(0, 3))
def test_it_is_six_digits_of_the_row_and_the_seed(responses: list[str], seed: int) -> None:
    row = make_row("p", responses)
    nonce = draw_nonce(row, seed)
    assert len(nonce) == 6 and nonce.isdigit() and nonce[0] != "0"
    assert nonce == draw_nonce(make_row("p", responses), seed)
    others = {draw_nonce(row, seed + i) for i in range(1, 9)}
    others |= {draw_nonce(make_row(f"p{i}", responses), seed) for i in range(8)}
    assert len(others - {nonce}) > 10


def test_it_stands_in_no_text_of_the_row() -> None:
    """Texts that hold every hundredth number of six digits, wherever a row has texts."""
    numbers = " ".join(f"{i:02}{j:02}{i:02}"[:6] for i, j in product(range(100), repeat=2))
    everything = "".join(f"{i:06}" for i in range(100_000, 250_000))
    for place in ("prompt", "response", "reference", "principles"):
        text = {"prompt": "p", "response": "r", "reference": "f", "principles": "c"}
        for seed in range(4):
            text[place] = f"{numbers} {everything}"
            row = make_row(
                text["prompt"], [text["response"], "x"],
                reference=text["reference"], principles=text["principles"],
            )  # fmt: skip
            assert draw_nonce(row, seed) not in text[place]
    full = "".join(f"{i:06}" for i in range(100_000, 1_000_000))
    with pytest.raises(ValueError, match="holds every nonce"):
        draw_nonce(make_row("p", [full]), 0)


@pytest.fixture(scope="module")
def judge() -> Judge:
    """The pocket model, whose judgements have no nonce, begun with the anchor or not."""
    pocket = Judge.load(POCKET)
    return Judge(
        pocket.model,
        pocket.tokenizer,
        judge_template=TEMPLATE + "{{ anchor }} ",
        settings=JudgeSettings(anchor_nonce=None),
    )


def test_what_a_judgement_writes_without_it_is_not_read(judge: Judge) -> None:
    row = world_rows(1)[0]
    options = {"k": 6, "temperature": 1.0, "max_new_tokens": 120, "seed": 3}
    without_prefill = TEMPLATE.replace('{{ turn("assistant") }}', "")
    bare = Judge(
        judge.model, judge.tokenizer, judge_template=without_prefill,
        settings=JudgeSettings(anchor_nonce=True),
    )  # fmt: skip
    assert judge.prompts.uses_nonce and bare.prompts.uses_nonce
    (verdict,) = bare.rows([row], **options)  # type: ignore[arg-type]
    assert isinstance(verdict, Verdict) and verdict.valid == 0
    assert any("Scores: \\boxed{" in sample.text for sample in verdict.samples)
    (forced,) = bare.rows([row], force_scores=True, **options)  # type: ignore[arg-type]
    assert isinstance(forced, Verdict) and forced.valid == 6
    line = f"Scores {draw_nonce(row, 3)}: \\boxed{{"
    assert all(sample.text.count(line) == 1 for sample in forced.samples)


def test_a_prompt_that_ends_in_it_is_read_on(judge: Judge) -> None:
    """The template begins the answer with the anchor line, which the text goes on with."""
    row = world_rows(1)[0]
    (verdict,) = judge.rows([row], k=6, temperature=1.0, max_new_tokens=120)
    assert isinstance(verdict, Verdict) and verdict.valid > 0
    nonce = draw_nonce(row, 0)
    rules = judge.settings.rules("eos", True)
    for sample in verdict.samples:
        ended, n = sample.finish == "eos", len(row.responses)
        text = f"Scores {nonce}: {sample.text}".encode()
        reason, shown = parse_scores(text, n, rules, ended, int(nonce))
        assert sample.invalid == (None if reason == Reason.VALID else reason.label)
        assert sample.scores is None or tuple(sample.scores[i] for i in sample.order) == shown
    prompt = judge.show(row.messages, row.responses)
    assert prompt.endswith(f"Scores {draw_nonce(make_row(row.messages, row.responses), 0)}: ")
