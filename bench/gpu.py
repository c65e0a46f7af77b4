"""One command on a machine with a GPU: every figure, and the kernels' tests, within 8 minutes.

    python -m bench.gpu [--out runs/gpu] [--part STEP ...] [--cache FILE] | --dry-run | --pack FILE

Runs the steps of bench/gpu_steps.py one after the other (--part: some of them), each in a process
of its own that is ended when its time is over: what fails or takes too long is a line, and the next
step begins. --dry-run prints the steps and their seconds. Everything is in DIR at once, and nothing
is anywhere else: figures.jsonl (a line for each figure, as it is measured), summary.json and
summary.md (goals and tables, written anew after every step), tests.jsonl and tests.txt, log.txt
(what was printed). A figure is measured where its own check holds; tests that fail are named beside
the figures. Results that are to stay are committed as bench/results/<device>/.

--pack writes a cache of compiled kernels, without a GPU; --cache unpacks it: see
bench/kernel_cache.py.

Needs torch, triton, numpy, safetensors, tokenizers, tqdm, and for the tests pytest, pytest-xdist
and hypothesis. Exits with 1 without a GPU, and where anything has failed.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from bench import kernel_cache
from bench.ceilings import Ceilings
from bench.figures import Figure
from bench.figures import table as figures_table
from bench.goals import DECODE_RATES, DECODE_SHARE, GOALS, LOSS_GB, compare
from bench.goals import table as goals_table
from bench.gpu_steps import STEPS, Run, append, perform, real_work
from bench.provenance import print_json, provenance
from bench.stage import read_log
from engine import command

ENVIRONMENT = {
    "QUORUM_CPP": "0",  # no C++ is built for what little a host computes
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTHONUNBUFFERED": "1",
}
TOTAL = 480.0  # seconds of a whole run
START = "spawn"  # how a step's process is started: none may share what another knows of the device

Line = dict[str, Any]


class Child:
    """A process for a step, made before its time so that it has imported everything by then."""

    def __init__(self, step: str, out: Path) -> None:
        self.step = step
        context: Any = multiprocessing.get_context(START)
        self.pipe, far = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(far, out / "log.txt"))
        self.process.start()

    def run(self, lines: Path, seconds: float, rates: Ceilings | None, cache: Path | None) -> None:
        """Let it do its step, and end it and all that it started when its time is over."""
        ends = time.monotonic() + seconds
        self.pipe.send((self.step, lines, ends - 2, rates, cache))
        self.process.join(seconds)
        error = None
        if self.process.is_alive():
            error = "ended after its time"
        elif self.process.exitcode:
            error = f"exit status {self.process.exitcode}"
        self.end()
        if error is not None:
            append(lines, {"step": self.step, "kind": "error", "name": self.step, "error": error})

    def end(self) -> None:
        """End what is left of it, and of what it started."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # nothing is left, or it does not lead a group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, log: Path) -> None:
    """In a process of its own: wait for a step, and do it."""
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work = real_work()
    step, lines, ends, rates, cache = pipe.recv()
    perform(Run(step, lines, ends, work, rates, cache))


def read_lines(path: Path) -> list[Line]:
    """The lines of a run; a torn last one is dropped."""
    return [json.loads(x) for x in path.read_text().split("\n")[:-1]] if path.exists() else []


def of_kind(lines: Sequence[Line], kind: str) -> list[Line]:
    """The lines of a kind, in order."""
    return [line for line in lines if line["kind"] == kind]


def rates_of(line: Line) -> Ceilings:
    """What a line of ceilings says."""
    return Ceilings(**{name: line[name] for name in Ceilings.__dataclass_fields__})


def run_steps(names: Sequence[str], out: Path, cache: Path | None) -> None:
    """Do steps one after the other. The last one has what time the others left."""
    path = out / "figures.jsonl"
    run = provenance()
    ends = time.monotonic() + min(TOTAL - 10, sum(STEPS[name].seconds for name in names))
    children = [Child(names[0], out)]
    try:
        for i, name in enumerate(names):
            is_last = name == names[-1]
            if not is_last:
                children.append(Child(names[i + 1], out))
            seconds = max(1.0, ends - time.monotonic()) if is_last else STEPS[name].seconds
            rates = [rates_of(line) for line in of_kind(read_lines(path), "ceilings")]
            print(f"== {name}: at most {seconds:.0f} s", flush=True)
            children[0].run(path, seconds, rates[-1] if rates else None, cache)
            children.pop(0)
            write_summary(out, run)
    finally:
        for child in children:
            child.end()


def summarise(lines: Sequence[Line], tests: Line, run: Line) -> dict[str, Any]:
    """Everything that goes into summary.json."""
    host = next((line for line in of_kind(lines, "machine")), {"device": "unknown"})
    found = [Figure.from_dict(line["figure"]) for line in of_kind(lines, "figure")]
    outcomes = compare(found, host["device"], GOALS)
    return {
        "run": run,
        "machine": host,
        "tests": tests,
        "lines": list(lines),
        "goals": [
            {"name": each.goal.name, "wanted": each.goal.describe(), "measured": each.value}
            | {"note": each.note, "met": each.met}
            for each in outcomes
        ],
    }


