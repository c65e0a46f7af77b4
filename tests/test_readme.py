"""The README's commands and code work as they stand, and what it shows is what one sees."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from engine.judge import Judge
from engine.sample import POCKET
from tests import forks
from tests.args import option_names
from train.trajectories import file_batches

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = blocks("python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 12
    names: dict[str, object] = {}
    exec(compile(first, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("0 ")
    exec(compile(second, "README.md", "exec"), names)
    means = json.loads(capsys.readouterr().out)
    assert len(means) == 2 and means[0] > means[1]


def test_the_command_and_the_row_work(tmp_path: Path) -> None:
    row, _ = blocks("json")
    (tmp_path / "rows.jsonl").write_text(row)
    command = next(line for line in README.splitlines() if "--data rows.jsonl" in line)
    words = shlex.split(command.replace("DIR", str(ROOT / "models" / "pocket")))
    assert words[:2] == [".venv/bin/python", "-m"]
    for name in ("rows.jsonl", "verdicts.jsonl"):
        words[words.index(name)] = str(tmp_path / name)
    process = forks.start(forks.command, *words[2:])
    process.join()
    assert process.exitcode in (0, 3)  # 3: the pocket model may find no scores
    verdict = json.loads((tmp_path / "verdicts.jsonl").read_text())
    shown = README[README.index('{"id": "r1", "key"') :]
    for key in (
        "id",
        "key",
        "best",
        "scores",
        "mean_scores",
        "tie",
        "k",
        "valid",
        "votes",
        "usage",
    ):
        assert key in verdict and f'"{key}":' in shown
    assert verdict["id"] == "r1" and len(verdict["samples"]) == 32


def test_the_chat_line_is_learnt(tmp_path: Path) -> None:
    _, line = blocks("json")
    (tmp_path / "chat.jsonl").write_text(line)
    judge = Judge.load(POCKET)
    ends = judge.model.config.eos_token_ids
    (found,) = file_batches(judge.prompts, ends, tmp_path / "chat.jsonl", 1, 0, 100)(0)
    (prompt,) = found.prompt
    shown = judge.tokenizer.show([*prompt, *found.completion])
    assert shown == "<|user|>What is 2 + 2?<|end|><|judge|>4<|end|>"


def test_the_output_shown_is_the_output_seen(tmp_path: Path) -> None:
    """That of `make sample`."""
    command = re.search(r"^sample:.*\n\t\$\(PY\) -m (.*)$", MAKEFILE, re.MULTILINE)
    assert command is not None
    with (tmp_path / "out").open("w+") as out:
        process = forks.start(
            forks.command, *shlex.split(command[1]), streams={"stdout": out.fileno()},
            environment={"COLUMNS": "80", "NO_COLOR": "1"},
        )  # fmt: skip
        process.join()
        out.seek(0)
        lines = [line.rstrip() for line in out]
    assert process.exitcode == 0
    shown = README[README.index("What it looks like") :].split("```")[1].strip("\n")
    assert "\n".join(lines).find(shown) >= 0


def options_in(text: str) -> set[str]:
    return set(re.findall(r"--([a-z][a-z-]+)", text))


def options_of(module: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Those of a command."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):  # a package
        found = importlib.import_module(f"{module}.__main__")
    settings = getattr(found, "Args", None) or getattr(found, "Options", None)
    if settings is not None:
        return {name.replace("_", "-") for name in option_names(settings)}
    with pytest.raises(SystemExit):
        found.main(["--help"])
    return options_in(capsys.readouterr().out)


def test_every_option_that_is_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the command that it is named with; else of judging or of one of the training loops."""
    command = re.compile(r"python -m (\w+(?:\.\w+)+)((?:[^`\n\\]|\\\n)*)")
    asked = command.findall(README)
    assert len(asked) >= 10
    for module, text in asked:
        unknown = options_in(text) - options_of(module, capsys)
        assert not unknown, (module, unknown)
    rest = options_in(
        re.sub(r"(torchrun|hf download|ray start|openrlhf)[^`\n]*", "", command.sub("", README))
    )
    loops = (
        "engine.sample", "engine.cluster", "engine.serve", "train.sft", "train.rft", "train.grpo",
        "train.meta_rm",
        "train.scalar_rm",
    )  # fmt: skip
    known = set().union(*(options_of(module, capsys) for module in loops))
    assert rest <= known, rest - known
