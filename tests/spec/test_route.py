"""The router: its choice against a sort in plain Python, its weights and their gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.route import Routing, route, route_ref
from tests.implementations import Implementation, check_refused

GREEDY = Routing(3)
GROUPED = Routing(3, scale=16.0, groups=4, groups_kept=2)
ROUTINGS = [GREEDY, Routing(2, normalise=True), Routing(12), GROUPED, Routing(1, True, 2.5)]


def routed(routing: Routing, op: Callable[..., tuple[Tensor, Tensor]] = route) -> Callable:
    """The operation as a function of its tensors alone."""
    return lambda x, gate: op(x, gate, routing)


def chosen_of(logits: list[float], routing: Routing) -> list[int]:
    """The experts of one token, by sorting."""
    size = len(logits) // routing.groups
    groups = [range(first, first + size) for first in range(0, len(logits), size)]
    groups.sort(key=lambda group: -max(logits[e] for e in group))
    allowed = sorted(e for group in groups[: routing.groups_kept] for e in group)
    return sorted(allowed, key=lambda e: -logits[e])[: routing.per_token]


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_reference_is_the_formula(routing: Routing) -> None:
    """With logits that repeat: of equal ones the first is chosen, of groups too."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (200, 12), generator=generator).double()
    experts, weights = route_ref(logits, torch.eye(12).double(), routing)
    assert experts.tolist() == [chosen_of(row, routing) for row in logits.tolist()]
    for row, own, found in zip(logits.tolist(), experts.tolist(), weights.tolist(), strict=True):
        total = sum(map(math.exp, (row[e] for e in own) if routing.normalise else row))
        expected = [routing.scale * math.exp(row[e]) / total for e in own]
        assert found == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 5), (37, 70), (16, 600)])
def test_values(
    on: Implementation, dtype: torch.dtype, routing: Routing, tokens: int, hidden: int
) -> None:
    x = on.draw(tokens, hidden, dtype=dtype)
    gate = on.draw(12, hidden, dtype=dtype, seed=1) * hidden**-0.5
    experts, weights = on.run(routed(routing), x, gate)
    assert experts.dtype == torch.int64
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, exact = route_ref(x.cpu().double(), gate.cpu().double(), routing)
    assert experts.cpu().equal(expected)
    # A logit is off by at most `hidden` roundings of a product, or of half of that in a sum.
    error = hidden * torch.finfo(weights.dtype).eps * 0.5
    error *= float((x.double().abs() @ gate.double().abs().T).max())
    torch.testing.assert_close(weights.cpu().double(), exact, rtol=2 * error + 1e-6, atol=0)


@pytest.mark.parametrize("routing", [GREEDY, GROUPED], ids=str)
def test_ties_take_the_lower_index(on: Implementation, routing: Routing) -> None:
    """Of many experts, of all of a token, and of groups."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (90, 20), generator=generator).float()
    logits[-1] = 0
    experts, _ = on.run(routed(routing), logits.to(on.device), torch.eye(20).to(on.device))
    assert experts.tolist() == [chosen_of(row, routing) for row in logits.tolist()]


def test_a_nan_is_chosen_last_and_shows(on: Implementation) -> None:
    logits = on.draw(5, 6)
    logits[1, 2] = logits[3] = math.nan
    for routing in (Routing(2), Routing(6, True), Routing(2, groups=3, groups_kept=2)):
        experts, weights = on.run(routed(routing), logits, torch.eye(6, device=on.device))
        # The other rows' products with 0 and 1 are what they are.
        assert weights.isnan().all(1).tolist() == [False, True, False, True, False]
        for row in experts.tolist():
            assert len({*row}) == routing.per_token and {*row} <= {*range(6)}


@pytest.mark.implementations("torch", "triton")
@pytest.mark.parametrize("routing", [GROUPED, Routing(2, normalise=True)], ids=str)
def test_gradients(on: Implementation, dtype: torch.dtype, routing: Routing) -> None:
    x, gate = on.draw(37, 20, dtype=dtype), on.draw(12, 20, dtype=dtype, seed=1)

    def weights_of(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda x, gate: op(x, gate, routing)[1]

    wide = torch.promote_types(dtype, torch.float32)
    grad = on.draw(37, routing.per_token, dtype=wide, seed=2)
    counts = on.check_gradients(weights_of(route), weights_of(route_ref), [x, gate], [grad])
    assert counts["_route_kernel"] == (on.name == "triton")


@pytest.mark.implementations("cpp", "triton")
@pytest.mark.usefixtures("products_in_order")
def test_a_token_is_routed_alike_in_any_batch(on: Implementation, dtype: torch.dtype) -> None:
    x, gate = on.draw(70, 300, dtype=dtype), on.draw(12, 300, dtype=dtype, seed=1)
    whole = route(x, gate, GROUPED)
    for first, last in ((0, 1), (3, 20), (17, 70)):
        for part, of_all in zip(route(x[first:last], gate, GROUPED), whole, strict=True):
            assert part.equal(of_all[first:last])


def test_bad_arguments() -> None:
    x, gate = torch.zeros(2, 4), torch.zeros(12, 4)
    misfits = (
        *(Routing(13), Routing(0), Routing(1, groups=5), Routing(5, groups=3)),
        Routing(1, groups_kept=2),
    )
    check_refused(
        route,
        {"x": x, "gate": gate, "routing": GREEDY},
        ({"x": x[0]}, "route: x must be"),
        ({"gate": gate[:, :3]}, "route: gate must be"),
        ({"gate": gate.double()}, "route: gate must be"),
        ({"x": x.long(), "gate": gate.long()}, "route: x must be"),
        *(({"routing": each}, r"route: Routing.* does not fit 12 experts") for each in misfits),
    )
