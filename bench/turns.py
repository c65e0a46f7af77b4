"""Peers in processes of their own, run in turn: what each takes of time and of memory.

A peer is made in its process, and run once every round; the first round is not counted.
Memory is the peak during a run above what was there before it: on CPU resident pages, on a GPU
what torch has allocated.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.timing import ON_GPU

START = "spawn"  # how a process is started: none may share what another knows of the device
Run = Callable[[], dict[str, float]]


def take_turns(
    makers: Mapping[str, Callable[[], Run]], repeats: int, title: str
) -> dict[str, dict[str, Any]]:
    """Of each peer: `seconds` (median), `peak_bytes` (largest), `ratio`, the median over the
    rounds of its time by that of the first, and what its last run gave; or the `error`. makers:
    functions that can be sent to another process."""
    context: Any = multiprocessing.get_context(START)
    pipes: dict[str, Connection] = {}
    workers = []
    for name, make in makers.items():
        pipes[name], far = context.Pipe()
        worker = context.Process(target=_serve, args=(make, far), daemon=True)
        worker.start()
        workers.append(worker)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
    results: dict[str, dict[str, Any]] = {}
    for _ in tqdm(range(repeats + 1), desc=title, unit="round"):
        for name, pipe in pipes.items():
            if name in results:
                continue
            with suppress(BrokenPipeError):  # it has failed, and said why
                pipe.send(True)
            told = pipe.recv()
            if isinstance(told, str):
                results[name] = {"error": told}
            else:
                rounds[name].append(told)
    for name, pipe in pipes.items():
        if name not in results:
            pipe.send(False)
    for worker in workers:
        worker.join()
    first = [taken["seconds"] for taken in rounds[next(iter(makers))]]
    for name, taken in rounds.items():
        if name in results:
            continue
        counted = taken[1:]
        ratios = [t["seconds"] / f for t, f in zip(counted, first[1:], strict=False)]
        results[name] = counted[-1] | {
            "seconds": statistics.median(t["seconds"] for t in counted),
            "peak_bytes": max(t["peak_bytes"] for t in counted),
            "ratio": statistics.median(ratios) if ratios else None,
        }
    return {name: results[name] for name in makers}


def describe(results: Mapping[str, dict[str, Any]]) -> str:
    """A line for each peer."""
    first = next(iter(results))
    lines = []
    for name, found in results.items():
        if "error" in found:
            lines.append(f"  {name:20} {found['error']}")
            continue
        ratio = "" if found["ratio"] is None else f" ({found['ratio']:.2f} x {first})"
        peak = f"{found['peak_bytes'] / 2**20:,.0f} MiB"
        lines.append(f"  {name:20} {found['seconds']:8.3f} s{ratio}, peak {peak}")
    return "\n".join(lines)


def _serve(make: Callable[[], Run], pipe: Connection) -> None:
    """In a process of its own: at every message, run and send what it took."""
    try:
        run = make()
        while pipe.recv():
            before = _resident(peak=False)
            _reset_peak()
            start = time.perf_counter()
            told = run()
            seconds = time.perf_counter() - start
            pipe.send(told | {"seconds": seconds, "peak_bytes": _resident(peak=True) - before})
    except Exception as error:  # of whatever kind: it is the finding
        pipe.send(f"{type(error).__name__}: {error}"[:200])


def _resident(peak: bool) -> int:
    """Bytes of memory, now or at most since the last reset."""
    if ON_GPU:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) << 10


def _reset_peak() -> None:
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
