"""Uninitialised memory is NaN in tests of Triton kernels, so that what no program wrote shows; and
fixtures for all."""

from collections.abc import Iterator

import pytest
import torch

from kernels import cpp
from tests import attention_packages


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("triton") is None:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def in_torch() -> Iterator[None]:
    """Operations on CPU run in torch, as where there is no C++ compiler."""
    with cpp.torch_only():
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in the subprocesses that are killed: the order of additions depends on the number of
    threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn and xformers, as stand-ins."""
    attention_packages.install(monkeypatch)
