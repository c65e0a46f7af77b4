"""The benchmarks: what they count, what they refuse, what they write down."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import figures, gpu, targets, train_step
from bench.bench_forest_attention import (
    GRID,
    PACKED,
    PREFILL_8K,
    PREFILLS,
    ROOT_ALONE,
    TARGETS,
    Case,
    backward_work,
    packed_work,
)
from bench.bench_forest_attention import make_work as attention_work
from bench.bench_gated_act import make_backward_work as gated_act_backward_work
from bench.bench_gated_act import make_work as gated_act_work
from bench.bench_linear_logprob import ROWS, log_probs_work, loss_work
from bench.bench_matmul import make_work as matmul_work
from bench.bench_merge_states import make_work as merge_states_work
from bench.bench_rms_norm import make_backward_work as rms_norm_backward_work
from bench.bench_rms_norm import make_work as rms_norm_work
from bench.bench_rope import make_backward_work as rope_backward_work
from bench.bench_rope import make_work as rope_work
from bench.bench_sample_token import OPTIONS, make_step
from bench.bench_sample_token import make_work as sample_token_work
from bench.bench_segment_attention import Case as Segments
from bench.bench_segment_attention import make_work as segments_work
from bench.bench_write_kv import make_work as write_kv_work
from bench.ceilings import Ceilings
from bench.figures import Figure, NotLikeReference, Peer, PeerFigure, Work, measure
from bench.forests import Heads, Tree, Workload, make_decode, make_prefill
from bench.rivals import decode_peers, prefill_peers
from bench.shapes import SHAPES
from bench.stage import StageLog
from bench.timing import num_sets
from bench.turns import Run, contend, describe
from kernels.forest_attention import forest_attention
from kernels.forest_attention.plan import ForestPlan
from kernels.logprob import LogProbs

ROOT = Path(__file__).parent.parent
HEADS = Heads(6, 2, 16, torch.float32)
CAPPED = replace(HEADS, softcap=5.0)
WINDOWED = replace(HEADS, window=30)
DECODED = [
    Tree((1, 6), (40, 5)),
    Tree((1, 2, 6), (17, 33, 20)),
    Tree((2, 6), (290, 1)),
    Tree((4, 4), (25, 7)),
    Tree((1, 5), (36, 0)),
]
PREFILLED = [Tree((1,), (70,)), Tree((1, 3), (50, 20)), Tree((2, 4), (33, 16))]
CEILINGS = Ceilings(100.0, 200.0, 0.5, "float32")


def brute_force(plan: ForestPlan, heads: Heads) -> tuple[int, int]:
    """Bytes and operations by listing every query and every key that it sees."""
    seen: set[tuple[int, int]] = set()
    positions = plan.positions.tolist()
    runs = [
        (range(query, query + num_queries), key, num_keys, position)
        for query, num_queries, key, num_keys, position in plan.tiles.tolist()
    ]
    if plan.suffix is not None:
        for slot, row in enumerate(plan.suffix.row.tolist()):
            first = plan.suffix.base + slot * plan.suffix.capacity
            length, position = int(plan.suffix.length[row]), int(plan.suffix.position[row])
            runs.append((range(row, row + 1), first, length, position))
    for queries, key, num_keys, position in runs:
        for query in queries:
            for j in range(num_keys):
                at = position + j
                if at <= positions[query] and at > positions[query] - (heads.window or 1 << 60):
                    seen.add((query, key + j))
    keys = len({key for _, key in seen})
    size = heads.head_dim * heads.dtype.itemsize
    moved = 2 * keys * heads.num_kv_heads * size + 2 * len(positions) * heads.num_heads * size
    return moved, 4 * len(seen) * heads.num_heads * heads.head_dim


@pytest.mark.parametrize("heads", [HEADS, WINDOWED], ids=["all", "window"])
def test_counts_of_attention(heads: Heads) -> None:
    works = [make_decode(tree, heads, 1) for tree in DECODED]
    works += [make_prefill(tree, heads, 1) for tree in PREFILLED]
    for work in works:
        assert work.cost == brute_force(work.plan, heads)


def test_sharing_saves_what_the_tree_says() -> None:
    tree = Tree((1, 2, 6), (32, 16, 5))
    assert tree.num_tokens == 32 + 2 * 16 + 6 * 5
    assert tree.unshared().num_tokens == 6 * (32 + 16 + 5)
    shared, alone = (make_decode(each, HEADS, 1).cost for each in (tree, tree.unshared()))
    assert shared[1] == alone[1]
    saved = alone[0] - shared[0]
    assert saved == (tree.unshared().num_tokens - tree.num_tokens) * HEADS.cell_bytes


def check_peers(workload: Workload, peers: dict[str, Peer], expected: set[str]) -> None:
    out = forest_attention(*workload.sets[0])  # type: ignore[arg-type]
    workload.check(out, 4)
    assert set(peers) == expected
    for peer in peers.values():
        theirs = peer.make()[0]()
        theirs = peer.as_ours(theirs) if peer.as_ours else theirs
        assert isinstance(theirs, Tensor)
        workload.check(theirs, 16)
        assert torch.allclose(theirs, out, rtol=0, atol=1e-5)  # every query, not only some


@pytest.mark.parametrize("heads", [HEADS, CAPPED, WINDOWED], ids=["plain", "capped", "window"])
def test_peers_attend_to_the_same(heads: Heads) -> None:
    """Also where a query sees less than its sequence."""
    torch.manual_seed(0)
    sdpa = set() if heads.softcap else {"sdpa"}
    for tree in DECODED:
        workload = make_decode(tree, heads, 2)
        peers, absent = decode_peers(tree, workload)
        shared = tree.nodes[0] < tree.samples and tree.suffix
        unshared = {"unshared"} if shared else set()
        check_peers(workload, peers, {"eager"} | sdpa | unshared)
        assert set(absent) == {"sdpa", "unshared"} - set(peers)
    for tree in PREFILLED:
        workload = make_prefill(tree, heads, 2)
        peers, absent = prefill_peers(tree, workload)
        unshared = {"unshared"} if tree.samples > 1 else set()
        check_peers(workload, peers, {"eager"} | (set() if heads.window else sdpa) | unshared)
        assert set(absent) == {"sdpa", "unshared"} - set(peers)


def test_peers_attend_to_the_same_segments() -> None:
    """Not SDPA's causal mask over longer keys, which is aligned at the start."""
    for case in (Segments(2, 30, 30, True, HEADS), Segments(2, 30, 50, False, HEADS)):
        work = segments_work(case)
        work.check(work.calls[0](), 4)
        assert set(work.peers) == {"eager", "sdpa"}
        for peer in work.peers.values():
            work.check(peer.make()[0](), 16)


