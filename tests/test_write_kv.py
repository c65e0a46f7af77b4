import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.write_kv import write_kv, write_kv_ref

HEADS, SIZE, DIM, V_DIM = 3, 12, 6, 4


def draw(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    k = torch.randn(tokens, HEADS, DIM, generator=generator).to(dtype)
    return k, torch.randn(tokens, HEADS, V_DIM, generator=generator).to(dtype)


def caches(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Poisoned, so that a slot written by mistake shows."""
    return (
        torch.full((HEADS, SIZE, DIM), float("nan"), dtype=dtype),
        torch.full((HEADS, SIZE, V_DIM), float("nan"), dtype=dtype),
    )


@given(
    st.lists(st.integers(0, SIZE - 1), unique=True),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_writes_every_token_and_nothing_else(indices: list[int], dtype: torch.dtype) -> None:
    k, v = draw(len(indices), dtype)
    for op in (write_kv_ref, write_kv):
        k_cache, v_cache = caches(dtype)
        op(k, v, k_cache, v_cache, torch.tensor(indices, dtype=torch.int64))
        for index in range(SIZE):
            for head in range(HEADS):
                if index in indices:
                    assert torch.equal(k_cache[head, index], k[indices.index(index), head])
                    assert torch.equal(v_cache[head, index], v[indices.index(index), head])
                else:
                    assert k_cache[head, index].isnan().all() and v_cache[head, index].isnan().all()


def test_takes_slices_of_wider_tensors_and_caches() -> None:
    qkv = torch.randn(5, 40, requires_grad=True)
    k = qkv[:, 4 : 4 + HEADS * DIM].unflatten(1, (HEADS, DIM))
    v = qkv[:, 24 : 24 + HEADS * V_DIM].unflatten(1, (HEADS, V_DIM))
    whole = torch.zeros(2, HEADS, SIZE, DIM)
    v_cache = torch.zeros(HEADS, SIZE, V_DIM)
    indices = torch.tensor([11, 0, 3, 4, 7])
    write_kv(k, v, whole[1], v_cache, indices)
    assert torch.equal(whole[1][:, indices].transpose(0, 1), k)
    assert torch.equal(v_cache[:, indices].transpose(0, 1), v)
    assert not whole[0].any() and not v_cache.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_index": torch.tensor([3, 3])}, "index 3 is written twice"),
        ({"cache_index": torch.tensor([0, SIZE])}, f"got 0 to {SIZE}"),
        ({"cache_index": torch.tensor([-1, 2])}, "got -1 to 2"),
        ({"cache_index": torch.tensor([0, 1], dtype=torch.int32)}, "int32"),
        ({"cache_index": torch.tensor([0, 1, 2])}, r"cache_index must be \(2,\)"),
        ({"k": torch.zeros(2, HEADS)}, r"k must be \(T, H, D\) floating"),
        ({"k": torch.zeros(2, HEADS, DIM, dtype=torch.float64)}, r"must be .* torch.float64, got"),
        ({"v": torch.zeros(2, HEADS + 1, V_DIM)}, "v must be"),
        ({"k_cache": torch.zeros(HEADS, SIZE, DIM + 1)}, "k_cache must be"),
        ({"v_cache": torch.zeros(HEADS, SIZE - 1, V_DIM)}, "v_cache must be"),
        (
            {"v_cache": torch.zeros(HEADS, SIZE, V_DIM).bfloat16()},
            r"v_cache must be .* torch.float32, got .*bfloat16",
        ),
    ],
)
def test_bad_arguments_write_nothing(change: dict[str, Tensor], message: str) -> None:
    k, v = draw(2)
    k_cache, v_cache = caches()
    tensors = {
        "k": k,
        "v": v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cache_index": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        write_kv(**(tensors | change))
    assert k_cache.isnan().all() and v_cache.isnan().all()
