"""The benchmarks: what they count, what they refuse, what they write down."""

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from torch import Tensor

from bench import figures, goals, provenance, train_step, turns
from bench.case import NotLikeReference, OpCase, Peer
from bench.ceilings import Ceilings
from bench.figures import FACTOR, PEERS_FACTOR, Figure, PeerFigure, measure
from bench.forests import Heads, Tree, decode_cost, make_decode, make_prefill, prefill_cost
from bench.ops import OPERATIONS, accept_token, forest_attention, norm_rope_write
from bench.ops.bench_ops import CASES
from bench.ops.forest_attention import DECODES as TIMED_DECODES
from bench.ops.forest_attention import PREFILL_8K, PREFILLS, ROOT_ALONE, backward, packed
from bench.ops.linear_logprob import log_probs, loss
from bench.ops.sample_token import OPTIONS, draw
from bench.ops.segment_attention import forward as segments
from bench.provenance import processor, said_by
from bench.shapes import SHAPES
from bench.timing import num_sets, randn, reseed
from bench.turns import Run, describe, take_turns
from kernels.forest_attention.plan import MAX_SPLIT, ForestPlan
from kernels.logprob import LogProbs
from tests import forks

ROOT = Path(__file__).parent.parent
POCKET = SHAPES["pocket"]
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
        for row, blocks in enumerate(plan.suffix.blocks.tolist()):
            length, position = int(plan.suffix.length[row]), int(plan.suffix.position[row])
            for start, block in zip(range(0, length, MAX_SPLIT), blocks, strict=True):
                keys = min(MAX_SPLIT, length - start)
                runs.append((range(row, row + 1), block, keys, position + start))
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
    for tree in DECODED:
        assert decode_cost(tree, heads) == brute_force(make_decode(tree, heads, 1).plan, heads)
    for tree in PREFILLED:
        assert prefill_cost(tree, heads) == brute_force(make_prefill(tree, heads, 1).plan, heads)


def test_sharing_saves_what_the_tree_says() -> None:
    tree = Tree((1, 2, 6), (32, 16, 5))
    assert tree.num_tokens == 32 + 2 * 16 + 6 * 5
    assert tree.unshared().num_tokens == 6 * (32 + 16 + 5)
    shared, alone = (decode_cost(each, HEADS) for each in (tree, tree.unshared()))
    assert shared[1] == alone[1]
    saved = alone[0] - shared[0]
    assert saved == (tree.unshared().num_tokens - tree.num_tokens) * HEADS.cell_bytes


def test_counts_of_segments() -> None:
    causal, free = segments(2, 3, 5, True, HEADS), segments(2, 3, 5, False, HEADS)
    assert causal.flops == 2 * (3 + 4 + 5) * 6 * 4 * 16
    moved = 4 * (2 * 3 * 6 * 16 * 2 + 2 * 5 * 2 * 16 * 2 + 2 * 3 * 6)
    assert causal.num_bytes == free.num_bytes == moved
    assert free.flops == 2 * 3 * 5 * 6 * 4 * 16


def altered(out: Any) -> Any:
    """A result whose first and last numbers are others."""
    if isinstance(out, LogProbs):
        return out._replace(logp=altered(out.logp))
    if isinstance(out, tuple):
        return (altered(out[0]), *out[1:])
    out = out.clone()
    out.view(-1)[[0, -1]] += 1
    return out


def check_case(case: OpCase, everywhere: bool = False) -> set[str]:
    """Its result and its peers' are the reference's, another is refused; the names of its peers.
    everywhere: peers' results are ours in every number, not only where the check looks."""
    reseed()
    inputs = case.make_inputs(randn, 2)
    out = case.call(*inputs[0])
    case.check(inputs[0], out, FACTOR)
    peers = {k: peer for k, peer in case.peers(inputs).items() if isinstance(peer, Peer)}
    for peer in peers.values():
        theirs: Any = peer.make()[0]()
        theirs = peer.as_ours(theirs) if peer.as_ours else theirs
        if peer.compare:
            case.check(inputs[0], theirs, PEERS_FACTOR)
        if everywhere:
            pairs = [(out, theirs)] if isinstance(out, Tensor) else zip(out, theirs, strict=True)
            for a, b in pairs:
                assert torch.allclose(a, b, rtol=0, atol=1e-5 * b.abs().max().clamp_min(1).item())
    if out is not None:
        with pytest.raises(NotLikeReference):
            case.check(inputs[0], altered(out), PEERS_FACTOR)
    return set(peers)


