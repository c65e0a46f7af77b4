"""Attention: decode on trees of one to three levels, and prefill.

On a GPU a part of the grid k x prefix x suffix x group x D x levels, with and without soft-cap and
window, that has every value of each; the rows that targets are set for come first. On CPU smaller
forests of the same kinds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from bench.figures import Figure, Work, calls_on
from bench.forests import Heads, Tree, Workload, make_decode, make_prefill
from bench.rivals import decode_peers, prefill_peers
from bench.shapes import SHAPES
from bench.timing import ON_GPU, num_sets
from kernels.forest_attention import forest_attention

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
CPU_PREFILLS = [Case(Tree((1, 4), (256, 64)), POCKET), Case(Tree((1,), (512,)), SMALL)]

DECODES = GRID if ON_GPU else CPU_GRID
TARGET_DECODES = TARGETS if ON_GPU else CPU_TARGETS
MORE_PREFILLS = PREFILLS if ON_GPU else CPU_PREFILLS[1:]
TARGET_PREFILLS = [PREFILL_8K] if ON_GPU else CPU_PREFILLS[:1]


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
