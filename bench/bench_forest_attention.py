"""Attention: decode on trees of one to three levels, prefill, and gradients; a training step's
forward and backward on a prompt shared by several responses, against each with its own.

On a GPU a part of the grid k x prefix x suffix x group x D x levels, with and without soft-cap and
window, that has every value of each; the rows that targets are set for come first. On CPU smaller
forests of the same kinds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.figures import Figure, Work, calls_on
from bench.forests import Heads, Tree, Workload, make_decode, make_prefill
from bench.rivals import decode_peers, prefill_peers, sdpa_backward, unshared_gradients
from bench.shapes import SHAPES
from bench.timing import ON_GPU, num_sets, randn
from kernels.forest_attention import (
    AttentionOptions,
    forest_attention,
    forest_attention_with_lse,
    torch_impl,
    triton_backward,
)
from kernels.forest_attention.plan import ForestPlan

QWEN = Heads.of(SHAPES["qwen3-8b"])
GEMMA_9B, GEMMA_27B = Heads.of(SHAPES["gemma2-9b"]), Heads.of(SHAPES["gemma2-27b"])
POCKET, SMALL = Heads.of(SHAPES["pocket"]), Heads.of(SHAPES["qwen3-107m"])


def pair(k: int, prefix: int, suffix: int) -> Tree:
    """k samples of one prompt."""
    return Tree((1, k), (prefix, suffix))


@dataclass(frozen=True)
class Case:
    """A tree under some heads."""

    tree: Tree
    heads: Heads

    @property
    def decode_name(self) -> str:
        """The name of its decode step in tables."""
        return f"{self.tree.describe()}, {self.heads.describe()}"

    @property
    def prefill_name(self) -> str:
        """The name of its prefill in tables."""
        sizes = zip(self.tree.nodes, self.tree.tokens, strict=True)
        tokens = " + ".join(f"{n} x {t}" if n > 1 else str(t) for n, t in sizes)
        return f"{tokens} tokens, {self.heads.describe()}"


THREE_LEVELS = Case(Tree((1, 8, 64), (1024, 2048, 256)), QWEN)
ROOT_ALONE = Case(pair(128, 16384, 0), QWEN)
PREFILL_8K = Case(Tree((1,), (8192,)), QWEN)
PACKED = Case(Tree((1, 4), (4096, 512)), QWEN)

TARGETS = [
    Case(pair(64, 4096, 512), QWEN),
    Case(pair(32, 4096, 512), QWEN),
    Case(pair(64, 8192, 512), QWEN),
    Case(pair(8, 4096, 128), QWEN),
    THREE_LEVELS,
    Case(pair(128, 16384, 64), QWEN),
    ROOT_ALONE,
]
GRID = [
    Case(pair(8, 512, 64), QWEN),
    Case(pair(16, 2048, 512), QWEN),
    Case(pair(32, 512, 2048), QWEN),
    Case(pair(128, 2048, 512), QWEN),
    Case(pair(16, 8192, 8192), QWEN),
    Case(Tree((32, 32), (2048, 512)), QWEN),
    Case(Tree((1, 4, 32), (512, 1024, 512)), QWEN),
    Case(Tree((4, 64), (2048, 512)), QWEN),
    Case(pair(32, 4096, 512), replace(QWEN, num_heads=8)),
    Case(pair(32, 4096, 512), replace(QWEN, num_heads=16)),
    Case(pair(32, 4096, 512), replace(QWEN, num_heads=64)),
    Case(pair(32, 4096, 512), replace(QWEN, dtype=torch.float16)),
    Case(pair(32, 8192, 512), replace(QWEN, window=4096)),
    Case(pair(32, 4096, 512), replace(QWEN, softcap=50.0)),
    Case(pair(32, 4096, 512), replace(QWEN, head_dim=256)),
    Case(pair(32, 4096, 512), GEMMA_9B),
    Case(pair(32, 8192, 512), Heads.of(SHAPES["gemma2-9b"], 4096)),
    Case(pair(64, 4096, 512), GEMMA_27B),
]
PREFILLS = [
    Case(Tree((1,), (2048,)), QWEN),
    Case(Tree((1, 8), (4096, 512)), QWEN),
    Case(Tree((1,), (8192,)), Heads.of(SHAPES["gemma2-9b"], 4096)),
]
CPU_TARGETS = [
    Case(pair(32, 1024, 64), SMALL),
    Case(Tree((1, 4, 16), (128, 256, 64)), POCKET),
]
CPU_GRID = [
    Case(pair(8, 256, 64), POCKET),
    Case(pair(32, 512, 64), POCKET),
    Case(pair(16, 512, 64), replace(POCKET, softcap=50.0, window=256)),
    Case(Tree((16, 16), (256, 64)), POCKET),
]
CPU_PACKED = Case(Tree((1, 4), (256, 64)), SMALL)
CPU_PREFILLS = [Case(Tree((1, 4), (256, 64)), POCKET), Case(Tree((1,), (512,)), SMALL)]

DECODES = GRID if ON_GPU else CPU_GRID
TARGET_DECODES = TARGETS if ON_GPU else CPU_TARGETS
MORE_PREFILLS = PREFILLS if ON_GPU else CPU_PREFILLS[1:]
TARGET_PREFILLS = [PREFILL_8K] if ON_GPU else CPU_PREFILLS[:1]
TARGET_BACKWARD = PREFILL_8K if ON_GPU else CPU_PREFILLS[1]
TARGET_PACKED = PACKED if ON_GPU else CPU_PACKED


def layers_of(case: Case) -> int:
    """How many input sets a case takes."""
    return num_sets(case.tree.num_tokens * case.heads.cell_bytes)


def make_work(op: str, name: str, workload: Workload) -> Work:
    """The operation on a workload, without peers."""
    calls = calls_on(forest_attention, workload.sets)

    return Work(op, name, *workload.cost, calls, workload.check)


def decode_work(case: Case) -> Work:
    """A decode step with its peers."""
    workload = make_decode(case.tree, case.heads, layers_of(case))
    work = make_work("decode attention", case.decode_name, workload)
    work.peers, work.absent = decode_peers(case.tree, workload)
    return work


def prefill_work(case: Case) -> Work:
    """A prefill with its peers."""
    workload = make_prefill(case.tree, case.heads, layers_of(case))
    work = make_work("prefill attention", case.prefill_name, workload)
    work.peers, work.absent = prefill_peers(case.tree, workload)
    return work


def attend_backward(
    d_o: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ForestPlan,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients alone."""
    run = triton_backward if ON_GPU else torch_impl
    return run.run_backward(q, k, v, o, lse, d_o, None, plan, options)