@pytest.mark.parametrize("rows", [16, 150])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_case_holds_and_refuses_a_wrong_result(operation: str, rows: int) -> None:
    """All that a model can lead to, in float32, with as many rows as decode and prefill have."""
    found = list(OPERATIONS[operation].variants(POCKET, rows))
    assert len({case.key for case in found}) == len(found), "two cases with one name"
    with torch.inference_mode():
        for case in found:
            check_case(case)


@pytest.mark.parametrize("heads", [HEADS, CAPPED, WINDOWED], ids=["plain", "capped", "window"])
def test_peers_attend_to_the_same(heads: Heads) -> None:
    """Also where a query sees less than its sequence."""
    sdpa = set() if heads.softcap else {"sdpa"}
    for tree in DECODED:
        unshared = {"unshared"} if tree.nodes[0] < tree.samples and tree.suffix else set()
        found = check_case(forest_attention.decode(tree, heads), everywhere=True)
        assert found == {"eager"} | sdpa | unshared
    for tree in PREFILLED:
        unshared = {"unshared"} if tree.samples > 1 else set()
        found = check_case(forest_attention.prefill(tree, heads), everywhere=True)
        assert found == {"eager"} | (set() if heads.window else sdpa) | unshared


def test_peers_attend_to_the_same_segments() -> None:
    """Not SDPA's causal mask over longer keys, which is aligned at the start."""
    for sizes, sdpa in (((30, 30, True), True), ((30, 50, False), True), ((30, 50, True), False)):
        found = check_case(segments(2, *sizes, HEADS))
        assert found == {"eager"} | ({"sdpa"} if sdpa else set())


def test_peers_find_the_same_gradients() -> None:
    """Everywhere, not in the first head alone; with a prompt for each, summed over them."""
    assert check_case(backward(PREFILLED[0], HEADS), everywhere=True) == {"sdpa"}
    assert check_case(packed(PREFILLED[1], CAPPED), everywhere=True) == {"unshared"}
    assert check_case(backward(PREFILLED[2], WINDOWED)) == set()


def test_unwritten_keys_are_refused() -> None:
    case = norm_rope_write.forward(POCKET, 32)
    (arguments,) = case.make_inputs(randn, 1)
    out = case.call(*arguments)
    for cache in arguments[6:8]:
        cache.zero_()
        with pytest.raises(NotLikeReference):
            case.check(arguments, out, FACTOR)
        case.check(arguments, case.call(*arguments), FACTOR)


def test_a_token_drawn_elsewhere_or_taken_twice_is_refused() -> None:
    for name in OPTIONS:
        case = draw(POCKET, 9, name)
        (arguments,) = case.make_inputs(randn, 1)
        drawn = case.call(*arguments)
        with pytest.raises(NotLikeReference):
            case.check(arguments, (drawn[0].roll(1), *drawn[1:]), FACTOR)
    for case in (accept_token.step(POCKET, 9), accept_token.take(9, 1, True, True)):
        (arguments,) = case.make_inputs(randn, 1)
        case.check(arguments, case.call(*arguments), FACTOR)
        with pytest.raises(NotLikeReference):
            case.check(arguments, case.call(*arguments), FACTOR)


def a_case(call: Callable[[], object], check: Callable[..., None], **fields: Any) -> OpCase:
    """An operation without arguments."""
    sizes = {"num_bytes": 10**9, "flops": 10**6}
    return OpCase("op", "case", lambda tensor, count: [()] * 3, call, check, **sizes | fields)


def test_a_line_names_where_its_figures_come_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "bench.decode", "--data", "two words"]
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *words])
    provenance.print_json({"ms": 2})
    line = json.loads(capsys.readouterr().out)
    run = line.pop("run")
    assert line == {"ms": 2} and run["command"] == shlex.join(["python", *words])
    assert run["versions"]["python"] == platform.python_version()
    assert run["versions"]["torch"] == torch.__version__
    assert run["versions"]["triton"] == triton.__version__
    status = said_by("git", "status", "--porcelain")
    assert run["versions"]["commit"] == said_by("git", "rev-parse", "HEAD")
    assert run["versions"]["modified"] == (None if status is None else status != "")
    assert run["machine"]["cores"] == os.cpu_count()
    assert run["machine"]["processor"] == processor()
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(run["date"])
    assert 0 <= age.total_seconds() < 600


def test_the_processor_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Architecture:  aarch64\nModel name:   Neoverse-N1\nModel:   1\n"
    monkeypatch.setattr(provenance, "said_by", lambda *command: said)
    assert processor() == "Neoverse-N1"


def test_every_benchmark_prints_its_provenance() -> None:
    files = [*ROOT.glob("bench/**/*.py")]
    printing = [x.stem for x in files if "print_json(" in x.read_text()]
    assert len(printing) >= 14
    assert [x.stem for x in files if "print(json" in x.read_text()] == ["provenance"]


