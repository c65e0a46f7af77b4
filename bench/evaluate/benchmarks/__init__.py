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
    realmistake,
    ultrafeedback,
)

BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (
        auto_j.BENCHMARK,
        helpsteer2.BENCHMARK,
        helpsteer3.BENCHMARK,
        hh.BENCHMARK,
        judgebench.BENCHMARK,
        llmbar.BENCHMARK,
        pandalm.BENCHMARK,
        plain.BENCHMARK,
        realmistake.BENCHMARK,
        ultrafeedback.BENCHMARK,
    )
}
