"""Experts of a mixture, for a step's tokens and a prefill's, and their gradients."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Arguments, OpCase, Peers, assert_close, like, same_inputs
from bench.shapes import SHAPES, Shape, experts_met
from bench.timing import DEVICE, ON_GPU, Fill
from kernels.moe import moe, moe_ref

Mix = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str], Tensor]


def _inputs(shape: Shape, rows: int, tensor: Fill) -> Arguments:
    """Any experts are as likely as any others, and a token's are distinct."""
    hidden, dtype, experts = shape.hidden_size, shape.dtype, shape.mixture
    count, width, per_token = experts.count, experts.intermediate_size, experts.routing.per_token
    chosen = torch.rand(rows, count, device=DEVICE).argsort(1)[:, :per_token]
    return (
        tensor(rows, hidden, dtype=dtype),
        tensor(count, 2 * width, hidden, dtype=dtype, scale=hidden**-0.5),
        tensor(count, hidden, width, dtype=dtype, scale=width**-0.5),
        chosen,
        tensor(rows, per_token).abs(),
        shape.activation,
    )


def _active(halves: Tensor, activation: str) -> Tensor:
    gate, up = halves.chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def _loop(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """Expert by expert, as transformers does without kernels; the host looks at each."""
    out = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        active = _active(x[token] @ gate_up[expert].T, activation)
        own = active @ down[expert].T * weights[token, choice, None]
        out.index_add_(0, token, own.to(x.dtype))
    return out


def _grouped(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """Torch's grouped products, over rows that are sorted by expert."""
    chosen, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(1, len(down) + 1, device=x.device)
    ends = torch.searchsorted(chosen, numbers).to(torch.int32)
    rows = x[order // experts.shape[1]]
    active = _active(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends), activation)
    outputs = torch.empty(len(order), x.shape[1], dtype=x.dtype, device=x.device)
    outputs[order] = F.grouped_mm(active, down.transpose(1, 2), offs=ends)
    return (weights[..., None] * outputs.unflatten(0, experts.shape)).sum(1).to(x.dtype)


def _name(shape: Shape, rows: int) -> str:
    experts = shape.mixture
    return f"{shape.name} {experts.routing.per_token} of {experts.count} {rows} rows"


def _cost(shape: Shape, rows: int) -> tuple[int, int]:
    """Bytes of the weights that such a choice reads on average, and of rows; operations."""
    hidden, experts = shape.hidden_size, shape.mixture
    per_token, one = experts.routing.per_token, 3 * experts.intermediate_size * hidden
    num_bytes = (int(experts_met(experts, rows) * one) + 2 * rows * hidden) * shape.dtype.itemsize
    return num_bytes, 2 * rows * per_token * one


def forward(shape: Shape, rows: int) -> OpCase:
    """The mixture's outputs for `rows` tokens."""
    num_bytes, flops = _cost(shape, rows)
    return OpCase(
        "moe",
        _name(shape, rows),
        lambda tensor, count: [_inputs(shape, rows, tensor) for _ in range(count)],
        moe,
        like("moe", moe_ref),
        num_bytes,
        flops,
        same_inputs(eager=_loop, torch=_grouped),
        capture=False,
    )


def _of_all(
    mix: Mix, x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor,
    activation: str, grad: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    with torch.inference_mode(False), torch.enable_grad():
        leaves = tuple(each.detach().requires_grad_() for each in (x, gate_up, down, weights))
        x, gate_up, down, weights = leaves
        out = mix(x, gate_up, down, experts, weights, activation)
        return torch.autograd.grad(out, leaves, grad)


def gradients(shape: Shape, rows: int) -> OpCase:
    """Outputs, and gradients of tokens, of all weights of experts and of those of tokens."""

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        grad = rows, shape.hidden_size
        with torch.inference_mode(False):
            return [
                (*_inputs(shape, rows, tensor), tensor(*grad, dtype=shape.dtype))
                for _ in range(count)
            ]

    def ours(*arguments: object) -> tuple[Tensor, ...]:
        return _of_all(moe, *arguments)  # type: ignore[arg-type]

    def check(arguments: Arguments, out: tuple[Tensor, ...], factor: float) -> None:
        with torch.inference_mode(False):
            wide = [
                x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
                for x in arguments
            ]
        exact, plain = (_of_all(moe_ref, *given) for given in (wide, arguments))
        names = ("x", "gate_up", "down", "weights")
        for name, found, right, plainly in zip(names, out, exact, plain, strict=True):
            assert_close(f"moe: gradient of {name}", found, right, plainly, 2 * factor)

    def peers(inputs: list[Arguments]) -> Peers:
        return same_inputs(eager=lambda *x: _of_all(_loop, *x))(inputs)

    num_bytes, flops = _cost(shape, rows)
    return OpCase(
        "moe gradients", _name(shape, rows), make_inputs, ours, check, 3 * num_bytes, 3 * flops,
        peers, capture=False,
    )  # fmt: skip


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """With gradients and without."""
    yield forward(shape, rows)
    yield gradients(shape, rows)


_NAMES = ("qwen3-30b-a3b", "deepseek-v2-lite") if ON_GPU else ("pocket", "v2-lite-small")
_SHAPES = [SHAPES[name] for name in _NAMES]
CASES = [
    forward(shape, rows) for shape in _SHAPES for rows in ((64, 2048) if ON_GPU else (32, 512))
]
CASES.append(gradients(_SHAPES[0], 2048 if ON_GPU else 512))