def test_nothing_wrong_is_timed() -> None:
    calls: list[str] = []

    def refuse(arguments: object, out: object, factor: float) -> None:
        raise NotLikeReference("no")

    with pytest.raises(NotLikeReference):
        measure(a_case(lambda: calls.append("ours"), refuse), CEILINGS)
    assert calls == ["ours"]


def test_peers_that_fail() -> None:
    """Ours to repair, or noted where they are others'; a wrong peer is not timed either."""

    def check(arguments: object, out: object, factor: float) -> None:
        if out != 1:
            raise NotLikeReference(f"got {out}")

    def broken() -> list[Callable[[], object]]:
        raise RuntimeError("not on this device")

    peers: dict[str, Peer | str] = {
        "good": Peer(lambda: [lambda: 1]),
        "adapted": Peer(lambda: [lambda: 2], as_ours=lambda out: out - 1),
        "unlike": Peer(lambda: [lambda: 2], compare=False),
        "wrong": Peer(lambda: [lambda: 2], third_party=True),
        "broken": Peer(broken, third_party=True),
        "missing": "not installed",
    }
    rounds: list[int] = []

    def repeat(target: Callable[[], None], setup: Callable[[], None], count: int) -> None:
        rounds.append(count)
        figures.in_turn(target, setup, count)

    figure = measure(a_case(lambda: 1, check, peers=lambda inputs: peers), CEILINGS, repeat)
    timed = {name for name, peer in figure.peers.items() if peer.ratio is not None}
    assert timed == {"good", "adapted", "unlike"} and rounds[0] >= 3
    notes = {name: peer.note for name, peer in figure.peers.items() if name not in timed}
    assert notes == {
        "missing": "not installed",
        "wrong": "NotLikeReference: got 2",
        "broken": "RuntimeError: not on this device",
    }
    case = a_case(lambda: 1, check, peers=lambda inputs: {"broken": Peer(broken)})
    with pytest.raises(RuntimeError):
        measure(case, CEILINGS)


def a_figure(key: str, ms: float, **peers: PeerFigure) -> Figure:
    op, case = key.split(": ", 1)
    return Figure(
        op=op, case=case, num_bytes=10**9, flops=10**9, ms=ms, gb_per_s=1e3 / ms,
        tflop_per_s=1 / ms, floor_ms=5.0, bound="memory", fraction=5 / ms,
        bandwidth_fraction=5 / ms, matmul_fraction=2 / ms, input_sets=3, captured=True, peers=peers,
    )  # fmt: skip


def test_figures() -> None:
    figure = measure(a_case(lambda: None, lambda *_: None), CEILINGS)
    assert figure.floor_ms == pytest.approx(5) and figure.bound == "memory"
    assert CEILINGS.floor_ms(10**9, 10**10)[1] == "compute"
    assert CEILINGS.floor_ms(10**9, 10**10)[0] == pytest.approx(20)
    assert figure.fraction == pytest.approx(5 / figure.ms)
    assert figure.gb_per_s == pytest.approx(1e3 / figure.ms)
    assert figure.bandwidth_fraction == pytest.approx(figure.gb_per_s / 200)
    assert figure.matmul_fraction == pytest.approx(figure.tflop_per_s / 0.5)
    assert figure.input_sets == 3 and figure.key == "op: case"
    assert Figure.from_dict(json.loads(json.dumps(figure.as_dict()))) == figure
    line = figures.summary(CEILINGS, [figure])
    assert line["figures"]["op: case"]["ms"] == round(figure.ms, 5)


def test_input_sets_exceed_the_cache() -> None:
    assert num_sets(1 << 60) == 1
    assert 1 < num_sets(1) == num_sets(0)


def test_table() -> None:
    peers = {"eager": PeerFigure(20.0, 2.5, True), "sdpa": PeerFigure(note="has no soft-cap")}
    text = figures.table([a_figure("op: case", 8.0, **peers)])
    assert "| op | case | 8.0000 | 62.5 % (memory) | eager 2.50, sdpa: has no soft-cap |" in text


def test_every_goal_names_a_case_that_is_timed_on_a_gpu() -> None:
    """In a process that believes in a GPU."""
    process = forks.start(check_goals, forgotten=("bench", "engine", "kernels", "models"))
    process.join()
    assert process.exitcode == 0
    assert len({case.key for case in CASES}) == len(CASES)


