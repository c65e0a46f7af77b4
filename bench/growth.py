"""How the time of a generated token grows with k, the prefix and the suffix, beside its floor.

    python -m bench.growth [--shape qwen3-107m | --model DIR] [--dtype bfloat16] [--repeats 3]
                           [--k 8 32 128] [--prefix 1024 4096 8192] [--suffix 64 512 4096]
                           [--plot FILE.png]

One axis at a time; the others stay at k = 32, prefix 1024 and 64 new tokens, the suffix's own axis
at k = 8. Every point is a run of `bench.decode`; seconds are those of decode over all its tokens,
so that a suffix counts with its mean length. The points of an axis are measured in turn, round by
round. Ends in one JSON line; --plot draws time and floor against each axis.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.ceilings import measure_ceilings
from bench.decode import Ours, floor_seconds, model_of
from bench.decode_load import Workload
from bench.provenance import print_json
from bench.shapes import SHAPES
from bench.timing import DEVICE
from engine import command
from models.config import DTYPES
from models.transformer import Transformer

AXES = ("k", "prefix", "suffix")


def workloads(axis: str, sizes: Sequence[int]) -> list[Workload]:
    """The workloads of an axis."""
    if axis == "k":
        return [Workload(1024, size, 64) for size in sizes]
    if axis == "prefix":
        return [Workload(size, 32, 64) for size in sizes]
    return [Workload(1024, 8, size) for size in sizes]


def measure_axis(
    model: Transformer, axis: str, sizes: Sequence[int], repeats: int, ceilings: Any
) -> list[dict[str, Any]]:
    """A point for each size: milliseconds a step and a token, and their floor."""
    loads = workloads(axis, sizes)
    peers = [Ours(model, load) for load in loads]
    seconds: list[list[float]] = [[] for _ in loads]
    for seed in tqdm(range(repeats + 1), desc=axis, unit="round"):
        for taken, ours in zip(seconds, peers, strict=True):
            round_ = ours.round(seed)
            if seed and round_.decode is not None:
                taken.append(round_.decode)
    points = []
    for size, load, taken in zip(sizes, loads, seconds, strict=True):
        weight = model.head_weight
        _, floor = floor_seconds(model.config, weight.dtype.itemsize, load, ceilings)
        steps = load.new_tokens - 1
        median = statistics.median(taken)
        points.append(
            {
                axis: size,
                "step_ms": 1e3 * median / steps,
                "token_ms": 1e3 * median / (steps * load.k),
                "floor_token_ms": 1e3 * floor / (steps * load.k),
                "fraction_of_floor": floor / median,
            }
        )
    return points


def plot(found: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Time of a token and its floor, a panel for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {
        "k": "samples of the prompt",
        "prefix": "tokens of the prompt",
        "suffix": "new tokens",
    }
    figure, panels = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.4), squeeze=False)
    for panel, (axis, points) in zip(panels[0], found.items(), strict=True):
        at = [point[axis] for point in points]
        panel.plot(at, [point["token_ms"] for point in points], "o-", label="measured")
        panel.plot(at, [point["floor_token_ms"] for point in points], "--", label="floor")
        panel.set_xscale("log", base=2)
        panel.set_xticks(at, [str(size) for size in at])
        panel.set_ylim(bottom=0)
        panel.set_xlabel(labels[axis])
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("milliseconds a token")
    panels[0][0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-107m")
    parser.add_argument("--model", type=Path, metavar="DIR", help="in place of a shape")
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--k", type=int, nargs="*", default=(8, 32, 128))
    parser.add_argument("--prefix", type=int, nargs="*", default=(1024, 4096, 8192))
    parser.add_argument("--suffix", type=int, nargs="*", default=(64, 512, 4096))
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} is less than 1")
    sizes: dict[str, list[int]] = {x: getattr(args, x) for x in AXES if getattr(args, x)}
    context = max(sizes.get("prefix", [1024])) + max(sizes.get("suffix", [64])) + 16
    model = model_of(args.model, args.shape, args.dtype, context)
    ceilings = measure_ceilings()
    print(ceilings.describe())
    found = {axis: measure_axis(model, axis, sizes[axis], args.repeats, ceilings) for axis in sizes}
    for axis, points in found.items():
        for point in points:
            print(
                f"{axis} {point[axis]}: {point['step_ms']:.2f} ms a step, "
                f"{point['token_ms']:.3f} ms a token (floor {point['floor_token_ms']:.3f})"
            )
    name = str(args.model or args.shape)
    if args.plot is not None:
        dtype = str(model.head_weight.dtype).removeprefix("torch.")
        plot(found, f"{name}, {dtype}, {DEVICE.type}", args.plot)
    print_json({"model": name, "repeats": args.repeats, **found})


if __name__ == "__main__":
    sys.exit(command.run(main))
