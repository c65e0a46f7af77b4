"""The whole of `engine.sample` through Triton's interpreter: every kernel runs, and what comes out
is what torch gives, to the byte."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kernels import launch
from kernels.launch import intercept
from tests.implementations import ON_GPU

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(ON_GPU, reason="compares CPU with CPU"),
]

ROW = {
    "id": "one",
    "prompt": "A nurse at the bank this monday asks: sort 3 1 2. Open with Sure, close with Bye, "
    "use ( ), name Anna, mention red.",
    "responses": ["Sure Anna, take ( 1 2 3 ) in red. Bye."],
}


counts: Counter[str] = Counter()


def run(kernel: Any, grid: Any, arguments: Any, options: dict[str, Any]) -> None:
    name = kernel.__name__
    if name == "_forest_attention_kernel":
        name = "suffix" if options["SUFFIX"] else "narrow" if options["M"] <= 16 else "wide"
    counts[name] += 1
    kernel[grid](*arguments, **options)


def sample(directory: Path, tokens: int, name: str) -> bytes:
    """The output file of one run, whose launches are counted."""
    from engine.sample import main  # not where there is a GPU and little else

    rows = directory / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    out = directory / name
    options = ["--data", str(rows), "--out", str(out), "--k", "2", "--max-new-tokens", str(tokens)]
    counts.clear()
    with intercept(run):
        assert main(options) in (0, 3)  # 3: too short for scores
    return out.read_bytes()


# The soak runs a whole judgement, with scores; the kernels are the same.
@pytest.mark.parametrize("tokens", [3, pytest.param(80, marks=pytest.mark.soak)])
def test_engine_sample_runs_every_kernel_and_gives_the_samples_of_torch(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_line = sample(tmp_path, tokens, "triton")
    launches = dict(counts)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    torch_line = sample(tmp_path, tokens, "torch")
    assert triton_line == torch_line and not counts
    verdict = json.loads(torch_line)
    assert verdict["votes"] == verdict["valid"] == (2 if tokens == 80 else 0)
    longest = max(s["tokens"] for s in verdict["samples"])
    assert longest == 3 if tokens == 3 else longest > 40
    layers, steps = 4, longest - 1  # the first token comes from the prompt
    # The host looks every 8 steps, so a few more may be run.
    for name, least in {
        "wide": layers,  # prefill; two leaves of three heads a group are narrow in decode
        "narrow": layers * steps,
        "suffix": layers * steps,
        "_merge_states_kernel": layers * steps,
        "_norm_rope_write_kernel": layers * (steps + 1),
        "_gated_act_kernel": layers * (steps + 1),
        "_rms_norm_kernel": (2 * layers + 1) * (steps + 1),
        "_tile_stats_kernel": steps + 1,
        "_sample_from_tiles_kernel": steps + 1,
        "_accept_token_kernel": steps + 1,
        "_uniforms_kernel": 2,
    }.items():
        assert launches.pop(name) >= least, name
    assert not launches
