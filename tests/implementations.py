"""The implementations that a specification in tests/spec runs under, and what holds their results.

In a plain run those of a CPU, torch and C++ (for the instruction set that QUORUM_ISA names); with
TRITON_INTERPRET=1 Triton under its interpreter; on a GPU all three.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import cpp
from kernels.launch import INTERPRETED, intercept

ON_GPU = torch.cuda.is_available()
HALVES = torch.float16, torch.bfloat16
# bf16 products under the interpreter are silently wrong.
DTYPES = {
    "torch": (torch.float64, torch.float32, *HALVES),
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, *(HALVES if ON_GPU else HALVES[:1])),
}
RUN_HERE = ("triton",) if INTERPRETED else ("torch", "cpp", "triton")[: 2 + ON_GPU]


@dataclass(frozen=True)
class Implementation:
    """One of "torch", "cpp" and "triton"; tests get it as the fixture `on`."""

    name: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.name == "triton" and ON_GPU else "cpu")

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Normal numbers, the same for every implementation."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(dtype).to(self.device)

    def poisoned(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """The numbers of `draw` in the midst of a wider tensor that is NaN elsewhere."""
        whole = torch.full([size + 5 for size in shape], math.nan, dtype=dtype, device=self.device)
        inner = whole[tuple(slice(2, -3) for _ in shape)]
        return inner.copy_(self.draw(*shape, dtype=dtype, seed=seed))

    def layouts(self, *shape: int) -> list[Tensor]:
        """Gradients as autograd may leave them: a slice, one row for all, one number for all, and
        with dimensions exchanged."""
        return [
            self.poisoned(*shape, seed=3),
            self.draw(shape[-1], seed=4).expand(shape),
            torch.ones((), device=self.device).expand(shape),
            self.draw(*shape[::-1], seed=5).permute(*reversed(range(len(shape)))),
        ]

    def untouched(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros of 16 bits. On a CPU they take address space, and memory only where touched."""
        if self.device.type == "cpu":
            return torch.from_numpy(np.zeros(shape, np.int16)).view(dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """How often each C++ function was called, or each Triton kernel launched; everything still
        runs. Fails where another implementation ran."""
        counts: dict[str, Counter[str]] = {name: Counter() for name in DTYPES}
        call = cpp.call

        def called(name: str, *arguments: Any, **form: Any) -> None:
            counts["cpp"][name] += 1
            call(name, *arguments, **form)

        def launched(
            kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]
        ) -> None:
            counts["triton"][kernel.__name__] += 1
            kernel[grid](*arguments, **options)

        with patch.object(cpp, "call", called):
            if self.name == "triton":
                # On a GPU the host draws a sample's first uniform: that is not what is counted.
                with intercept(launched), cpp.torch_only():
                    yield counts["triton"]
            else:
                yield counts[self.name]
        assert {name for name, found in counts.items() if found} <= {self.name}

    def run(self, op: Callable[..., Any], *arguments: Any) -> Any:
        """The results of an operation, which this implementation has computed: at least one C++
        function or kernel ran, and none where there is nothing to compute."""
        with self.counted() as counts:
            results = op(*arguments)
        wanted = self.name != "torch" and any(x.numel() for x in tuple_of(results))
        assert bool(counts) == wanted, counts
        return results

    def check(self, op: Callable[..., Any], reference: Callable[..., Any], *arguments: Any) -> Any:
        """Run an operation and hold every result to the reference; see `assert_exact`. Returns the
        results."""
        results = self.run(op, *arguments)
        assert_exact(results, reference, *arguments)
        return results

    def check_gradients(
        self,
        op: Callable[..., Any],
        reference: Callable[..., Any],
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
    ) -> Counter[str]:
        """The gradients of `op` in all inputs, for these gradients of its results, are those of
        `reference`, element by element and, which bounds what is wrong in length and in direction,
        in the Euclidean norm. Returns what ran."""
        size = len(inputs)

        def one(i: int, *arguments: Tensor) -> Tensor:
            return gradients(reference, arguments[:size], arguments[size:])[i]

        with self.counted() as counts:
            found = gradients(op, inputs, grads)
        arguments = (*inputs, *grads)
        for i, out in enumerate(found):
            assert_exact(out, partial(one, i), *arguments)
            exact, plain = one(i, *map(wide, arguments)), one(i, *map(on_cpu, arguments))
            error, own = (float((x.cpu() - exact).norm()) for x in (out, plain))
            units = 16 if out.dtype == torch.float64 else 1
            bound = units * torch.finfo(out.dtype).eps * float(exact.norm())
            assert error <= slack(out) * max(4 * own, bound)
        return counts


