"""The engine through Triton's interpreter: the kernels run, and what comes out is what torch gives:
of `engine.sample` to the byte, of other families the samples and their log-probs."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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

ROW = {
    "id": "one",
    "prompt": "A nurse at the bank this monday asks: sort 3 1 2. Open with Sure, close with Bye, "
    "use ( ), name Anna, mention red.",
    "responses": ["Sure Anna, take ( 1 2 3 ) in red. Bye."],
}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each kernel is launched, and each instance of attention's."""
    counts: Counter[str] = Counter()

    def run(kernel: Any, grid: Any, arguments: Any, options: dict[str, Any]) -> None:
        name = kernel.__name__
        if name == "_forest_attention_kernel":
            name = "suffix" if options["SUFFIX"] else "narrow" if options["M"] <= 16 else "wide"
        counts[name] += 1
        kernel[grid](*arguments, **options)

    with launch.intercept(run):
        yield counts


def sample(directory: Path, tokens: int, name: str) -> tuple[bytes, Counter[str]]:
    """The output file of one run, and its launches."""
    from engine.sample import main  # not where there is a GPU and little else

    rows = directory / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    out = directory / name
    options = ["--data", str(rows), "--out", str(out), "--k", "2", "--max-new-tokens", str(tokens)]
    with counted() as counts:
        assert main(options) in (0, 3)  # 3: too short for scores
    return out.read_bytes(), counts


# The soak runs a whole judgement, with scores; the kernels are the same.
@pytest.mark.parametrize("tokens", [3, pytest.param(80, marks=pytest.mark.soak)])
def test_engine_sample_runs_every_kernel_and_gives_the_samples_of_torch(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_line, launches = sample(tmp_path, tokens, "triton")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    torch_line, none = sample(tmp_path, tokens, "torch")
    assert triton_line == torch_line and not none
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


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.soak)])
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])
def test_samples_of_mixtures_are_those_of_torch(
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

    with counted() as launches:
        ours = samples()
    assert {"suffix", "_norm_rope_write_kernel", "_route_kernel"} <= launches.keys()
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for (tokens, logprobs, *_), (expected, exact, *_) in zip(ours, samples(), strict=True):
        assert tokens == expected
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(exact), atol=2e-5, rtol=0)