def attend_and_back(d_o: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, after the forward."""
    o, lse = forest_attention_with_lse(*arguments)  # type: ignore[arg-type]
    return attend_backward(d_o, o, lse, *arguments)  # type: ignore[arg-type]


def backward_work(case: Case) -> Work:
    """The gradients of a prefill. They take five products where the forward takes two."""
    workload = make_prefill(case.tree, case.heads, layers_of(case))
    grads = [randn(*q.shape, dtype=q.dtype) for q in workload.queries]
    calls = [
        partial(attend_backward, d_o, *forest_attention_with_lse(*arguments), *arguments)  # type: ignore[arg-type]
        for d_o, arguments in zip(grads, workload.sets, strict=True)
    ]
    num_bytes, flops = workload.cost
    work = Work(
        "attention backward", case.prefill_name, 2 * num_bytes, flops * 5 // 2, calls,
        lambda outs, factor: workload.check_backward(outs, grads[0], factor),
    )  # fmt: skip
    if case.heads.softcap is None and case.heads.window is None and case.tree.samples == 1:
        work.peers["sdpa"] = sdpa_backward(workload, grads)
    else:
        work.absent["sdpa"] = "one causal sequence only"
    return work


def packed_work(case: Case) -> Work:
    """Forward and backward of a packed tree, with gradients at its last level alone; the same
    sequences without sharing beside it."""
    workload = make_prefill(case.tree, case.heads, layers_of(case))
    grads = [randn(*q.shape, dtype=q.dtype) for q in workload.queries]
    for d_o in grads:
        d_o[workload.plan.positions < case.tree.prefix] = 0
    calls = [
        partial(attend_and_back, d_o, *arguments)
        for d_o, arguments in zip(grads, workload.sets, strict=True)
    ]
    num_bytes, flops = workload.cost
    return Work(
        "attention forward + backward, packed", case.prefill_name, 3 * num_bytes, flops * 7 // 2,
        calls, lambda outs, factor: workload.check_backward(outs, grads[0], factor),
        {"unshared": unshared_gradients(case.tree, workload, grads, attend_and_back)},
    )  # fmt: skip


def test_target_backward(measured: Callable[[Work], Figure]) -> None:
    measured(backward_work(TARGET_BACKWARD))


def test_target_packed(measured: Callable[[Work], Figure]) -> None:
    measured(packed_work(TARGET_PACKED))


@pytest.mark.parametrize("case", TARGET_DECODES, ids=lambda case: case.decode_name)
def test_target_decode(case: Case, measured: Callable[[Work], Figure]) -> None:
    measured(decode_work(case))


@pytest.mark.parametrize("case", TARGET_PREFILLS, ids=lambda case: case.prefill_name)
def test_target_prefill(case: Case, measured: Callable[[Work], Figure]) -> None:
    measured(prefill_work(case))


@pytest.mark.parametrize("case", DECODES, ids=lambda case: case.decode_name)
def test_decode(case: Case, measured: Callable[[Work], Figure]) -> None:
    measured(decode_work(case))


@pytest.mark.parametrize("case", MORE_PREFILLS, ids=lambda case: case.prefill_name)
def test_prefill(case: Case, measured: Callable[[Work], Figure]) -> None:
    measured(prefill_work(case))
