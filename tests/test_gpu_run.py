"""`python -m bench.gpu`: its plan, its steps on a GPU that is not there, and what it writes."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_steps
from bench.ceilings import Ceilings
from bench.figures import Figure
from bench.goals import GOALS
from bench.gpu_steps import STEPS, Run, Step
from bench.provenance import provenance
from bench.stage import read_log
from tests import forks

ROOT = Path(__file__).parent.parent
CEILINGS: dict[str, Any] = {
    "copy_gb_per_s": 4000.0, "read_gb_per_s": 4300.0, "matmul_tflop_per_s": 790.0,
    "matmul_dtype": "bfloat16",
}  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_plan_fits_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    *steps, total = capsys.readouterr().out.splitlines()
    seconds = [float(line.split()[0]) for line in steps]
    names = [line.split()[2] for line in steps]
    assert names == list(STEPS) and sum(seconds) == float(total.split()[0]) <= 480
    assert sum(seconds[: names.index("attention")]) <= 45  # figures begin


def test_every_step_on_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """The steps' own code: no tensor on the CPU reaches a kernel, no decode step waits for the
    device, and each step writes what it is for."""
    with (tmp_path / "said").open("w+") as out:
        process = forks.start(
            forks.command, "tests.gpu_run", str(tmp_path), streams={"stdout": out.fileno()},
            environment={"QUORUM_CPP": "0"}, forgotten=("bench", "engine", "kernels", "models"),
        )  # fmt: skip
        process.join()
        out.seek(0)
        *_, last = out
    assert process.exitcode == 0
    said = json.loads(last)
    assert said["refused"] == [
        "add: tensors of two devices",
        "main: an argument on the CPU",
    ]
    lines = lines_of(tmp_path / "figures.jsonl")
    assert [line for line in lines if line["kind"] == "error"] == []
    found = {step: {line["kind"] for line in lines if line["step"] == step} for step in STEPS}
    assert found == {
        "machine": {"machine", "ceilings", "step"},
        "smoke": {"checked", "replayed", "step"},
        "attention": {"ceilings", "figure", "pieces", "step"},
        "decode": {"ceilings", "decode", "step"},
        "unshared": {"ceilings", "decode", "step"},
        "gemma": {"ceilings", "decode", "step"},
        "deepseek": {"ceilings", "decode", "step"},
        **{step: {"ceilings", "figure", "step"} for step in ("losses", "others", "grid")},
        **{step: set() for step in ("compile", "memory", "tests")},  # in other processes
    }
    pieces = next(line for line in lines if line["kind"] == "pieces")["us"]
    kernel = "forest_attention_kernel"
    assert list(pieces) == [f"{kernel} suffix", f"{kernel} M 16", "merge_states_kernel"]
    decodes = [line for line in lines if line["kind"] == "decode"]
    assert [(x["model"], x["k"], x["sharing"], x["reduced_precision"]) for x in decodes] == [
        ("qwen3-8b", 4, True, True),
        ("qwen3-8b", 18, True, True),
        ("qwen3-8b", 4, True, False),
        ("qwen3-8b", 12, False, True),
        ("gemma2-27b", 4, True, True),
        ("v2-lite-small", 4, True, True),
    ]
    # Steps were captured, and replayed more often than launched.
    assert said["launched"]["replay"] > 100 and said["launched"]["_uniforms_kernel"] >= 4
    for kernel in ("_forest_attention_dq_kernel", "_logits_kernel", "_matmul_kernel"):
        assert said["launched"][kernel]
    steps = {"decode.load", "decode.run", "decode._step", "decode.draw", "decode.poll"}
    waits = [read for read in said["reads"] if any(name.startswith("generate.") for name in read)]
    assert waits and [read for read in waits if steps & set(read)] == []
    assert {read[0] for read in waits} <= {"decode.fetch"}


def writes(run: Run) -> None:
    run.write("checked", name="something")


def hangs(run: Run) -> None:
    run.write("checked", name=str(subprocess.Popen(["sleep", "60"]).pid))
    time.sleep(60)


def dies(run: Run) -> None:
    os._exit(3)


def raises(run: Run) -> None:
    raise ValueError("no such thing")


def lives(pid: str) -> bool:
    status = Path("/proc", pid, "status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_no_step_stops_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises, dies or hangs is a line; the summary is there after each step."""
    steps: list[Callable[[Run], None]] = [raises, hangs, dies, writes]
    named = {
        each.__name__: Step(each.__name__, 1.0 if each is hangs else 20.0, each, "")
        for each in steps
    }
    monkeypatch.setattr(gpu, "START", "fork")  # as it is patched here
    for module in (gpu, gpu_steps):
        monkeypatch.setattr(module, "STEPS", named)
    gpu.run_steps(list(named), tmp_path, None)
    lines = lines_of(tmp_path / "figures.jsonl")
    assert [(line["step"], line["kind"], line.get("error")) for line in lines] == [
        ("raises", "error", "ValueError: no such thing"),
        ("raises", "step", None),
        ("hangs", "checked", None),
        ("hangs", "error", "ended after its time"),
        ("dies", "error", "exit status 3"),
        ("writes", "checked", None),
        ("writes", "step", None),
    ]
    assert "in raises" in lines[0]["trace"]
    assert not lives(lines[2]["name"])  # what a step has started ends with it
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "figures.jsonl", "log.txt", "summary.json", "summary.md",
    ]  # fmt: skip
    assert "hangs: ended after its time" in (tmp_path / "summary.md").read_text()


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    run = Run("smoke", tmp_path / "lines", time.monotonic() - 1, gpu_steps.real_work())
    assert list(run.each(["a", "b"])) == []
    assert [x["name"] for x in lines_of(run.lines)] == ["a", "b"]
    assert {x["error"] for x in lines_of(run.lines)} == {gpu_steps.NO_TIME}


