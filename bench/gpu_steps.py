"""What `bench.gpu` does on the device, step by step; each runs in a process of its own.

A step writes what it finds as JSON lines at once, one for each figure: {step, kind, ...}. What
fails is a line of kind "error" with the `name` of what it was; the next figure is tried. A step
begins nothing new once its time is over, and its process is ended soon after.
"""

import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import decode, kernel_cache
from bench import loss as loss_memory
from bench.aot import compile_all
from bench.case import OpCase
from bench.ceilings import Ceilings, measure_ceilings
from bench.decode_load import Workload
from bench.figures import FACTOR, measure
from bench.loss_peers import Head
from bench.ops import OPERATIONS, accept_token
from bench.ops import forest_attention as attention
from bench.ops.linear_logprob import SMALL, log_probs, loss
from bench.provenance import ROOT, said_by
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, Rotation, num_sets, randn, reseed
from engine import generate
from engine.decode import Decoder
from kernels.launch import intercept, launch

TESTS = ("tests/spec", "tests/triton")
NO_TIME = "not run, for want of time"


@dataclass(frozen=True)
class Work:
    """What there is to do: that of an 8B and a 27B model, or less for a test. `smoke` is checked
    and not timed, `model` decodes with two layers; `figures` are the cases of a step, in order;
    `decodes` the model and the workloads of a step; `memory` the heads of the policy loss, by the
    name of their shape; `tests` the arguments of pytest."""

    smoke: Sequence[OpCase]
    model: Shape
    figures: dict[str, Sequence[OpCase]]
    decodes: dict[str, tuple[Shape, Sequence[Workload]]]
    memory: dict[str, Head]
    tests: Sequence[str]


def real_work() -> Work:
    """What is measured on a GPU. Every case of `make bench` is in it once."""
    qwen, gemma = SHAPES["qwen3-8b"], SHAPES["gemma2-27b"]
    deepseek = SHAPES["deepseek-v2-lite"]
    figures: dict[str, Sequence[OpCase]] = {
        "attention": [only_unshared(attention.decode(*x)) for x in attention.DECODES[:7]],
        "losses": [case(shape, 8192) for case in (log_probs, loss) for shape in (qwen, gemma)],
        "others": [
            attention.prefill(*attention.PREFILL_8K),
            attention.backward(*attention.PREFILL_8K),
            attention.packed(*attention.PACKED),
            accept_token.step(qwen, 32),
        ],
    }
    taken = {case.key for cases in figures.values() for case in cases}
    all_cases = [case for operation in OPERATIONS.values() for case in operation.cases]
    figures["grid"] = [case for case in all_cases if case.key not in taken]
    long, longer = (32, 4096, 1024), (64, 8192, 1024)

    def load(k: int, prefix: int, new_tokens: int, sharing: bool = True) -> Workload:
        return Workload(prefix, k, new_tokens, sharing=sharing)

    return Work(
        smoke=[next(iter(operation.variants(qwen, 64))) for operation in OPERATIONS.values()],
        model=replace(qwen, num_layers=2),
        figures=figures,
        decodes={
            "decode": (qwen, [load(*long), load(*longer), load(128, 8192, 1024)]),
            # Few new tokens: a step's time is what counts.
            "unshared": (qwen, [load(32, 4096, 256, False), load(64, 8192, 256, False)]),
            "gemma": (gemma, [load(*long)]),
            "deepseek": (deepseek, [load(*long)]),
        },
        memory={
            shape.name: Head(
                8192, shape.hidden_size, shape.vocab_size, shape.final_softcap, shape.dtype
            )
            for shape in (gemma, qwen)
        },
        tests=["-n", "12", "--dist", "loadfile", "-q", "-m", "gpu or triton", *TESTS],
    )


def only_unshared(case: OpCase) -> OpCase:
    """A case without the peers in torch, which copy every sample's keys and take long to."""
    peers = case.peers
    return replace(
        case, peers=lambda x: {k: v for k, v in peers(x).items() if k not in ("eager", "sdpa")}
    )


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON, whole or not at all."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


