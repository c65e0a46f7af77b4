"""Runs and their directories: whose they are, how signals end them, what a person is told."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.command import with_values
from engine.stopping import Stopped, Stopping
from models import load
from tests import forks
from tests.args import args_of
from tests.tiny import write_model
from train import checkpoint, grpo, meta_rm, rft, sft
from train.directory import RunDirectory
from train.sources import labelled_rows
from train.world.pocket import JUDGE_TEMPLATE

ROOT = Path(__file__).parent.parent
POCKET = ROOT / "models" / "pocket"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    write_model(directory, "qwen3")
    (directory / "judge_template.jinja").write_text(JUDGE_TEMPLATE)
    return directory


@pytest.fixture
def args(base: Path, tmp_path: Path) -> sft.Args:
    data = tmp_path / "trajectories.jsonl"
    line = {"prompt": "p", "responses": ["a", "b"], "judgement": "Scores: \\boxed{9, 1}"}
    data.write_text(json.dumps(line) + "\n")
    return args_of(
        sft.Args, model=base, out=tmp_path / "out", data=data, steps=3, rows=1, warmup=1,
        log_every=1, save_every=2, max_new_tokens=5,
    )  # fmt: skip


def steps_of(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# -- whose a directory is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        ["model.safetensors", "config.json"],  # a model
        ["best/photo.jpg", "checkpoints/step-99999999/weights.pt"],
        [".hidden"],
    ],
    ids=str,
)
def test_what_no_run_has_written_is_left_alone(args: sft.Args, files: list[str]) -> None:
    for name in files:
        (args.out / name).parent.mkdir(parents=True, exist_ok=True)
        (args.out / name).write_text("mine")
    before = contents(args.out)
    with pytest.raises(ValueError, match="holds what no run has written there"):
        sft.train(args)
    assert contents(args.out) == before


def test_a_directory_is_one_commands(args: sft.Args) -> None:
    sft.train(args)
    with pytest.raises(ValueError, match=r"has a run of train\.sft, not of train\.grpo"):
        RunDirectory(args.out, "train.grpo")


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(args: sft.Args) -> None:
    """It would have emptied the metrics and replaced the models."""
    dev = args.out.with_name("dev.jsonl")
    dev.write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "label": 0}) + "\n")
    args = with_values(args, eval_every=2, eval_data=dev, eval_k=1)
    sft.train(args)
    for name in ("best/notes.txt", "notes.txt"):  # a person's, among the run's
        (args.out / name).write_text("mine")
    for path in (args.out / "checkpoints").rglob("*"):
        if path.is_file():
            path.unlink()
    before = contents(args.out)
    assert {"best/model.safetensors", "best.json", "metrics.jsonl"} <= before.keys()
    with pytest.raises(ValueError, match="no whole checkpoint any more"):
        sft.train(args)
    assert contents(args.out) == before


def test_a_second_run_is_kept_out(args: sft.Args) -> None:
    first = RunDirectory(args.out, "train.sft")
    with pytest.raises(ValueError, match="another run is writing there"):
        sft.train(args)
    assert [path.name for path in args.out.iterdir()] == ["run.json"]
    first.close()
    sft.train(args)


@pytest.mark.parametrize(
    "line", [b"junk\n", b"[]\n", b'{"loss": 1}\n', b"\0\0\0\n", b"\xff\n"], ids=str
)
def test_lines_that_are_no_run_s_are_named(args: sft.Args, line: bytes) -> None:
    sft.train(args)
    path = args.out / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 4, is no line of a run"):
        sft.train(args)


# -- how a run ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step(
    args: sft.Args, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What is saved continues to the same bytes; handlers are put back."""
    whole = with_values(args, out=tmp_path / "whole")
    sft.train(whole)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    step = sft.SftTrainer.step

    def hit(self: sft.SftTrainer, at: int) -> Any:
        os.kill(os.getpid(), number)
        return step(self, at)

    with monkeypatch.context() as patch:
        patch.setattr(sft.SftTrainer, "step", hit)
        with pytest.raises(Stopped) as stopped:
            sft.train(args)
    assert stopped.value.number == number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    newest = checkpoint.latest(args.out / "checkpoints")
    assert newest and newest.name == "step-00000001"  # not one of `save_every`
    assert "saved after step 1: the same command continues" in capsys.readouterr().err
    sft.train(args)
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (args.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_a_signal_is_the_exit_status(args: sft.Args) -> None:
    """Of the command as a person runs it."""
    reader, writer = os.pipe()
    options = f"--model {args.model} --data {args.data} --out {args.out} --rows 1 --steps 1000000"
    run = forks.start(
        forks.command, "train.sft", *options.split(), "--log-every", "1", streams={"stderr": writer}
    )
    os.close(writer)
    with open(reader, encoding="utf-8") as said:
        first = said.readline()  # no bar where there is no terminal
        assert first.startswith("step 1/1000000  loss ")
        run.terminate()
        assert "Traceback" not in said.read()
    run.join()
    assert run.exitcode == 128 + signal.SIGTERM
    saved = checkpoint.latest(args.out / "checkpoints")
    assert saved and checkpoint.read_state(saved)["step"] == steps_of(args.out)[-1]


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    found: list[object] = []

    def enter() -> None:
        with Stopping() as stopping:
            found.append(stopping.number)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [None]


def test_a_finished_run_goes_on(args: sft.Args, capsys: pytest.CaptureFixture[str]) -> None:
    sft.train(args)
    short = load(args.out)[0].head_weight
    more = with_values(args, steps=5)
    sft.train(more)
    assert "a finished run of 3 steps goes on to 5" in capsys.readouterr().err
    assert steps_of(args.out) == [1, 2, 3, 4, 5]
    assert not load(args.out)[0].head_weight.equal(short)
    for refused in (args, with_values(args, steps=9, seed=1)):  # fewer steps, and another seed
        with pytest.raises(ValueError, match="other settings: "):
            sft.train(refused)


def test_patience(args: sft.Args, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training ends after two evaluations that are no better than the best, and stays ended. Of
    equals the later is kept."""
    dev = args.out.with_name("dev.jsonl")
    dev.write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "label": 0}) + "\n")
    votes = iter([0.2, 0.5, 0.5, 0.4, 0.9])
    monkeypatch.setattr(
        sft.SftTrainer, "evaluate", lambda self: {"dev_vote": next(votes), "dev_single": 0.0}
    )
    patient = with_values(args, eval_every=1, eval_data=dev, patience=2, steps=9)
    sft.train(patient)
    assert steps_of(args.out) == [0, 1, 2, 3]
    assert json.loads((args.out / "best.json").read_text()) == {"step": 2, "score": 0.5}
    sft.train(patient)
    assert steps_of(args.out) == [0, 1, 2, 3] and next(votes) == 0.9


# -- what a run is evaluated on --------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Twenty rows of ten conversations; and each with a judgement."""
    rows, judged = tmp_path / "rows.jsonl", tmp_path / "judged.jsonl"
    lines = [
        {"id": str(i), "prompt": f"p{i // 2}", "responses": ["a", "b"], "label": i % 2}
        for i in range(20)
    ]
    more = {"judgement": "Scores: \\boxed{9, 1}", "right": True}
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged.write_text("".join(json.dumps(line | more) + "\n" for line in lines))
    return rows, judged


@pytest.mark.parametrize("kind", ["grpo", "sft", "meta_rm", "meta_rm of judgements", "rft"])
def test_evaluation_is_on_rows_that_are_not_learnt_from(
    kind: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the data that is given, never of the toy world; by conversation, of which each has two
    rows here."""
    rows, judged = files
    shared: dict[str, Any] = {"model": POCKET, "out": tmp_path / "out", "eval_every": 1}
    if kind == "grpo":
        trainer = grpo.GrpoTrainer(args_of(grpo.Args, data=rows, rows=16, **shared))
        dev, learnt = trainer.dev, [row.id for row in trainer.rows(0)]
    elif kind == "sft":
        learner = sft.SftTrainer(args_of(sft.Args, data=judged, rows=16, **shared))
        lines = [int(each.name.removeprefix("line ")) for each in learner.batches(0)]
        dev, learnt = learner.dev, [str(number - 1) for number in lines]
    elif kind == "rft":
        args = args_of(rft.Args, data=rows, max_new_tokens=2, **shared)
        with pytest.raises(ValueError, match="no trajectory was kept"):
            rft.train(args)
        dev = labelled_rows(args.out / "dev.jsonl")[0]
        before = contents(args.out)
        with pytest.raises(ValueError, match="other settings: held_out = 2, not 1"):
            rft.train(with_values(args, eval_rows=2))
        assert contents(args.out) == before
        progress = (args.out / "progress.jsonl").read_text().splitlines()[1:]
        learnt = [json.loads(line)["id"] for line in progress]
    else:
        given: dict[str, Any] = {"data": rows, "rows": 16}
        if kind == "meta_rm of judgements":
            given = {"judgements": judged, "rows": 0, "judged_rows": 16}
        meta = meta_rm.MetaTrainer(args_of(meta_rm.Args, **given, **shared))
        found = meta.rows(0) if meta.kept is None else [each.row for each in meta.kept(0)]
        dev, learnt = meta.dev_rows, [row.id for row in found]
    held = {int(row.id) for row in dev}
    assert len(held) == 4 and {number ^ 1 for number in held} == held
    assert sorted(map(int, learnt)) == sorted(set(range(20)) - held)
    assert "held out for evaluation: 4 rows of " in capsys.readouterr().err


# -- what a person is told, and what is written ----------------------------------------------------


def test_a_step_without_a_valid_judgement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = args_of(
        grpo.Args, out=tmp_path, steps=1, rows=2, group=2, max_new_tokens=2, beta=0, warmup=1
    )
    grpo.train(args)
    said = capsys.readouterr().err
    assert "step 0: no judgement has scores that could be read (4 truncated)" in said
    assert "Begin with train.sft" in said and "\nstep 1/1  reward -1 " in said


def test_prompts_in_place_of_the_models(base: Path, args: sft.Args, tmp_path: Path) -> None:
    """They are what is trained on, decide whether a run continues, and lie beside its model."""
    template = tmp_path / "other.jinja"
    template.write_text("Judge!\n" + JUDGE_TEMPLATE)
    args = with_values(args, template=template, score_max=20, anchor="")
    trainer = sft.SftTrainer(args)
    assert trainer.judge.prompts.judge_template == template.read_text()
    sft.train(args)
    assert (args.out / "judge_template.jinja").read_text() == template.read_text()
    settings = json.loads((args.out / "judge.json").read_text())
    assert settings == {"score_max": 20, "anchor": None}
    template.write_text("Judge!!\n" + JUDGE_TEMPLATE)
    with pytest.raises(ValueError, match="other settings: template = "):
        sft.train(args)
