"""Attention: decode on trees of one to three levels, prefill, and gradients; a training step's
forward and backward on a prompt shared by several responses, against each with its own.

On a GPU a part of the grid k x prefix x suffix x group x D x levels, with and without soft-cap and
window, that has every value of each. On CPU smaller forests of the same kinds.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from bench.attention_peers import decode_peers, prefill_peers, sdpa_backward, unshared_gradients
from bench.case import Arguments, OpCase, Peers
from bench.forests import (
    Heads,
    Tree,
    Workload,
    decode_cost,
    make_decode,
    make_prefill,
    prefill_cost,
)
from bench.shapes import DECODE_ROWS, SHAPES, Shape
from bench.timing import ON_GPU, Fill, empty
from kernels.forest_attention import forest_attention, torch_impl, triton_backward
from kernels.launch import runs_triton

Forest = tuple[Tree, Heads]
Gradients = tuple[Tensor, Tensor, Tensor]  # of queries, keys and values


def _attend(work: Workload, layer: int) -> Tensor:
    return forest_attention(*work.arguments(layer))


def _attend_backward(
    work: Workload, layer: int, d_o: Tensor, d_lse: Tensor | None, o: Tensor, lse: Tensor
) -> Gradients:
    """The gradients alone."""
    q, k, v, *rest = work.arguments(layer)
    room = triton_backward if runs_triton(q) else torch_impl
    return room.run_backward(q, k, v, o, lse, d_o, d_lse, *rest)


def _attend_and_back(work: Workload, layer: int, d_o: Tensor) -> Gradients:
    """The gradients, after the forward."""
    return _attend_backward(work, layer, d_o, None, *work.attend(layer))


def _prefill_name(tree: Tree, heads: Heads) -> str:
    sizes = zip(tree.nodes, tree.tokens, strict=True)
    tokens = " + ".join(f"{n} x {t}" if n > 1 else str(t) for n, t in sizes)
    return f"{tokens} tokens, {heads.describe()}"


def _forward(
    op: str,
    name: str,
    make: Callable[[Tree, Heads, int, Fill], Workload],
    peers: Callable[[Tree, Workload], Peers],
    cost: tuple[int, int],
    forest: Forest,
    per_split: bool,
) -> OpCase:
    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        work = make(*forest, count, tensor)
        work.plan.per_split = per_split
        return [(work, layer) for layer in range(count)]

    return OpCase(
        op,
        name + (", per split" if per_split else ""),
        make_inputs,
        _attend,
        lambda arguments, out, factor: arguments[0].check(out, factor),
        *cost,
        lambda inputs: peers(forest[0], inputs[0][0]),
    )


def decode(tree: Tree, heads: Heads, per_split: bool = False) -> OpCase:
    """A decode step, with one partial for every split or with as few as there can be."""
    return _forward(
        "decode attention", f"{tree.describe()}, {heads.describe()}", make_decode, decode_peers,
        decode_cost(tree, heads), (tree, heads), per_split,
    )  # fmt: skip


def prefill(tree: Tree, heads: Heads, per_split: bool = False) -> OpCase:
    """The prefill of all nodes of a tree."""
    return _forward(
        "prefill attention", _prefill_name(tree, heads), make_prefill, prefill_peers,
        prefill_cost(tree, heads), (tree, heads), per_split,
    )  # fmt: skip


def backward(tree: Tree, heads: Heads, lse_grad: bool = False) -> OpCase:
    """The gradients of a prefill, from those of log-sum-exps too or not. They take five products
    where the forward takes two."""

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        work = make_prefill(tree, heads, count, tensor)
        inputs: list[Arguments] = []
        for layer, q in enumerate(work.queries):
            d_o, d_lse = tensor(*q.shape, dtype=q.dtype), tensor(*q.shape[:2])
            o, lse = (d_o, d_lse) if tensor is empty else work.attend(layer)
            inputs.append((work, layer, d_o, d_lse if lse_grad else None, o, lse))
        return inputs

    def check(arguments: Arguments, outs: Gradients, factor: float) -> None:
        work, _, d_o, d_lse, *_ = arguments
        work.check_backward(outs, d_o, d_lse, factor)

    def peers(inputs: list[Arguments]) -> Peers:
        if heads.softcap is not None or heads.window is not None or tree.samples > 1 or lse_grad:
            return {"sdpa": "one causal sequence only"}
        return {"sdpa": sdpa_backward(inputs[0][0], [arguments[2] for arguments in inputs])}

    num_bytes, flops = prefill_cost(tree, heads)
    return OpCase(
        "attention backward",
        _prefill_name(tree, heads) + (", log-sum-exps" if lse_grad else ""),
        make_inputs,
        _attend_backward,
        check,
        2 * num_bytes,
        flops * 5 // 2,
        peers,
    )


def packed(tree: Tree, heads: Heads) -> OpCase:
    """Forward and backward of a packed tree, with gradients at its last level alone; the same
    sequences without sharing beside it."""

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        work = make_prefill(tree, heads, count, tensor)
        inputs = []
        for layer, q in enumerate(work.queries):
            d_o = tensor(*q.shape, dtype=q.dtype)
            d_o[work.plan.positions < tree.prefix] = 0
            inputs.append((work, layer, d_o))
        return inputs

    def check(arguments: Arguments, outs: Gradients, factor: float) -> None:
        work, _, d_o = arguments
        work.check_backward(outs, d_o, None, factor)

    def peers(inputs: list[Arguments]) -> Peers:
        grads = [d_o for *_, d_o in inputs]
        return {"unshared": unshared_gradients(tree, inputs[0][0], grads, _attend_and_back)}

    num_bytes, flops = prefill_cost(tree, heads)
    return OpCase(
        "attention forward + backward, packed",
        _prefill_name(tree, heads),
        make_inputs,
        _attend_and_back,
        check,
        3 * num_bytes,
        flops * 7 // 2,
        peers,
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Decode of `rows` samples, or a prefill of as many tokens with its gradients; with the model's
    soft-cap, with and without its window, free and with one partial for every split."""
    for window, per_split in product(dict.fromkeys((None, shape.window)), (False, True)):
        heads = Heads.of(shape, window)
        if rows <= max(DECODE_ROWS):
            yield decode(pair(rows, 2048, 40), heads, per_split)
        else:
            for tree in (Tree((1,), (rows,)), Tree((1, 4), (512, 20))):
                yield prefill(tree, heads, per_split)
                yield backward(tree, Heads.without_cache(shape, window), lse_grad=per_split)
        if rows == 16:
            yield decode(Tree((1, 4, rows), (512, 300, 40)), heads, per_split)
            yield decode(Tree((rows, rows), (700, 16)), heads, per_split)


