"""Segment attention; and the adapters of other people's kernels, against stand-ins that follow
those packages' documentation (neither runs without a GPU)."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.forest_attention import AttentionOptions
from kernels.merge_states import merge_states
from kernels.segment_attention import segment_attention, segment_attention_ref
from tests.implementations import Implementation, check_refused
from tests.oracles.attention import Attend, over_sequences, rounded_once

# Four pairs, one of them without queries and one without keys.
CU_SEQLENS = [0, 3, 3, 70, 75], [0, 5, 9, 80, 80]
PLAIN = AttentionOptions(0.3)
Case = tuple[AttentionOptions, bool]
CASES: list[Case] = [
    (PLAIN, False),
    (PLAIN, True),
    (AttentionOptions(0.3, 5.0), True),
    (AttentionOptions(0.3, 5.0, 4), True),
]
OTHERS = pytest.mark.usefixtures("packages")


def draw(
    on: Implementation, queries: int, keys: int, dtype: torch.dtype = torch.float32, v_dim: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (queries, 6, 16), (keys, 2, 16), (keys, 2, v_dim)
    q, k, v = (on.draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    return q, k, v


def reference(*arguments: Any) -> Attend:
    return rounded_once(lambda q, k, v: segment_attention_ref(q, k, v, *arguments))


def test_reference_is_attention_over_each_segment() -> None:
    q, k, v = draw(Implementation("torch"), 70, 80, torch.float64)
    pairs = [(3, torch.arange(5)), (67, torch.arange(9, 80))]
    for options in (PLAIN, AttentionOptions(0.3, 5.0, 4)):
        found = segment_attention_ref(q, k, v, [0, 3, 3, 70], [0, 5, 9, 80], options, True)
        expected = over_sequences(pairs, options)(q, k.transpose(0, 1), v.transpose(0, 1))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=64 * 2.0**-52)
    # Without a mask, against torch's own.
    out, _ = segment_attention_ref(q, k, v, [0, 70], [0, 80], AttentionOptions(0.25))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, theirs.transpose(0, 1))


@pytest.mark.parametrize("case", CASES)
def test_values(on: Implementation, dtype: torch.dtype, case: Case) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return segment_attention(q, k, v, *CU_SEQLENS, *case)

    q, k, v = draw(on, 75, 80, dtype)
    out, lse = on.check(attend, reference(*CU_SEQLENS, *case), q, k, v)
    assert out[70:].eq(0).all() and lse[70:].isneginf().all()


def test_segments_joined_by_the_merge_are_one_attention(on: Implementation) -> None:
    """Queries over a first segment and causally over their own, merged: a causal prefill."""

    def joined(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        above = segment_attention(q, k[:50], v[:50], [0, 30], [0, 50], PLAIN)
        own = segment_attention(q, k[50:], v[50:], [0, 30], [0, 30], PLAIN, True)
        index = torch.arange(30)[:, None] + torch.tensor([0, 30])
        o, lse = (torch.cat(parts) for parts in zip(above, own, strict=True))
        return merge_states(o, lse, index.to(on.device))

    on.check(joined, reference([0, 30], [0, 80], PLAIN, True), *draw(on, 30, 80))


def test_a_backend_is_not_replaced_by_another(on: Implementation) -> None:
    q, k, v = draw(on, 75, 80)
    mine, other = ("triton", "torch") if on.name == "triton" else ("torch", "triton")
    chosen, default = (
        segment_attention(q, k, v, *CU_SEQLENS, PLAIN, backend=backend)  # type: ignore[arg-type]
        for backend in (mine, None)
    )
    assert all(a.equal(b) for a, b in zip(chosen, default, strict=True))
    with pytest.raises(ValueError, match=f"'{other}' does not run on {on.device.type}"):
        segment_attention(q, k, v, *CU_SEQLENS, PLAIN, backend=other)  # type: ignore[arg-type]


# -- flash-attn and xformers -----------------------------------------------------------------------


@OTHERS
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["flash-attn", "xformers"])
def test_adapters(backend: Any, case: Case) -> None:
    # xformers' causal mask wants as many keys as queries.
    last = 88 if backend == "xformers" else 80
    offsets = CU_SEQLENS[0], [*CU_SEQLENS[1][:-1], last]
    q, k, v = draw(Implementation("torch"), 75, last, torch.bfloat16, v_dim=16)
    options, causal = case
    if backend == "xformers" and options.softcap is not None:
        with pytest.raises(ValueError, match=r"xformers has no soft-cap, got 5\.0"):
            segment_attention(q, k, v, *offsets, *case, backend=backend)
        case = (replace(options, softcap=None), causal)
    out, lse = segment_attention(q, k, v, *offsets, *case, backend=backend)
    q, k, v = (x.double() for x in (q, k, v))
    expected, expected_lse = segment_attention_ref(q, k, v, *offsets, *case)
    assert out.dtype == torch.bfloat16 and out.equal(expected.bfloat16())
    assert lse.equal(expected_lse.float()) and lse.shape == (75, 6)


def test_absent_packages_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(Implementation("torch"), 3, 5, torch.bfloat16, v_dim=16)
    packages: Any = (("flash-attn", "flash_attn", "flash"), ("xformers", "xformers", "xformers"))
    for backend, module, extra in packages:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"pip install 'quorum-grm\[{extra}\]'"):
            segment_attention(q, k, v, [0, 3], [0, 5], PLAIN, backend=backend)


@OTHERS
def test_bad_arguments() -> None:
    tensors = {name: torch.zeros(5, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    fewer_keys: dict[str, Any] = {"cu_seqlens_q": [0, 3, 5], "cu_seqlens_k": [0, 1, 5]}
    fewer_keys |= {"causal": True} | {name: x.half() for name, x in tensors.items()}
    check_refused(
        segment_attention,
        tensors | {"cu_seqlens_q": [0, 5], "cu_seqlens_k": [0, 5], "options": PLAIN},
        ({"q": torch.zeros(5, 16)}, r"q \(5, 16\)"),
        ({"v": torch.zeros(4, 2, 16)}, r"v \(4, 2, 16\)"),
        ({"cu_seqlens_q": [0, 4]}, r"cu_seqlens_q must ascend from 0 to 5, got \[0, 4\]"),
        ({"cu_seqlens_k": [0, 4, 3, 5]}, "cu_seqlens_k must ascend"),
        ({"cu_seqlens_k": [0, 2, 5]}, "1 segments of queries, 2 of keys"),
        ({"options": AttentionOptions(1.0, None, 4)}, "a window needs a causal mask, got window 4"),
        ({"backend": "cudnn"}, "got 'cudnn'"),
        ({"backend": "flash-attn"}, "flash-attn takes float16 and bfloat16 .*got torch.float32"),
        ({"backend": "xformers"}, "xformers takes float16"),
        (fewer_keys | {"backend": "xformers"}, "as many keys as queries"),
    )


@pytest.mark.implementations("triton")
def test_keys_of_latent_attention_are_refused(on: Implementation) -> None:
    q, k, v = (torch.zeros(3, 1, size).to(on.device) for size in (576, 576, 512))
    with pytest.raises(ValueError, match="triton takes keys of at most 256 channels, got 576"):
        segment_attention(q, k, v, [0, 3], [0, 3], PLAIN, backend="triton")
