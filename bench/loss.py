"""Memory and time of the policy loss and its gradients, fused and unfused, on one head.

    python -m bench.loss [--tokens 1024 4096] [--hidden 512] [--vocab 151936] [--softcap C]
                         [--dtype float32] [--small 1024] [--repeats 3]

`unfused` makes all logits and lets autograd do the rest; `fused` is `grpo_loss`; `fused in place`
adds the weight's gradient to a float32 buffer that is already there, `fused small` does that with
--small rows of logits at a time; `liger` is Liger-Kernel's loss, on a GPU where it is installed.
Each runs in a process of its own, all in turn, round by round; the first round is not counted.
Loss and gradients have to agree. What is given as memory is the peak above what was there before:
gradients included, but for the weight's where it is added in place. Floor: three matrix products at
the measured rate. Ends in one JSON line.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.ceilings import measure_ceilings
from bench.loss_peers import OPTIONS, Batch, Head, liger, unfused
from bench.timing import DEVICE, ON_GPU
from kernels.grpo_loss import grpo_loss

CONTENDERS = ("fused", "fused in place", "fused small", "unfused", *(["liger"] if ON_GPU else []))


def step(name: str, batch: Batch, softcap: float | None, small: int) -> Callable[[], Tensor]:
    """A forward and backward; gives the loss."""
    in_place = name in ("fused in place", "fused small")
    weight_grad = torch.zeros_like(batch.weight, dtype=torch.float32) if in_place else None

    def run() -> Tensor:
        batch.hidden.grad = batch.weight.grad = None
        if name == "unfused":
            loss = unfused(batch, softcap)
        elif name == "liger":
            loss = liger(batch, softcap)
        else:
            loss = grpo_loss(
                batch.hidden, batch.weight, batch.target, batch.advantage, batch.token_weight,
                OPTIONS, old_logp=batch.old_logp, ref_logp=batch.ref_logp, softcap=softcap,
                chunk_size=small if name == "fused small" else None, weight_grad=weight_grad,
            ).loss  # fmt: skip
        loss.backward()
        if weight_grad is not None:
            batch.weight.grad = None
        return loss.detach()

    return run


def _resident(peak: bool) -> int:
    """Bytes of memory, now or at most since the last reset."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) << 10


def _reset_peak() -> None:
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _serve(name: str, head: Head, small: int, pipe: Connection) -> None:
    """In a process of its own: at every message, run and send what it took."""
    try:
        batch = Batch.of(head)
        run = step(name, batch, head.softcap, small)
        while pipe.recv():
            batch.hidden.grad = batch.weight.grad = None
            before = _resident(peak=False)
            _reset_peak()
            start = time.perf_counter()
            loss = run().item()
            seconds = time.perf_counter() - start
            extra = _resident(peak=True) - before
            grad = batch.hidden.grad
            assert grad is not None
            pipe.send((seconds, extra, loss, grad.float().norm().item()))
    except Exception as error:  # of whatever kind: it is the finding
        pipe.send(f"{type(error).__name__}: {error}"[:200])


def measure(head: Head, small: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds (median), peak bytes, loss and norm of the hidden states' gradient by contender; or
    why there are none."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name in CONTENDERS:
        pipes[name], far = context.Pipe()
        worker = context.Process(target=_serve, args=(name, head, small, far), daemon=True)
        worker.start()
        workers.append(worker)
    found: dict[str, list[tuple[float, int, float, float]]] = {name: [] for name in CONTENDERS}
    errors: dict[str, str] = {}
    for _ in tqdm(range(repeats + 1), desc=f"{head.tokens} tokens", unit="round"):
        for name, pipe in pipes.items():
            if name in errors:
                continue
            pipe.send(True)
            told = pipe.recv()
            if isinstance(told, str):
                errors[name] = told
            else:
                found[name].append(told)
    for name, pipe in pipes.items():
        if name not in errors:
            pipe.send(False)
    for worker in workers:
        worker.join()
    results: dict[str, dict[str, Any]] = {name: {"error": errors[name]} for name in errors}
    for name in CONTENDERS:
        if name not in errors:
            rounds = found[name][1:]
            results[name] = {
                "seconds": statistics.median(r[0] for r in rounds),
                "peak_bytes": max(r[1] for r in rounds),
                "loss": rounds[-1][2],
                "gradient": rounds[-1][3],
                "ratio": statistics.median(
                    a[0] / b[0] for a, b in zip(rounds, found["fused"][1:], strict=True)
                ),
            }
    return results


def disagreements(results: dict[str, dict[str, Any]], dtype: torch.dtype) -> list[str]:
    """Ours whose loss or gradient is not that of whole logits."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    exact = results["unfused"]
    if "error" in exact:
        return []
    return [
        f"{name}: {key} {result[key]:.6g}, not {exact[key]:.6g}"
        for name, result in results.items()
        for key in ("loss", "gradient")
        if name.startswith("fused") and "error" not in result
        and abs(result[key] - exact[key]) > tolerance * abs(exact[key])
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.loss", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], metavar="N")
    parser.add_argument("--hidden", type=int, default=512, metavar="H")
    parser.add_argument("--vocab", type=int, default=151_936, metavar="V")
    parser.add_argument("--softcap", type=float, metavar="C")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--small", type=int, default=1024 if ON_GPU else 64, metavar="ROWS")
    parser.add_argument("--repeats", type=int, default=3, metavar="R")
    args = parser.parse_args(arguments)
    dtype = getattr(torch, args.dtype)
    ceilings = measure_ceilings()
    print(ceilings.describe())
    lines = []
    wrong: list[str] = []
    for tokens in args.tokens:
        head = Head(tokens, args.hidden, args.vocab, args.softcap, dtype)
        results = measure(head, args.small, args.repeats)
        wrong += disagreements(results, dtype)
        product = 2 * tokens * args.hidden * args.vocab
        floor = 3 * product / ceilings.matmul_tflop_per_s * 1e-12
        print(f"\n{tokens} tokens, head {args.hidden} x {args.vocab}: floor {floor:.3f} s")
        for name, result in results.items():
            if "error" in result:
                print(f"  {name:15} {result['error']}")
            else:
                print(
                    f"  {name:15} {result['seconds']:7.3f} s ({result['ratio']:.2f} x fused), peak "
                    f"{result['peak_bytes'] / 2**20:8,.0f} MiB"
                )
        lines.append({"tokens": tokens, "floor_seconds": floor, "contenders": results})
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    summary = {"device": str(DEVICE), "threads": torch.get_num_threads(), "small": args.small}
    shape = {"hidden": args.hidden, "vocab": args.vocab, "dtype": args.dtype}
    print(json.dumps(summary | shape | {"softcap": args.softcap, "points": lines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
