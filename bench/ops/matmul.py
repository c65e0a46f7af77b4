"""What products in fixed tiles cost against those of the library, in decode and in prefill."""

from collections.abc import Iterator

import torch.nn.functional as F

from bench.case import OpCase, each, like, same_inputs
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU
from kernels.matmul import matmul, matmul_ref


def forward(shape: Shape, layer: str, rows: int, bias: bool = False) -> OpCase:
    """The product of one layer for `rows` tokens."""
    size, summed = shape.products[layer]
    dtype = shape.dtype
    return OpCase(
        "matmul",
        f"{shape.name} {layer}{' + bias' if bias else ''} {rows} rows",
        each(
            lambda tensor: (
                tensor(rows, summed, dtype=dtype),
                tensor(size, summed, dtype=dtype, scale=summed**-0.5),
                tensor(size, dtype=dtype) if bias else None,
            )
        ),
        matmul,
        like("matmul", matmul_ref),
        (rows * summed + size * summed + rows * size) * dtype.itemsize,
        2 * rows * size * summed,
        same_inputs(torch=F.linear),
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Every product of the decoder, of queries, keys and values with a bias too."""
    for layer in shape.products:
        yield forward(shape, layer, rows)
    yield forward(shape, "qkv_proj", rows, bias=True)


# Rows of a step's few samples and of many, and of a prefill; of a prompt nobody wants the logits of
# every token.
CASES = [
    forward(SHAPES["qwen3-8b" if ON_GPU else "qwen3-107m"], layer, rows)
    for rows in ((16, 64, 256, 4096) if ON_GPU else (32, 512))
    for layer in SHAPES["qwen3-8b"].products
    if layer != "lm_head" or rows <= 256
]
if ON_GPU:
    CASES += [
        forward(SHAPES["gemma2-27b"], layer, rows)
        for rows in (64, 4096)
        for layer in ("o_proj", "gate_up_proj")
    ]
