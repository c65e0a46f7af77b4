"""Rejective fine-tuning: what is kept, what the file says, and runs that are killed and resumed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.command import with_values
from engine.judge import Judge
from engine.request import BadRow, Row, make_row
from engine.verdict import Sample, Verdict
from models import load
from models.tokenizer import Tokenizer
from tests.args import args_of
from tests.tiny import write_tokenizer
from train import rejection, rft
from train.chat import encode_said
from train.directory import RunDirectory
from train.judgements import read_judgements
from train.rft import Args
from train.trajectories import file_batches
from train.world import BASE

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 10
LONGEST = 230  # tokens that a judgement of the world may take, but for some of four responses


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(BASE, dtype=torch.float32)


@pytest.fixture
def args(tmp_path: Path) -> Args:
    return args_of(Args,
        out=tmp_path / "out", rows=ROWS, max_new_tokens=LONGEST, chunk_rows=4, steps=2,
        step_rows=3, warmup=1, log_every=1, seed=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Args, dict[str, bytes]]:
    """A run of sampling that nobody disturbs, and its files."""
    out = tmp_path_factory.mktemp("whole")
    args = args_of(Args, out=out, rows=ROWS, max_new_tokens=LONGEST, seed=3)
    rft.sample(args)
    return args, files(out)


def files(out: Path) -> dict[str, bytes]:
    names = ("trajectories.jsonl", "judgements.jsonl", "progress.jsonl", "counts.json")
    return {name: (out / name).read_bytes() for name in names}


def progress(out: Path) -> list[dict[str, Any]]:
    """The rows' lines of progress."""
    return [json.loads(line) for line in (out / "progress.jsonl").read_bytes().splitlines()[1:]]


# -- what is kept ----------------------------------------------------------------------------------

TOKENIZER = Tokenizer(BASE)
TEXT = TOKENIZER.encode_text("Scores: 1")
CONTROL = min(TOKENIZER.control_ids)
BROKEN = next(i for i, b in enumerate(TOKENIZER.token_bytes) if b[:1] >= b"\xf0" and len(b) == 1)
BODIES = {"text": TEXT, "control": [*TEXT, CONTROL], "broken": [BROKEN, *TEXT]}


def fabricated(
    scores: tuple[int, ...] | None, finish: Literal["eos", "length"], body: str
) -> Sample:
    ids = [*BODIES[body], CONTROL]
    text = TOKENIZER.decode(ids)
    return Sample((), text, scores, None, None, len(ids), finish, ids, [], [])


def samples_of(n: int, size: int) -> st.SearchStrategy[list[Any]]:
    scores = st.none() | st.tuples(*[st.integers(4, 7)] * n)
    body = st.sampled_from(["text", "text", "text", "control", "broken"])
    ends: list[Literal["eos", "length"]] = ["eos", "eos", "eos", "length"]
    one = st.tuples(scores, st.sampled_from(ends), body)
    return st.lists(one, min_size=size, max_size=size)


@st.composite
def rows_of_samples(draw: st.DrawFn) -> tuple[Any, list[Any]]:
    n = draw(st.integers(1, 4))
    label: Any = draw(st.integers(0, max(n - 1, 1)))
    samples = draw(samples_of(n, draw(st.integers(1, 4))))
    if n > 1 and draw(st.booleans()):  # gold scores, and often judgements that agree
        label = [0.5 if i == label else 0.1 for i in range(n)]
    if draw(st.booleans()):
        best = label.index(0.5) if isinstance(label, list) else label
        good = (7 * best + 2,) if n == 1 else tuple(9 if i == best else 3 for i in range(n))
        samples = [(good, *rest) if draw(st.integers(0, 4)) else (scores, *rest)
                   for scores, *rest in samples]  # fmt: skip
    return label, samples


def agrees(scores: tuple[float, ...] | None, label: Any) -> bool:
    if scores is None:
        return False
    if len(scores) == 1:
        return label == (1 if scores[0] >= 6 else 0)
    best = label.index(max(label)) if isinstance(label, list) else label
    top = max(scores)
    return scores.index(top) == best and scores.count(top) == 1