@dataclass
class Run:
    """A step under way: where its lines go, when it ends (by `time.monotonic`), what it is to do,
    the device's ceilings if a step before has measured them, a cache of compiled kernels."""

    step: str
    lines: Path
    ends: float
    work: Work
    ceilings: Ceilings | None = None
    cache: Path | None = None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def write(self, kind: str, **found: Any) -> None:
        """Append a line."""
        append(self.lines, {"step": self.step, "kind": kind, **found})

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """What is raised inside is written down."""
        try:
            yield
        except Exception as error:  # of whatever kind: it is the finding
            told = f"{type(error).__name__}: {error}".split("\n", 1)[0][:400]
            self.write("error", name=name, error=told, trace=traceback.format_exc()[-3000:])
        gc.collect()
        torch.cuda.empty_cache()

    def each(self, names: Sequence[str]) -> Iterator[int]:
        """The indices of what there is time to begin; names what there is none for."""
        for i, name in enumerate(names):
            if self.left > 0:
                yield i
            else:
                self.write("error", name=name, error=NO_TIME)

    def rates(self) -> Ceilings:
        """The device's ceilings."""
        if self.ceilings is None:
            self.ceilings = measure_ceilings()
            self.write("ceilings", **asdict(self.ceilings))
        return self.ceilings