def a_figure(key: str) -> Figure:
    op, case = key.split(": ", 1)
    return Figure(
        op=op, case=case, num_bytes=10**9, flops=10**9, ms=5.5, gb_per_s=1e3 / 5.5,
        tflop_per_s=1 / 5.5, floor_ms=5.0, bound="memory", fraction=5 / 5.5,
        bandwidth_fraction=5 / 5.5, matmul_fraction=2 / 5.5, input_sets=3, captured=True, peers={},
    )  # fmt: skip


@pytest.mark.parametrize("device", ["NVIDIA H100", "NVIDIA H200"])
def test_a_summary_has_all_that_was_found(device: str, tmp_path: Path) -> None:
    """Figures are there beside red tests; goals are those of the device."""
    rate = {
        "model": "qwen3-8b", "k": 32, "prefix": 4096, "sharing": True, "reduced_precision": True,
        "decode_tokens_per_s": 5000.0, "decode_fraction_of_floor": 0.76, "step_ms": 6.4,
        "prefill_s": 0.3,
    }  # fmt: skip
    peers = {"fused small": {"seconds": 0.05, "peak_bytes": 5e8}, "liger": {"error": "no"}}
    figure = a_figure(GOALS[0].key)
    lines: list[dict[str, Any]] = [
        {"kind": "machine", "device": device, "driver": "580"},
        {"kind": "ceilings", **CEILINGS},
        {"kind": "figure", "figure": figure.as_dict()},
        {"kind": "pieces", "case": figure.key, "us": {"suffix": 36.0, "merge": 13.0}},
        {"kind": "decode", **rate},
        {"kind": "memory", "model": "qwen3-8b", "peers": peers},
        {"kind": "replayed", "same_tokens": 1.0, "largest_difference": 0.0},
        {"kind": "error", "name": "a case", "error": "NotLikeReference: off"},
    ]
    (tmp_path / "figures.jsonl").write_text(
        "".join(json.dumps({"step": "x", **line}) + "\n" for line in lines) + '{"torn'
    )
    tests = [
        {"test": "good", "outcome": "passed"},
        {"test": "bad", "outcome": "failed", "reason": "r"},
        {"test": "cut off"},
    ]
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tests))
    gpu.write_summary(tmp_path, provenance())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["goals"][0]["measured"] == pytest.approx(100 * 5 / 5.5)
    assert [each["measured"] for each in summary["goals"]].count(None) == len(GOALS) - 2
    assert summary["tests"]["failed"] == [{"test": "bad", "reason": "r"}]
    text = (tmp_path / "summary.md").read_text()
    for said in (
        "**tests red: bad**", "broke off in one of: cut off", "suffix 36.0 us, merge 13.0 us",
        "5,000 tokens/s", "0.50 GB (at most 0.6); liger: no", "x: a case: NotLikeReference: off",
        "wanted 5,680: missed" if "H200" in device else "wanted 75 %: met",
        "<= 44 us | 5.5e+03 us | no" if "H200" in device else ">= 80 % | 90.9 % | yes",
        Ceilings(**CEILINGS).describe(),
    ):  # fmt: skip
        assert said in text, said


