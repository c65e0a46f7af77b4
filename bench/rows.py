"""Judging whole rows: how fast, where the time goes, and what is lost beside `bench.decode`.

    python -m bench.rows [--model DIR] [--data FILE] [--split final] [--rows 200] [--k 32]
                         [--temperature 0.5] [--max-batch 256] [--repeats 5]
                         [--beside-decode [--levels 1]] [--compare-transformers]

Every round judges the same rows, from text to verdicts, samples joining and retiring as they do.
Reported are generated tokens per second of wall-clock time, and the share of that time outside
model, attention and sampling (drawing, extraction and keeping what was drawn are sampling).

--beside-decode: in turn with that, `bench.decode` on one prompt of the rows' mean length, with as
many samples as were live on average and as many new tokens as a judgement has on average. The ratio
is that of generated tokens per second without prefill: what retiring, joining, uneven rows and the
short segments of their prompts cost. --levels makes that one prompt a tree of as many levels.

--compare-transformers: in turn too, the first 8 rows with transformers' `generate` in float32 or
whatever the model is stored in: the same prompts and options, padded to batches of 32, 64, 128 and
256, each of which runs until its last sample has ended by itself. Counted are the tokens up to each
sample's end, and the fastest batch.

Figures are medians of rounds, ratios medians of the rounds' ratios, after one round that is not
counted. Ends in one JSON line.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from bench.decode import Ours
from bench.decode_load import Workload
from bench.provenance import print_json
from bench.voting import read_labelled
from engine import command
from engine.decode import Decoder
from engine.judge import Judge, JudgeOptions
from engine.orders import draw_orders
from engine.request import Row
from engine.verdict import Verdict
from train.world.cases import Split

PEER_ROWS = 8
PEER_BATCHES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Args:
    """Measure how fast rows are judged."""

    model: Path = Path("models/pocket")
    data: Path | None = None
    split: Split = "final"  # of the judging world, when there is no --data
    rows: int = 200
    k: int = 32
    temperature: float = 0.5
    max_new_tokens: int = 400
    max_batch: int = 256
    seed: int = 0
    repeats: int = 5
    beside_decode: bool = False
    levels: int = 1  # of the tree that bench.decode's prompts make up
    compare_transformers: bool = False


@dataclass
class Counts:
    """Of one round: seconds inside model, attention and sampling, and what they did. `live` is the
    sum of the live samples over all decode steps."""

    inside_s: float = 0.0
    steps: int = 0
    live: int = 0


@dataclass(frozen=True)
class Judged:
    """One round over the rows."""

    total_s: float
    inside_s: float
    prefill_s: float
    tokens: int
    prompt_tokens: float  # of one sample, on average
    judgement_tokens: float
    live: float  # samples, on average over decode steps

    @property
    def decode_rate(self) -> float:
        """Generated tokens a second without prefill."""
        return self.tokens / (self.total_s - self.prefill_s)


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts what every `Decoder` does meanwhile."""
    counts, depth = Counts(), 0
    names = ("_steps", "forward", "head_logits", "draw")
    before = {name: getattr(Decoder, name) for name in names}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal depth
            started, depth = time.perf_counter(), depth + 1
            try:
                return call(*arguments)
            finally:
                depth -= 1
                if not depth:
                    counts.inside_s += time.perf_counter() - started

        return run

    def steps(decoder: Decoder, plan: Any, number: int) -> None:
        counts.steps += number
        counts.live += number * len(decoder.leaves)
        timed(before["_steps"])(decoder, plan, number)

    try:
        for name in names:
            setattr(Decoder, name, steps if name == "_steps" else timed(before[name]))
        yield counts
    finally:
        for name, call in before.items():
            setattr(Decoder, name, call)


def judge_rows(judge: Judge, rows: Sequence[Row], args: Args) -> Judged:
    """Judge all rows once. Raises ValueError for a row that fails."""
    prefill = judge.usage.prefill_seconds
    with counted() as counts:
        started = time.perf_counter()
        outcomes = list(
            judge.rows(
                rows,
                k=args.k,
                temperature=args.temperature,
                max_new_tokens=args.max_new_tokens,
                seed=args.seed,
            )
        )
        total = time.perf_counter() - started
    verdicts = [outcome for outcome in outcomes if isinstance(outcome, Verdict)]
    if len(verdicts) < len(rows):
        raise ValueError(f"{len(rows) - len(verdicts)} of {len(rows)} rows could not be judged")
    samples = sum(len(verdict.samples) for verdict in verdicts)
    tokens = sum(verdict.decode_tokens for verdict in verdicts)
    return Judged(
        total,
        counts.inside_s,
        judge.usage.prefill_seconds - prefill,
        tokens,
        sum(verdict.prompt_tokens for verdict in verdicts) / samples,
        tokens / samples,
        counts.live / max(counts.steps, 1),
    )


