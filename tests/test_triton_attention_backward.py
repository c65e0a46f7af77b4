"""Gradients of forest attention in Triton: against autograd through dense attention in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.forest_attention import AttentionOptions, ForestPlan, forest_attention, torch_impl
from kernels.forest_attention.plan import WorkTile
from kernels.launch import intercept
from tests.forests import Sample, Segment, Shape
from tests.oracles.attention import Problem, problem
from tests.triton_device import DEVICE, DTYPES, on_triton

pytestmark = on_triton

PLAIN = AttentionOptions(0.25)
CAPPED = AttentionOptions(0.25, 3.0)
WINDOWED = AttentionOptions(0.2, 5.0, 30)

SHAPES = [
    Shape(2, 2, 16, 16),
    Shape(1, 3, 24, 20),  # nothing is a power of two
    Shape(1, 20, 8, 33),  # more heads in a group than rows of a product
    Shape(2, 1, 16, 8),
]
TREES: list[list[tuple[Segment, ...]]] = [
    [((0, 70), (1, 20)), ((0, 70), (2, 9))],
    [((0, 33), (1, 9), (3, 18)), ((0, 33), (1, 9), (4, 17)), ((0, 33), (2, 5))],
    [((0, 6), (1, 4)), ((0, 6), (2, 3))],
]


def make(tree: int, shape: Shape, options: AttentionOptions, d_lse: bool = True) -> Problem:
    samples = [Sample(100 + i, prompt, 0) for i, prompt in enumerate(TREES[tree])]
    return problem(samples, shape, options, d_lse=d_lse, device=DEVICE)


@contextmanager
def lists() -> Iterator[dict[str, list[int]]]:
    """Of each kernel of the backward launched: programs, full spans and masked spans."""
    found: dict[str, list[int]] = {}

    def run(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        if "tiles_ptr" in given:
            assert kernel.__name__ not in found
            _, _, first, first_masked, end = given["tiles_ptr"].T
            full = (first_masked - first).sum().item()
            masked = (end - first_masked).sum().item()
            found[kernel.__name__] = [grid[0] * grid[1], full, masked]
        kernel[grid](*arguments, **options)

    with intercept(run):
        yield found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [PLAIN, CAPPED, WINDOWED])
@pytest.mark.parametrize("number", range(4))
def test_gradients_equal_those_of_dense_attention(
    number: int, options: AttentionOptions, dtype: torch.dtype
) -> None:
    tree = 2 if number == 2 else (number + (options.softcap is None)) % 2
    case = make(tree, replace(SHAPES[number], dtype=dtype), options, d_lse=options != CAPPED)
    with lists() as found:
        grads = case.gradients()
    case.check(grads)
    assert set(found) == {"_forest_attention_dq_kernel", "_forest_attention_dkv_kernel"}
    assert all(programs and masked for programs, _, masked in found.values())
    unseen = case.k.isnan().all(-1).all(-1)
    assert unseen.any() and all(grad[unseen].eq(0).all() for grad in grads[1:])
    assert all(grad.is_contiguous() for grad in grads)


def test_full_and_masked_spans() -> None:
    """Of keys and of queries; the prompt's tiles have full spans that reach across branches."""
    for options in (PLAIN, AttentionOptions(0.25, 3.0, 60)):
        case = make(0, SHAPES[0], options)
        with lists() as found:
            case.check(case.gradients())
        assert all(full and masked for _, full, masked in found.values())


def test_the_same_bits_in_every_run() -> None:
    case = make(1, SHAPES[1], WINDOWED)
    first, again = case.gradients(), case.gradients()
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))


