"""Rewards over HTTP: what the server costs beside a batch, at rising rates, and under attack.

    python -m bench.serve [--model DIR] [--rows 100] [--k 8] [--shares 0.25 0.5 0.75 1.0 1.5]
                          [--hostile 1000]

First the rows are judged as one batch in this process, as `bench.rows` does: that rate is the
ceiling. Then `engine.serve` starts in a process of its own, on loopback, and judges them

    together   in one request; all lines have to be those of the batch, to the byte
    one by one at constant rates, each of --shares times the ceiling, a request a row, sent when its
               time comes whether or not those before it are done

of which the median, 95th and 99th percentile of the latencies are told in milliseconds, rows a
second from the first request to the last answer, and how many were answered 429. Then come
--hostile requests that are wrong in one of some ways, after as many others; each must be answered
4xx. The server's resident memory is told between the two: what the first ones take is the threads'
and the allocator's, and stays.

Client and server share the machine's cores. Ends in one JSON line.
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import tyro

from bench.provenance import ROOT, print_json
from bench.rows import Args as RowsArgs
from bench.rows import judge_rows
from bench.voting import read_labelled
from engine import command
from engine.judge import Judge
from engine.request import Row
from engine.verdict import to_line
from train.world.cases import Split

SECONDS = 600.0  # that one request may take
STAGGER = 32  # hostile requests at a time


@dataclass(frozen=True)
class Args:
    """Measure the server beside a batch."""

    model: Path = Path("models/pocket")
    data: Path | None = None
    split: Split = "final"  # of the judging world, when there is no --data
    rows: int = 100
    k: int = 8
    temperature: float = 0.5
    max_new_tokens: int = 400
    max_batch: int = 256
    seed: int = 0
    repeats: int = 3
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    hostile: int = 1000


class Served:
    """A server in a process of its own. A context."""

    def __init__(self, args: Args) -> None:
        words = {
            "port": 0, "model": args.model, "k": args.k, "temperature": args.temperature,
            "max-new-tokens": args.max_new_tokens, "max-batch": args.max_batch, "seed": args.seed,
            "device": "cpu", "max-rows": max(512, args.rows), "max-body-bytes": 1 << 24,
        }  # fmt: skip
        options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine.serve", *options],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        if not line.startswith("{"):
            raise ValueError(f"no server: {line}")
        self.url = f"http://127.0.0.1:{json.loads(line)['port']}"
        # What is logged later has to be read, or the pipe would fill.
        self.log = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)
        self.process.stderr.close()

    def rss_mb(self) -> float:
        """Resident memory in MB of 10^6 bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024 / 1e6

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.wait()


def body_of(row: Row) -> dict[str, Any]:
    """The request of a row."""
    messages = [{"role": each.role, "content": each.content} for each in row.messages]
    fields = {
        "id": row.id, "prompt": messages, "responses": list(row.responses), "label": row.label,
        "reference": row.reference, "principles": row.principles, "meta": row.meta,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


async def together(url: str, rows: Sequence[Row], lines: Sequence[bytes], repeats: int) -> float:
    """Rows a second of one request with all rows, the median of some; raises ValueError where the
    answer is not these lines."""
    rates = []
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:
        for _ in range(repeats + 1):
            started = time.perf_counter()
            answer = await client.post("/v1/judge", json={"rows": [*map(body_of, rows)]})
            rates.append(len(rows) / (time.perf_counter() - started))
            expected = b",".join(line.rstrip(b"\n") for line in lines)
            if answer.content != b'{"outcomes":[' + expected + b"]}":
                raise ValueError("the server's lines are not those of the batch")
    return statistics.median(rates[1:])


async def one_by_one(url: str, rows: Sequence[Row], rate: float) -> dict[str, Any]:
    """Requests at a rate a second."""
    latencies: list[float] = []
    statuses: Counter[int] = Counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as client:
        started = time.perf_counter()

        async def send(number: int, row: Row) -> None:
            due = started + number / rate
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            answer = await client.post("/v1/judge", json=body_of(row))
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                latencies.append(time.perf_counter() - due)

        await asyncio.gather(*(send(number, row) for number, row in enumerate(rows)))
        seconds = time.perf_counter() - started
    if statuses.keys() - {200, 429}:
        raise ValueError(f"answers {dict(statuses)}")
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "offered_per_s": rate,
        "rows_per_s": len(latencies) / seconds,
        "latency_ms": {f"p{p}": 1000 * cuts[p - 1] for p in (50, 95, 99)},
        "refused": statuses[429],
    }


