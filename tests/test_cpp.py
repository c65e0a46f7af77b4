"""The C++ operations against torch's, bit for bit in float32, and what happens without them."""

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpp
from kernels.forest_attention import AttentionOptions, forest_attention_with_lse
from kernels.gated_act import gated_act
from kernels.packed_linear import packed_linear, packed_linear_ref, packs
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_cos_sin
from kernels.sample_token import SamplingOptions, sample_token, uniforms
from kernels.write_kv import write_kv
from models import load
from models.decoder import CppDecoder
from models.transformer import Transformer, linear
from tests.forests import Grove, Shape
from tests.test_forest_attention import OPTIONS, crowd, forests
from tests.test_generate import drawn, make_generator, make_groups, run
from tests.tiny import FAMILIES, write_model

pytestmark = pytest.mark.skipif(
    not cpp.runs_cpp(torch.zeros(1)), reason="operations run in torch here"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each C++ function was called."""
    counter: Counter[str] = Counter()
    call = cpp.call

    def counted(name: str, dtype: torch.dtype, *arguments: Any) -> None:
        counter[name] += 1
        call(name, dtype, *arguments)

    monkeypatch.setattr(cpp, "call", counted)
    return counter


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same(operation: Callable[[], Any]) -> None:
    """The operation's results, or what it returns of tensors, are those of torch."""
    ours = operation()
    with cpp.torch_only():
        theirs = operation()
    for a, b in zip(
        ours if isinstance(ours, tuple) else (ours,),
        theirs if isinstance(theirs, tuple) else (theirs,),
        strict=True,
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def head_shapes(draw: st.DrawFn) -> Shape:
    """Groups that fill a vector in part, wholly, and more than all that are taken together. (Of a
    head of one or two channels MKL adds in another order, alone among all that were tried.)"""
    return Shape(
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.sampled_from([1, 2, 3, 5, 16])),
        head_dim=draw(st.sampled_from([8, 20, 32, 64, 144])),
        v_head_dim=draw(st.sampled_from([8, 20, 32, 64, 80])),
    )


@given(forests(), head_shapes(), OPTIONS, st.sampled_from([1, 2]))
@settings(max_examples=60)
def test_forest_attention(
    samples: list, shape: Shape, options: AttentionOptions, num_threads: int
) -> None:
    """Decode and prefill; outputs and log-sum-exps."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for written in (True, False):
            grove = Grove(samples, shape, capacity=304, written=written)

            def attend(grove: Grove = grove, written: bool = written) -> Any:
                q, plan = grove.decode() if written else grove.prefill(grove.whole())
                return forest_attention_with_lse(q, *grove.caches, plan, options)

            same(attend)
    finally:
        torch.set_num_threads(before)


def test_attention_reads_nothing_behind_a_suffix(calls: Counter[str]) -> None:
    """NaN there stays there: slots are not cleared for C++."""
    grove = Grove(crowd(), Shape(2, 3, 32, 32), capacity=304)
    for slot in range(grove.cache.num_slots):
        grove.cache.v[0][:, grove._region(slot)] = float("nan")
        grove.cache.k[0][:, grove._region(slot)] = float("nan")
    q, plan = grove.decode()
    assert grove.cache.v[0].isnan().any()
    out, lse = forest_attention_with_lse(q, *grove.caches, plan, AttentionOptions(0.25))
    assert out.isfinite().all() and lse.isfinite().all()
    assert calls == {"attend_suffixes": 1, "attend_items": 1, "merge": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elementwise_operations(dtype: torch.dtype, threads: int, calls: Counter[str]) -> None:
    """bfloat16 as well: it is computed in float32 by both."""
    for size in (1, 20, 64, 192, 768, 2304, 5000):
        x, residual, weight = (randn(n, size).to(dtype) for n in (50, 50, 1))
        same(partial(rms_norm, x, weight[0], 1e-6))
        same(partial(rms_norm, x, weight[0], 1e-5, True, residual))
    wide = randn(41, 12, 40).to(dtype)
    same(lambda: rms_norm(wide[:, 2:7], wide[0, 0], 1e-6))
    cos, sin = rope_cos_sin(torch.arange(41) * 91, torch.rand(20))
    same(lambda: rope(wide[:, 3:9], cos, sin))
    for size in (1, 37, 512, 1500):
        gate_up = 3 * randn(30, 2 * size).to(dtype)
        same(partial(gated_act, gate_up, "silu"))
        same(partial(gated_act, gate_up, "gelu_tanh"))
    assert calls == {"rms_norm": 15, "rope": 1, "gated_act": 8}


@pytest.mark.parametrize("shape", [(64,), (7, 64), (2, 3, 64), (2, 3, 4, 64), (0, 64), (3, 0)])
def test_norms_of_any_shape(shape: tuple[int, ...]) -> None:
    """Their results have the shape of what came in; nothing is done for nothing."""
    x, residual, weight = randn(*shape), randn(*shape, seed=1), randn(shape[-1])
    same(partial(rms_norm, x, weight, 1e-6))
    same(partial(rms_norm, x, weight, 1e-6, False, residual))


def test_nothing_is_done_for_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = randn(8, 64).to(dtype)
        assert packed_linear(weight[:0], weight).shape == (0, 8)
        assert linear(weight[:0], weight).shape == (0, 8)
        assert gated_act(weight[:0], "silu").shape == (0, 32)
        cos, sin = rope_cos_sin(torch.arange(8), torch.rand(32))
        assert rope(weight[:, None][:, :0], cos, sin).shape == (8, 0, 64)
        logits, uniform = weight[:0].contiguous(), torch.empty(0)
        assert sample_token(logits, uniform, SamplingOptions())[0].shape == (0,)


def test_write_kv(calls: Counter[str]) -> None:
    k, v = randn(9, 2, 24), randn(9, 5, 20)[:, 1:3]
    slots = torch.tensor([3, 11, 0, 7, 29, 4, 5, 6, 1])

    def write() -> tuple[Tensor, Tensor]:
        caches = torch.zeros(2, 30, 24), torch.zeros(2, 30, 20)
        write_kv(k, v, *caches, slots)
        return caches

    same(write)
    for wrong in (torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 30]), torch.tensor([0] * 9)):
        slots = wrong
        with pytest.raises(ValueError, match=r"slots must lie in|written twice"):
            write()
    assert calls == {"write_kv": 1}


@pytest.mark.parametrize("vocab", [1, 475, 1024, 1025, 5000])
def test_sample_token(vocab: int, threads: int, calls: Counter[str]) -> None:
    logits = 4 * randn(70, vocab)
    logits[3] = 0  # all equal
    logits[4, : vocab // 2] = float("-inf")
    logits[5, vocab // 2] = 60  # certain
    logits[6, -1] = logits[6].max()  # a tie for the first
    uniform = torch.rand(70, generator=torch.Generator().manual_seed(1))
    uniform[:3] = torch.tensor([2.0**-24, 1 - 2.0**-24, 0.5])
    for dtype in (torch.float32, torch.bfloat16):
        rows = logits.to(dtype)
        for temperature in (0.0, 0.5, 0.7, 1.0):
            for min_p, softcap in ((0.0, None), (0.05, None), (0.0, 30.0)):
                options = SamplingOptions(temperature, min_p=min_p)
                same(partial(sample_token, rows, uniform, options, softcap))
    assert calls == {"sample_token": 24}


def test_a_row_of_nan_gives_some_token(calls: Counter[str]) -> None:
    logits = randn(4, 2000)
    logits[1, 7] = float("nan")
    logits[2] = float("inf")
    uniform = torch.full((4,), 0.5)
    for temperature in (0.0, 0.7):
        token, logprob, _ = sample_token(logits, uniform, SamplingOptions(temperature))
        assert ((token >= 0) & (token < 2000)).all()
        assert logprob.isnan().tolist() == [False, True, True, False]
    assert calls == {"sample_token": 2}


def test_uniforms(calls: Counter[str]) -> None:
    keys = torch.randint(2**32, (50, 2), generator=torch.Generator().manual_seed(0))
    index = torch.arange(50) << 30
    positions = torch.arange(50)[:, None] * 2**29 + torch.arange(9)
    same(lambda: uniforms(keys, index, positions))
    same(lambda: uniforms(keys, index, positions[:, 3]))
    assert calls == {"uniforms": 2}


@pytest.mark.parametrize("rows", [1, 13, 14, 15, 100])
def test_packed_linear(rows: int, threads: int) -> None:
    """In float32 the bits of `linear`; in bfloat16 within rounding of float64."""
    for columns, terms in ((7, 20), (96, 256), (475, 192), (64, 700)):
        weight, bias = randn(columns, terms, seed=1), randn(columns, seed=2)
        x = randn(rows, terms)
        padded = torch.cat([x, torch.zeros(-rows % 16, terms)])
        assert packed_linear(x, weight).equal(linear(padded, weight)[:rows])
        assert packed_linear(x, weight, bias).equal(linear(padded, weight, bias)[:rows])
        half, w, b = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
        exact = packed_linear_ref(half.double(), w.double(), b.double())
        plain = (packed_linear_ref(half, w, b).double() - exact).abs().max()
        assert (packed_linear(half, w, b).double() - exact).abs().max() <= 1.01 * plain


def test_a_changed_weight_is_packed_again(calls: Counter[str]) -> None:
    weight = torch.nn.Parameter(randn(40, 30).bfloat16())
    x = randn(5, 30).bfloat16()
    with torch.no_grad():
        first = packed_linear(x, weight)
        assert packed_linear(x, weight).equal(first)
        assert calls == {"pack": 1, "linear": 2}
        weight.mul_(2)
        assert packed_linear(x, weight).equal(2 * first)
        assert calls == {"pack": 2, "linear": 3}
        assert packs(x, weight) and not packs(x.float(), weight)
    assert not packs(x, weight)  # it would need a gradient
    with torch.inference_mode():
        assert not packs(x, weight.clone())
    with pytest.raises(ValueError, match="must be"):
        packed_linear(x[:, :3], weight)
    with pytest.raises(ValueError, match="bias"):
        packed_linear(x, weight, randn(40))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder(family: str, tmp_path: Path, calls: Counter[str]) -> None:
    """Samples of rows with shared segments, joining and retiring: tokens and log-probs."""
    write_model(tmp_path, family)
    model, _ = load(tmp_path)
    groups = make_groups(6, k=5, longest=90)

    def sample() -> list:
        generator = make_generator(model, max_batch=11, options=SamplingOptions(0.8))
        return [drawn(result) for result in run(generator, groups)]

    ours = sample()
    # Each stands for all the steps between two looks.
    assert calls["decode"] > 10 and calls["take_token"] > 10 and not calls["attend_items"]
    before = calls.copy()
    with cpp.torch_only():
        assert sample() == ours
    assert calls == before


def test_a_model_that_is_trained_between_samples(tmp_path: Path) -> None:
    """The decoder follows weights that change in place, also within one generator."""
    write_model(tmp_path, "qwen3")
    model, _ = load(tmp_path)
    generator = make_generator(model)
    groups = make_groups(1)  # not the rows of before: the keys of their head are kept
    run(generator, make_groups(1, seed=1))
    first = [drawn(r) for r in run(make_generator(model), groups)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    changed = [drawn(r) for r in run(generator, groups)]
    assert changed != first
    with cpp.torch_only():
        assert [drawn(r) for r in run(make_generator(model), groups)] == changed


def test_bfloat16_decoder_is_as_exact_as_torch(tmp_path: Path) -> None:
    """Log-probs of the same tokens, against float64."""
    write_model(tmp_path, "gemma2")
    errors = {}
    exact = load(tmp_path, dtype="bfloat16")[0].double()
    model, _ = load(tmp_path, dtype="bfloat16")
    groups = make_groups(2)
    for name in ("native", "torch"):
        if name == "native":
            results = run(make_generator(model), groups)
        else:
            with cpp.torch_only():
                results = run(make_generator(model), groups)
        worst = 0.0
        for group, result in zip(groups, results, strict=True):
            for prompt, generation in zip(group.prompts, result.generations, strict=True):
                ids = [t for segment in prompt for t in segment] + generation.token_ids
                logits = exact.logits(ids)[-len(generation.token_ids) - 1 : -1].double()
                logprobs = logits.log_softmax(-1)
                expected = logprobs.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
                error = (expected - torch.tensor(generation.logprobs)).abs().max()
                worst = max(worst, float(error))
        errors[name] = worst
    assert errors["native"] <= 2 * errors["torch"], errors


def test_slots_of_a_forward_are_checked(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3")
    model, _ = load(tmp_path)
    grove = Grove(crowd(), Shape(2, 2, 24, 24), capacity=304)
    decoder = CppDecoder(model, grove.cache.k * 3, grove.cache.v * 3)
    _, plan = grove.decode()
    tokens = torch.ones(len(plan.positions), dtype=torch.int64)
    with pytest.raises(ValueError, match="distinct and within the cache"):
        decoder.forward(tokens, plan.positions, tokens, plan)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpp.library.cache_clear()
    yield
    cpp.library.cache_clear()


@pytest.mark.parametrize("fault", ["no compiler", "a broken one", "other bits"])
@pytest.mark.usefixtures("without_library")
def test_without_the_library_torch_runs(
    fault: str, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    """It says why, once, and gives the same."""
    x, weight = randn(20, 64), randn(64)
    if fault == "no compiler":
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        message = "no C\\+\\+ compiler"
    elif fault == "a broken one":
        monkeypatch.setenv("CXX", "false")
        message = "no C\\+\\+ library"
    else:
        monkeypatch.setattr(cpp, "_same_bits", lambda _: False)
        message = "differ in the last bits"
    with pytest.warns(RuntimeWarning, match=message) as warned:
        out = rms_norm(x, weight, 1e-6)
        rms_norm(x, weight, 1e-6)
    assert len(warned) == 1 and not calls
    cpp.library.cache_clear()
    monkeypatch.undo()
    again = rms_norm(x, weight, 1e-6)
    assert isinstance(out, Tensor) and isinstance(again, Tensor) and again.equal(out)


@pytest.mark.usefixtures("without_library")
def test_it_is_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    build = cpp._run

    def counted(command: list[str]) -> str:
        commands.append(command)
        return build(command)

    monkeypatch.setattr(cpp, "_run", counted)
    assert isinstance(cpp.library(), ctypes.CDLL)
    (made,) = (tmp_path / "quorum").glob("native-*.so")
    cpp.library.cache_clear()
    assert cpp.library() is not None
    assert sum("-o" in command for command in commands) == 1
    assert [*(tmp_path / "quorum").iterdir()] == [made]  # nothing half made is left


def test_other_sums_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at loading fails for a library whose sums run in another order."""
    library = cpp.library()
    assert library is not None and cpp._same_bits(library)
    typed = cpp._typed(library)
    linear_f32 = typed["linear", torch.float32]

    def nudged(*arguments: Any) -> None:
        linear_f32(*arguments)
        address, (rows, columns) = arguments[6], (arguments[1], arguments[4])
        y = (ctypes.c_float * (rows * columns)).from_address(address)
        y[5] = y[5] * (1 + 2**-22)

    monkeypatch.setattr(cpp, "_typed", lambda _: typed | {("linear", torch.float32): nudged})
    assert not cpp._same_bits(library)


def test_transformer_is_the_definition() -> None:
    """It names no C++: what runs there is each operation's to choose, and none is without it."""
    assert "native" not in Transformer.forward.__code__.co_names
