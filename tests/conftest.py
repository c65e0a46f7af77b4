"""Uninitialised memory is NaN in tests of Triton kernels, so that what no program wrote shows; and
fixtures for all."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kernels import cpp
from kernels.launch import INTERPRETED
from tests import attention_packages


def _find_builtins_once() -> None:
    """Triton's interpreter looks through the whole language at each call of a function: an eighth
    of these tests' time."""
    import triton.language as tl
    from triton.runtime import interpreter

    names = {
        package: [name for name, each in inspect.getmembers(package) if tl.core.is_builtin(each)]
        for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    }

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


if INTERPRETED:
    _find_builtins_once()


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.parent.name not in ("spec", "triton"):
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


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter adds up a tile's products in index order. NumPy's library, which it asks
    otherwise, adds in an order that depends on the tile's rows on some processors."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total = d.data.copy()
        for k in range(a.data.shape[-1]):
            column = a.data[..., :, k, None].astype(total.dtype)
            total += column * b.data[..., None, k, :].astype(total.dtype)
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


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