def tuple_of(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def wide(value: Any) -> Any:
    """Floating tensors as float64 on CPU, other tensors on CPU."""
    value = on_cpu(value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def slack(x: Tensor) -> int:
    """How many times as far off a result may be for being a GPU's: ex2.approx and div.full are off
    by 2 units in the last place of float32, where what is rounded is off by half a unit. Half types
    do not show it."""
    return 4 if x.is_cuda and x.dtype == torch.float32 else 1


def assert_exact(results: Any, reference: Callable[..., Any], *arguments: Any) -> None:
    """The error of each result against the reference in float64 is at most twice that of the
    reference itself in the arguments' dtype, plus one unit in the last place of the largest value;
    on a GPU see `slack`. What is infinite or NaN there is so here. In float64 the reference is no
    more exact than the result: 16 units."""
    exact = tuple_of(reference(*map(wide, arguments)))
    with cpp.torch_only():
        plain = tuple_of(reference(*map(on_cpu, arguments)))
    for ours, right, theirs in zip(tuple_of(results), exact, plain, strict=True):
        assert ours.shape == right.shape and ours.dtype == theirs.dtype
        if not ours.numel():
            continue
        odd = ~right.isfinite()
        found = ours.cpu().double()
        torch.testing.assert_close(found[odd], right[odd], rtol=0, atol=0, equal_nan=True)
        right, own, found = (x.double().masked_fill(odd, 0) for x in (right, theirs, found))
        error, own_error = ((x - right).abs().max().item() for x in (found, own))
        unit = torch.finfo(ours.dtype).eps * max(right.abs().max().item(), 1e-30)
        unit *= 16 if ours.dtype == torch.float64 else 1
        assert error <= slack(ours) * (2 * own_error + unit), (error, own_error, unit)


def gradients(
    op: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of `op` in all of its arguments, for these gradients of its results."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = tuple_of(op(*leaves))
    given = [(y, grad) for y, grad in zip(results, grads, strict=True) if y.requires_grad]
    return torch.autograd.grad([y for y, _ in given], leaves, [grad for _, grad in given])


def check_refused(
    op: Callable[..., Any], arguments: dict[str, Any], *refusals: tuple[dict[str, Any], str]
) -> None:
    """With each of these changes of its arguments the operation raises ValueError with that
    message."""
    for change, message in refusals:
        with pytest.raises(ValueError, match=message):
            op(**(arguments | change))


def gaps_in(arguments: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """What no kernel takes: that any of these tensors has gaps in its last dimension."""
    message = r"contiguous, got shape \(.*strides \(.*2,?\)"
    return [
        ({name: x.repeat_interleave(2, -1)[..., ::2]}, message)
        for name, x in arguments.items()
        if isinstance(x, Tensor)
    ]


def check_once_differentiable(op: Callable[..., Tensor], x: Tensor) -> None:
    """Gradients of the gradient of `op` in x are refused."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad((op(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any function of torch gives."""

    numel = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        results = function(*arguments, **(options or {}))
        tensors = (x for x in tree_leaves(results) if isinstance(x, Tensor))
        self.numel = max(self.numel, *(x.numel() for x in tensors), 0)
        return results
