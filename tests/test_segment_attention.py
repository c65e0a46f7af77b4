"""Segment attention: torch against the reference, and the adapters of other people's kernels
against stand-ins that follow those packages' documentation (neither runs without a GPU)."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.forest_attention import AttentionOptions
from kernels.merge_states import merge_states
from kernels.segment_attention import segment_attention, segment_attention_ref

CU_SEQLENS_Q, CU_SEQLENS_K = (
    [0, 3, 3, 70, 75],
    [0, 5, 9, 80, 80],
)  # one pair without queries, one without keys
Case = tuple[AttentionOptions, bool]
CASES: list[Case] = [
    (AttentionOptions(0.3), False),
    (AttentionOptions(0.3), True),
    (AttentionOptions(0.3, 5.0), True),
    (AttentionOptions(0.3, 5.0, 4), True),
]


def draw(
    dtype: torch.dtype, cu_seqlens_q: list[int], cu_seqlens_k: list[int], v_dim: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((cu_seqlens_q[-1], 6, 16), (cu_seqlens_k[-1], 2, 16), (cu_seqlens_k[-1], 2, v_dim))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("case", CASES)
def test_torch_equals_the_reference(case: Case) -> None:
    q, k, v = draw(torch.float64, CU_SEQLENS_Q, CU_SEQLENS_K)
    out, lse = segment_attention(q, k, v, CU_SEQLENS_Q, CU_SEQLENS_K, *case)
    expected, expected_lse = segment_attention_ref(q, k, v, CU_SEQLENS_Q, CU_SEQLENS_K, *case)
    assert out[70:].eq(0).all() and lse[70:].isneginf().all()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_the_reference_is_softmax_attention() -> None:
    """Against torch's own, over one segment."""
    q, k, v = draw(torch.float64, [0, 20], [0, 20])
    out, _ = segment_attention_ref(q, k, v, [0, 20], [0, 20], AttentionOptions(0.25), True)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, theirs.transpose(0, 1))


def test_segments_joined_by_the_merge_are_one_attention() -> None:
    """Queries over a first segment and causally over their own, merged: a causal prefill."""
    q, k, v = draw(torch.float64, [0, 30], [0, 80])
    whole, whole_lse = segment_attention(q, k, v, [0, 30], [0, 80], AttentionOptions(0.3), True)
    above = segment_attention(q, k[:50], v[:50], [0, 30], [0, 50], AttentionOptions(0.3))
    own = segment_attention(q, k[50:], v[50:], [0, 30], [0, 30], AttentionOptions(0.3), True)
    index = torch.arange(30)[:, None] + torch.tensor([0, 30])
    o, lse = (torch.cat([a, b]) for a, b in zip(above, own, strict=True))
    merged, merged_lse = merge_states(o, lse, index)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(merged_lse, whole_lse)


# -- flash-attn and xformers -----------------------------------------------------------------------


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["flash-attn", "xformers"])
def test_adapters(backend: Any, case: Case) -> None:
    # xformers' causal mask wants as many keys as queries.
    cu_seqlens_k = [*CU_SEQLENS_K[:-1], 88] if backend == "xformers" else CU_SEQLENS_K
    q, k, v = draw(torch.bfloat16, CU_SEQLENS_Q, cu_seqlens_k, v_dim=16)
    options, causal = case
    if backend == "xformers" and options.softcap is not None:
        with pytest.raises(ValueError, match=r"xformers has no soft-cap, got 5\.0"):
            segment_attention(q, k, v, CU_SEQLENS_Q, cu_seqlens_k, *case, backend=backend)
        case = (replace(options, softcap=None), causal)
    out, lse = segment_attention(q, k, v, CU_SEQLENS_Q, cu_seqlens_k, *case, backend=backend)
    q, k, v = (x.double() for x in (q, k, v))
    expected, expected_lse = segment_attention_ref(q, k, v, CU_SEQLENS_Q, cu_seqlens_k, *case)
    assert out.dtype == torch.bfloat16 and out.equal(expected.bfloat16())
    assert lse.equal(expected_lse.float()) and lse.shape == (75, 6)


def test_absent_packages_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(torch.bfloat16, [0, 3], [0, 5], v_dim=16)
    for backend, module, extra in (
        ("flash-attn", "flash_attn", "flash"),
        ("xformers", "xformers", "xformers"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"pip install 'quorum-grm\[{extra}\]'"):
            segment_attention(q, k, v, [0, 3], [0, 5], AttentionOptions(0.3), backend=backend)  # type: ignore[arg-type]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 16)}, r"q \(3, 16\)"),
        ({"v": torch.zeros(4, 2, 16)}, r"v \(4, 2, 16\)"),
        ({"cu_seqlens_q": [0, 2]}, r"cu_seqlens_q must ascend from 0 to 3, got \[0, 2\]"),
        ({"cu_seqlens_k": [0, 4, 3, 5]}, "cu_seqlens_k must ascend"),
        ({"cu_seqlens_k": [0, 2, 5]}, "1 segments of queries, 2 of keys"),
        ({"options": AttentionOptions(1.0, None, 4)}, "a window needs a causal mask, got window 4"),
        ({"backend": "cudnn"}, "got 'cudnn'"),
        ({"backend": "triton"}, "'triton' does not run on cpu here"),
        ({"backend": "flash-attn"}, "flash-attn takes float16 and bfloat16 .*got torch.float32"),
        ({"backend": "xformers"}, "xformers takes float16"),
        (
            {"backend": "xformers", "causal": True,
             "cu_seqlens_q": [0, 3, 3], "cu_seqlens_k": [0, 1, 5],
             **{name: torch.zeros(size, heads, 16).half()
                for name, size, heads in (("q", 3, 4), ("k", 5, 2), ("v", 5, 2))}},
            "as many keys as queries",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(3, 4, 16), "k": torch.zeros(5, 2, 16), "v": torch.zeros(5, 2, 16),
        "cu_seqlens_q": [0, 3], "cu_seqlens_k": [0, 5], "options": AttentionOptions(1.0),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        segment_attention(**(arguments | change))
