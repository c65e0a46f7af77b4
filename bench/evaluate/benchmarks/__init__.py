"""The published sets, by the names that the command knows them by."""

from bench.evaluate.benchmark import Benchmark
from bench.evaluate.benchmarks import (
    auto_j,
    helpsteer2,
    helpsteer3,
    hh,
    judgebench,
    llmbar,
    pandalm,
    plain,
    ppe_correctness,
    ppe_preference,
    realmistake,
    rewardbench,
    rewardbench2,
    rm_bench,
    rmb,
    ultrafeedback,
)

_SETS = (
    auto_j, helpsteer2, helpsteer3, hh, judgebench, llmbar, pandalm, plain, ppe_correctness,
    ppe_preference, realmistake, rewardbench, rewardbench2, rm_bench, rmb, ultrafeedback,
)  # fmt: skip
BENCHMARKS: dict[str, Benchmark] = {each.BENCHMARK.name: each.BENCHMARK for each in _SETS}
