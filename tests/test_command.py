"""engine/command.py: the exit status and the line of an error; options, their groups and help."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine import command

ROOT = Path(__file__).parent.parent


def raising(error: BaseException, *, at_work: bool = False) -> Callable[[], int]:
    def fails() -> int:
        if at_work:
            command.begin_work()
        raise error

    return fails


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("k = 0"), "k = 0"),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (FloatingPointError("loss nan"), "loss nan"),
        (ValueError("two\nlines, \x1b[2J, \u202e and \udcff"), None),
    ],
)
def test_an_error_is_one_line(
    error: BaseException, words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(raising(error)) == 2
    assert command.run(raising(error, at_work=True)) == 1
    assert command.run(raising(error)) == 2  # the next command has not begun
    shown = words or "two\\nlines, \\x1b[2J, \\u202e and \\udcff"
    assert capsys.readouterr().err == f"error: {shown}\n" * 3


def test_other_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(lambda: None) == 0
    assert command.run(lambda: 3) == 3
    assert command.run(raising(KeyboardInterrupt())) == 130
    assert command.run(raising(BrokenPipeError())) == 141
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyError):  # a fault of ours keeps its traceback
        command.run(raising(KeyError("x")))
    with pytest.raises(SystemExit):
        command.run(raising(SystemExit(2)))


def test_the_traceback_in_development_mode() -> None:
    program = "from engine.command import run\nrun(lambda: int('x'))"
    shown = [
        subprocess.run(
            [sys.executable, *options, "-c", program], cwd=ROOT, capture_output=True, text=True
        ).stderr
        for options in ((), ("-X", "dev"))
    ]
    assert shown[0].startswith("error: invalid literal") and shown[0].count("\n") == 1
    assert "Traceback" in shown[1] and shown[1].endswith(shown[0])


def test_a_reader_that_leaves_early() -> None:
    """What is still buffered when the command ends, help included."""
    program = "import sys; from engine.command import run; sys.exit(run(lambda: print('x')))"
    for line in (program, program.replace("print('x')", "(print('x'), sys.exit(0))")):
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.Popen(
            [sys.executable, "-c", line], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
        )
        os.close(writer)
        _, err = process.communicate()
        assert (process.returncode, err) == (141, b"")


# Options


@dataclass(frozen=True, kw_only=True)
class Base:
    """Not shown."""

    steps: int = 1000  # of the optimizer
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Settings(Base):
    """What they are of."""

    model: Path
    """Where it is,
    in the file system."""
    steps: int = 12
    is_fast: bool = False  # not careful
    out: str | None = None
    """Overrides."""  # not this

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} is less than 0")


def parse(*arguments: str) -> Settings:
    groups = {"model": ("model",), "learning": ("steps", "lr", "is_fast")}
    return command.parse(
        Settings, groups, prog="python -m x", example="--model DIR", arguments=arguments
    )


def test_options_are_read() -> None:
    assert parse("--model", "a") == Settings(model=Path("a"))
    given = parse("--steps", "3", "--is-fast", "--model", "a/b", "--out", "c", "--seed", "4")
    assert given == Settings(model=Path("a/b"), steps=3, is_fast=True, out="c", seed=4)
    with pytest.raises(ValueError, match="seed = -1"):
        parse("--model", "a", "--seed", "-1")


@pytest.mark.parametrize("wrong", [[], ["--model", "a", "--steps", "x"], ["--model", "a", "b"]])
def test_options_that_do_not_parse(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse(*wrong)
    assert error.value.code == 2
    assert "python -m x --help" in capsys.readouterr().err


def test_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse("--help")
    assert error.value.code == 0
    _, _, shown = capsys.readouterr().out.partition("\n\n")  # past the usage
    places = [
        shown.index(words)
        for words in (
            "What they are of.", "Example:", "    python -m x --model DIR\n",
            "model options", "--model PATH", "Where it is, in the file system. (required)",
            "learning options", "--steps INT", "of the optimizer (default: 12)", "--is-fast",
            "not careful", "other options", "--seed INT", "--out", "Overrides.",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert "Not shown" not in shown and "not this" not in shown and "no-is-fast" not in shown
