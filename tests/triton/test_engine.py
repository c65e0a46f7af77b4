"""The whole of `engine.sample` through Triton's interpreter: every kernel runs, and what comes out
is what torch gives, to the byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
SCRIPT = """
import atexit, collections, json, runpy, sys
from kernels.launch import INTERPRETED, intercept

counts = collections.Counter()
atexit.register(lambda: print(json.dumps(counts), file=sys.stderr))

def run(kernel, grid, arguments, options):
    name = kernel.__name__
    if name == "_forest_attention_kernel":
        name = "suffix" if options["SUFFIX"] else "narrow" if options["M"] <= 16 else "wide"
    counts[name] += 1
    kernel[grid](*arguments, **options)

if INTERPRETED:
    with intercept(run):
        runpy.run_module("engine.sample", run_name="__main__", alter_sys=True)
else:
    runpy.run_module("engine.sample", run_name="__main__", alter_sys=True)
"""


def sample(directory: Path, tokens: int, interpreted: bool) -> tuple[bytes, dict[str, int]]:
    """The output file of one run, and its launches."""
    rows = directory / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    out = directory / f"{interpreted}.jsonl"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    options = ["--data", str(rows), "--out", str(out), "--k", "2", "--max-new-tokens", str(tokens)]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *options],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode in (0, 3), run.stderr  # 3: too short for scores
    return out.read_bytes(), json.loads(run.stderr.splitlines()[-1])


# The soak runs a whole judgement, with scores; the kernels are the same.
@pytest.mark.parametrize("tokens", [3, pytest.param(80, marks=pytest.mark.soak)])
def test_engine_sample_runs_every_kernel_and_gives_the_samples_of_torch(
    tokens: int, tmp_path: Path
) -> None:
    torch_line, none = sample(tmp_path, tokens, interpreted=False)
    triton_line, counts = sample(tmp_path, tokens, interpreted=True)
    assert not none
    assert triton_line == torch_line
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
        assert counts.pop(name) >= least, name
    assert not counts