class Transformers:
    """transformers on the prompts that rows' samples have."""

    def __init__(self, judge: Judge, rows: Sequence[Row], args: Args) -> None:
        from transformers import AutoModelForCausalLM

        self.args = args
        self.model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=judge.model.head_weight.dtype
        ).eval()
        options = JudgeOptions(k=args.k, seed=args.seed)
        self.prompts = [
            judge.prompts.render(row, order) for row in rows for order in draw_orders(row, options)
        ]
        self.ends = torch.tensor(sorted(judge.model.config.eos_token_ids))

    @torch.inference_mode()
    def rate(self, batch: int) -> float:
        """Generated tokens a second, in batches of so many samples."""
        started, tokens = time.perf_counter(), 0
        for first in range(0, len(self.prompts), batch):
            prompts = self.prompts[first : first + batch]
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            lengths = torch.tensor([[len(prompt)] for prompt in prompts])
            out = self.model.generate(
                ids,
                attention_mask=(torch.arange(longest) >= longest - lengths).long(),
                do_sample=True,
                temperature=self.args.temperature,
                top_k=0,
                max_new_tokens=self.args.max_new_tokens,
                pad_token_id=int(self.ends[0]),
            )
            is_end = torch.isin(out[:, longest:], self.ends).long()
            tokens += int((is_end.cumsum(1) == is_end).sum())  # no end before this token
        return tokens / (time.perf_counter() - started)


def measure(judge: Judge, rows: Sequence[Row], args: Args) -> dict[str, Any]:
    """The figures of all rounds."""
    first = judge_rows(judge, rows, args)
    load = Workload(
        round(first.prompt_tokens), round(first.live), round(first.judgement_tokens), args.levels
    )
    beside = Ours(judge.model, load) if args.beside_decode else None
    peer = Transformers(judge, rows[:PEER_ROWS], args) if args.compare_transformers else None
    taken: list[Judged] = []
    decode_rates: list[float] = []
    their_rates: list[list[float]] = []
    for seed in tqdm(range(args.repeats + 1), unit="round"):
        judged = judge_rows(judge, rows, args)
        round_ = beside.round(seed) if beside else None
        theirs = [peer.rate(batch) for batch in PEER_BATCHES] if peer else []
        if not seed:
            continue
        taken.append(judged)
        their_rates.append(theirs)
        if round_ is not None and round_.decode is not None:
            decode_rates.append(round_.decode_tokens / round_.decode)
    rates = [judged.tokens / judged.total_s for judged in taken]
    figures: dict[str, Any] = {
        **{name: value for name, value in asdict(args).items() if name not in ("model", "data")},
        "model": str(args.model),
        "dtype": str(judge.model.head_weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "tokens": first.tokens,
        "tokens_per_s": statistics.median(rates),
        "rounds": [round(rate) for rate in rates],
        "prefill_share": statistics.median(j.prefill_s / j.total_s for j in taken),
        "outside_share": statistics.median(1 - j.inside_s / j.total_s for j in taken),
        "live": first.live,
        "prompt_tokens": first.prompt_tokens,
        "judgement_tokens": first.judgement_tokens,
    }
    if beside:
        figures["decode"] = {
            "tokens_per_s": statistics.median(decode_rates),
            "ratio": statistics.median(
                j.decode_rate / rate for j, rate in zip(taken, decode_rates, strict=True)
            ),
        }
    if peer:
        medians = [statistics.median(column) for column in zip(*their_rates, strict=True)]
        figures["transformers"] = {
            "tokens_per_s": dict(zip(map(str, PEER_BATCHES), medians, strict=True)),
            "ratio": statistics.median(
                rate / max(theirs) for rate, theirs in zip(rates, their_rates, strict=True)
            ),
        }
    return figures


def describe(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = [
        f"{figures['rows']} rows, k={figures['k']}, {figures['dtype']}, {figures['threads']} "
        f"threads: {figures['tokens_per_s']:,.0f} generated tokens/s "
        f"({figures['live']:.0f} samples live on average)",
        f"prefill {100 * figures['prefill_share']:.0f} % of the time; outside model, attention and "
        f"sampling {100 * figures['outside_share']:.0f} %",
    ]
    if "decode" in figures:
        decode = figures["decode"]
        lines.append(
            f"bench.decode at that batch: {decode['tokens_per_s']:,.0f} tokens/s in decode; rows "
            f"reach {100 * decode['ratio']:.0f} % of it"
        )
    if "transformers" in figures:
        theirs = figures["transformers"]
        each = ", ".join(f"{k}: {rate:,.0f}" for k, rate in theirs["tokens_per_s"].items())
        lines.append(
            f"transformers, tokens/s by batch: {each}; ours is {theirs['ratio']:.1f} times as fast"
        )
    return "\n".join(lines)


def main(args: Args) -> None:
    """Measure and print."""
    if args.repeats < 1:
        raise SystemExit(f"--repeats {args.repeats} is less than 1")
    rows = read_labelled(args.data, args.split, args.rows, args.seed)
    judge = Judge.load(args.model, device="cpu", max_batch=args.max_batch)
    figures = measure(judge, rows, args)
    print(describe(figures))
    print_json(figures)


if __name__ == "__main__":
    sys.exit(command.run(lambda: main(tyro.cli(Args, description=Args.__doc__))))