def test_rejection_is_that_of_a_plain_oracle() -> None:
    seen: Counter[str] = Counter()

    @given(rows_of_samples(), st.booleans())
    def check(case: tuple[Any, list[Any]], rejects: bool) -> None:
        label, drawn = case
        expected = []
        for scores, finish, body in drawn:
            if finish == "length":
                expected.append("truncated")
            elif scores is None:
                expected.append("invalid")
            elif rejects and not agrees(scores, label):
                expected.append("wrong")
            else:
                expected.append("kept" if body == "text" else "garbled")
        made = [fabricated(*each) for each in drawn]
        rule = rft.Rule(label, 5.5, rejects)
        assert [rft.fate(each, rule, TOKENIZER) for each in made] == expected
        if rejects and all(agrees(scores, label) for scores, _, _ in drawn):
            expected = ["too_easy"] * len(expected)
        assert rft.fates(made, rule, TOKENIZER) == expected
        seen.update(expected)

    check()
    assert set(seen) == set(rejection.FATES)


def test_thinking_is_no_garbage(tmp_path: Path) -> None:
    """Where a model's own tokens of thinking are text; the trajectory has them again."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    text = "<think>a</think>b"
    ids = encode_said(tokenizer, text)
    assert len(tokenizer.control_ids & set(ids)) == 2
    end = tokenizer.encode_template("<|im_end|>")
    for body, expected in ((ids, "kept"), ([*ids, *end], "garbled")):
        sample = Sample((0,), text, (9,), None, None, 9, "eos", [*body, *end], [], [])
        assert rft.fate(sample, rft.Rule(1, 5.5), tokenizer) == expected


# -- the hint --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_hint_names_the_place_of_the_best_in_every_order(judge: Judge, n: int) -> None:
    texts = [f"text{i}" for i in range(n)]
    for best, order in itertools.product(range(n), itertools.permutations(range(n))):
        gold = [0.25 + (i == best) for i in range(n)]
        for label in (best, gold):
            row = make_row("p", texts, label=label)
            hint = rft.best_hint(row, order)
            prompt = TOKENIZER.decode(judge.prompts.render(row, order, hint))
            place = prompt.split("\nHint: The best response is: Response ")[1].split("\n")[0]
            assert f"\nResponse {place}: text{best}\n" in prompt


def test_a_hint_is_in_the_prompt_and_in_the_key_where_there_is_one(judge: Judge) -> None:
    (row,) = islice_rows(1, responses=3)
    options: dict[str, Any] = {"k": 3, "temperature": 0.7, "max_new_tokens": 20}
    (plain,) = judge.rows([row], **options)
    (none,) = judge.rows([row], hint=lambda *_: None, **options)
    (hinted,) = judge.rows([row], hint=rft.best_hint, **options)
    assert isinstance(plain, Verdict) and isinstance(hinted, Verdict)
    assert none == plain and plain.key == judge.key(row, **options)
    assert hinted.key == judge.key(row, hint=rft.best_hint, **options)
    other = judge.key(row, hint=lambda *_: "look", **options)
    assert len({plain.key, hinted.key, other}) == 3
    assert len({sample.order for sample in hinted.samples}) == 3
    for sample in hinted.samples:
        prompt = judge.prompts.render(row, sample.order, rft.best_hint(row, sample.order))
        logits = judge.model.logits(prompt + sample.token_ids)[len(prompt) - 1 : -1]
        at = torch.tensor(sample.token_ids)[:, None]
        logp = logits.log_softmax(-1).gather(1, at)[:, 0]
        assert (logp - torch.tensor(sample.logprobs)).abs().max() < 1e-4  # as in test_judge.py


def islice_rows(count: int, responses: int) -> list[Row]:
    rows = (entry for entry in rft.entries(None, 200, 0) if isinstance(entry, Row))
    return list(itertools.islice((r for r in rows if len(r.responses) == responses), count))


# -- what is written -------------------------------------------------------------------------------


def test_what_is_kept_is_what_was_sampled(judge: Judge, whole: tuple[Args, Any]) -> None:
    """Every line, in order, is a judgement that the judge draws by itself, and is right."""
    args, _ = whole
    rows = [row for row in rft.entries(None, ROWS, 3) if isinstance(row, Row)]
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": LONGEST, "stop": "eos"}
    expected, hinted = [], 0
    for row, done in zip(rows, progress(args.out), strict=True):
        assert done["id"] == row.id
        (verdict,) = judge.rows([row], k=3, seed=3, **options)
        assert isinstance(verdict, Verdict)
        kept = []
        if not all(agrees(sample.scores, row.label) for sample in verdict.samples):
            kept = [s for s in verdict.samples if agrees(s.scores, row.label)]
            if len(row.responses) > 1:
                (one,) = judge.rows([row], k=1, seed=rft.hinted_seed(3), hint=rft.best_hint,
                                    **options)  # fmt: skip
                assert isinstance(one, Verdict)
                kept += [s for s in one.samples if agrees(s.scores, row.label)]
                hinted += 1
            else:
                assert done["hinted"] is None
        kept = [s for s in kept if s.finish == "eos" and "�" not in s.text]
        assert (done["row"] == "kept") == bool(kept)
        expected += [(row.id, s.text, list(s.order)) for s in kept]
    lines = [json.loads(line) for line in (args.out / "trajectories.jsonl").open()]
    assert [(line["id"], line["judgement"], line["order"]) for line in lines] == expected
    assert len(expected) > 3 and hinted > 3


def test_every_valid_judgement_says_whether_it_is_right(
    judge: Judge, whole: tuple[Args, Any]
) -> None:
    """All those without a hint, of easy rows too, as rows of judgements."""
    args, _ = whole
    rows = [row for row in rft.entries(None, ROWS, 3) if isinstance(row, Row)]
    outcomes = judge.rows(
        rows, k=3, seed=3, temperature=1.0, max_new_tokens=LONGEST, stop="eos"
    )  # fmt: skip
    expected = {}
    for row, verdict in zip(rows, outcomes, strict=True):
        assert isinstance(verdict, Verdict)
        valid = [s for s in verdict.samples if s.scores is not None]
        expected[row.id] = [(list(s.order), s.text, agrees(s.scores, row.label)) for s in valid]
    expected = {name: judgements for name, judgements in expected.items() if judgements}
    found = read_judgements(args.judgements)
    told = {
        each.row.id: [(own.order, own.text, own.right) for own in each.judgements] for each in found
    }
    assert told == expected
    assert {own.right for each in found for own in each.judgements} == {False, True}


@pytest.mark.parametrize("keep_hint", [False, True])
def test_the_file_is_read_back_with_the_prompt_that_was_asked_for(
    judge: Judge, whole: tuple[Args, Any], tmp_path: Path, keep_hint: bool
) -> None:
    args = whole[0]
    if keep_hint:
        args = with_values(args, out=tmp_path, keep_hint=True)
        rft.sample(args)
        same = {name: data for name, data in files(tmp_path).items() if name == "counts.json"}
        assert same.items() <= whole[1].items()
    of_row = {r.id: r for r in rft.entries(None, ROWS, 3) if isinstance(r, Row)}
    shown = []  # the row, and whether the line belongs to its hinted judgement
    for done in progress(args.out):
        shown += [(of_row[done["id"]], False)] * done["samples"].count("kept")
        shown += [(of_row[done["id"]], True)] * (done["hinted"] == "kept")
    assert {hinted for _, hinted in shown} == {False, True}
    end = judge.tokenizer.end_id(judge.model.config.eos_token_ids)
    lines = [json.loads(line) for line in args.trajectories.open()]
    for number, (line, (row, hinted)) in enumerate(zip(lines, shown, strict=True)):
        alone = tmp_path / f"{number}.jsonl"
        alone.write_text(json.dumps(line) + "\n")
        (trajectory,) = file_batches(judge.prompts, {end}, alone, 1, 0, 4096)(0)
        hint = rft.best_hint(row, line["order"]) if hinted and keep_hint else None
        prompt = [token for segment in trajectory.prompt for token in segment]
        assert prompt == judge.prompts.render(row, line["order"], hint)
        assert trajectory.completion[-1] == end
        assert judge.tokenizer.decode(trajectory.completion[:-1]) == line["judgement"]
    assert len(
        file_batches(judge.prompts, {end}, args.trajectories, len(lines), 0, 4096)(0)
    ) == len(lines)


def test_counts_add_up_to_everything_read_and_sampled(
    args: Args, tmp_path: Path, judge: Judge
) -> None:
    """Of a file with bad lines, rows without a label, and rows that cannot be judged."""
    narrow = tmp_path / "narrow"
    shutil.copytree(BASE, narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 700}))
    row = {"prompt": "p", "responses": ["a", "b"], "label": 0}
    lines: list[Any] = [
        "junk",
        row | {"id": "long", "prompt": "@" * 800},
        {"id": "none", "prompt": "p", "responses": ["a"]},
        {"id": "pair", "prompt": "p", "chosen": "a", "rejected": "b"},
        row | {"id": "pair"},
    ]
    pairs, singles = islice_rows(4, responses=2), islice_rows(3, responses=1)
    lines += [
        {"id": r.id, "prompt": r.messages[-1].content, "responses": r.responses, "label": r.label}
        for r in pairs + singles
    ]
    lines.append(row | {"id": "beyond"})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    args = with_values(args, model=narrow, data=data, rows=9)
    counts = rft.sample(args).table()
    assert counts == json.loads((args.out / "counts.json").read_text())
    rows, samples, hinted = counts["rows"], counts["samples"], counts["hinted"]
    for table in (rows, samples, hinted):
        assert table["all"] == sum(table.values()) - table["all"]
    assert (rows["all"], rows["bad_line"], rows["no_label"], rows["failed"]) == (12, 2, 1, 1)
    judged = rows["kept"] + rows["too_easy"] + rows["none_kept"]
    assert judged == 8 and samples["all"] == 24 and samples["too_easy"] == 3 * rows["too_easy"]
    done = progress(args.out)
    several = [d for d in done if d["id"] in {"pair", *(r.id for r in pairs)} and d["samples"]]
    assert hinted["all"] == sum(d["row"] != "too_easy" for d in several) > 0
    assert all(d["hinted"] is None for d in done if d["id"] in {r.id for r in singles})
    kept = args.trajectories.read_bytes()
    assert counts["trajectories"] == samples["kept"] + hinted["kept"] == kept.count(b"\n") > 0
    assert done[-1]["ends"] == [len(kept), len(args.judgements.read_bytes())]
    failed = [d["row"] for d in done if d["error"] is not None]
    assert sorted(failed) == ["bad_line", "bad_line", "failed"]


def test_a_template_without_the_hint_fails_for_hinted_judgements_alone(
    judge: Judge, whole: tuple[Args, Any]
) -> None:
    template = judge.prompts.judge_template.replace("Hint: {{ hint }}", "")
    deaf = Judge(judge.model, judge.tokenizer, judge_template=template, settings=judge.settings)
    (row,) = islice_rows(1, responses=2)
    assert isinstance(row.label, int)
    wrong = replace(row, label=1 - row.label)
    args = with_values(whole[0], max_new_tokens=8)
    ((done, lines),) = rft.judged(deaf, [wrong], args)
    assert (done.row, done.hinted, lines.trajectories) == ("none_kept", "failed", [])
    assert done.samples == ["truncated"] * 3
    assert done.error is not None and "the hint is not shown" in done.error
    ((done, _),) = rft.judged(deaf, [wrong], with_values(args, hinted=False))
    assert done.hinted is None and done.error is None


def test_hinted_judgements_change_no_other(whole: tuple[Args, Any], tmp_path: Path) -> None:
    args = with_values(whole[0], out=tmp_path, hinted=False)
    rft.sample(args)
    with_hints = progress(whole[0].out)
    assert [d["samples"] for d in progress(tmp_path)] == [d["samples"] for d in with_hints]
    assert all(d["hinted"] is None for d in progress(tmp_path))


# -- runs ------------------------------------------------------------------------------------------


def kill_and_resume(out: Path, expected: dict[str, bytes], kills: list[int]) -> None:
    """SIGKILL as soon as progress has so many lines, with torn lines added, as if it had come in
    the middle of one; again and again, and then a run that nobody disturbs."""
    command = [sys.executable, "-m", "train.rft", "--out", str(out), "--rows", str(ROWS),
               "--max-new-tokens", str(LONGEST), "--seed", "3", "--chunk-rows", "1",
               "--sample-only"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    path = out / "progress.jsonl"
    for lines in kills:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = path.read_bytes()
        done = before[: before.rindex(b"\n") + 1]  # a kill may come before a torn line is cut
        assert lines <= done.count(b"\n") < ROWS + 1
        assert expected["progress.jsonl"].startswith(done)
        for name in ("progress.jsonl", "trajectories.jsonl"):
            with (out / name).open("ab") as file:
                file.write(b'{"id": "torn')
    subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, check=True)
    assert files(out) == expected


@pytest.mark.soak
def test_a_killed_run_resumes_to_the_byte(args: Args, whole: tuple[Args, dict[str, bytes]]) -> None:
    kill_and_resume(args.out, whole[1], [4])


@pytest.mark.soak
@pytest.mark.parametrize("kills", [[1, 2, 3, 5, 7, 8], [1, 1, 6], [2, 4, 6, 8]], ids=str)
def test_runs_killed_many_times_resume_to_the_byte(
    args: Args, whole: tuple[Args, dict[str, bytes]], kills: list[int]
) -> None:
    kill_and_resume(args.out, whole[1], kills)


def test_a_run_resumes_from_between_any_two_writes(
    args: Args, whole: tuple[Args, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trajectories without their line of progress are cut; rows that are done are not sampled."""
    made: list[str | None] = []
    judged = rft.judged

    def counted(judge: Judge, chunk: list[Row | BadRow], given: Args) -> Any:
        for done, lines in judged(judge, chunk, given):
            made.append(done.id)
            yield done, lines

    monkeypatch.setattr(rft, "judged", counted)
    expected = whole[1]
    header, *lines = expected["progress.jsonl"].splitlines(keepends=True)
    ends = [json.loads(line)["ends"] for line in lines]
    RunDirectory(args.out, "train.rft").close()
    for rows in (1, 4, ROWS - 1, ROWS):
        cut, judgements_cut = ends[min(rows, ROWS - 1)]
        args.trajectories.write_bytes(expected["trajectories.jsonl"][:cut])
        args.judgements.write_bytes(expected["judgements.jsonl"][:judgements_cut])
        (args.out / "progress.jsonl").write_bytes(header + b"".join(lines[:rows]))
        made.clear()
        rft.sample(args)
        assert files(args.out) == expected
        assert made == [json.loads(line)["id"] for line in lines[rows:]]
    # After a power cut progress may be on the disk and what it counts not.
    for which, path in enumerate((args.trajectories, args.judgements)):
        last = max(i for i in range(ROWS) if ends[i][which] > (ends[i - 1][which] if i else 0))
        path.write_bytes(expected[path.name][: ends[last][which] - 1])
        made.clear()
        rft.sample(args)
        assert files(args.out) == expected and len(made) == ROWS - last


