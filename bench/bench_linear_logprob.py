"""Log-probs from hidden states, and the policy loss with its gradients, under whole models' heads.

Without gradients the floor is one matrix product, for the policy loss of tokens it is three. The
weight's gradient goes to a float32 buffer that is there. Memory is measured by `bench.loss`.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_close, calls_on
from bench.loss_peers import OPTIONS, Batch, Head, liger, unfused
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU
from kernels.logprob import LogProbs, linear_logprob
from kernels.logprob.linear_policy_loss import linear_policy_loss

TARGETS = ["gemma2-27b", "qwen3-8b"] if ON_GPU else ["pocket"]
OTHERS = ["gemma2-9b"] if ON_GPU else ["qwen3-107m"]
ROWS = {"qwen3-107m": 128, "pocket": 512}  # of others 8,192
SMALL = 1024 if ON_GPU else 64  # rows of logits at a time in the mode for little memory
CHECKED = [0, -1]  # rows
_BLOCK = 1 << 14  # tokens whose logits are checked at a time


def make_batch(shape: Shape) -> tuple[str, Batch]:
    """The name of the case, and its tensors, which gradients may be taken of."""
    rows = ROWS.get(shape.name, 8192)
    head = Head(rows, shape.hidden_size, shape.vocab_size, shape.final_softcap, shape.dtype)
    with torch.inference_mode(False):
        batch = Batch.of(head)
    return f"{shape.name} head, {rows} tokens", batch


def logits_of(batch: Batch, softcap: float | None, dtype: torch.dtype) -> Tensor:
    """Logits (rows, V) of the rows that are checked, made in a dtype."""
    x = batch.hidden[CHECKED].to(dtype)
    parts = [x @ w.to(dtype).T for w in batch.weight.split(_BLOCK)]
    logits = torch.cat(parts, 1).to(torch.promote_types(dtype, torch.float32))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def log_probs_work(shape: Shape) -> Work:
    """Log-probs, entropy and log-sum-exp, without gradients."""
    case, batch = make_batch(shape)
    arguments = batch.hidden, batch.weight, batch.target, shape.final_softcap
    size = batch.weight.numel()

    def eager(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> LogProbs:
        logits = (hidden @ weight.T).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_p = torch.log_softmax(logits, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        lse = logits[:, 0] - log_p[:, 0]
        return LogProbs(log_p.gather(1, target[:, None])[:, 0], entropy, lse)

    def check(out: LogProbs, factor: float) -> None:
        def values(dtype: torch.dtype) -> Tensor:
            log_p = torch.log_softmax(logits_of(batch, shape.final_softcap, dtype), -1)
            logp = log_p.gather(1, batch.target[CHECKED, None])[:, 0]
            return torch.stack([logp, -(log_p.exp() * log_p).sum(-1)])

        found = torch.stack([out.logp[CHECKED], out.entropy[CHECKED]])
        plain = values(torch.float32)
        # Sums over a whole vocabulary, in another order.
        assert_close("linear_logprob", found, values(torch.float64), plain, 4 * factor)

    return Work(
        "linear_logprob",
        case,
        (size + batch.hidden.numel()) * shape.dtype.itemsize,
        2 * len(batch.hidden) * size,
        calls_on(linear_logprob, [arguments]),
        check,
        {"eager": Peer(lambda: calls_on(eager, [arguments]), compare=shape.dtype.itemsize == 4)},
        capture=False,
    )


def loss_work(shape: Shape, chunk_size: int | None = None) -> Work:
    """The policy loss and its gradients."""
    case, batch = make_batch(shape)
    softcap, size = shape.final_softcap, batch.weight.numel()
    with torch.inference_mode(False):
        weight_grad = torch.zeros_like(batch.weight, dtype=torch.float32)

    def ours() -> Tensor:
        return linear_policy_loss(
            batch.hidden, batch.weight, batch.target, batch.advantage, batch.token_weight,
            OPTIONS, old_logp=batch.old_logp, ref_logp=batch.ref_logp, softcap=softcap,
            chunk_size=chunk_size, weight_grad=weight_grad,
        ).loss  # fmt: skip

    def gradients(loss: Callable[[], Tensor], of_weight: bool) -> tuple[Tensor, ...]:
        """Of hidden, and of the weight where the loss leaves it to autograd."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [batch.hidden, batch.weight] if of_weight else [batch.hidden]
            return torch.autograd.grad(loss(), leaves)

    def check(out: tuple[Tensor, ...], factor: float) -> None:
        def values(dtype: torch.dtype) -> Tensor:
            log_p = torch.log_softmax(logits_of(batch, softcap, dtype), -1)
            wide, target = log_p.dtype, batch.target[CHECKED, None]
            logp = log_p.gather(1, target)[:, 0]
            advantage, weight, old, ref = (
                x[CHECKED].to(wide)
                for x in (batch.advantage, batch.token_weight, batch.old_logp, batch.ref_logp)
            )
            ratio = (logp - old).exp()
            clipped = ratio.clamp(1 - OPTIONS.clip_low, 1 + OPTIONS.clip_high)
            moves = ratio * advantage <= clipped * advantage
            slope = torch.where(moves, -ratio * advantage, 0) - OPTIONS.beta * (ref - logp).expm1()
            dz = -log_p.exp() * (slope * weight)[:, None]
            dz.scatter_add_(1, target, (slope * weight)[:, None])
            if softcap is not None:
                z = log_p + logits_of(batch, softcap, dtype).logsumexp(-1, keepdim=True)
                dz = dz * (1 - (z / softcap) ** 2)
            blocks = zip(dz.to(dtype).split(_BLOCK, 1), batch.weight.split(_BLOCK), strict=True)
            return sum((d @ w.to(dtype) for d, w in blocks), torch.zeros(()).to(dz)).to(dtype)

        plain = values(shape.dtype).to(out[0].dtype)
        assert_close("policy loss", out[0][CHECKED], values(torch.float64), plain, factor)

    peers: dict[str, Peer] = {
        "eager": Peer(
            lambda: [partial(gradients, partial(unfused, batch, softcap), True)],
            compare=False,
            capture=False,
        )
    }
    absent = {"liger": "has no soft-cap" if softcap is not None else "runs on a GPU"}
    if ON_GPU and softcap is None:
        peers["liger"] = Peer(
            lambda: [partial(gradients, partial(liger, batch, None), True)],
            compare=False, third_party=True, capture=False,
        )  # fmt: skip
        absent = {}
    in_little = "" if chunk_size is None else f", {chunk_size} rows at a time"
    return Work(
        "policy loss",
        case + in_little,
        2 * (size + batch.hidden.numel()) * shape.dtype.itemsize + 8 * size,
        3 * 2 * len(batch.hidden) * size,
        [partial(gradients, ours, False)],
        check,
        peers,
        absent,
        capture=False,
    )


Measured = Callable[[Work], Figure]


@pytest.mark.parametrize("name", TARGETS)
def test_target_log_probs(name: str, measured: Measured) -> None:
    measured(log_probs_work(SHAPES[name]))


@pytest.mark.parametrize("name", TARGETS)
def test_target_policy_loss(name: str, measured: Measured) -> None:
    measured(loss_work(SHAPES[name]))


@pytest.mark.parametrize("name", TARGETS)
def test_policy_loss_in_little_memory(name: str, measured: Measured) -> None:
    measured(loss_work(SHAPES[name], SMALL))


@pytest.mark.parametrize("name", OTHERS)
def test_log_probs(name: str, measured: Measured) -> None:
    measured(log_probs_work(SHAPES[name]))


@pytest.mark.parametrize("name", OTHERS)
def test_policy_loss(name: str, measured: Measured) -> None:
    measured(loss_work(SHAPES[name]))