def markdown(lines: Sequence[Line], tests: Line, run: Line) -> str:
    """The summary for a person: goals, figures, and what is missing."""
    host = next((line for line in of_kind(lines, "machine")), {"device": "unknown device"})
    found = [Figure.from_dict(line["figure"]) for line in of_kind(lines, "figure")]
    versions = run["versions"]
    said = [
        f"# {host['device']}",
        f"torch {versions['torch']}, triton {versions['triton']}, driver {host.get('driver')}, "
        f"commit {versions['commit']}{' with changes' if versions['modified'] else ''}",
    ]
    said += [rates_of(line).describe() for line in of_kind(lines, "ceilings")[-1:]]
    said += ["", describe_tests(tests), ""]
    said += [goals_table(compare(found, host["device"], GOALS)), "", figures_table(found), ""]
    said += [f"- {line['case']}: {_microseconds(line['us'])}" for line in of_kind(lines, "pieces")]
    said += [f"- {describe_decode(line, host['device'])}" for line in of_kind(lines, "decode")]
    said += [f"- {describe_memory(line)}" for line in of_kind(lines, "memory")]
    said += [
        f"- replayed steps: {100 * line['same_tokens']:.1f} % of tokens as in launched ones, "
        f"log-probs within {line['largest_difference']:.2g}"
        for line in of_kind(lines, "replayed")
    ]
    said += ["", *(f"- {x['step']}: {x['name']}: {x['error']}" for x in of_kind(lines, "error"))]
    return "\n".join(said) + "\n"


def _microseconds(pieces: dict[str, float]) -> str:
    return ", ".join(f"{name} {us:.1f} us" for name, us in pieces.items())


def describe_tests(tests: Line) -> str:
    """One paragraph for a person."""
    failed, not_run, begun = tests["failed"], tests["not_run"], tests["begun"]
    counts = f"tests: {tests['passed']} passed, {len(failed)} failed, {tests['skipped']} skipped"
    said = [f"{counts}, {len(not_run)} not run for want of time"]
    if failed:
        said.append(f"**tests red: {', '.join(each['test'] for each in failed)}**")
    if begun:
        said.append(f"broke off in one of: {', '.join(begun)}")
    return "; ".join(said)


def describe_decode(line: Line, device: str) -> str:
    """One line for a person."""
    share = 100 * line["decode_fraction_of_floor"]
    rate = DECODE_RATES.get((line["model"], line["k"], line["prefix"]))
    kind = "" if line["sharing"] else ", nothing shared"
    kind += "" if line["reduced_precision"] else ", sums of products in float32 throughout"
    if rate is None or not line["sharing"]:
        goal = ""
    elif "H200" in device:
        goal = f" (wanted {rate:,}: {'met' if line['decode_tokens_per_s'] >= rate else 'missed'})"
    else:
        goal = f" (wanted {DECODE_SHARE} %: {'met' if share >= DECODE_SHARE else 'missed'})"
    return (
        f"{line['model']}, k={line['k']}, prefix {line['prefix']}{kind}: "
        f"{line['decode_tokens_per_s']:,.0f} tokens/s in decode, {share:.0f} % of the floor's "
        f"speed{goal}, {line['step_ms']:.2f} ms a step, prefill {line['prefill_s']:.2f} s"
    )


def describe_memory(line: Line) -> str:
    """One line for a person."""
    said = []
    for name, found in line["peers"].items():
        wanted = LOSS_GB.get(line["model"], {}).get(name)
        said.append(
            f"{name}: {found['error']}"
            if "error" in found
            else f"{name} {1e3 * found['seconds']:.1f} ms, {found['peak_bytes'] / 1e9:.2f} GB"
            + ("" if wanted is None else f" (at most {wanted})")
        )
    return "; ".join([f"policy loss, {line['model']} head: {said[0]}", *said[1:]])


def write_summary(out: Path, run: Line) -> None:
    """Write the summary anew, from what is in the folder. run: where it comes from."""
    lines, tests = read_lines(out / "figures.jsonl"), read_log(out / "tests.jsonl")
    (out / "summary.json").write_text(json.dumps(summarise(lines, tests, run), indent=1) + "\n")
    (out / "summary.md").write_text(markdown(lines, tests, run))


def plan() -> str:
    """The steps and their seconds, for a person."""
    listed = [f"{step.seconds:4.0f} s  {step.name:10} {step.purpose}" for step in STEPS.values()]
    total = sum(step.seconds for step in STEPS.values())
    return "\n".join([*listed, f"{total:4.0f} s  in all, of {TOTAL:.0f}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument("--part", nargs="+", choices=list(STEPS), metavar="STEP")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="compiled kernels to unpack")
    parser.add_argument("--dry-run", action="store_true", help="print the steps, do nothing")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="compile kernels, do nothing else"
    )
    args = parser.parse_args(arguments)
    if args.dry_run:
        print(plan())
        return 0
    os.environ |= ENVIRONMENT
    kernel_cache.folder()
    if args.pack is not None:
        print_json(kernel_cache.pack(real_work(), args.pack))
        return 0
    if not torch.cuda.is_available():
        print("bench.gpu needs a GPU, and torch finds none: nothing is measured", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    run_steps(args.part or list(STEPS), args.out, args.cache)
    print((args.out / "summary.md").read_text())
    lines, tests = read_lines(args.out / "figures.jsonl"), read_log(args.out / "tests.jsonl")
    errors = len(of_kind(lines, "error"))
    counts = {kind: len(of_kind(lines, kind)) for kind in ("figure", "decode", "memory")}
    print_json({"out": str(args.out), "errors": errors, "tests": tests["passed"], **counts})
    return 1 if errors or tests["failed"] or tests["begun"] else 0


if __name__ == "__main__":
    sys.exit(command.run(main))