def test_end_to_end(args: Args, whole: tuple[Args, dict[str, bytes]]) -> None:
    shutil.copytree(whole[0].out, args.out)
    rft.train(args)
    trained, first = load(args.out / "model")[0], load(BASE)[0]
    pairs = zip(trained.parameters(), first.parameters(), strict=True)
    assert any(not a.equal(b) for a, b in pairs)
    lines = (args.out / "model" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    weights = (args.out / "model" / "model.safetensors").read_bytes()
    rft.train(args)  # nothing is left to do
    assert (args.out / "model" / "model.safetensors").read_bytes() == weights
    assert files(args.out) == whole[1]
    with pytest.raises(ValueError, match="other settings: lr = "):
        rft.train(with_values(args, lr=1e-3))
    verdict = Judge.load(args.out / "model")("p", ["a", "b"], k=2, max_new_tokens=10)
    assert verdict.k == 2


# -- refusals --------------------------------------------------------------------------------------


def test_nothing_kept_is_refused(args: Args) -> None:
    args = with_values(args, max_new_tokens=3, rows=2)
    with pytest.raises(ValueError, match=r'no trajectory was kept: .*"truncated": 6'):
        rft.train(args)
    assert (args.out / "counts.json").exists() and not (args.out / "model").exists()


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"temperature": 0.9}, {"samples": 2}, {"hinted": False}, {"keep_hint": True},
     {"rows": 3}, {"orders": "fixed"}],
    ids=str,
)  # fmt: skip
def test_other_settings_are_refused(
    args: Args, whole: tuple[Args, dict[str, bytes]], change: dict[str, Any]
) -> None:
    shutil.copytree(whole[0].out, args.out)
    (name,) = change
    with pytest.raises(ValueError, match=f"other settings: {name} = "):
        rft.train(with_values(args, **change))
    assert files(args.out) == whole[1]


