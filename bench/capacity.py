"""How many rows a second a machine judges, and how many machines a load needs.

    python -m bench.capacity [--shape qwen3-107m | --model DIR] [--dtype bfloat16]
        [--numerics fast] [--live 64] [--at K,P,T ...] [--rate 1 100 10000]

A row takes k judgements of T tokens after a prompt of P tokens of its own. What it costs is made of
pieces, which are measured here:

    seconds = prompt P + k T (token + key P + own T / 2)

Rows of several k, P and T are judged side by side, `live` samples at once, in whole runs of the
engine; least squares, each relative to its time, give the four pieces. A point that has no part in
that, larger than all others, says how far the model is off. For each K,P,T of --at the table has
rows and tokens a second, and machines for each rate of rows. Ends in one JSON line.

Not in it: templates that rows have in common, a meta model, the network. A machine is the one that
this runs on, with all that it computes with.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.decode import model_of
from bench.decode_load import Workload
from bench.provenance import print_json
from bench.shapes import SHAPES
from engine import command
from engine.generate import Generator, Group
from kernels.extract_scores import ScoreAutomaton
from kernels.sample_token import SamplingOptions
from kernels.score_grammar import ScoreRules
from models import NUMERICS
from models.config import DTYPES
from models.transformer import Transformer

PIECES = ("prompt", "token", "key", "own")


@dataclass(frozen=True)
class Load:
    """k judgements of `new_tokens` tokens after a prompt of `prefix`."""

    k: int
    prefix: int
    new_tokens: int

    @classmethod
    def parse(cls, text: str) -> "Load":
        """Of K,P,T. Raises ValueError for anything else."""
        try:
            k, prefix, new_tokens = map(int, text.split(","))
        except ValueError:
            raise ValueError(f"{text!r} is not K,P,T") from None
        if min(k, prefix, new_tokens) < 1:
            raise ValueError(f"{text!r} has a number below 1")
        return cls(k, prefix, new_tokens)

    @property
    def amounts(self) -> np.ndarray:
        """How much of each piece a row takes."""
        tokens = self.k * self.new_tokens
        return np.array([self.prefix, tokens, tokens * self.prefix, tokens * self.new_tokens / 2])


# What is measured, and what the model is held against.
POINTS = (
    Load(8, 128, 64),
    Load(8, 1024, 64),
    Load(32, 256, 64),
    Load(8, 256, 256),
    Load(2, 1024, 16),
)
HELD_OUT = Load(16, 1536, 128)


def seconds_of_a_row(model: Transformer, load: Load, live: int, rows: int) -> float:
    """Seconds of each of many rows side by side, every one with a prompt of its own."""
    vocab_size, weight = model.config.vocab_size, model.head_weight
    texts = [f"{i} ".encode() for i in range(vocab_size)]
    generator = Generator(
        model,
        ScoreAutomaton(texts, [], ScoreRules(first=True), weight.device),
        options=SamplingOptions(temperature=1.0),
        max_new_tokens=load.new_tokens,
        max_batch=max(live, load.k),
        max_scores=16,
        stop="eos",
        ignore_eos=True,
    )

    def groups(first: int, count: int) -> Iterator[Group]:
        for seed in range(first, first + count):
            prompts = Workload(load.prefix, load.k, load.new_tokens).prompts(vocab_size, seed)
            yield Group(prompts, (seed, 0), [4] * load.k)

    for result in generator.run(groups(0, 1)):  # packs weights, compiles kernels
        assert result.error is None, result.error
    started = time.perf_counter()
    for result in generator.run(groups(1, rows)):
        assert result.error is None, result.error
    return (time.perf_counter() - started) / rows


def fit(loads: Sequence[Load], seconds: Sequence[float]) -> np.ndarray:
    """The pieces, none of them negative, by least squares of relative errors."""
    from scipy.optimize import nnls

    amounts = np.stack([load.amounts for load in loads]) / np.array(seconds)[:, None]
    scale = amounts.max(0)
    return np.asarray(nnls(amounts / scale, np.ones(len(loads)))[0] / scale)


def table(pieces: np.ndarray, loads: Sequence[Load], rates: Sequence[float]) -> str:
    """Markdown: rows and tokens a second, and machines for each rate."""
    heads = [
        "k",
        "prompt",
        "tokens",
        "rows/s",
        "tokens/s",
        *(f"for {rate:g} rows/s" for rate in rates),
    ]
    lines = [heads, ["---"] * len(heads)]
    for load in loads:
        per_second = 1 / float(load.amounts @ pieces)
        lines.append([
            str(load.k), f"{load.prefix:,}", f"{load.new_tokens:,}", f"{per_second:.3g}",
            f"{per_second * load.k * load.new_tokens:,.0f}",
            *(f"{math.ceil(rate / per_second):,}" for rate in rates),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-107m")
    which.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument("--numerics", choices=NUMERICS, default="portable")
    parser.add_argument("--live", type=int, default=64, help="samples decoded at once")
    parser.add_argument("--rows", type=int, default=4, help="rows of live samples a point")
    parser.add_argument("--at", nargs="+", metavar="K,P,T", default=["8,1024,256", "32,2500,512"])
    parser.add_argument("--rate", nargs="+", type=float, default=[1.0, 100.0, 10_000.0])
    args = parser.parse_args(arguments)
    try:
        asked = [Load.parse(text) for text in args.at]
    except ValueError as error:
        parser.error(str(error))
    if min(args.live, args.rows, *args.rate) <= 0:
        parser.error("--live, --rows and --rate have to be above 0")
    points = [*POINTS, HELD_OUT]
    context = max(load.prefix + load.new_tokens for load in points) + 16
    model = model_of(args.model, args.shape, args.dtype, context)
    if args.numerics == "fast":
        model.use_fast_numerics()
    found = [
        seconds_of_a_row(model, load, args.live, max(1, args.rows * args.live // load.k))
        for load in tqdm(points, unit="point", disable=None)
    ]
    pieces = fit(POINTS, found[:-1])
    off = float(HELD_OUT.amounts @ pieces) / found[-1] - 1
    print(
        f"a point that was held out is predicted {abs(off):.0%} too {'slow' if off > 0 else 'fast'}"
    )
    print(table(pieces, asked, args.rate))
    print_json(
        {
            "model": str(args.model or args.shape), "numerics": args.numerics, "live": args.live,
            "pieces_s": dict(zip(PIECES, pieces.tolist(), strict=True)),
            "points": [
                {"k": load.k, "prefix": load.prefix, "new_tokens": load.new_tokens, "row_s": each}
                for load, each in zip(points, found, strict=True)
            ],
            "held_out_error": off,
        }
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(command.run(main))
