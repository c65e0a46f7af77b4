"""The published sets, by the names that the command knows them by."""

from bench.evaluate.benchmark import Benchmark
from bench.evaluate.benchmarks import llmbar, pandalm, plain

BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (
        llmbar.BENCHMARK,
        pandalm.BENCHMARK,
        plain.BENCHMARK,
    )
}