def test_settings_that_never_judged_a_row_do_not_bind(args: Args) -> None:
    with pytest.raises(ValueError, match="temperature"):
        rft.sample(with_values(args, temperature=-1.0))
    rft.sample(with_values(args, max_new_tokens=2, rows=1))


def test_other_data_and_damaged_files_are_refused(
    args: Args, whole: tuple[Args, dict[str, bytes]], tmp_path: Path
) -> None:
    shutil.copytree(whole[0].out, args.out)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "label": 0}) + "\n")
    with pytest.raises(ValueError, match="other settings: data = None, not "):
        rft.train(with_values(args, data=data))
    path = args.out / "progress.jsonl"
    header, *lines = whole[1]["progress.jsonl"].splitlines(keepends=True)
    path.write_bytes(header + lines[1] + b"".join(lines[1:]))
    with pytest.raises(ValueError, match=r"row 'rft-3-0-1' .* not in its place"):
        rft.train(args)
    path.write_bytes(header + lines[0] + b'{"id": "x", "row": "lost"}\n')
    with pytest.raises(ValueError, match=r"progress\.jsonl, line 3: .*lost"):
        rft.train(args)
    for ends in ([-1, 0], [7, 0]):  # before the file, and within a line
        first = json.dumps(json.loads(lines[0]) | {"ends": ends}).encode() + b"\n"
        path.write_bytes(header + first)
        with pytest.raises(ValueError, match=r"line 2: -?\d is not where a line of .*traj.* ends"):
            rft.train(args)
    path.unlink()
    with pytest.raises(ValueError, match=r"trajectories\.jsonl is not empty"):
        rft.train(args)
    assert args.trajectories.read_bytes() == whole[1]["trajectories.jsonl"]


def test_two_writers_are_refused(args: Args) -> None:
    first = RunDirectory(args.out, "train.rft")
    with pytest.raises(ValueError, match="another run is writing there"):
        rft.sample(args)
    first.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows = 0 is less than 1"),
        ({"samples": 0}, "samples = 0 is less than 1"),
        ({"step_rows": 0}, "step_rows = 0 is less than 1"),
        ({"chunk_rows": 0}, "chunk_rows = 0 is less than 1"),
        ({"steps": 0}, "steps = 0 is less than 1"),
        ({"out": BASE}, "out is the directory of the model"),
        ({"out": BASE.parent, "model": BASE.parent / "model"}, "out is the directory of the"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(
    args: Args, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rft.train(with_values(args, **change))
