"""Log-probs from hidden states, and the policy loss with its gradients, under whole models' heads.

Without gradients the floor is one matrix product, for the policy loss of tokens it is three. The
weight's gradient goes to a float32 buffer that is there. Memory is measured by `bench.loss`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import (
    Arguments,
    OpCase,
    Peer,
    Peers,
    assert_close,
    calls_on,
    gradients,
    same_inputs,
)
from bench.loss_peers import OPTIONS, Batch, Head, liger, unfused
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU, Fill
from kernels.logprob import LogProbs, linear_logprob, linear_logprob_ref
from kernels.logprob.linear_policy_loss import linear_policy_loss
from kernels.logprob.policy_loss import PolicyLossOptions

SMALL = 768 if ON_GPU else 64  # rows of logits at a time in the mode for little memory
CHECKED = [0, -1]  # rows
# Of log-probs from half types: a tensor core cuts off what it adds up, not rounds it, and 256 sums
# of 16 terms (4,096 channels) leave about 1e-5 of logits that are near 10.
HALF_ERROR = 1e-4


class _Case:
    """`rows` tokens under a shape's head."""

    def __init__(self, shape: Shape, rows: int) -> None:
        self.softcap, self.dtype = shape.final_softcap, shape.dtype
        self.name = f"{shape.name} head, {rows} tokens"
        self.size, hidden = shape.vocab_size * shape.hidden_size, rows * shape.hidden_size
        self.num_bytes = (self.size + hidden) * shape.dtype.itemsize
        self.flops = 2 * rows * self.size
        self.head = Head(
            rows, shape.hidden_size, shape.vocab_size, shape.final_softcap, shape.dtype
        )

    def make_inputs(self, tensor: Fill, count: int) -> list[Arguments]:
        """Hidden states, weight, targets."""
        batches = [Batch.of(self.head, tensor) for _ in range(count)]
        return [(batch.hidden, batch.weight, batch.target) for batch in batches]

    def log_probs(self, hidden: Tensor, weight: Tensor, target: Tensor) -> LogProbs:
        """The operation."""
        return linear_logprob(hidden, weight, target, self.softcap)


