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
        ppe_correctness.BENCHMARK,
        ppe_preference.BENCHMARK,
        realmistake.BENCHMARK,
        rewardbench.BENCHMARK,
        rewardbench2.BENCHMARK,
        rm_bench.BENCHMARK,
        rmb.BENCHMARK,
        ultrafeedback.BENCHMARK,
    )
}
