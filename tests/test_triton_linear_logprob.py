"""`linear_logprob` and `linear_policy_loss` in Triton, against float64 logits under autograd."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.launch import intercept
from kernels.logprob import LogProbs, linear_logprob, linear_logprob_ref
from kernels.logprob.linear_policy_loss import linear_policy_loss
from kernels.logprob.policy_loss import LOSSES
from tests.policy_oracle import dense
from tests.test_linear_logprob import assert_as_near, gradients, problem
from tests.test_linear_policy_loss import arguments, run, to_dtype
from tests.triton_device import DEVICE, DTYPES, counted, on_triton

pytestmark = on_triton

# Relative error, in norm, of gradients from half-precision operands: twice what it takes to round
# each probability, and then each gradient of a logit, once.
HALF = {torch.float32: 2**-21, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def on_device(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def move(value: Any) -> Any:
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    return {name: move(value) for name, value in to_dtype(given, dtype).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize(
    ("tokens", "vocab", "softcap", "temperature"),
    [(37, 611, None, 1.0), (37, 600, 5.0, 0.6), (1, 90, 5.0, 1.0), (16, 65, None, 0.6)],
)
def test_values_and_gradients_are_those_of_the_definition(
    tokens: int, vocab: int, softcap: float | None, temperature: float, peaked: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Of several tiles and of one, of rows that fill no tile; gradients of all three results."""
    x, w, t = (z.to(DEVICE) for z in problem(tokens, 24, vocab, peaked))
    x, w = x.to(dtype), w.to(dtype)
    narrow = x.cpu(), w.cpu(), t.cpu(), softcap, temperature
    exact = gradients(linear_logprob_ref, x.cpu().double(), w.cpu().double(), *narrow[2:])
    with counted() as counts:
        found = gradients(partial(linear_logprob, chunk_size=32), x, w, t, softcap, temperature)
    chunks = 2 if tokens > 32 else 1
    assert counts["_logits_kernel"] == counts["_join_kernel"] == 2 * chunks
    assert counts["_hidden_gradient_kernel"] == counts["_weight_gradient_kernel"] == chunks
    plain = gradients(linear_logprob_ref, *narrow)
    assert_as_near(found[3:], plain[3:], exact[3:], t, HALF[dtype])
    unit = 2**-23 * exact[2].abs().max()
    for values in zip(found[:3], plain, exact, strict=False):
        error, plain_error = ((x.cpu() - values[2]).abs().max() for x in values[:2])
        assert error <= 4 * plain_error + 4 * unit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("softcap", "temperature", "peaked"), [(None, 1.0, 0), (5.0, 0.6, 1)])
