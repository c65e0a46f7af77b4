"""One command on a machine with a GPU: test the kernels, measure them, write the figures down.

    python -m bench.gpu [--out runs/gpu] [--seconds 510] [--test-seconds 220] [--decode-seconds 120]
                        [--loss-seconds 60]

Runs the Triton tests of tests/spec and tests/triton on the device, then all benchmarks, those with
a goal first, then `bench.decode` end to end (DECODES) and the memory of the policy loss (LOSSES),
and writes DIR/<device>-<date>.json (provenance, device, tests, ceilings, figures, goals) and the
tables as DIR/<device>-<date>.md. Each stage has its time: what did not run is named. Where a test
fails or a run breaks off, figures are not measured: no speed on a red test. Results that are to
stay are committed as bench/results/<device>/<date>.json.

Needs torch, triton, numpy, safetensors, tokenizers, pytest, pytest-benchmark and hypothesis. Exits
with 1 without a GPU, and where a test or a benchmark fails.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceilings
from bench.figures import Figure
from bench.figures import table as figures_table
from bench.goals import GOALS, compare
from bench.goals import table as goals_table
from bench.provenance import ROOT, print_json, provenance, said_by
from bench.stage import StageLog, read_log
from engine import command

GRACE = 30.0  # seconds that the test in progress has after the budget
TESTS = ("tests/spec", "tests/triton")
BENCH = "bench/ops/bench_ops.py"
# Arguments of bench.decode, and tokens per second to reach on an H200 (None: no goal).
DECODES: list[tuple[str, float | None]] = [
    ("--shape qwen3-8b --k 32 --prefix 4096 --new-tokens 1024", 5680),
    ("--shape qwen3-8b --k 32 --prefix 4096 --new-tokens 1024 --no-sharing", None),
    ("--shape qwen3-8b --k 64 --prefix 8192 --new-tokens 1024", 9530),
    ("--shape qwen3-8b --k 128 --prefix 8192 --new-tokens 1024", 14650),
    ("--shape qwen3-8b --k 64 --prefix 8192 --new-tokens 1024 --no-sharing", None),
    ("--shape gemma2-27b --k 32 --prefix 4096 --new-tokens 1024", None),
]
# Arguments of bench.loss, and the extra memory in GB that some of its peers may take.
LOSSES: list[tuple[str, dict[str, float]]] = [
    (
        "--tokens 8192 --hidden 4608 --vocab 256000 --softcap 30 --dtype bfloat16 --repeats 2",
        {"fused in place": 2.5, "fused small": 0.6},
    ),
    (
        "--tokens 8192 --hidden 4096 --vocab 151936 --dtype bfloat16 --repeats 2",
        {"fused in place": 1.6, "fused small": 0.6},
    ),
]


@dataclass
class Stage:
    """A run of pytest: its log, its exit status (None: it was ended), its seconds."""

    log: StageLog
    status: int | None
    seconds: float

    @property
    def green(self) -> bool:
        """Something passed, nothing failed, nothing broke off."""
        return self.status == 0 and self.log.begun is None and self.log.count("passed") > 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        log = self.log
        reasons = {t["test"]: t["reason"] for t in log.tests if t["outcome"] == "failed"}
        return {
            "green": self.green,
            "passed": log.count("passed"),
            "failed": [{"test": name, "reason": reasons[name]} for name in log.named("failed")],
            "skipped": log.count("skipped"),
            "not_run": log.named("not run"),
            "broke_off_in": log.begun,
            "exit_status": self.status,
            "seconds": round(self.seconds, 1),
        }

    def describe(self) -> str:
        """One line for a person."""
        found = self.as_dict()
        parts = [f"{found['passed']} passed", f"{len(found['failed'])} failed"]
        if found["not_run"]:
            parts.append(f"{len(found['not_run'])} not run, for want of time")
        if self.status is None:
            parts.append("ended after its time")
        elif self.status not in (0, 1):
            parts.append(f"exit status {self.status}")
        if self.log.begun is not None:
            parts.append(f"broke off in {self.log.begun}")
        return f"{', '.join(parts)}; {self.seconds:.0f} s"


def run_stage(name: str, arguments: Sequence[str], budget: float) -> Stage:
    """Run pytest in a process of its own, with `budget` seconds to begin tests in."""
    print(f"== {name}: at most {budget:.0f} s", flush=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        # The project's own options name hypothesis, which need not be there.
        process = subprocess.Popen(
            [
                sys.executable, "-u", "-m", "pytest", "-o", "addopts=--strict-markers", "-p",
                "bench.stage", "--log", log, "--budget", f"{budget:.0f}", "--tb=short", *arguments,
            ],
            cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip
        status: int | None
        try:
            status = process.wait(budget + GRACE)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        stage = Stage(read_log(log), status, time.monotonic() - started)
    print(f"== {name}: {stage.describe()}", flush=True)
    return stage


def run_script(
    module: str, entries: Sequence[dict[str, Any]], budget: float, describe: Callable[[Any], str]
) -> list[dict[str, Any]]:
    """A script that ends in a line of JSON, with the arguments of every entry that can begin within
    `budget` seconds: the entry, and what it said, or the error."""
    found = []
    ends = time.monotonic() + budget
    for entry in entries:
        left = ends - time.monotonic()
        if left <= 0:
            found.append(entry | {"error": "not run, for want of time"})
            continue
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, *entry["arguments"].split()],
                cwd=ROOT, capture_output=True, text=True, timeout=left + GRACE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            found.append(entry | {"error": "ended after its time"})
            continue
        if done.returncode:
            found.append(entry | {"error": done.stderr.strip()[-2000:]})
        else:
            found.append(entry | json.loads(done.stdout.splitlines()[-1]))
        print(f"== {module}: {describe(found[-1])}", flush=True)
    return found


def run_decodes(budget: float) -> list[dict[str, Any]]:
    """`bench.decode` for every entry of DECODES."""
    entries = [
        {"arguments": f"--json --repeats 2 {arguments}", "wanted_tokens_per_s": wanted}
        for arguments, wanted in DECODES
    ]
    return run_script("bench.decode", entries, budget, describe_decode)


def run_losses(budget: float) -> list[dict[str, Any]]:
    """`bench.loss` for every entry of LOSSES."""
    entries = [{"arguments": arguments, "wanted_gb": wanted} for arguments, wanted in LOSSES]
    return run_script("bench.loss", entries, budget, describe_loss)


def describe_decode(entry: dict[str, Any]) -> str:
    """One line for a person."""
    if "error" in entry:
        return f"{entry['arguments']}: {entry['error'].splitlines()[-1]}"
    wanted = entry["wanted_tokens_per_s"]
    return (
        f"{entry['arguments']}: {entry['decode_tokens_per_s']:,.0f} tokens/s in decode"
        + ("" if wanted is None else f" (on an H200 at least {wanted:,.0f})")
        + f", {100 * entry['decode_fraction_of_floor']:.0f} % of the floor's speed, prefill "
        f"{entry['prefill_s']:.2f} s"
    )


def describe_loss(entry: dict[str, Any]) -> str:
    """One line for a person."""
    if "error" in entry:
        return f"{entry['arguments']}: {entry['error'].splitlines()[-1]}"
    parts = []
    for point in entry["points"]:
        for name, found in point["peers"].items():
            wanted = entry["wanted_gb"].get(name)
            parts.append(
                f"{name}: {found['error']}"
                if "error" in found
                else f"{name} {1e3 * found['seconds']:.1f} ms, {found['peak_bytes'] / 1e9:.2f} GB"
                + ("" if wanted is None else f" (at most {wanted})")
            )
    return f"{entry['arguments']}: {'; '.join(parts)}"


def machine() -> dict[str, Any]:
    """The device, its driver and toolkit; None for what cannot be told."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def summarise(
    host: dict[str, Any],
    tests: Stage,
    benches: Stage | None,
    decodes: Sequence[dict[str, Any]] = (),
    losses: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Everything that goes into the JSON file; without figures where tests are not green."""
    found = [] if benches is None else [Figure.from_dict(x) for x in benches.log.values("figure")]
    rates = [] if benches is None else list(benches.log.values("ceilings"))
    outcomes = compare(found, host["device"], GOALS)
    return {
        "run": provenance(),
        "device": host,
        "tests": tests.as_dict(),
        "benchmarks": None if benches is None else benches.as_dict(),
        "ceilings": rates[0] if rates else None,
        "figures": [figure.as_dict() for figure in found],
        "decode": list(decodes),
        "loss": list(losses),
        "goals": [
            {
                "name": outcome.goal.name,
                "wanted": outcome.goal.describe(),
                "measured": outcome.value,
                "note": outcome.note,
                "met": outcome.met,
            }
            for outcome in outcomes
        ],
    }


def markdown(summary: dict[str, Any]) -> str:
    """The summary for a person: goals, figures, and what is missing."""
    host, versions = summary["device"], summary["run"]["versions"]
    tests, benches = summary["tests"], summary["benchmarks"]
    found = [Figure.from_dict(data) for data in summary["figures"]]
    outcomes = compare(found, host["device"], GOALS)
    lines = [
        f"# {host['device']}",
        f"torch {versions['torch']}, triton {versions['triton']}, driver {host['driver']}, commit "
        f"{versions['commit']}{' with changes' if versions['modified'] else ''}",
        f"tests: {tests['passed']} passed, {len(tests['failed'])} failed, "
        f"{tests['skipped']} skipped, {len(tests['not_run'])} not run",
    ]
    if benches is None:
        lines.append("**Tests are red: nothing was measured.**")
    if summary["ceilings"] is not None:
        lines.append(Ceilings(**summary["ceilings"]).describe())
    lines += ["", goals_table(outcomes), "", figures_table(found)]
    lines += ["", *(f"- {describe_decode(entry)}" for entry in summary["decode"])]
    lines += [*(f"- {describe_loss(entry)}" for entry in summary["loss"]), ""]
    for title, stage in (("tests", tests), ("benchmarks", benches)):
        if stage is None:
            continue
        lines += [f"{title}, failed: {each['test']}" for each in stage["failed"]]
        lines += [f"{title}, not run: {name}" for name in stage["not_run"]]
        if stage["broke_off_in"] is not None:
            lines.append(f"{title}, broke off in: {stage['broke_off_in']}")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument("--seconds", type=float, default=510, metavar="S", help="for everything")
    parser.add_argument("--test-seconds", type=float, default=220, metavar="S")
    parser.add_argument("--decode-seconds", type=float, default=120, metavar="S")
    parser.add_argument("--loss-seconds", type=float, default=60, metavar="S")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu needs a GPU, and torch finds none: nothing is measured", file=sys.stderr)
        return 1
    started = time.monotonic()
    host = machine()
    print(f"== {host['device']}, torch {torch.__version__}", flush=True)
    tests = run_stage("tests", ["-q", "-m", "gpu or triton", *TESTS], args.test_seconds)
    benches, decodes, losses = None, [], []
    if tests.green:
        left = args.seconds - GRACE - args.decode_seconds - args.loss_seconds
        left -= time.monotonic() - started
        chosen = ["-v", "--benchmark-columns=median,rounds", BENCH]
        benches = run_stage("benchmarks", chosen, left)
        decodes = run_decodes(args.decode_seconds)
        losses = run_losses(args.loss_seconds)
    summary = summarise(host, tests, benches, decodes, losses)

    slug = re.sub(r"[^a-z0-9]+", "-", host["device"].lower()).strip("-")
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H%M")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{slug}-{date}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    text = markdown(summary)
    path.with_suffix(".md").write_text(text)
    print(text)
    green = tests.green and benches is not None and benches.green
    met = [outcome["met"] for outcome in summary["goals"]]
    line = {
        "file": str(path),
        "green": green,
        "figures": len(summary["figures"]),
        "goals_met": met.count(True),
        "goals_missed": met.count(False),
    }
    print_json(line)
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(command.run(main))
