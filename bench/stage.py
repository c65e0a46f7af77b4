"""A pytest plugin for runs that must end in time: a budget, and a log that survives a crash.

    python -m pytest -p bench.stage --budget 120 --log FILE ...

Tests that have not begun when the budget is spent are skipped. The log has one JSON line a test:
{test, outcome, seconds, reason?, ...}, with whatever the test put into `user_properties`; the
outcome is "passed", "failed", "skipped" or "not run". The line {test} alone says that a test began.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_NO_TIME = "the time budget is spent"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("stage")
    group.addoption("--budget", type=float, help="seconds after which no test begins")
    group.addoption("--log", type=Path, help="file for one JSON line a test")


def pytest_configure(config: pytest.Config) -> None:
    """Start the clock."""
    config.pluginmanager.register(_Stage(config.getoption("--budget"), config.getoption("--log")))


class _Stage:
    def __init__(self, budget: float | None, log: Path | None) -> None:
        self.deadline = None if budget is None else time.monotonic() + budget
        self.log = log

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            pytest.skip(_NO_TIME)
        self._write({"test": item.nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        line: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            **dict(report.user_properties),
        }
        if report.failed:
            line["reason"] = report.longreprtext[-2000:]
        elif report.skipped and isinstance(report.longrepr, tuple):
            line["reason"] = report.longrepr[2].removeprefix("Skipped: ")
            if line["reason"] == _NO_TIME:
                line["outcome"] = "not run"
        self._write(line)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.passed:
            return
        reason = report.longreprtext[-2000:]
        self._write(
            {"test": report.nodeid, "outcome": report.outcome, "seconds": 0.0, "reason": reason}
        )

    def _write(self, line: dict[str, Any]) -> None:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")


@dataclass
class StageLog:
    """What a log says. begun: a test that began and did not end, which is where a crash was."""

    tests: list[dict[str, Any]] = field(default_factory=list)
    begun: str | None = None

    def count(self, outcome: str) -> int:
        """Tests with this outcome."""
        return len(self.named(outcome))

    def named(self, outcome: str) -> list[str]:
        """Names of the tests with this outcome, each once."""
        names = [test["test"] for test in self.tests if test["outcome"] == outcome]
        return list(dict.fromkeys(names))

    def values(self, key: str) -> Iterator[Any]:
        """What passed tests said under a key."""
        return (t[key] for t in self.tests if key in t and t["outcome"] == "passed")


def read_log(path: Path) -> StageLog:
    """Read a log; a torn last line, which a killed run may leave, is dropped."""
    log = StageLog()
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    for line in map(json.loads, lines):
        if "outcome" in line:
            log.tests.append(line)
            log.begun = None
        else:
            log.begun = line["test"]
    return log
