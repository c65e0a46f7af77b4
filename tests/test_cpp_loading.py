"""Where there is a compiler the C++ is what runs: without this test a library that is refused would
only make the others skip."""

import os

import pytest

from kernels import cpp
from kernels.cpp import build
from kernels.launch import INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="Triton runs")
@pytest.mark.skipif(os.environ.get("QUORUM_CPP") == "0", reason="C++ is off")
def test_the_library_is_loaded() -> None:
    try:
        build.instruction_set()
        build._compiler()
    except OSError as error:
        pytest.skip(str(error))
    assert cpp.implementation() == "cpp"