STAGE = """
import os, time, pytest

def test_good(): ...

def test_bad():
    assert 1 == 2

@pytest.mark.skip(reason="elsewhere")
def test_skipped(): ...
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_log_of_the_tests(workers: int, tmp_path: Path) -> None:
    """What passes, fails, is skipped or has no time is told apart, in parallel too; a crash shows,
    and every line is whole."""

    def run(text: str, budget: float) -> dict[str, Any]:
        (tmp_path / "log").unlink(missing_ok=True)
        (tmp_path / "test_stage.py").write_text(text)
        options = ["--log", str(tmp_path / "log"), "--budget", str(budget), "-n", str(workers)]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.stage", "-p", "xdist.plugin"]
        more = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", os.devnull]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        subprocess.run(
            [*command, *options, *more, str(tmp_path)],
            cwd=ROOT, env=environment, capture_output=True,
        )  # fmt: skip
        return read_log(tmp_path / "log")

    crashing = STAGE + "\ndef test_crash():\n    os._exit(3)\n"
    found = run(crashing, 60)
    assert (found["passed"], found["skipped"], found["not_run"]) == (1, 1, [])
    failed = {each["test"].split("::")[1]: each["reason"] for each in found["failed"]}
    assert "assert 1 == 2" in failed.pop("test_bad")
    begun_and_ended = (tmp_path / "log").read_text().splitlines()
    assert len(begun_and_ended) == 4 + (4 if workers else 3)  # written once
    if workers:
        assert "crashed" in failed["test_crash"] and not found["begun"]
        return
    assert not failed and [name.split("::")[1] for name in found["begun"]] == ["test_crash"]
    found = run(STAGE, 0)
    assert found["passed"] == 0 and len(found["not_run"]) == 3 and not found["failed"]


def test_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in (*gpu.ENVIRONMENT, "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored afterwards
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert "needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_gpu_run_needs_few_packages() -> None:
    """All that `bench.gpu` runs can be imported where the rest is not installed."""
    files = [file for folder in gpu_steps.TESTS for file in sorted((ROOT / folder).glob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    assert len(names) > 20
    missing = "tyro", "msgspec", "jinja2", "matplotlib", "transformers"
    own = "bench", "engine", "kernels", "models", "tests", "train"
    names = ["bench.gpu", "bench.stage", "bench.loss", "tests.conftest", *names]
    process = forks.start(import_all, names, missing, forgotten=(*own, *missing))
    process.join()
    assert process.exitcode == 0


def import_all(names: list[str], missing: tuple[str, ...]) -> None:
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]  # importing them fails
    for name in names:
        importlib.import_module(name)