def test_slices_of_wider_tensors() -> None:
    """Queries, keys and values as one projection leaves them, and gradients of other layouts."""
    case = make(1, SHAPES[0], CAPPED)
    expected = case.gradients()
    k, v = case.k.nan_to_num(), case.v.nan_to_num()
    rows = max(len(case.q), len(k))
    wide = torch.full((rows, 3, 9, 16), float("nan"), device=DEVICE)
    wide[: len(case.q), 1, :4], wide[: len(k), 1, 4:6], wide[: len(k), 1, 6:8] = case.q, k, v
    wide = wide[:, 1].requires_grad_()
    q, k, v = wide[: len(case.q), :4], wide[: len(k), 4:6], wide[: len(k), 6:8]
    assert not any(x.is_contiguous() for x in (q, k, v))
    o, lse = case.attend(q, k, v)
    assert case.d_lse is not None
    # A last dimension with gaps, and heads before tokens.
    d_o = case.d_o.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    d_lse = case.d_lse.T.contiguous().T
    found = torch.autograd.grad((o, lse), (q, k, v), (d_o, d_lse))
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    d_o = case.d_o.transpose(0, 1).contiguous().transpose(0, 1)
    found = torch.autograd.grad(
        forest_attention(q, k.transpose(0, 1), v.transpose(0, 1), case.plan, CAPPED),
        (q, k, v), d_o,
    )  # fmt: skip
    case.d_lse = None
    assert all(a.equal(b) for a, b in zip(found, case.gradients(), strict=True))


def test_a_gradient_of_the_log_sum_exp_alone() -> None:
    case = make(1, SHAPES[1], CAPPED)
    case.d_o.zero_()
    inputs = case.inputs()
    found = torch.autograd.grad(case.attend(*inputs)[1], inputs, case.d_lse)
    case.check(found)
    assert found[0].ne(0).any() and found[2].eq(0).all()


def test_queries_without_keys_and_keys_without_queries() -> None:
    """Query 1 stands before its only keys, query 3 has no item; keys from 4 on are NaN."""
    plan = ForestPlan([WorkTile(0, 3, 0, 4, 3)], torch.tensor([4, 2, 6, 5], device=DEVICE))
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_o = (torch.randn(4, 2, 16, generator=generator).to(DEVICE) for _ in range(4))
    k, v = (torch.cat([x, torch.full_like(x, float("nan"))]) for x in (k, v))
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, :2] = mask[2, :4] = True
    case = Problem(q, k, v, d_o, d_o[..., 0], plan, mask, PLAIN)
    found = case.gradients()
    case.check(found)
    assert found[0][[1, 3]].eq(0).all()
    assert all(grad[4:].eq(0).all() and grad[:4].ne(0).any() for grad in found[1:])


def test_nothing_at_all() -> None:
    empty = ForestPlan([], torch.zeros(0, dtype=torch.int64, device=DEVICE))
    q = torch.zeros(0, 2, 16, device=DEVICE, requires_grad=True)
    cache = torch.full((1, 8, 16), float("nan"), device=DEVICE, requires_grad=True)
    d_q, d_cache = torch.autograd.grad(
        forest_attention(q, cache, cache, empty, PLAIN).sum(), (q, cache)
    )
    assert d_q.shape == q.shape and d_cache.eq(0).all()


