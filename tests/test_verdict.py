"""engine/verdict.py: the line of a verdict, byte for byte; agreement with labels; keys of lines."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine.key import MODEL_FILES, line_key, model_fingerprint
from engine.request import BadRow, make_row
from engine.verdict import RowFailure, Sample, Verdict, is_as_written, to_line

VALID = Sample(
    order=(1, 0),
    text="Scores: \\boxed{7, 2} é\u2028",
    scores=(2, 7),
    invalid=None,
    meta=None,
    tokens=3,
    finish="box",
    token_ids=[1, 2, 3],
    logprobs=[-0.5] * 3,
    sampling_logprobs=[-0.25] * 3,
)
INVALID = replace(VALID, order=(0, 1), text='"\n\x00', scores=None, invalid="missing", finish="eos")
VERDICT = Verdict(
    id="r1",
    key="k1",
    best=1,
    scores=[2, 7],
    mean_scores=[2.0, 0.1 + 0.2],
    tie=False,
    k=2,
    valid=1,
    votes=1,
    samples=[VALID, INVALID],
    prompt_tokens=40,
    tree_tokens=30,
    decode_tokens=6,
)


def unchecked(outcome: Verdict | RowFailure) -> bytes:
    """The line of an outcome without its `check`, which fits the rest."""
    line = to_line(outcome)
    assert is_as_written(line)
    record, _, check = line.rpartition(b',"check":"')
    assert check.decode() == hashlib.sha256(record + b"}").hexdigest()[:16] + '"}\n'
    return record + b"}\n"


def test_the_line_of_a_verdict() -> None:
    expected = (
        '{"id":"r1","key":"k1","best":1,"scores":[2,7],"mean_scores":[2.0,0.30000000000000004],'
        '"tie":false,"k":2,"valid":1,"votes":1,"samples":['
        '{"order":[1,0],"text":"Scores: \\\\boxed{7, 2} é\u2028","scores":[2,7],"invalid":null,'
        '"meta":null,"tokens":3,"finish":"box"},'
        '{"order":[0,1],"text":"\\"\\n\\u0000","scores":null,"invalid":"missing",'
        '"meta":null,"tokens":3,"finish":"eos"}],'
        '"usage":{"prompt_tokens":40,"tree_tokens":30,"decode_tokens":6}}\n'
    )
    assert unchecked(VERDICT) == expected.encode("utf-8")


def test_optional_fields_of_a_verdict() -> None:
    verdict = replace(VERDICT, label=(0.5, 1.0), correct=False, row_meta={"b": None, "a": [1]})
    fields = json.loads(to_line(verdict))
    assert list(fields)[-4:] == ["label", "correct", "row_meta", "check"]
    assert (fields["label"], fields["correct"]) == ([0.5, 1.0], False)
    assert list(fields["row_meta"]) == ["b", "a"]
    assert json.loads(to_line(replace(VERDICT, row_meta=0)))["row_meta"] == 0
    guided = replace(VERDICT, correct=True, unguided_best=0, unguided_correct=False)
    told = ["correct", "unguided_best", "unguided_correct", "check"]
    assert list(json.loads(to_line(guided)))[-4:] == told
    early = json.loads(to_line(replace(VERDICT, k=32, k_used=2, label=1)))
    assert list(early)[-4:] == ["usage", "k_used", "label", "check"]
    assert (early["k"], early["k_used"], len(early["samples"])) == (32, 2, 2)


def test_no_vote_is_null_and_never_zero() -> None:
    for scores, means in (([0, 0], [0.0, 0.0]), (None, None)):
        verdict = replace(VERDICT, best=None, scores=scores, mean_scores=means, votes=0, valid=0)
        fields = json.loads(to_line(verdict))
        assert fields["best"] is fields["scores"] is fields["mean_scores"] is None
        assert (fields["votes"], fields["valid"], fields["k"]) == (0, 0, 2)


def test_meta_scores() -> None:
    samples = [replace(VALID, meta=0.1), replace(VALID, meta=float("nan"))]
    fields = json.loads(to_line(replace(VERDICT, samples=samples)))
    assert [sample["meta"] for sample in fields["samples"]] == [0.1, None]


def test_the_line_of_a_failure() -> None:
    failure = RowFailure(id=None, line=3, key="k", error="not JSON: é")
    assert unchecked(failure) == '{"line":3,"key":"k","error":"not JSON: é"}\n'.encode()
    failure = RowFailure(id="x", line=3, key="k", error="e")
    assert unchecked(failure) == b'{"id":"x","line":3,"key":"k","error":"e"}\n'
    assert unchecked(replace(failure, line=None, key=None)) == b'{"id":"x","error":"e"}\n'


@given(st.data())
def test_a_line_that_is_not_as_it_was_written(data: st.DataObject) -> None:
    line = to_line(VERDICT)
    start = data.draw(st.integers(0, len(line) - 1))
    end = data.draw(st.integers(start, len(line)))
    changed = line[:start] + data.draw(st.binary(max_size=3)) + line[end:]
    assert is_as_written(changed) == (changed == line)


def test_the_engine_names_what_its_callers_need() -> None:
    given = (engine.RowFailure, engine.Sample, engine.Verdict, engine.to_line, engine.make_row)
    assert given == (RowFailure, Sample, Verdict, to_line, make_row)
    assert all(hasattr(engine, name) for name in engine.__all__)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False, width=64))
def test_a_line_is_one_line_and_reads_back(text: str, number: float) -> None:
    if number in (float("inf"), float("-inf")):
        number = 0.0
    verdict = replace(VERDICT, id=text, mean_scores=[number, 0.0], row_meta={text: text})
    line = to_line(verdict)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    fields = json.loads(line)
    assert fields["id"] == text and fields["row_meta"] == {text: text}
    assert fields["mean_scores"][0] == number


# Labels


# Keys

OPTIONS: dict[str, str | int | float | bool | None] = {
    "k": 8, "temperature": 0.5, "template": "ab", "max_orders": None, "greedy": False,
}  # fmt: skip


def test_a_key_changes_with_everything_it_covers() -> None:
    row = make_row("p", ["a", "b"])
    keys = [
        line_key(row, OPTIONS, "model"),
        line_key(make_row("p", ["a", "c"]), OPTIONS, "model"),
        line_key(make_row("p", ["a", "b"], meta=1), OPTIONS, "model"),
        line_key(row, OPTIONS, "model 2"),
        line_key(row, {}, "model"),
        *(line_key(row, OPTIONS | {name: "other"}, "model") for name in OPTIONS),
        line_key(row, OPTIONS | {"new": None}, "model"),
        line_key(BadRow("id", 1, "error", "digest"), OPTIONS, "model"),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 and int(key, 16) >= 0 for key in keys)


def test_a_key_does_not_change_with_spelling() -> None:
    row = make_row("p", ["a", "b"])
    key = line_key(row, OPTIONS, "model")
    assert line_key(row, dict(reversed(OPTIONS.items())), "model") == key
    assert line_key(row, OPTIONS | {"k": 8.0}, "model") == key
    assert line_key(row, OPTIONS | {"greedy": 0}, "model") != key


def test_a_key_needs_finite_options() -> None:
    with pytest.raises(ValueError, match="temperature = nan"):
        line_key(make_row("p", ["a"]), {"temperature": float("nan")}, "model")


def test_every_file_that_is_read_is_in_the_fingerprint(tmp_path: Path) -> None:
    """The index too, which decides which weights are read."""
    found = set()
    for name in (*MODEL_FILES, "a.safetensors", "b.safetensors"):
        for content in ("one", "two"):
            (tmp_path / name).write_text(content)
            found.add(model_fingerprint(tmp_path))
    assert len(found) == 2 * (len(MODEL_FILES) + 2)
    (tmp_path / "notes.txt").write_text("not read")
    assert model_fingerprint(tmp_path) in found
