"""A test of a specification takes `on`, the implementation that it runs under, and may take
`dtype`, one of those that the implementation computes in."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from kernels import cpp
from tests.implementations import DTYPES, RUN_HERE, Implementation


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "on" not in metafunc.fixturenames:
        return
    chosen = metafunc.definition.get_closest_marker("implementations")
    names = [name for name in RUN_HERE if chosen is None or name in chosen.args]
    marks = {name: [pytest.mark.triton] if name == "triton" else [] for name in names}
    if "dtype" not in metafunc.fixturenames:
        cases = [pytest.param(name, marks=marks[name], id=name) for name in names]
        metafunc.parametrize("on", cases, indirect=True)
        return
    pairs = [
        pytest.param(name, dtype, marks=marks[name], id=f"{name}-{str(dtype)[6:]}")
        for name in names
        for dtype in DTYPES[name]
    ]
    metafunc.parametrize(("on", "dtype"), pairs, indirect=["on"])


@pytest.fixture
def on(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    if request.param == "cpp" and not cpp.runs_cpp(torch.zeros(1)):
        pytest.skip("there is no C++ compiler")
    with cpp.torch_only() if request.param == "torch" else nullcontext():
        yield Implementation(request.param)