def pair(k: int, prefix: int, suffix: int) -> Tree:
    """k samples of one prompt."""
    return Tree((1, k), (prefix, suffix))


QWEN = Heads.of(SHAPES["qwen3-8b"])
GEMMA_9B, GEMMA_27B = Heads.of(SHAPES["gemma2-9b"]), Heads.of(SHAPES["gemma2-27b"])
# Of one model: over a cache, absorbed, and without one.
DEEPSEEK, EXPANDED = (of(SHAPES["deepseek-v2-lite"]) for of in (Heads.of, Heads.without_cache))
POCKET, SMALL = Heads.of(SHAPES["pocket"]), Heads.of(SHAPES["qwen3-107m"])

THREE_LEVELS: Forest = Tree((1, 8, 64), (1024, 2048, 256)), QWEN
ROOT_ALONE: Forest = pair(128, 16384, 0), QWEN
PREFILL_8K: Forest = Tree((1,), (8192,)), QWEN
PACKED: Forest = Tree((1, 4), (4096, 512)), QWEN

DECODES: list[Forest] = [
    (pair(64, 4096, 512), QWEN),
    (pair(32, 4096, 512), QWEN),
    (pair(64, 8192, 512), QWEN),
    (pair(8, 4096, 128), QWEN),
    THREE_LEVELS,
    (pair(128, 16384, 64), QWEN),
    ROOT_ALONE,
    (pair(8, 512, 64), QWEN),
    (pair(16, 2048, 512), QWEN),
    (pair(32, 512, 2048), QWEN),
    (pair(128, 2048, 512), QWEN),
    (pair(16, 8192, 8192), QWEN),
    (Tree((32, 32), (2048, 512)), QWEN),
    (Tree((1, 4, 32), (512, 1024, 512)), QWEN),
    (Tree((4, 64), (2048, 512)), QWEN),
    (pair(32, 4096, 512), replace(QWEN, num_heads=8)),
    (pair(32, 4096, 512), replace(QWEN, num_heads=16)),
    (pair(32, 4096, 512), replace(QWEN, num_heads=64)),
    (pair(32, 4096, 512), replace(QWEN, dtype=torch.float16)),
    (pair(32, 8192, 512), replace(QWEN, window=4096)),
    (pair(32, 4096, 512), replace(QWEN, softcap=50.0)),
    (pair(32, 4096, 512), replace(QWEN, head_dim=256)),
    (pair(32, 4096, 512), GEMMA_9B),
    (pair(32, 8192, 512), replace(GEMMA_9B, window=4096)),
    (pair(64, 4096, 512), GEMMA_27B),
    (pair(32, 4096, 512), DEEPSEEK),
]
PREFILLS: list[Forest] = [
    PREFILL_8K,
    (Tree((1,), (2048,)), QWEN),
    (Tree((1, 8), (4096, 512)), QWEN),
    (Tree((1,), (8192,)), replace(GEMMA_9B, window=4096)),
]
CPU_DECODES: list[Forest] = [
    (pair(32, 1024, 64), SMALL),
    (Tree((1, 4, 16), (128, 256, 64)), POCKET),
    (pair(8, 256, 64), POCKET),
    (pair(32, 512, 64), POCKET),
    (pair(16, 512, 64), replace(POCKET, softcap=50.0, window=256)),
    (Tree((16, 16), (256, 64)), POCKET),
    (pair(32, 512, 64), Heads.of(SHAPES["v2-lite-small"])),
]
CPU_PREFILLS: list[Forest] = [
    (Tree((1, 4), (256, 64)), POCKET),
    (Tree((1,), (512,)), SMALL),
    *((Tree((1,), (512,)), replace(each, dtype=torch.float32)) for each in (DEEPSEEK, EXPANDED)),
]

CASES = [
    backward(*(PREFILL_8K if ON_GPU else CPU_PREFILLS[1])),
    packed(*(PACKED if ON_GPU else (Tree((1, 4), (256, 64)), SMALL))),
    *(decode(*forest) for forest in (DECODES if ON_GPU else CPU_DECODES)),
    *(prefill(*forest) for forest in (PREFILLS if ON_GPU else CPU_PREFILLS)),
]