def hostile_requests(count: int, seed: int) -> list[tuple[str, bytes, dict[str, str]]]:
    """Paths, bodies and headers, each wrong in one way."""
    draw = random.Random(seed)
    json_type = {"content-type": "application/json"}
    row = b'{"prompt":"q","responses":["a","b"]%s}'
    wrong: list[tuple[str, bytes, dict[str, str]]] = [
        ("/v1/judge", b"[" * 100_000, json_type),
        ("/v1/judge", b'{"meta":' * 5000 + b"1" + b"}" * 5000, json_type),
        ("/v1/judge", row % b',"options":{"k":1000000}', json_type),
        ("/v1/judge", row % b',"label":NaN', json_type),
        ("/v1/judge", row % b',"prompt":"r"', json_type),
        ("/v1/judge", b'{"prompt":"\\ud800","responses":["a"]}', json_type),
        ("/v1/judge", b'{"prompt":"%s","responses":["a"]}' % (b"q " * 100_000), json_type),
        ("/v1/judge", b'{"rows":[%s]}' % b",".join([b"{}"] * 5000), json_type),
        ("/v1/judge", row % b"", {"content-type": "text/plain"}),
        ("/v1/judge", b" " * (1 << 24) + b"{}", json_type),
        ("/get_reward", b'{"query":["a"],"prompts":[]}', json_type),
        ("/rerank", b'{"query":"q","documents":[%s]}' % b",".join([b'"a"'] * 300), json_type),
        ("/classify", b'{"input":"x"}', json_type),
        ("/v1/chat/completions", b'{"messages":[{"role":"user"}]}', json_type),
        ("/no/such/page", b"{}", json_type),
    ]
    found = []
    for _ in range(count):
        path, body, headers = draw.choice(wrong)
        if draw.random() < 0.3 and len(body) > 1:  # cut anywhere
            path, body = "/v1/judge", body[: draw.randrange(1, min(len(body), 200))]
        found.append((path, body, headers))
    return found


async def attack(url: str, requests: Sequence[tuple[str, bytes, dict[str, str]]]) -> dict[str, int]:
    """The answers to hostile requests by status; raises ValueError where one is not 4xx."""
    statuses: Counter[str] = Counter()
    free = asyncio.Semaphore(STAGGER)
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:

        async def send(path: str, body: bytes, headers: dict[str, str]) -> None:
            async with free:
                try:
                    answer = await client.post(path, content=body, headers=headers)
                    statuses[str(answer.status_code)] += 1
                except httpx.TransportError:  # it closed while a long body was on its way
                    statuses["closed"] += 1

        await asyncio.gather(*(send(*request) for request in requests))
        statuses["health"] = (await client.get("/health")).status_code
    if statuses.pop("health") != 200 or any(status[0] in "235" for status in statuses):
        raise ValueError(f"answers to hostile requests: {dict(statuses)}")
    return dict(statuses)


def measure(args: Args) -> dict[str, Any]:
    """All figures."""
    rows = read_labelled(args.data, args.split, args.rows, args.seed)
    judge = Judge.load(args.model, device="cpu", max_batch=args.max_batch)
    options = {name: getattr(args, name) for name in ("k", "temperature", "max_new_tokens", "seed")}
    batch = RowsArgs(**options)
    rounds = [judge_rows(judge, rows, batch).total_s for _ in range(args.repeats + 1)]
    ceiling = len(rows) / statistics.median(rounds[1:])
    lines = [to_line(outcome) for outcome in judge.rows(rows, **options)]
    judge.close()
    print(f"batch: {ceiling:.1f} rows/s")
    with Served(args) as server:
        rate = asyncio.run(together(server.url, rows, lines, args.repeats))
        print(f"one request: {rate:.1f} rows/s, {100 * rate / ceiling:.0f} % of that")
        at_rates = []
        for share in args.shares:
            figures = asyncio.run(one_by_one(server.url, rows, share * ceiling))
            at_rates.append({"share": share, **figures})
            latency = ", ".join(f"{k} {v:,.0f}" for k, v in figures["latency_ms"].items())
            print(
                f"{figures['offered_per_s']:.1f} requests/s offered: {figures['rows_per_s']:.1f} "
                f"rows/s, {latency} ms, {figures['refused']} refused"
            )
        sizes = [server.rss_mb()]
        for seed in (args.seed + 1, args.seed):
            requests = hostile_requests(args.hostile, seed)
            statuses = asyncio.run(attack(server.url, requests))
            sizes.append(server.rss_mb())
        told = " -> ".join(f"{size:.0f}" for size in sizes)
        print(f"2 x {args.hostile} hostile requests, the last {statuses}: {told} MB")
    named = {name: value for name, value in asdict(args).items() if name not in ("model", "data")}
    return {
        **named,
        "model": str(args.model),
        "batch_rows_per_s": ceiling,
        "together_rows_per_s": rate,
        "together_ratio": rate / ceiling,
        "one_by_one": at_rates,
        "hostile_answers": statuses,
        "rss_mb": sizes,
    }


def main(args: Args) -> None:
    """Measure and print."""
    for name in ("rows", "repeats", "hostile"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is less than 1")
    if not args.shares or min(args.shares) <= 0:
        raise ValueError(f"--shares {args.shares} are not positive")
    print_json(measure(args))


if __name__ == "__main__":
    sys.exit(command.run(lambda: main(tyro.cli(Args, description=Args.__doc__))))
