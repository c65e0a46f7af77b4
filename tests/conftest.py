"""Uninitialised memory is NaN in tests of Triton kernels, so that what no program wrote shows; and
fixtures for all."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kernels import cpp
from kernels.launch import INTERPRETED
from tests import attention_packages


def _hasten_interpreter() -> None:
    """More than half of Triton's time under its interpreter is here not spent: it patches the
    language at each call of a function, makes the type and shape of each value anew, and checks
    integers for overflow by operations of the language."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    numpy_dtype, new_type, new_tensor = (
        interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__
    )  # fmt: skip
    dtypes: dict[str, Any] = {}
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, dict[str, Any]] = {}

    def get_np_dtype(dtype: Any) -> Any:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = numpy_dtype(dtype)
        return dtypes[dtype.name]

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in types:
            new_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = (*type.shape,) if type.is_block() else ()
        if key not in shapes:
            new_tensor(self, handle, type)
            shapes[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    def check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth < 64:
            same = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
            found = same(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
            low, high = kind.get_int_min_value(), kind.get_int_max_value()
            assert low <= found.min() and found.max() <= high, f"{kind} overflow in {operation}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
    interpreter._get_np_dtype = get_np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = init_type, init_tensor


if INTERPRETED:
    _hasten_interpreter()


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
