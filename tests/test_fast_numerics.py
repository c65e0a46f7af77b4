"""`--numerics fast`: as exact as bfloat16 is, samples that do not depend on each other, and no word
of it where it cannot be had. Its products are tested in tests/spec/test_packed_linear.py."""

import json
from pathlib import Path

import pytest
import torch

from engine import sample
from engine.judge import Judge
from engine.sample import POCKET
from kernels import cpp
from kernels.packed_linear import allow_dot_products
from models import load
from tests.rows import needs_dots
from tests.test_cpp import logprob_errors
from tests.test_generate import drawn, make_generator, make_groups, run
from tests.tiny import write_model


@needs_dots
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "qwen3_moe", "deepseek_v2"])
def test_samples(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs of drawn tokens against float64, over shared segments of odd and even lengths, are
    as good as those of torch in bfloat16; a sample does not depend on its company."""
    write_model(tmp_path, family)
    exact = load(tmp_path, dtype="bfloat16")[0].double()
    called: list[tuple[str, bool]] = []
    call = cpp.call

    def counted(name: str, dtype: torch.dtype, *arguments: object, dots: bool = False) -> None:
        called.append((name, dots))
        call(name, dtype, *arguments, dots=dots)

    monkeypatch.setattr(cpp, "call", counted)
    groups = make_groups(3, longest=90, k=4)

    def error(numerics: str) -> float:
        model, _ = load(tmp_path, dtype="bfloat16", numerics=numerics)
        results = run(make_generator(model, max_batch=11), groups)
        if numerics == "fast":
            alone = run(make_generator(model, max_batch=5), groups[:1])
            assert drawn(alone[0]) == drawn(results[0])
        return float(logprob_errors(exact, results).square().mean().sqrt())

    fast = error("fast")
    assert {("decode", True), ("linear", True)} <= set(called)
    assert not {("decode", False), ("linear", False)} & set(called)
    with cpp.torch_only():
        assert fast <= 2 * error("portable")


@needs_dots
def test_keys_tell_them_apart(tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"prompt": "a", "responses": ["b", "c"]}) + "\n")
    words = ["--model", str(POCKET), "--meta-model", str(POCKET.with_name("pocket-meta"))]
    words += ["--data", str(data), "--out", str(out), "--k", "2", "--dtype", "bfloat16"]
    words.append("--force-scores")
    assert sample.main([*words, "--numerics", "fast"]) == 0
    assert sample.main([*words, "--numerics", "fast", "--resume"]) == 0
    assert sample.main([*words, "--resume"]) == 2  # other options than those of its lines


def test_what_cannot_be_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"for bfloat16 on a CPU, the weights are torch\.float32"):
        Judge.load(POCKET, numerics="fast")
    with pytest.raises(ValueError, match="numerics must be one of portable, fast, got 'quick'"):
        Judge.load(POCKET, numerics="quick")
    with pytest.raises(ValueError, match="in pairs, a sum has 7"):
        allow_dot_products([torch.ones(3, 7).bfloat16()])
    with cpp.torch_only(), pytest.raises(ValueError, match="a processor with AVX512-BF16"):
        allow_dot_products([torch.ones(3, 8).bfloat16()])