def test_like_torch() -> None:
    """The same gradients as the implementation on CPU, from the same results of the forward."""
    case = make(0, SHAPES[0], WINDOWED)
    found = case.gradients()
    q, k, v = (x.detach().cpu() for x in case.inputs())
    plan = ForestPlan(case.plan.tiles, case.plan.positions.cpu())
    caches = k.transpose(0, 1), v.transpose(0, 1)
    results = torch_impl.run(q, *caches, plan, case.options)
    assert case.d_lse is not None
    grads = torch_impl.run_backward(
        q, *caches, *results, case.d_o.cpu(), case.d_lse.cpu(), plan, case.options
    )
    case.check([grads[0], grads[1].transpose(0, 1), grads[2].transpose(0, 1)])
    eps = torch.finfo(torch.float32).eps
    for mine, theirs in zip(
        found, (grads[0], *(x.transpose(0, 1) for x in grads[1:])), strict=True
    ):
        assert (mine.cpu() - theirs).abs().max() <= 32 * eps * theirs.abs().max()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_types_keep_magnitude_and_direction(dtype: torch.dtype) -> None:
    """Sums over 200 queries of one sign, along the exact gradients and across them."""
    tokens = 200
    q_pos = torch.full((tokens,), 15, device=DEVICE)
    tiles = [WorkTile(i, min(64, tokens - i), 0, 16, 0) for i in range(0, tokens, 64)]
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_o = (
        torch.rand(size, 1, 16, generator=generator).add(0.5).to(dtype).to(DEVICE)
        for size in (tokens, 16, 16, tokens)
    )
    mask = torch.ones(tokens, 16, dtype=torch.bool)
    d_lse = torch.rand(tokens, 1, generator=generator).to(DEVICE)
    case = Problem(q, k, v, d_o, d_lse, ForestPlan(tiles, q_pos), mask, PLAIN)
    found = case.gradients()
    case.check(found)
    exact = case.dense(torch.float64)
    for mine, plain, exactly in zip(found, case.dense(dtype), exact, strict=True):
        mine = mine.double().cpu()
        along = ((mine * exactly).sum() / exactly.square().sum()).item()
        # Roundings are half a unit at most, and those of single elements average out.
        assert abs(along - 1) <= torch.finfo(dtype).eps / 2
        assert (mine - along * exactly).norm() <= 4 * (plain.double() - exactly).norm()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_long_sums_are_float32(dtype: torch.dtype) -> None:
    """One large term and 511 small ones, each 1/256 of a unit in the last place of the large one:
    a sum kept in a half type would stand still. All weights are equal, so that sums are known."""
    large = 2048.0
    terms = torch.full((512, 1, 16), large * torch.finfo(dtype).eps / 256)
    terms[0] = large
    expected = terms.double().sum(0)[0, 0].to(dtype)
    assert expected == large * (1 + 2 * torch.finfo(dtype).eps)
    terms = terms.to(dtype).to(DEVICE)
    nothing = torch.zeros_like(terms)
    first = nothing[:1].clone()
    first[..., 0] = 1
    # 512 queries of one key, where d_lse is what ds becomes; then one query of 512 keys.
    tiles = [WorkTile(i, 64, 0, 1, 0) for i in range(0, 512, 64)]
    plan = ForestPlan(tiles, torch.zeros(512, dtype=torch.int64, device=DEVICE))
    mask = torch.ones(512, 1, dtype=torch.bool)
    many = Problem(
        torch.ones_like(terms), nothing[:1], first, terms, terms[..., 0].float(), plan, mask,
        AttentionOptions(1.0),
    )  # fmt: skip
    _, d_k, d_v = many.gradients()
    assert d_k.eq(expected).all() and d_v.eq(expected).all()
    plan = ForestPlan(
        [WorkTile(0, 1, 0, 256, 0), WorkTile(0, 1, 256, 256, 256)],
        torch.tensor([511], device=DEVICE),
    )
    d_lse = torch.full((1, 1), 512.0, device=DEVICE)
    one = Problem(
        nothing[:1], terms, nothing, nothing[:1], d_lse, plan, mask.T, AttentionOptions(1.0)
    )
    assert one.gradients()[0].eq(expected).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_packed_tree_on_a_gpu(dim: int, dtype: torch.dtype) -> None:
    """A prompt of 1,000 tokens and four branches of 300, with everything; twice the same bits."""
    samples = [Sample(9 + i, ((0, 1000), (1 + i, 300)), 0) for i in range(4)]
    for options in (AttentionOptions(dim**-0.5), AttentionOptions(dim**-0.5, 20.0, 700)):
        case = problem(samples, Shape(2, 4, dim, dim, dtype), options, device=DEVICE)
        first, again = case.gradients(), case.gradients()
        case.check(first)
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))
