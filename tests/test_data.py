"""Batches of trajectories: addressed by number, from the world and from files."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.prompt import PromptBuilder
from engine.request import make_row
from engine.settings import JudgeSettings
from kernels.score_grammar import Reason, ScoreRules, parse_scores
from models.tokenizer import Tokenizer
from tests.tiny import write_tokenizer
from train.judgements import read_judgements
from train.sources import conversation_of
from train.trajectories import Trajectory, file_batches, labelled_trajectory_rows
from train.world.cases import CRITERIA, cases
from train.world.pocket import JUDGE_TEMPLATE
from train.world.rows import world_batches

END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return PromptBuilder(Tokenizer(directory), JUDGE_TEMPLATE, JudgeSettings())


def test_world_batches_are_a_function_of_seed_and_number(builder: PromptBuilder) -> None:
    batch = world_batches(builder, END, 3, seed=7)
    ahead = [batch(number) for number in range(4)]
    again = world_batches(builder, END, 3, seed=7)
    assert again(3) == ahead[3]
    assert again(1) == ahead[1]
    assert len({json.dumps(t.prompt) for b in ahead for t in b}) == 12
    assert world_batches(builder, END, 3, seed=8)(0) != ahead[0]
    assert all(len(b) == 3 for b in ahead)


def test_world_trajectories_show_a_train_row_and_end_once(builder: PromptBuilder) -> None:
    (first, *_) = world_batches(builder, END, 4, seed=7)(2)
    case = next(cases("sft-7-2", "train"))
    row = case.row()
    expected = builder.render(make_row(row["prompt"], row["responses"]), range(len(case.responses)))
    assert flat(first) == expected
    assert first.completion[-1] == END
    assert builder.tokenizer.control_ids.isdisjoint(first.completion[:-1])


def test_the_teacher_uses_what_the_prompt_gives_it(builder: PromptBuilder) -> None:
    """Principles are followed, references are right, hints name the winner; shares as stated."""
    seen: Counter[str] = Counter()
    batch = world_batches(builder, END, 100, seed=0)
    for trajectory in (t for number in range(8) for t in batch(number)):
        prompt = builder.tokenizer.decode(flat(trajectory))
        text = builder.tokenizer.decode(trajectory.completion)
        responses = prompt.count("\nResponse ")
        reason, scores = parse_scores(text.encode(), responses, ScoreRules(first=True), True)
        assert reason == Reason.VALID
        listed = text.split("\n")[0].removeprefix("Specific Criteria: ")
        assert len({item.split()[0] for item in listed.split(", ")} & set(CRITERIA)) == 3
        if "\nPrinciples: " in prompt:
            seen["principles"] += 1
            assert f"\nPrinciples: {listed}\n" in prompt
        if "\nReference: " in prompt:
            seen["reference"] += 1
            reference = prompt.split("\nReference: ")[1].split("\n")[0]
            if "\nWork: " in text:
                work = text.split("\nWork: ")[1].split("\nAnalysis:")[0]
                assert work.split(" so ")[-1] == reference
        if "\nHint: " in prompt:
            seen["hint"] += 1
            best = int(prompt.split("\nHint: The best response is: Response ")[1].split("\n")[0])
            assert scores.count(max(scores)) == 1
            assert scores[best - 1] == max(scores)
    # 800 rows: 80 +- 5 standard deviations, and one in sixty.
    assert 38 < seen["principles"] < 122 and 38 < seen["reference"] < 122
    assert 0 < seen["hint"] < 32


def flat(trajectory: Trajectory) -> list[int]:
    """The prompt as one list of tokens."""
    return [token for segment in trajectory.prompt for token in segment]


def write_lines(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def line(number: int, **more: Any) -> dict[str, Any]:
    judgement = f"Scores: \\boxed{{{number}, 1}}"
    return {"prompt": f"p{number}", "responses": ["a", "b"], "judgement": judgement, **more}


def test_file_trajectories_follow_the_line(builder: PromptBuilder, tmp_path: Path) -> None:
    full = line(
        1, order=[1, 0], hint="look", reference="ref", principles="calm 5", id="x", label=0,
        meta={"any": "thing"},
    )  # fmt: skip
    (shown,) = file_batches(builder, {END}, write_lines(tmp_path / "a", full), 1, 0, 4096)(0)
    row = make_row("p1", ["a", "b"], reference="ref", principles="calm 5")
    assert flat(shown) == builder.render(row, [1, 0], "look")
    assert shown.completion == [*builder.tokenizer.encode_text("Scores: \\boxed{1, 1}"), END]
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "judgement": "<|im_end|>"}
    (shown,) = file_batches(builder, {END}, write_lines(tmp_path / "b", pair), 1, 0, 4096)(0)
    assert flat(shown) == builder.render(make_row("p", ["c", "r"]), [0, 1])
    assert shown.completion.count(END) == 1  # the text of a control token is only text
    thought = line(1, judgement="<think>7 < 8</think><|im_start|>")
    (shown,) = file_batches(builder, {END}, write_lines(tmp_path / "c", thought), 1, 0, 4096)(0)
    texts = [builder.tokenizer.encode_text(text) for text in ("7 < 8", "<|im_start|>")]
    assert shown.completion == [3, *texts[0], 4, *texts[1], END]  # but for <think> and </think>


def test_every_epoch_holds_each_line_once_in_a_new_order(
    builder: PromptBuilder, tmp_path: Path
) -> None:
    lines = [line(number) for number in range(7)]
    path = write_lines(tmp_path / "a", *lines)
    batch = file_batches(builder, {END}, path, 3, seed=5, longest=4096)
    stream = [t for number in range(14) for t in batch(number)]  # 42 trajectories, 6 epochs
    alone = file_batches(builder, {END}, path, 7, seed=5, longest=4096)(0)
    epochs = [[alone.index(t) for t in stream[7 * e : 7 * e + 7]] for e in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert file_batches(builder, {END}, path, 3, seed=5, longest=4096)(9) == batch(9)
    assert [file_batches(builder, {END}, path, 3, seed=6, longest=4096)(n) for n in range(3)] != [
        batch(n) for n in range(3)
    ]


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"prompt": "p", "responses": ["a"]}, "judgement"),
        (line(1, judgement=None), "judgement"),
        (line(1, judgement="\ud800"), "surrogate"),
        (line(1, order=[0]), "order"),
        (line(1, order=[0, 0]), "order"),
        (line(1, order=[1, 2]), "order"),
        (line(1, order="10"), "order"),
        (line(1, order=[False, True]), "order"),
        (line(1, hint=3), "hint"),
        (line(1, responses=[]), "responses"),
        (line(1, responses=["a", None]), "responses"),
        (line(1, extra=1), "extra"),
        (line(1, label=float("nan")), "NaN"),
        ({"responses": ["a"], "judgement": "j"}, "prompt"),
        ([1], "object"),
        ("{", "not JSON"),
        (line(1, messages=[]), "judgement beside a conversation"),
        ('{"judgement": "a", "judgement": "b"}', "the key 'judgement' is repeated"),
    ],
    ids=str,
)
def test_a_bad_line_is_named(
    builder: PromptBuilder, tmp_path: Path, bad: object, message: str
) -> None:
    path = write_lines(tmp_path / "bad.jsonl", line(0), bad, line(2))
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: .*{message}"):
        file_batches(builder, {END}, path, 1, 0, 4096)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line(1), "does not say whether its judgement is right"),
        (line(1, right=2), "right"),
        (line(1, right=True, order=[0]), "order"),
        ({"messages": []}, "judgement"),
        (b'{"right": true, "right": false}', "the key 'right' is repeated"),
        (b"\xc3", "not UTF-8: unexpected end of data at byte 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_line_of_judgements_is_named(tmp_path: Path, bad: Any, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    text = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    path.write_bytes(json.dumps(line(0, right=True)).encode() + b"\n\n" + text)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: .*{message}"):
        read_judgements(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.jsonl holds no judgement"):
        read_judgements(path)


def test_lines_of_a_conversation_are_held_out(builder: PromptBuilder, tmp_path: Path) -> None:
    """All judgements of its rows, whatever their order and responses."""
    chat = {"messages": [{"role": "user", "content": "p0"}, {"role": "assistant", "content": "a"}]}
    again = line(0, order=[1, 0], label=1)
    other = line(0, responses=["c", "d"], label=[3, 2])
    tied, bare = line(7, label="tie"), line(8)
    path = write_lines(tmp_path / "a", line(0, label=1), line(1, label=0), again, other, chat, tied,
                       bare)  # fmt: skip
    rows = labelled_trajectory_rows(path)
    assert [(row.messages[0].content, row.responses) for row in rows] == [
        ("p0", ("a", "b")), ("p1", ("a", "b")), ("p0", ("c", "d"))
    ]  # fmt: skip
    held_out = {conversation_of(rows[0])}
    assert held_out == {conversation_of(rows[2])} != {conversation_of(rows[1])}
    kept = file_batches(builder, {END}, path, 4, 0, 4096, held_out)(0)
    names = {"line 2", "line 5 messages[1]", "line 6", "line 7"}
    assert {each.name for each in kept} == names
    all_held = {conversation_of(row) for row in rows[:2]}
    with pytest.raises(ValueError, match="no trajectory"):
        file_batches(builder, {END}, write_lines(path, line(0), line(1)), 1, 0, 4096, all_held)


def test_files_are_read_as_those_of_rows(builder: PromptBuilder, tmp_path: Path) -> None:
    """Blank lines are passed over and counted; arrays and gzip are read, damage is told."""
    lines = [json.dumps(line(number)).encode() for number in range(2)]
    path = tmp_path / "any"

    def read() -> list[Trajectory]:
        return file_batches(builder, {END}, path, 2, 0, 4096)(0)

    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n" + lines[1])
    found = {each.name: each for each in read()}
    assert set(found) == {"line 1", "line 3"}
    packed = gzip.compress(b"\n".join(lines))
    for data in (b"[" + b",".join(lines) + b"]", packed):
        path.write_bytes(data)
        again = {each.name: each for each in read()}
        assert again["line 1"] == found["line 1"]
        assert flat(again["line 2"]) == flat(found["line 3"])
    path.write_bytes(packed[:-9])
    with pytest.raises(OSError, match="any is damaged"):
        read()
    path.write_bytes(lines[0] + b"\n" + lines[1].replace(b"p1", b"\xff"))
    with pytest.raises(ValueError, match="any, line 2: not UTF-8: invalid start byte at byte 12 "):
        read()
    for name in ("rows.gz", "rows.jsonl"):  # what a file is is seen in it, not in its name
        path = tmp_path / name
        path.write_bytes(lines[0])
        assert [each.name for each in read()] == ["line 1"] * 2
        path.write_bytes(b"PK\x03\x04\x8c")
        with pytest.raises(ValueError, match=f"{name}, line 1: not UTF-8"):
            read()


def test_an_empty_file_is_refused(builder: PromptBuilder, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="no trajectory"):
        file_batches(builder, {END}, tmp_path / "empty", 1, 0, 4096)


def test_a_line_beyond_the_context_is_named_at_once(tmp_path: Path, builder: PromptBuilder) -> None:
    path = write_lines(tmp_path / "long", line(0), line(1) | {"judgement": "w " * 300})
    (first,) = file_batches(builder, {END}, write_lines(tmp_path / "a", line(0)), 1, 0, 4096)(0)
    tokens = sum(map(len, first.prompt)) + len(first.completion)
    with pytest.raises(ValueError, match=rf"long, line 2: it has \d+ tokens, the context {tokens}"):
        file_batches(builder, {END}, path, 1, 0, tokens)