def check_goals() -> None:
    with patch.object(torch.cuda, "is_available", lambda: True):
        from bench.goals import GOALS
        from bench.gpu_steps import STEPS, real_work
        from bench.ops.bench_ops import CASES
    keys = [case.key for case in CASES]
    assert len(set(keys)) == len(keys), "two cases with one name"
    wanted = {goal.key for goal in GOALS}
    assert wanted == set(keys[: len(wanted)]), wanted - set(keys)  # they come first
    work = real_work()
    ran = [case.key for cases in work.figures.values() for case in cases]
    assert sorted(ran) == sorted(keys)
    assert not wanted & {case.key for case in work.figures["grid"]}
    others = {"machine", "compile", "smoke", "memory", "tests"}
    assert {*work.figures, *work.decodes, *others} == set(STEPS)


def test_the_head_that_a_figure_is_named_after() -> None:
    case = loss(POCKET, 512, 64)
    assert case.name == "pocket head, 512 tokens, 64 rows at a time"
    assert log_probs(POCKET, 512).flops * 3 == case.flops == 6 * 512 * 192 * 475


def test_the_grid_has_every_value() -> None:
    trees, heads = zip(*TIMED_DECODES, strict=True)
    assert {tree.samples for tree in trees} >= {8, 16, 32, 64, 128}
    assert {tree.prefix for tree in trees} >= {512, 2048, 4096, 8192, 16384}
    assert {tree.suffix for tree in trees} >= {64, 512, 2048, 8192}
    assert {each.num_heads // each.num_kv_heads for each in heads} >= {1, 2, 4, 8}
    assert {each.head_dim for each in heads} >= {128, 256}
    assert any(tree.nodes[0] == tree.samples for tree in trees)
    assert {len(tree.nodes) for tree in trees} == {2, 3}
    assert len({(each.softcap is None, each.window is None) for each in heads}) == 4
    assert ROOT_ALONE in TIMED_DECODES and PREFILL_8K in PREFILLS


def test_goals_beside_figures() -> None:
    def read(figure: Figure) -> float | None:
        return figure.ratio("peer")

    wanted = [
        goals.Goal("met", "op: a", 2, "x", read, peer="peer"),
        goals.Goal("missed", "op: b", 2, "x", read, peer="peer"),
        goals.Goal("no peer", "op: c", 2, "x", read, peer="peer"),
        goals.Goal("no figure", "op: d", 2, "x", read, peer="peer"),
        goals.Goal("fast", "op: a", 8, "ms", lambda f: f.ms, at_most=True),
        goals.Goal("slow", "op: a", 7, "ms", lambda f: f.ms, at_most=True, device="H200", share=60),
    ]
    found = [
        a_figure("op: a", 8.0, peer=PeerFigure(16.0, 2.0, True)),
        a_figure("op: b", 8.0, peer=PeerFigure(8.0, 1.99, True)),
        a_figure("op: c", 8.0, peer=PeerFigure(note="not installed")),
    ]
    outcomes = goals.compare(found, "NVIDIA H100", wanted)
    assert [outcome.met for outcome in outcomes] == [True, False, None, None, True, True]
    assert [outcome.value for outcome in outcomes] == [2.0, 1.99, None, None, 8.0, 62.5]
    assert goals.compare(found, "NVIDIA H200", wanted)[-1].met is False
    lines = goals.table(outcomes).splitlines()[2:]
    assert lines == [
        "| met | >= 2 x | 2 x | yes |",
        "| missed | >= 2 x | 1.99 x | no |",
        "| no peer | >= 2 x | not measured (not installed) |  |",
        "| no figure | >= 2 x | not measured |  |",
        "| fast | <= 8 ms | 8 ms | yes |",
        "| slow: share of the ceiling | >= 60 % | 62.5 % | yes |",
    ]


@pytest.mark.parametrize(
    ("peers", "start"),
    [
        (["packed", "unshared"], "fork"),
        pytest.param(list(train_step.PEERS), turns.START, marks=pytest.mark.soak),
    ],
)
def test_a_training_step_with_and_without_sharing(
    peers: list[str],
    start: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All peers find one loss and one gradient, each in a process of its own."""
    monkeypatch.setattr(turns, "START", start)
    sizes = "--prefix 20 --completion 5 --group 2 --rows 2 --repeats 1"
    assert train_step.main(["--shape", "pocket", *sizes.split(), "--peers", *peers]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["token_ratio"] == 2 * 25 / 30
    assert set(line["peers"]) == set(peers) and len(train_step.PEERS) == 4
    for found in line["peers"].values():
        assert found["seconds"] > 0 and found["peak_bytes"] >= 0 and found["ratio"] > 0


def _fails() -> Run:
    raise ValueError("no such thing")


def test_a_peer_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "START", "fork")
    found = take_turns({"bad": _fails}, 1, "failing")
    assert found == {"bad": {"error": "ValueError: no such thing"}}
    assert "no such thing" in describe(found)