def test_peers_find_the_same_gradients() -> None:
    """Everywhere, not in the first head alone; with a prompt for each, summed over them."""
    alone, packed = (
        backward_work(Case(PREFILLED[0], HEADS)),
        packed_work(Case(PREFILLED[1], CAPPED)),
    )
    assert set(alone.peers) == {"sdpa"} and set(packed.peers) == {"unshared"}
    for work in (alone, packed):
        ours: Any = work.calls[0]()
        work.check(ours, 4)
        for peer in work.peers.values():
            assert peer.as_ours is not None
            theirs: Any = peer.as_ours(peer.make()[0]())
            work.check(theirs, 16)
            for a, b in zip(ours, theirs, strict=True):
                assert torch.allclose(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_counts_of_segments() -> None:
    num_bytes, flops = Segments(2, 3, 5, True, HEADS).cost
    assert flops == 2 * (3 + 4 + 5) * 6 * 4 * 16
    assert num_bytes == 4 * (2 * 3 * 6 * 16 * 2 + 2 * 5 * 2 * 16 * 2 + 2 * 3 * 6)
    assert Segments(2, 3, 5, False, HEADS).cost == (num_bytes, 2 * 3 * 5 * 6 * 4 * 16)


def altered(out: Any) -> Any:
    """A result whose first number is another."""
    if isinstance(out, LogProbs):
        return out._replace(logp=altered(out.logp))
    if isinstance(out, tuple):
        return (altered(out[0]), *out[1:])
    out = out.clone()
    out.view(-1)[0] += 1
    return out


POCKET = SHAPES["pocket"]
WORKS: dict[str, Callable[[], Work]] = {
    "rms_norm": lambda: rms_norm_work(POCKET, 16, False),
    "rms_norm + residual": lambda: rms_norm_work(POCKET, 16, True),
    "rms_norm backward": lambda: rms_norm_backward_work(POCKET, 16, False),
    "rms_norm + residual backward": lambda: rms_norm_backward_work(POCKET, 16, True),
    "rope": lambda: rope_work(POCKET, 16),
    "rope backward": lambda: rope_backward_work(POCKET, 16),
    "gated_act": lambda: gated_act_work(POCKET, 16),
    "gated_act backward": lambda: gated_act_backward_work(POCKET, 16),
    "linear_logprob": lambda: log_probs_work(POCKET),
    "policy loss": lambda: loss_work(POCKET),
    "matmul": lambda: matmul_work(POCKET, "qkv_proj", 16),
    "merge_states": lambda: merge_states_work(POCKET, 8, 3),
    "sample_token": lambda: sample_token_work(POCKET, 9, "greedy"),
    "attention": lambda: attention_work("decode", "small", make_decode(DECODED[0], HEADS, 1)),
    "attention backward": lambda: backward_work(Case(PREFILLED[0], HEADS)),
    "attention backward, windowed": lambda: backward_work(Case(PREFILLED[2], WINDOWED)),
    "attention, packed": lambda: packed_work(Case(PREFILLED[1], CAPPED)),
    "segments": lambda: segments_work(Segments(2, 3, 5, True, HEADS)),
}


@pytest.mark.parametrize("name", WORKS)
def test_a_wrong_result_is_refused(name: str) -> None:
    work = WORKS[name]()
    out = work.calls[0]()
    work.check(out, 4)
    with pytest.raises(NotLikeReference):
        work.check(altered(out), 16)


def test_unwritten_keys_are_refused() -> None:
    work = write_kv_work(POCKET, 32)
    with pytest.raises(NotLikeReference):
        work.check(None, 4)
    work.check(work.calls[0](), 4)


def test_a_token_drawn_elsewhere_is_refused() -> None:
    for name in OPTIONS:
        work = sample_token_work(POCKET, 9, name)
        drawn: Any = work.calls[0]()
        work.check(drawn, 4)
        with pytest.raises(NotLikeReference):
            work.check((drawn[0].roll(1), drawn[1]), 4)
    step = make_step(POCKET, 9)
    out = step.calls[0]()
    step.check(out, 4)
    with pytest.raises(NotLikeReference):  # taken twice
        step.check(step.calls[0](), 4)


class Rounds:
    """In the place of the benchmark fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(
        self, target: Callable[[], object], setup: Callable[[], None], rounds: int, iterations: int
    ) -> None:
        assert iterations == 1
        for _ in range(rounds):
            setup()
            target()
        self.rounds = rounds


def test_nothing_wrong_is_timed() -> None:
    calls: list[str] = []

    def refuse(out: object, factor: float) -> None:
        raise NotLikeReference("no")

    work = Work("op", "case", 1, 1, [lambda: calls.append("ours")], refuse)
    rounds = Rounds()
    with pytest.raises(NotLikeReference):
        measure(work, CEILINGS, rounds)  # type: ignore[arg-type]
    assert calls == ["ours"] and rounds.rounds == 0 and not rounds.extra_info


def test_peers_that_fail() -> None:
    """Ours to repair, or noted where they are others'; a wrong peer is not timed either."""

    def check(out: object, factor: float) -> None:
        if out != 1:
            raise NotLikeReference(f"got {out}")

    def broken() -> list[Callable[[], object]]:
        raise RuntimeError("not on this device")

    peers = {
        "good": Peer(lambda: [lambda: 1]),
        "adapted": Peer(lambda: [lambda: 2], as_ours=lambda out: out - 1),
        "unlike": Peer(lambda: [lambda: 2], compare=False),
        "wrong": Peer(lambda: [lambda: 2], third_party=True),
        "broken": Peer(broken, third_party=True),
    }
    work = Work("op", "case", 1, 1, [lambda: 1], check, peers, {"missing": "not installed"})
    rounds = Rounds()
    figure = measure(work, CEILINGS, rounds)  # type: ignore[arg-type]
    timed = {name for name, peer in figure.peers.items() if peer.ratio is not None}
    assert timed == {"good", "adapted", "unlike"} and rounds.rounds >= 3
    notes = {name: peer.note for name, peer in figure.peers.items() if name not in timed}
    assert notes == {
        "missing": "not installed",
        "wrong": "NotLikeReference: got 2",
        "broken": "RuntimeError: not on this device",
    }
    work.peers = {"broken": Peer(broken)}
    with pytest.raises(RuntimeError):
        measure(work, CEILINGS, Rounds())  # type: ignore[arg-type]


def a_figure(key: str, ms: float, **peers: PeerFigure) -> Figure:
    op, case = key.split(": ", 1)
    return Figure(
        op=op, case=case, num_bytes=10**9, flops=10**9, ms=ms, gb_per_s=1e3 / ms,
        tflop_per_s=1 / ms, floor_ms=5.0, bound="memory", fraction=5 / ms,
        bandwidth_fraction=5 / ms, matmul_fraction=2 / ms, input_sets=3, captured=True, peers=peers,
    )  # fmt: skip


def test_figures() -> None:
    work = Work("op", "case", 10**9, 10**6, [lambda: None] * 3, lambda out, factor: None)
    rounds = Rounds()
    figure = measure(work, CEILINGS, rounds)  # type: ignore[arg-type]
    assert figure.floor_ms == pytest.approx(5) and figure.bound == "memory"
    assert CEILINGS.floor_ms(10**9, 10**10)[1] == "compute"
    assert CEILINGS.floor_ms(10**9, 10**10)[0] == pytest.approx(20)
    assert figure.fraction == pytest.approx(5 / figure.ms)
    assert figure.gb_per_s == pytest.approx(1e3 / figure.ms)
    assert figure.bandwidth_fraction == pytest.approx(figure.gb_per_s / 200)
    assert figure.matmul_fraction == pytest.approx(figure.tflop_per_s / 0.5)
    assert figure.input_sets == 3 and figure.key == "op: case"
    assert Figure.from_dict(json.loads(json.dumps(rounds.extra_info))) == figure
    line = json.loads(figures.json_line(CEILINGS, [figure]))
    assert line["figures"]["op: case"]["ms"] == round(figure.ms, 5)


def test_input_sets_exceed_the_cache() -> None:
    assert num_sets(1 << 60) == 1
    assert 1 < num_sets(1) == num_sets(0)


def test_table() -> None:
    peers = {"eager": PeerFigure(20.0, 2.5, True), "sdpa": PeerFigure(note="has no soft-cap")}
    text = figures.table([a_figure("op: case", 8.0, **peers)])
    assert "| op | case | 8.0000 | 62.5 % (memory) | eager 2.50, sdpa: has no soft-cap |" in text


def test_every_target_names_a_case() -> None:
    cases = {f"decode attention: {case.decode_name}" for case in [*TARGETS, *GRID]}
    cases |= {f"prefill attention: {case.prefill_name}" for case in [PREFILL_8K, *PREFILLS]}
    cases.add(f"attention backward: {PREFILL_8K.prefill_name}")
    cases.add(f"attention forward + backward, packed: {PACKED.prefill_name}")
    cases.add("sample_token + accept_token: qwen3-8b 32 rows")
    assert len(cases) == len(TARGETS) + len(GRID) + len(PREFILLS) + 4, "two cases with one name"
    for name in ("gemma2-27b", "qwen3-8b"):
        cases |= {f"{op}: {name} head, 8192 tokens" for op in ("linear_logprob", "policy loss")}
    assert {target.key for target in targets.TARGETS} <= cases


def test_the_head_that_a_figure_is_named_after() -> None:
    assert ROWS.keys().isdisjoint({"gemma2-27b", "qwen3-8b"})
    work = loss_work(SHAPES["pocket"], 64)
    assert work.case == "pocket head, 512 tokens, 64 rows at a time"
    assert log_probs_work(SHAPES["pocket"]).flops * 3 == work.flops == 6 * 512 * 192 * 475


def test_the_grid_has_every_value() -> None:
    cases: list[Case] = [*TARGETS, *GRID]
    assert {case.tree.samples for case in cases} >= {8, 16, 32, 64, 128}
    assert {case.tree.prefix for case in cases} >= {512, 2048, 4096, 8192, 16384}
    assert {case.tree.suffix for case in cases} >= {64, 512, 2048, 8192}
    assert {case.heads.num_heads // case.heads.num_kv_heads for case in cases} >= {1, 2, 4, 8}
    assert {case.heads.head_dim for case in cases} >= {128, 256}
    alone = [case for case in cases if case.tree.nodes[0] == case.tree.samples]
    assert alone and {len(case.tree.nodes) for case in cases} == {2, 3}
    options = {(case.heads.softcap is not None, case.heads.window is not None) for case in cases}
    assert len(options) == 4
    assert ROOT_ALONE in TARGETS


def test_targets_beside_figures() -> None:
    def read(figure: Figure) -> float | None:
        return figure.ratio("peer")

    wanted = [
        targets.Target("met", "op: a", 2, "x", read, peer="peer"),
        targets.Target("missed", "op: b", 2, "x", read, peer="peer"),
        targets.Target("no peer", "op: c", 2, "x", read, peer="peer"),
        targets.Target("no figure", "op: d", 2, "x", read, peer="peer"),
        targets.Target("fast", "op: a", 8, "ms", lambda f: f.ms, at_most=True),
        targets.Target("slow", "op: a", 7, "ms", lambda f: f.ms, at_most=True, device="H200"),
    ]
    found = [
        a_figure("op: a", 8.0, peer=PeerFigure(16.0, 2.0, True)),
        a_figure("op: b", 8.0, peer=PeerFigure(8.0, 1.99, True)),
        a_figure("op: c", 8.0, peer=PeerFigure(note="not installed")),
    ]
    outcomes = targets.compare(found, "NVIDIA H100", wanted)
    assert [outcome.met for outcome in outcomes] == [True, False, None, None, True, None]
    assert [outcome.value for outcome in outcomes] == [2.0, 1.99, None, None, 8.0, 8.0]
    assert targets.compare(found, "NVIDIA H200", wanted)[-1].met is False
    lines = targets.table(outcomes).splitlines()[2:]
    assert lines == [
        "| met | >= 2 x | 2 x | yes |",
        "| missed | >= 2 x | 1.99 x | no |",
        "| no peer | >= 2 x | not measured (not installed) |  |",
        "| no figure | >= 2 x | not measured |  |",
        "| fast | <= 8 ms | 8 ms | yes |",
        "| slow | <= 7 ms | 8 ms | set for H200 |",
    ]


HOST: dict[str, Any] = {
    "device": "NVIDIA H100", "torch": "2", "triton": "3", "driver": None, "commit": None,
    "modified": False,
}  # fmt: skip


def a_stage(*outcomes: str, status: int = 0, begun: str | None = None, **said: Any) -> gpu.Stage:
    tests = [
        {"test": f"t{i}", "outcome": outcome, "seconds": 0.1, "reason": "r", **said}
        for i, outcome in enumerate(outcomes)
    ]
    return gpu.Stage(StageLog(tests, begun), status, 1.0)


def test_a_summary_has_what_was_measured() -> None:
    key = targets.TARGETS[0].key
    figure = a_figure(key, 5.5)
    said: dict[str, Any] = {"figure": figure.as_dict(), "ceilings": vars(CEILINGS)}
    benches = a_stage("passed", "failed", "not run", status=1, **said)
    summary = json.loads(json.dumps(gpu.summarise(HOST, a_stage("passed"), benches)))
    assert [Figure.from_dict(x) for x in summary["figures"]] == [figure]  # not the failed test's
    assert summary["targets"][0]["measured"] == pytest.approx(100 * 5 / 5.5)
    assert [t["measured"] for t in summary["targets"] if t["name"].startswith("prefill")] == [None]
    text = gpu.markdown(summary)
    assert "90.9 %" in text and "not measured" in text
    assert "benchmarks, failed: t1" in text and "benchmarks, not run: t2" in text


@pytest.mark.parametrize(
    "tests",
    [
        a_stage("passed", "failed", status=1),
        a_stage("passed", status=-11, begun="t1"),
        a_stage("skipped"),
        a_stage("passed", status=2),
    ],
    ids=["failed", "broke off", "nothing ran", "pytest failed"],
)
def test_red_tests_give_no_figures(tests: gpu.Stage) -> None:
    assert not tests.green
    summary = gpu.summarise(HOST, tests, None)
    assert summary["figures"] == [] and summary["ceilings"] is None
    assert {target["measured"] for target in summary["targets"]} == {None}
    assert "nothing was measured" in gpu.markdown(summary)


STAGE = """
import os, time, pytest

def test_good(record_property):
    record_property("figure", 7)

def test_bad():
    record_property = 1
    assert record_property == 2

@pytest.mark.skip(reason="elsewhere")
def test_skipped(): ...
"""


def test_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes, fails and is skipped is told apart; a crash, a hang and a spent budget show."""
    file = tmp_path / "test_stage.py"
    file.write_text(STAGE)
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(file)]
    stage = gpu.run_stage("tests", arguments, 60)
    found = stage.as_dict()
    assert stage.status == 1 and not stage.green
    assert (found["passed"], found["skipped"], found["not_run"]) == (1, 1, [])
    assert [x["test"].split("::")[1] for x in found["failed"]] == ["test_bad"]
    assert "assert 1 == 2" in found["failed"][0]["reason"]
    assert list(stage.log.values("figure")) == [7]

    found = gpu.run_stage("tests", arguments, 0).as_dict()
    assert found["passed"] == 0 and len(found["not_run"]) == 3 and not found["failed"]

    file.write_text(STAGE + "\ndef test_crash():\n    os._exit(3)\n")
    crashed = gpu.run_stage("tests", arguments, 60)
    assert crashed.status == 3 and str(crashed.log.begun).endswith("test_crash")

    monkeypatch.setattr(gpu, "GRACE", 2)
    file.write_text("import time\ndef test_hangs():\n    time.sleep(60)\n")
    hung = gpu.run_stage("tests", arguments, 2)
    assert hung.status is None and not hung.green and hung.seconds < 30


def test_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert "needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_gpu_run_writes_down_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stages that measure nothing here: figures are those of the benchmarks' log."""
    figure = a_figure(targets.TARGETS[0].key, 5.5)
    benches = a_stage("passed", figure=figure.as_dict(), ceilings=vars(CEILINGS))
    stages = {"tests": a_stage("passed"), "benchmarks": benches}
    ran: list[str] = []

    def run_stage(name: str, arguments: list[str], budget: float) -> gpu.Stage:
        assert 0 < budget < 480
        ran.append(name)
        return stages[name]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda: HOST)
    monkeypatch.setattr(gpu, "run_stage", run_stage)
    small = "--shape pocket --prefix 20 --k 3 --new-tokens 4"
    monkeypatch.setattr(gpu, "DECODES", [(small, 5.0), ("--shape pocket --k 0", None)])
    head = "--tokens 32 --hidden 16 --vocab 64 --small 16 --repeats 1"
    monkeypatch.setattr(gpu, "LOSSES", [(head, {"fused": 9.0}), ("--tokens none", {})])
    assert gpu.main(["--out", str(tmp_path / "green")]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ran == ["tests", "benchmarks"] and line["green"] and line["targets_met"] == 1
    written = json.loads(Path(line["file"]).read_text())
    assert Path(line["file"]).name.startswith("nvidia-h100-2")
    assert [Figure.from_dict(x) for x in written["figures"]] == [figure]
    assert written["ceilings"] == vars(CEILINGS)
    text = Path(line["file"]).with_suffix(".md").read_text()
    assert "90.9 %" in text
    good, bad = written["decode"]
    assert good["k"] == 3 and good["decode_tokens_per_s"] > 0 and "k = 0" in bad["error"]
    assert small in text and "k = 0 is less than 1" in text
    good, bad = written["loss"]
    found = good["points"][0]["contenders"]
    assert all(found[name]["seconds"] > 0 for name in ("fused", "fused small", "unfused"))
    assert "(at most 9.0)" in text and "invalid int value: 'none'" in bad["error"]

    ran.clear()
    stages["tests"] = a_stage("passed", "failed", status=1)
    assert gpu.main(["--out", str(tmp_path / "red")]) == 1
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads(Path(line["file"]).read_text())
    assert ran == ["tests"] and not line["green"] and written["figures"] == []
    assert written["decode"] == written["loss"] == []
    assert written["tests"]["failed"] == [{"test": "t1", "reason": "r"}]


def test_a_training_step_with_and_without_sharing(capsys: pytest.CaptureFixture[str]) -> None:
    """All contenders find one loss and one gradient, each in a process of its own."""
    sizes = "--prefix 20 --completion 5 --group 2 --rows 2 --repeats 1"
    assert train_step.main(["--shape", "pocket", *sizes.split()]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["token_ratio"] == 2 * 25 / 30
    assert set(line["contenders"]) == {"packed", "recomputed", "unshared", "whole logits"}
    for found in line["contenders"].values():
        assert found["seconds"] > 0 and found["peak_bytes"] >= 0 and found["ratio"] > 0


def _fails() -> Run:
    raise ValueError("no such thing")


def test_a_contender_that_fails_says_why() -> None:
    found = contend({"bad": _fails}, 1, "failing")
    assert found == {"bad": {"error": "ValueError: no such thing"}}
    assert "no such thing" in describe(found)


def test_a_gpu_run_needs_few_packages() -> None:
    """All that `bench.gpu` runs can be imported where the rest is not installed."""
    files = [ROOT / path for path in gpu.BENCHES]
    assert set(files) == set(ROOT.glob("bench/bench_*.py"))
    files += [ROOT / "bench/conftest.py", *sorted(ROOT.glob("tests/test_triton_*.py"))]
    names = [f"{file.parent.name}.{file.stem}" for file in files]
    code = f"""
import importlib, sys, pytest
for name in ("tyro", "msgspec", "minijinja", "hypothesis", "matplotlib", "tqdm", "transformers"):
    sys.modules[name] = None  # importing it fails
for name in {["bench.gpu", "bench.stage", *names]}:
    try:
        importlib.import_module(name)
    except pytest.skip.Exception:  # of a test module that says itself what it needs
        assert name.startswith("tests."), name
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
