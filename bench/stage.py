"""A pytest plugin for runs that must end in time: a budget, and a log that survives a crash.

    python -m pytest -p bench.stage --budget 120 --log FILE ...

Tests that have not begun when the budget is spent are skipped. The log has two JSON lines a test:
{test} when it begins, {test, outcome, seconds, reason?} when it is over; the outcome is "passed",
"failed", "skipped" or "not run". Where xdist runs the tests, its controller alone writes.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

NO_TIME = "the time budget is spent"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("stage")
    group.addoption("--budget", type=float, help="seconds after which no test begins")
    group.addoption("--log", type=Path, help="file for the JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    """Start the clock."""
    log = None if hasattr(config, "workerinput") else config.getoption("--log")
    config.pluginmanager.register(_Stage(config.getoption("--budget"), log))


class _Stage:
    def __init__(self, budget: float | None, log: Path | None) -> None:
        self.deadline = None if budget is None else time.monotonic() + budget
        self.log = log

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            pytest.skip(NO_TIME)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"test": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        line: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
        }
        if report.failed:
            line["reason"] = report.longreprtext[-2000:]
        elif report.skipped and isinstance(report.longrepr, tuple):
            line["reason"] = report.longrepr[2].removeprefix("Skipped: ")
            if line["reason"] == NO_TIME:
                line["outcome"] = "not run"
        self._write(line)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            line = {"test": report.nodeid, "outcome": "failed", "seconds": 0.0}
            self._write(line | {"reason": report.longreprtext[-2000:]})

    def _write(self, line: dict[str, Any]) -> None:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> dict[str, Any]:
    """What a log says, for JSON: `passed` and `skipped`, how many; `failed`, each with its reason;
    `not_run`, the names; `begun`, the names of those that began and did not end, of which one is
    where a crash was. A torn last line, which a run that was ended may leave, is dropped."""
    tests: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, path.read_text().split("\n")[:-1] if path.exists() else []):
        if tests.get(line["test"], {}).get("outcome") != "failed":  # in its call, or after it
            tests[line["test"]] = line

    def named(outcome: str | None) -> list[str]:
        return [name for name, line in tests.items() if line.get("outcome") == outcome]

    return {
        "passed": len(named("passed")),
        "skipped": len(named("skipped")),
        "failed": [{"test": name, "reason": tests[name]["reason"]} for name in named("failed")],
        "not_run": named("not run"),
        "begun": named(None),
    }
