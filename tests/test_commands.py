"""train/commands.py, and what all commands have in common: help, groups, one line for an error."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from engine.command import help_of, parts_of
from tests.args import option_names
from train.commands import COMMANDS, main

ROOT = Path(__file__).parent.parent


def settings_of(name: str) -> Any:
    module = import_module(COMMANDS[name][0])
    return getattr(module, "Args", None) or module.Options


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option says what it is, in a group with a name, and there is an example of options that
    exist."""
    with pytest.raises(SystemExit) as error:
        main([name, "--help"])
    assert error.value.code == 0
    shown = capsys.readouterr().out
    settings = settings_of(name)
    names, texts = option_names(settings), dict(help_of(settings))
    kinds: list[type] = [*map(type, parts_of(settings).values())]
    for kind in kinds:
        texts |= help_of(kind)
    assert set(names) <= texts.keys() and len(set(names)) == len(names)
    flags = [f"--{name.replace('_', '-')}" for name in names]
    missing = [flag for flag in flags if not re.search(rf"^\W {flag}[ ,]", shown, re.MULTILINE)]
    assert not missing and "other options" not in shown
    _, example, rest = shown.partition(f"\n    quorum {name} ")
    used = [word for word in rest.split("\n\n")[0].split() if word.startswith("--")]
    assert example and used and set(used) <= set(flags)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--k", "0"], "k = 0"),
        (["sft", "--model", "nowhere", "--out", "out"], "nowhere: no such directory"),
        (["rft", "--data", "none", "--out", "out"], "'none'"),
        (["grpo", "--steps", "0", "--out", "out"], "steps = 0"),
        (["meta_rm", "--model", "nowhere", "--out", "out"], "nowhere: no such directory"),
        (["world", "--rows", "0"], "rows = 0"),
        (["world", "--out", "no/rows"], "'no/rows'"),
        (["judge"], "there is no command 'judge'"),
        (["--lable"], "there is no command '--lable'"),
    ],
)
def test_what_the_user_got_wrong(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_an_error_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No row of the first step can be judged."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "%s", "responses": ["a", "b"], "label": 0}\n' % ("long " * 9000))
    arguments = ["grpo", "--data", str(data), "--rows", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: step 0: no row could be judged")


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["-h"]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in COMMANDS)


def test_help_needs_no_torch() -> None:
    """So that it comes at once: the list, and that of sampling."""
    program = (
        "import sys\nfrom train.commands import main\nmain(['--help'])\n"
        "try:\n    main(['sample', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