def log_probs(shape: Shape, rows: int) -> OpCase:
    """Log-probs, entropy and log-sum-exp, without gradients."""
    case = _Case(shape, rows)

    def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> LogProbs:
        logits = hidden @ weight.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        log_p = torch.log_softmax(logits, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        lse = logits[:, 0] - log_p[:, 0]
        return LogProbs(log_p.gather(1, target[:, None])[:, 0], entropy, lse)

    def check(arguments: Arguments, out: LogProbs, factor: float) -> None:
        hidden, weight, target = arguments

        def values(dtype: torch.dtype) -> LogProbs:
            inputs = hidden[CHECKED].to(dtype), weight.to(dtype), target[CHECKED]
            return linear_logprob_ref(*inputs, case.softcap)

        exact, plain = values(torch.float64), values(torch.float32)
        least = HALF_ERROR if shape.dtype.itemsize == 2 else 0.0
        for name, found, exactly, plainly in zip(out._fields, out, exact, plain, strict=True):
            # Sums over a whole vocabulary, in another order.
            title = f"linear_logprob: {name}"
            assert_close(title, found[CHECKED], exactly, plainly, 4 * factor, least)

    return OpCase(
        "linear_logprob",
        case.name,
        case.make_inputs,
        case.log_probs,
        check,
        case.num_bytes,
        case.flops,
        same_inputs(compare=shape.dtype.itemsize == 4, eager=eager),
        capture=False,
    )


def _gradients(loss: Callable[[], Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """Of a loss, in inference mode too."""
    with torch.inference_mode(False), torch.enable_grad():
        return torch.autograd.grad(loss(), leaves)


def log_probs_backward(shape: Shape, rows: int, of: tuple[str, ...]) -> OpCase:
    """The gradient of hidden states from some of the results' sums."""
    case = _Case(shape, rows)

    def total(found: LogProbs) -> Tensor:
        return torch.stack([getattr(found, name).sum() for name in of]).sum()

    def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return _gradients(lambda: total(case.log_probs(hidden, weight.detach(), target)), hidden)

    def check(arguments: Arguments, out: tuple[Tensor, ...], factor: float) -> None:
        hidden, weight, target = arguments

        def values(dtype: torch.dtype) -> Tensor:
            def loss(hidden: Tensor) -> Tensor:
                others = weight.to(dtype), target[CHECKED]
                return total(linear_logprob_ref(hidden, *others, case.softcap))

            return gradients(loss, [hidden[CHECKED].to(dtype)], [torch.ones((), dtype=dtype)])[0]

        exact, plain = values(torch.float64), values(shape.dtype)
        assert_close("linear_logprob backward", out[0][CHECKED], exact, plain, factor)

    name = f"{case.name}, {' + '.join(of)}"
    return OpCase("linear_logprob backward", name, case.make_inputs, ours, check, capture=False)


def loss(shape: Shape, rows: int, chunk_size: int | None = None, level: str = "token") -> OpCase:
    """The policy loss and its gradients. level "sequence": of sequences of one token."""
    case = _Case(shape, rows)
    options = PolicyLossOptions(beta=OPTIONS.beta, level=level)

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        inputs: list[Arguments] = []
        for _ in range(count):
            batch = Batch.of(case.head, tensor)
            with torch.inference_mode(False):
                inputs.append((batch, tensor(*batch.weight.shape)))
        return inputs

    def ours(batch: Batch, weight_grad: Tensor) -> tuple[Tensor, ...]:
        lengths = torch.ones_like(batch.target) if level == "sequence" else None
        return _gradients(
            lambda: linear_policy_loss(
                batch.hidden, batch.weight, batch.target, batch.advantage, batch.token_weight,
                options, old_logp=batch.old_logp, ref_logp=batch.ref_logp, lengths=lengths,
                softcap=case.softcap, chunk_size=chunk_size, weight_grad=weight_grad,
            ).loss,
            batch.hidden,
        )  # fmt: skip

    def check(arguments: Arguments, out: tuple[Tensor, ...], factor: float) -> None:
        def values(dtype: torch.dtype) -> Tensor:
            with torch.inference_mode(False):
                part = arguments[0].rows(CHECKED, dtype)
            return _gradients(lambda: unfused(part, case.softcap), part.hidden)[0]

        exact, plain = values(torch.float64), values(shape.dtype)
        assert_close("policy loss", out[0][CHECKED], exact, plain, factor)

    def beside(function: Callable[..., Tensor], batch: Batch, *_: Tensor) -> tuple[Tensor, ...]:
        return _gradients(lambda: function(batch, case.softcap), batch.hidden, batch.weight)

    def peers(inputs: list[Arguments]) -> Peers:
        def peer(function: Callable[..., Any], third_party: bool = False) -> Peer:
            make = partial(calls_on, partial(beside, function), inputs)
            return Peer(make, compare=False, third_party=third_party, capture=False)

        if case.softcap is not None:
            return {"eager": peer(unfused), "liger": "has no soft-cap"}
        return {"eager": peer(unfused), "liger": peer(liger, True) if ON_GPU else "runs on a GPU"}

    name = case.name + ("" if chunk_size is None else f", {chunk_size} rows at a time")
    return OpCase(
        "policy loss" if level == "token" else "policy loss by sequence",
        name,
        make_inputs,
        ours,
        check,
        2 * case.num_bytes + 8 * case.size,
        3 * case.flops,
        peers,
        capture=False,
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """With and without gradients, and the policy loss of tokens and of sequences."""
    yield log_probs(shape, rows)
    yield log_probs_backward(shape, rows, ("logp",))
    yield log_probs_backward(shape, rows, LogProbs._fields)
    yield loss(shape, rows)
    yield loss(shape, rows, level="sequence")


_HEADS = {
    name: (SHAPES[name], rows)
    for name, rows in (
        {"gemma2-27b": 8192, "qwen3-8b": 8192, "gemma2-9b": 8192}
        if ON_GPU
        else {"pocket": 512, "qwen3-107m": 128}
    ).items()
}
CASES = [case(*head) for case in (log_probs, loss) for head in _HEADS.values()]
CASES += [
    loss(*_HEADS[name], SMALL) for name in (("gemma2-27b", "qwen3-8b") if ON_GPU else ("pocket",))
]
