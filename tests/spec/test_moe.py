"""Experts against a loop over tokens in float64, forward and backward."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.gated_act import ACTIVATIONS, gated_act_ref
from kernels.moe import moe, moe_ref
from tests.implementations import Implementation, Largest, check_refused, gradients
from tests.rows import num_threads

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
EXPERTS = 5
# exp(100) is infinite, as it has to be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow")
# Of tokens (T, K) the experts: any; all the same; none in 1, 2 and 4; one twice for a token.
CHOICES: dict[str, Callable[[int, int], Tensor]] = {
    "any": lambda t, k: torch.rand(t, EXPERTS, generator=seeded()).argsort(1)[:, :k],
    "one gets all": lambda t, k: torch.full((t, k), 3),
    "some get none": lambda t, k: torch.rand(t, 2, generator=seeded()).argsort(1)[:, :k] * 3,
    "ties": lambda t, k: torch.randint(EXPERTS, (t, k), generator=seeded()),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def inputs(
    on: Implementation,
    dtype: torch.dtype = torch.float32,
    choice: str = "any",
    tokens: int = 13,
    per_token: int = 2,
    hidden: int = 20,
    width: int = 12,
) -> Inputs:
    wide = torch.promote_types(dtype, torch.float32)
    return (
        on.draw(tokens, hidden, dtype=dtype),
        on.draw(EXPERTS, 2 * width, hidden, dtype=dtype, seed=1) / 4,
        on.draw(EXPERTS, hidden, width, dtype=dtype, seed=2) / 4,
        CHOICES[choice](tokens, per_token).to(on.device),
        on.draw(tokens, per_token, dtype=wide, seed=3).abs(),
    )


def mixed(
    experts: Tensor, activation: str = "silu", op: Callable[..., Tensor] = moe
) -> Callable[..., Tensor]:
    """The operation as a function of what it has gradients in."""

    def function(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return op(x, gate_up, down, experts.to(x.device), weights, activation)

    return function


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("choice", CHOICES)
def test_reference_is_a_loop_over_tokens(choice: str, activation: str) -> None:
    x, gate_up, down, experts, weights = inputs(Implementation("torch"), torch.float64, choice)
    for token, out in enumerate(moe_ref(x, gate_up, down, experts, weights, activation)):
        expected = torch.zeros(20, dtype=torch.float64)
        for expert, weight in zip(experts[token].tolist(), weights[token].tolist(), strict=True):
            active = gated_act_ref((gate_up[expert] @ x[token])[None], activation)[0]
            expected += weight * (down[expert] @ active)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("choice", "activation"), [*((choice, "silu") for choice in CHOICES), ("any", "gelu_tanh")]
)
def test_values_and_gradients(
    on: Implementation, dtype: torch.dtype, choice: str, activation: str
) -> None:
    """The gradients for an uneven one of the result, a slice."""
    x, gate_up, down, experts, weights = inputs(on, dtype, choice)
    op, reference = mixed(experts, activation), mixed(experts, activation, moe_ref)
    on.check(op, reference, x, gate_up, down, weights)
    if on.name != "cpp":
        grad = on.poisoned(13, 20, dtype=dtype, seed=4)
        counts = on.check_gradients(op, reference, [x, gate_up, down, weights], [grad])
        if on.name == "triton":
            assert counts["_experts_kernel"] == 4 and counts["_experts_backward_kernel"] == 2


@pytest.mark.parametrize(
    ("tokens", "per_token", "hidden", "width"), [(1, 4, 7, 5), (70, 3, 64, 33), (3, 1, 130, 70)]
)
def test_sizes(on: Implementation, tokens: int, per_token: int, hidden: int, width: int) -> None:
    """One token; more than a tile has; sums of several steps."""
    x, gate_up, down, experts, weights = inputs(
        on, tokens=tokens, per_token=per_token, hidden=hidden, width=width
    )
    for activation in ACTIVATIONS:
        op, reference = mixed(experts, activation), mixed(experts, activation, moe_ref)
        on.check(op, reference, x, gate_up, down, weights)


@pytest.mark.implementations("torch", "triton")
def test_frozen_weights_cost_no_gradient(on: Implementation) -> None:
    """As with adapters: only what asks for a gradient gets one."""
    x, gate_up, down, experts, weights = inputs(on)
    (alone,) = gradients(
        lambda x: moe(x, gate_up, down, experts, weights, "silu"), [x], [torch.ones_like(x)]
    )
    both = gradients(mixed(experts), [x, gate_up, down, weights], [torch.ones_like(x)])
    assert alone.equal(both[0])


@pytest.mark.implementations("triton")
def test_inference_keeps_nothing_for_a_backward(on: Implementation) -> None:
    """Though weights ask for gradients: the halves of gate and up are not written."""
    x, gate_up, down, experts, weights = inputs(on, tokens=200)
    gate_up.requires_grad_()
    largest = []
    for learns in (False, True):
        with torch.set_grad_enabled(learns), Largest() as found:
            moe(x, gate_up, down, experts, weights, "silu")
        largest.append(found.numel)
    # Outputs of 20 channels, and halves of 24 together. The interpreter sees tensors as bytes.
    assert largest[1] * 20 == largest[0] * 24


@pytest.mark.implementations("cpp", "triton")
@pytest.mark.usefixtures("products_in_order")
def test_a_token_has_the_same_bits_in_any_batch(on: Implementation, dtype: torch.dtype) -> None:
    """Alone, with other neighbours, and where they all share one expert with it."""
    x, gate_up, down, experts, weights = inputs(on, dtype, tokens=80, hidden=40, width=24)
    crowd = experts[5].expand(80, 2).contiguous()

    def of_it(first: int, last: int, chosen: Tensor = experts) -> Tensor:
        rows = slice(first, last)
        return moe(x[rows], gate_up, down, chosen[rows], weights[rows], "silu")[5 - first]

    alone = of_it(5, 6)
    for threads in (1, 3):
        with num_threads(threads):
            assert of_it(0, 80).equal(alone)
            assert of_it(4, 37).equal(alone)
            assert of_it(0, 80, crowd).equal(alone)


def test_no_tokens(on: Implementation) -> None:
    x, gate_up, down, experts, weights = inputs(on)
    out = moe(x[:0], gate_up, down, experts[:0], weights[:0], "silu")
    assert out.shape == (0, 20)


def test_a_nan_stays_with_its_token(on: Implementation) -> None:
    x, gate_up, down, experts, weights = inputs(on, choice="one gets all")
    x[4, 2] = weights[6, 0] = math.nan
    out = on.run(mixed(experts), x, gate_up, down, weights)
    assert out.isnan().any(1).nonzero()[:, 0].tolist() == [4, 6]


def test_bad_arguments() -> None:
    names = "x", "gate_up", "down", "experts", "weights"
    given = dict(zip(names, inputs(Implementation("torch")), strict=True))
    check_refused(
        moe,
        given | {"activation": "silu"},
        ({"x": given["x"][0]}, "moe: x must be"),
        ({"gate_up": given["gate_up"][:, 1:]}, "moe: gate_up must be"),
        ({"down": given["down"].half()}, "moe: down must be"),
        ({"experts": given["experts"][:4]}, "moe: experts must be"),
        ({"experts": given["experts"].int()}, "moe: experts must be"),
        ({"experts": given["experts"] - 1}, r"moe: experts must be in \[0, 5\), got .*-1"),
        ({"experts": given["experts"] + 1}, r"moe: experts must be in \[0, 5\), got .*5"),
        ({"weights": given["weights"].double()}, "moe: weights must be"),
        ({"activation": "relu"}, "activation must be one of"),
    )
