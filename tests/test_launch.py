"""Launches are intercepted, and tiles chosen, for one thread and for as long as asked."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kernels.launch import INTERPRETED, intercept, launch, launch_beside, runs_triton
from kernels.target import TARGETS, Target, target_of

X = torch.zeros(2)


def test_a_handler_gets_the_launches_of_its_thread_alone() -> None:
    def no_kernel(*_: Any) -> None:
        raise AssertionError("launched")

    def elsewhere() -> tuple[bool, Target]:
        return runs_triton(X), target_of(X)

    here, calls = target_of(X), []
    other = ThreadPoolExecutor(1)
    with other, intercept(lambda *call: calls.append(call), TARGETS["gfx942"]):
        assert runs_triton(X) and target_of(X) is TARGETS["gfx942"]
        assert other.submit(elsewhere).result() == (INTERPRETED, here)
        launch(no_kernel, (3, 2), X, 7, BLOCK=4)
        launch(no_kernel, (3, 0), X)
        with intercept(no_kernel):  # without a target only what would be launched anyway
            assert target_of(X) == here and runs_triton(X) == INTERPRETED
        assert target_of(X) is TARGETS["gfx942"]
    ((kernel, grid, arguments, options),) = calls
    assert kernel is no_kernel and (grid, options) == ((3, 2), {"BLOCK": 4})
    assert arguments[0] is X and arguments[1] == 7
    assert elsewhere() == (INTERPRETED, here)


def test_an_error_ends_an_interception() -> None:
    with pytest.raises(KeyError), intercept(lambda *_: None, TARGETS["sm_80"]):
        raise KeyError
    assert runs_triton(X) == INTERPRETED and target_of(X) is not TARGETS["sm_80"]


def test_without_a_gpu_launches_beside_others_run_at_once() -> None:
    calls: list[int] = []
    join = launch_beside(X, lambda: calls.append(1))
    assert calls == [1]
    join()
    assert calls == [1]
