"""Benchmarks run under pytest: `measured` takes an `OpCase`, checks it, times it, reports it.

The end is a table and one JSON line, of what was measured and nothing else.
"""

import gc
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.case import OpCase
from bench.ceilings import Ceilings, measure_ceilings
from bench.figures import Figure, measure, summary, table
from bench.provenance import print_json
from bench.timing import ON_GPU
from kernels.launch import INTERPRETED

_figures = pytest.StashKey[list[Figure]]()
_ceilings = pytest.StashKey[Ceilings]()


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to time an interpreter."""
    if INTERPRETED:
        raise pytest.UsageError("TRITON_INTERPRET is set: interpreted kernels are not timed")
    config.stash[_figures] = []


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config) -> Ceilings:
    """The device's ceilings, measured once a run."""
    pytestconfig.stash[_ceilings] = measured = measure_ceilings()
    return measured


@pytest.fixture
def measured(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture, ceilings: Ceilings
) -> Iterator[Callable[[OpCase], Figure]]:
    """Measure and report. The table of pytest-benchmark shows whole rotations of ours."""

    def repeat(target: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        benchmark.pedantic(target, setup=setup, rounds=rounds, iterations=1)

    def run(case: OpCase) -> Figure:
        figure = measure(case, ceilings, repeat)
        benchmark.extra_info.update(figure.as_dict())
        request.config.stash[_figures].append(figure)
        return figure

    with torch.inference_mode():
        yield run
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The table."""
    found = config.stash.get(_ceilings, None)
    if found is None:
        return
    terminalreporter.section("figures")
    load = f"; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    terminalreporter.line(found.describe() + ("" if ON_GPU else load))
    figures = config.stash[_figures]
    terminalreporter.line(table(figures))


def pytest_unconfigure(config: pytest.Config) -> None:
    """The JSON line."""
    found = config.stash.get(_ceilings, None)
    if found is not None:
        figures = config.stash[_figures]
        print_json(summary(found, figures))