@pytest.mark.parametrize(("beta", "on_policy"), [(0.0, True), (0.1, False)])
@pytest.mark.parametrize("kind", LOSSES)
def test_policy_loss_and_gradients_are_those_of_all_logits(
    kind: str, beta: float, on_policy: bool, softcap: float | None, temperature: float,
    peaked: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    narrow = to_dtype(arguments(kind, beta, on_policy, bool(peaked)), dtype)
    expected = dense(kind, to_dtype(narrow, torch.float64), softcap, temperature)
    plain = dense(kind, narrow, softcap, temperature)
    with counted() as counts:
        found, dx, dw = run(
            linear_policy_loss, on_device(narrow, dtype), softcap=softcap, temperature=temperature,
            chunk_size=32,
        )  # fmt: skip
    assert counts["_hidden_gradient_kernel"] == counts["_weight_gradient_kernel"] == 2
    assert counts["_logits_kernel"] == (4 if kind == "gspo" else 2)
    loss = found.loss.detach()
    assert_as_near((loss, dx, dw), plain, expected, narrow["target"], HALF[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_likely_tokens(dtype: torch.dtype) -> None:
    """It is 1 - p, which is lost where p is rounded to half precision."""
    x, w, _ = problem(120, 24, 90, peaked=True)
    x, w = x.to(dtype), (1.5 * w).to(dtype)
    t = (x.double() @ w.double().T).argmax(1)
    p = linear_logprob_ref(x.double(), w.double(), t).logp.exp()
    likely = (p > 0.99) & (p < 1 - 1e-3)
    x, t = x[likely], t[likely]
    assert len(t) >= 3

    def gradient(operation: Any, x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        operation(x, w, t).logp.sum().backward()
        assert x.grad is not None
        return x.grad

    exact = gradient(linear_logprob_ref, x.double(), w.double(), t)
    found = gradient(linear_logprob, x.to(DEVICE), w.to(DEVICE), t.to(DEVICE)).cpu().double()
    errors = (found - exact).norm(dim=1) / exact.norm(dim=1)
    # float32 has the log-prob itself to 1e-6, a thousandth of 1 - p.
    assert errors.max() <= max(1e-3, 8 * HALF[dtype]), errors


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_nothing_but_the_row(dtype: torch.dtype) -> None:
    x, w, t = (z.to(DEVICE) for z in problem(150, 40, 300, peaked=False))
    x, w = x.to(dtype), w.to(dtype)
    whole = gradients(linear_logprob, x, w, t, None, 0.7)
    again = gradients(linear_logprob, x, w, t, None, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    cut = gradients(partial(linear_logprob, chunk_size=48), x, w, t, None, 0.7)
    # The weight's gradient is a sum over chunks; float16 has units of the chunk.
    same = 3 if dtype == torch.float16 else 4
    for a, b in zip(whole[:same], cut[:same], strict=True):
        assert torch.equal(a, b)
    few = linear_logprob(x[5:9], w, t[5:9], None, 0.7)
    for a, b in zip(few, whole, strict=False):
        assert torch.equal(a, b[5:9])


def test_slices_of_wider_tensors() -> None:
    x, w, t = (z.to(DEVICE) for z in problem(20, 24, 90, peaked=False))
    x, w = x.float(), w.float()
    expected = gradients(linear_logprob, x, w, t)
    wide_x, wide_w = torch.full((20, 50), math.nan), torch.full((90, 64), math.nan)
    wide_x, wide_w = wide_x.to(DEVICE), wide_w.to(DEVICE)
    wide_x[:, 7:31], wide_w[:, 16:40] = x, w

    def sliced(x: Tensor, w: Tensor, t: Tensor) -> LogProbs:
        a, b = torch.zeros_like(wide_x), torch.zeros_like(wide_w)
        a[:, 7:31], b[:, 16:40] = x, w
        return linear_logprob(a[:, 7:31], b[:, 16:40], t)

    for ours, theirs in zip(gradients(sliced, x, w, t), expected, strict=True):
        assert ours.equal(theirs)
    found = linear_logprob(wide_x[:, 7:31], wide_w[:, 16:40], t)
    assert found.logp.equal(expected[0])


def test_a_target_out_of_range_shows_on_a_gpu() -> None:
    """On CPU it is refused; there it would take waiting for the device."""
    x, w, t = (z.to(DEVICE) for z in problem(8, 24, 90, peaked=False))
    t[2], t[5] = 90, -1
    if not x.is_cuda:
        with pytest.raises(ValueError, match="targets must be in"):
            linear_logprob(x.float(), w.float(), t)
        t = t.as_subclass(_OnDevice)
    found = linear_logprob(x.float(), w.float(), t)
    odd = torch.tensor([i in (2, 5) for i in range(8)])
    assert found.logp.cpu().isnan().equal(odd) and found.lse.isfinite().all()


class _OnDevice(Tensor):
    """A tensor that does not say that it is on CPU."""

    is_cpu = False


def test_rows_that_nothing_asks_for_are_not_computed() -> None:
    """They are NaN, and lie in tiles of their own behind those that count; the results are those
    of the others alone."""
    given = on_device(arguments("grpo", 0.0, False, False), torch.float32)
    kept = torch.arange(41, device=DEVICE) % 3 != 1
    few = {k: v[kept] if isinstance(v, Tensor) and len(v) == 41 else v for k, v in given.items()}
    expected, dx, dw = run(linear_policy_loss, few)
    # 41 rows of which 27 count, a hundred more that do not: 3 tiles of 64 rows.
    many = {
        k: torch.cat([v, v[:1].expand(100, *v.shape[1:])])
        if isinstance(v, Tensor) and len(v) == 41
        else v
        for k, v in given.items()
    }
    counts = torch.cat([kept, kept.new_zeros(100)])
    many["token_weight"] = torch.where(counts, many["token_weight"], 0)
    many["hidden"][~counts] = math.nan
    many["lengths"] = None
    programs: list[tuple[str, int]] = []

    def watched(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
        if kernel.__name__ == "_logits_kernel":
            # A tile that is not computed leaves what is there; a poisoned partial would show.
            for partials in arguments[4:7]:
                partials.fill_(math.nan)
        programs.append((kernel.__name__, grid[0]))
        kernel[grid](*arguments, **options)

    with intercept(watched):
        found, all_dx, all_dw = run(linear_policy_loss, many)
    assert [n for name, n in programs if name == "_logits_kernel"] == [3 * 4]
    assert found.loss.equal(expected.loss) or abs(found.loss - expected.loss) < 1e-6
    assert found.logp[counts].equal(expected.logp) and not found.logp[~counts].any()
    moved = expected.terms.coefficient != 0
    assert all_dx[counts].equal(dx) and moved.any() and not all_dx[~counts].any()
    assert (all_dw - dw).abs().max() <= 1e-6 * dw.abs().max()


def test_small_coefficients_in_half_precision() -> None:
    """Those of a loss over a hundred million tokens are beyond float16; gradients are not, where
    they are taken out in float32."""
    given = on_device(arguments("dapo", 0.0, True, False), torch.float16)
    expected = torch.zeros(len(given["weight"]), 24, device=DEVICE)
    linear_policy_loss(**given, weight_grad=expected)
    found = torch.zeros_like(expected)
    linear_policy_loss(
        **given | {"token_weight": given["token_weight"] * 2.0**-26}, weight_grad=found
    )
    assert expected.abs().max() > 0 and (found * 2.0**26).equal(expected)


def test_no_tokens() -> None:
    x, w, t = (z.to(DEVICE) for z in problem(0, 24, 90, peaked=False))
    with counted() as counts:
        found = gradients(linear_logprob, x.float(), w.float(), t)
    assert not counts and not found[-1].any() and found[0].shape == (0,)


def test_float64_is_refused() -> None:
    x, w, t = (z.to(DEVICE) for z in problem(4, 24, 90, peaked=False))
    with pytest.raises(ValueError, match="float64 runs on CPU only"):
        linear_logprob(x, w, t)