def machine(run: Run) -> None:
    """The device, its driver and toolkit; None for what cannot be told. Then the ceilings."""
    properties = torch.cuda.get_device_properties(0)
    run.write(
        "machine",
        device=properties.name,
        memory_bytes=properties.total_memory,
        processors=properties.multi_processor_count,
        driver=said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        clocks=said_by("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
    )
    run.rates()


def compile_kernels(run: Run) -> None:
    """Unpack the cache of compiled kernels, or make it."""
    with run.trying("compile"):
        if run.cache is not None:
            run.write("compile", unpacked=kernel_cache.unpack(run.cache))
            return
        count = 0
        for report in compile_all(kernel_cache.kernels_of(run.work)):
            count += 1
            if report.error is not None:
                run.write("error", name=report.launch, error=report.error[:2000])
        run.write("compile", compiled=count)


@torch.inference_mode()
def smoke(run: Run) -> None:
    """Each operation's own check on one shape; steps that are replayed beside steps that the host
    launches."""
    for i in run.each([case.key for case in run.work.smoke]):
        case = run.work.smoke[i]
        with run.trying(case.key):
            reseed()
            (arguments,) = case.make_inputs(randn, 1)
            case.check(arguments, case.call(*arguments), FACTOR)
            run.write("checked", name=case.key)
    with run.trying("replayed steps"):
        run.write("replayed", **replayed_like_launched(run.work.model))


def replayed_like_launched(shape: Shape) -> dict[str, Any]:
    """The share of tokens that are the same in steps of a CUDA graph and in steps that the host
    launches, and the largest difference of their log-probs."""
    load = Workload(prefix=300, k=8, new_tokens=40)
    model = decode.random_model(decode.config_of(shape, 400), shape.dtype, DEVICE)
    prompts = load.prompts(shape.vocab_size, 0)
    replayed = decode.Ours(model, load).sample(prompts, 0)
    with patch.object(generate, "make_decoder", Decoder):
        launched = decode.Ours(model, load).sample(prompts, 0)
    pairs = [
        (a.token_ids[i] == b.token_ids[i], abs(a.logprobs[i] - b.logprobs[i]))
        for a, b in zip(replayed, launched, strict=True)
        for i in range(load.new_tokens)
    ]
    same, differences = zip(*pairs, strict=True)
    return {"same_tokens": sum(same) / len(same), "largest_difference": max(differences)}


@torch.inference_mode()
def figures(run: Run, pieces: bool = False) -> None:
    """A figure of each case; the step's launches timed apart, where asked."""
    cases = run.work.figures[run.step]
    for i in run.each([case.key for case in cases]):
        with run.trying(cases[i].key):
            run.write("figure", figure=measure(cases[i], run.rates()).as_dict())
            if pieces:
                run.write("pieces", case=cases[i].key, us=microseconds_of_launches(cases[i]))


def microseconds_of_launches(case: OpCase) -> dict[str, float]:
    """Of one call: how long each of its launches takes by itself."""
    calls: dict[str, list[Any]] = {}
    made: dict[str, int] = {}

    def keep(kernel: Any, grid: Any, arguments: Any, options: dict[str, Any]) -> None:
        name = kernel.__name__.strip("_")
        if "SUFFIX" in options:
            name += " suffix" if options["SUFFIX"] else f" M {options['M']}"
        made[name] = made.get(name, 0) + 1
        call = partial(launch, kernel, grid, *arguments, **options)
        calls.setdefault(f"{name}, {made[name]}" if made[name] > 1 else name, []).append(call)
        kernels.append(call)

    kernels: list[Any] = []
    reseed()
    for arguments in case.make_inputs(randn, num_sets(case.num_bytes)):
        made.clear()
        with intercept(keep):
            case.call(*arguments)
        while kernels:
            kernels.pop(0)()  # what the next launches read
    return {name: 1e3 * Rotation(each).time_ms() for name, each in calls.items()}


def end_to_end(run: Run) -> None:
    """Decode from prompts to the last token, on one model; on one device's memory what does not fit
    is an error. At last the first workload again, with sums of a product in float32 throughout."""
    shape, loads = run.work.decodes[run.step]
    with run.trying(f"{run.step}: {shape.name}"):
        config = decode.config_of(shape, max(map(decode.context_of, loads)))
        model = decode.random_model(config, shape.dtype, DEVICE)
        plans = [(load, True) for load in loads]
        if run.step == "decode":
            plans.append((loads[0], False))
        for i in run.each([f"{run.step}: {load}" for load, _ in plans]):
            load, reduced = plans[i]
            with run.trying(f"{run.step}: {load}"):
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
                warm = i > 0 and not load.sharing  # its prompts take long
                found = decode.measure(model, load, 1, (), run.rates(), warm)
                run.write("decode", model=shape.name, reduced_precision=reduced, **found)


def memory(run: Run) -> None:
    """What the policy loss takes of memory, beside its peers, each in a process of its own."""
    for i in run.each(list(run.work.memory)):
        name, head = list(run.work.memory.items())[i]
        with run.trying(f"memory: {name}"):
            peers = loss_memory.measure(head, SMALL, 2)
            wrong = loss_memory.disagreements(peers, head.dtype)
            run.write("memory", model=name, peers=peers, disagreements=wrong)


def tests(run: Run) -> None:
    """The kernels' tests, in parallel. Their log is the plugin's, `tests.jsonl` beside the lines;
    what pytest prints is in `tests.txt`."""
    log, printed = (run.lines.with_name(f"tests.{x}") for x in ("jsonl", "txt"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = ["--log", str(log), "--budget", f"{max(0.0, run.left - 10):.0f}", "--tb=short"]
    options += run.work.tests
    with printed.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "pytest", "-p", "bench.stage", *options],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode not in (0, 1):
        run.write("error", name="pytest", error=f"exit status {done.returncode}: see {printed}")


@dataclass(frozen=True)
class Step:
    """A step's name, its seconds, what it does, and what for."""

    name: str
    seconds: float
    perform: Any
    purpose: str


STEPS = {
    step.name: step
    for step in (
        Step("machine", 10, machine, "device, driver, ceilings"),
        Step("compile", 15, compile_kernels, "unpack the cache of kernels, or compile them"),
        Step("smoke", 20, smoke, "each operation's check; replayed steps beside launched ones"),
        Step("attention", 45, partial(figures, pieces=True), "decode attention, and its launches"),
        Step("decode", 75, end_to_end, "Qwen3-8B end to end"),
        Step("losses", 40, figures, "log-probs and policy loss"),
        Step("others", 30, figures, "prefill, backward, packed training, sampling"),
        Step("unshared", 45, end_to_end, "Qwen3-8B without sharing"),
        Step("gemma", 35, end_to_end, "Gemma-27B end to end"),
        Step("deepseek", 25, end_to_end, "DeepSeek-V2-Lite end to end"),
        Step("tests", 75, tests, "the kernels' tests, in parallel"),
        Step("memory", 30, memory, "memory of the policy loss"),
        Step("grid", 30, figures, "all other cases of make bench, until the end"),
    )
}


def perform(run: Run) -> None:
    """Do a step. What it raises is written down."""
    started = time.monotonic()
    gc.freeze()  # what is imported need not be looked through after every case
    with run.trying(run.step):
        STEPS[run.step].perform(run)
    run.write("step", seconds=round(time.monotonic() - started, 1))
