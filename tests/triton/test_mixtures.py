"""Latent attention and experts in the engine, through Triton's interpreter: samples and log-probs
are those of torch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import launch
from models import load
from tests.implementations import ON_GPU

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(ON_GPU, reason="compares CPU with CPU"),
]


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.soak)])
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])
def test_samples_are_those_of_torch(
    family: str, deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not where there is a GPU and little else.
    from tests.test_generate import drawn, make_generator, make_groups, run
    from tests.tiny import write_model

    write_model(tmp_path, family, num_hidden_layers=2)
    model, _ = load(tmp_path, dtype=torch.float32)
    groups = make_groups(1, k=2, longest=20)

    def samples() -> list[Any]:
        options: dict[str, Any] = {"max_new_tokens": 3, "deterministic": deterministic}
        (result,) = run(make_generator(model, **options), groups)
        return drawn(result)

    launched: list[str] = []

    def counted(kernel: Any, grid: Any, arguments: Any, options: dict[str, Any]) -> None:
        launched.append(kernel.__name__)
        kernel[grid](*arguments, **options)

    with launch.intercept(counted):
        ours = samples()
    assert {"_forest_attention_kernel", "_norm_rope_write_kernel", "_route_kernel"} <= {*launched}
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for (tokens, logprobs, *_), (expected, exact, *_) in zip(ours, samples(), strict=True):
        assert tokens == expected
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(exact), atol=2e-5, rtol=0)
