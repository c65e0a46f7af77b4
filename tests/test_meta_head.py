"""The meta head: its scores against a dense forward, on every path, and what becomes of a vote."""

import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import engine.generate as generate
from engine import sample as command_line
from engine.generate import Generation, Generator, Group
from engine.judge import Judge
from engine.meta_head import MetaHead
from engine.request import Row, make_row
from engine.sample import POCKET
from engine.verdict import to_line
from kernels import cpp
from kernels.extract_scores import ScoreAutomaton
from kernels.sample_token import SamplingOptions
from kernels.take_token import LiveSamples
from models import load_score_weight
from models.transformer import Transformer, causal_attend
from tests import tiny
from tests.judges import rebuilt
from tests.rows import needs_cpp
from tests.test_meta import VOTED, one

K = 6
CUT = 90  # tokens: some judgements of VOTED are whole by then, some are not
ROWS = [VOTED, make_row(VOTED.messages, [*VOTED.responses, "Bye."], id="other")]
Drawn = list[tuple[list[int], Generation]]  # a prompt and what came after it


def head(seed: int = 0) -> Tensor:
    return torch.randn(1, 192, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plain() -> Judge:
    return Judge.load(POCKET)


def draw(
    judge: Judge,
    weight: Tensor | None,
    max_new_tokens: int,
    rows: Sequence[Row] = ROWS,
    k: int = K,
    ahead: int = 0,
    **options: Any,
) -> list[Drawn]:
    """K samples of each row in alternating orders, from the engine below `Judge`."""
    generator = Generator(
        judge.model,
        judge._automaton,
        options=SamplingOptions(1.0),
        max_new_tokens=max_new_tokens,
        max_scores=3,
        cache_bytes=1 << 25,
        meta_head=weight,
        **({"max_batch": 16} | options),
    )
    generator.ahead = ahead
    groups = []
    for row in rows:
        order = list(range(len(row.responses)))
        prompts = [
            [segment.token_ids for segment in judge.prompts.segments(row, shown)]
            for shown in [order, order[::-1]] * (k // 2)
        ]
        groups.append(Group(prompts, (ROWS.index(row), 7), len(order), row.id))
    found = {
        result.group.tag: [
            ([token for segment in prompt for token in segment], generation)
            for prompt, generation in zip(result.group.prompts, result.generations, strict=True)
        ]
        for result in generator.run(groups)
    }
    return [found[row.id] for row in rows]


def bits(found: list[Drawn]) -> list:
    return [[(g.token_ids, g.logprobs, g.meta) for _, g in samples] for samples in found]


# Scores


@torch.no_grad()
def dense(model: Transformer, ids: list[int], weight: Tensor) -> Tensor:
    """w . h at each position of one sequence, in the model's dtype."""
    at = torch.arange(len(ids))
    hidden = model(torch.tensor(ids), at, causal_attend(model.config))
    return hidden @ weight[0].to(hidden.dtype)


@pytest.mark.parametrize(
    ("max_new_tokens", "stop", "finishes"),
    [
        (1, "box", {"length"}),
        (2, "box", {"length"}),
        (CUT, "box", {"box", "length"}),
        (300, "eos", {"eos"}),
    ],
)
def test_a_score_is_that_of_the_state_before_the_last_token(
    plain: Judge, max_new_tokens: int, stop: str, finishes: set[str]
) -> None:
    """Of samples that end at different steps, side by side. The neighbouring states' scores are
    far from it."""
    (found,) = draw(plain, head(), max_new_tokens, ROWS[:1], stop=stop)
    assert {g.finish for _, g in found} == finishes
    exact_model = deepcopy(plain.model).double()
    reference, errors, others = [], [], []
    for prompt, g in found:
        ids, last = prompt + g.token_ids, len(prompt) + len(g.token_ids) - 1
        exact = dense(exact_model, ids, head())
        reference.append(abs(dense(plain.model, ids, head())[last - 1] - exact[last - 1]).item())
        assert g.meta is not None
        errors.append(abs(g.meta - exact[last - 1].item()))
        others.append(min(abs(g.meta - exact[i].item()) for i in (last - 2, last)))
    # The engine adds in other orders than the dense forward: a few times its error in float32.
    tolerance = 5 * max(reference)
    assert max(errors) <= tolerance
    assert sorted(others)[len(others) // 2] > 1000 * tolerance


@needs_cpp
def test_no_bit_depends_on_company(plain: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on what the host looks at, or on pieces of a prefill; and none without a head."""
    together = draw(plain, head(), CUT)
    expected = bits(together)
    assert len({meta for row in expected for *_, meta in row}) == 2 * K
    assert [bits(draw(plain, head(), CUT, [row]))[0] for row in ROWS] == expected
    for max_batch, ahead in ((1, 0), (5, 1)):
        assert bits(draw(plain, head(), CUT, max_batch=max_batch, ahead=ahead)) == expected
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 48)
    assert bits(draw(plain, head(), CUT, max_batch=7)) == expected
    without = bits(draw(plain, None, CUT))
    assert without == [[(*sample[:2], None) for sample in row] for row in expected]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which C++ functions were called, those that are only repeated left out."""
    names: list[str] = []
    call = cpp.call

    def noted(name: str, dtype: torch.dtype, *arguments: Any) -> None:
        names.append(name)
        call(name, dtype, *arguments)

    monkeypatch.setattr(cpp, "call", noted)
    return names


in_native = pytest.mark.skipif(
    not cpp.runs_cpp(torch.zeros(1)), reason="operations run in torch here"
)


@in_native
def test_torch_and_cpp_give_the_same_bits(plain: Judge, called: list[str]) -> None:
    ours = bits(draw(plain, head(), 20, k=2))
    assert 0 < called.count("keep_scores") < 18  # of 18 steps some were repeated
    del called[:]
    with cpp.torch_only():
        assert bits(draw(plain, head(), 20, k=2)) == ours
    assert not called


@in_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_operation_in_torch_and_cpp(
    dtype: torch.dtype, threads: int, called: list[str]
) -> None:
    """Of any width; a sample that has finished keeps its score."""
    automaton = ScoreAutomaton([b"x"], [], "Scores:", 1, 10)
    batch, slots = 21, 30
    generator = torch.Generator().manual_seed(0)
    live = LiveSamples.start(
        torch.ones(batch, dtype=torch.int64),
        torch.randperm(slots, generator=generator)[:batch],
        automaton.start(torch.ones(batch, dtype=torch.int64), 1),
    )
    live.finished.copy_(torch.arange(batch) % 4 == 1)
    widths, before = (1, 20, 64, 192, 768, 2304, 5000), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width in widths:
            hidden = torch.randn(32, width, generator=generator).to(dtype)
            weight = torch.randn(1, width, generator=generator)

            def run(hidden: Tensor = hidden, weight: Tensor = weight) -> list[float]:
                kept = MetaHead(weight, slots)
                kept.keep_of(live, hidden)
                return kept.fetch(live)

            ours = run()
            with cpp.torch_only():
                assert run() == ours
            exact = hidden.double() @ weight[0].double()
            # Each product and each addition is rounded once.
            bound = width * torch.finfo(torch.float32).eps * (hidden * weight).abs().sum(1)
            for b, score in enumerate(ours):
                if live.finished[b]:
                    assert score == 0.0
                else:
                    assert abs(score - exact[b].item()) <= bound[b].item()
    finally:
        torch.set_num_threads(before)
    assert called == ["keep_scores"] * len(widths)


# Votes


def test_the_best_k_meta_vote(plain: Judge) -> None:
    judge = rebuilt(plain, meta_head=head())
    verdict = one(judge, max_new_tokens=CUT, k_meta=2)
    assert 2 < verdict.valid < verdict.k and verdict.votes == 2
    assert all((s.meta is None) == (s.scores is None) for s in verdict.samples)
    valid = [sample for sample in verdict.samples if sample.scores is not None]
    best = sorted(valid, key=lambda s: -(s.meta or 0.0))[:2]
    assert best != valid[:2]
    assert verdict.scores == [sum(s.scores[i] for s in best if s.scores) for i in range(2)]
    line = json.loads(to_line(verdict))
    assert [s["meta"] for s in line["samples"]] == [s.meta for s in verdict.samples]
    assert one(judge, max_new_tokens=CUT).votes == min(verdict.valid, 4)  # half of 8
    turned = one(rebuilt(plain, meta_head=-head()), max_new_tokens=CUT, k_meta=2)
    assert [s.meta for s in turned.samples] == [s.meta and -s.meta for s in verdict.samples]
    assert turned.scores != verdict.scores
    unheaded = one(plain, max_new_tokens=CUT)
    assert [s.token_ids for s in unheaded.samples] == [s.token_ids for s in verdict.samples]
    assert unheaded.votes == verdict.valid and {s.meta for s in unheaded.samples} == {None}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_no_vote(plain: Judge, value: float) -> None:
    weight = torch.zeros(1, 192)
    weight[0, 3] = value
    verdict = one(rebuilt(plain, meta_head=weight), max_new_tokens=CUT)
    assert verdict.valid and (verdict.votes, verdict.best, verdict.scores) == (0, None, None)
    assert all(math.isnan(s.meta or 0.0) for s in verdict.samples if s.scores)
    assert {s["meta"] for s in json.loads(to_line(verdict))["samples"]} == {None}


# Options, keys and files


def test_options_that_are_refused(plain: Judge) -> None:
    judge = rebuilt(plain, meta_head=head())
    for options, words in (
        ({"k": 4, "k_meta": 5}, "k_meta = 5 is more than k = 4"),
        ({"until_decided": 0.9}, "until_decided has no meaning with a meta model or head"),
    ):
        with pytest.raises(ValueError, match=words):
            judge.key(VOTED, **options)
    for wrong in (head()[0], head()[:, 1:], head().double()):
        with pytest.raises(ValueError, match=r"the meta head must be \(1, 192\) float32, got"):
            rebuilt(plain, meta_head=wrong)


def test_the_key_names_the_heads_content(plain: Judge) -> None:
    first, same, other = (rebuilt(plain, meta_head=head(seed)) for seed in (0, 0, 1))
    assert first.key(VOTED) == same.key(VOTED, k_meta=4)
    keys = [plain.key(VOTED), first.key(VOTED), other.key(VOTED), first.key(VOTED, k_meta=3)]
    assert len(set(keys)) == len(keys)
    verdict = one(first, max_new_tokens=1)
    assert verdict.key == first.key(VOTED, k=8, temperature=1.0, max_new_tokens=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_file_of_any_float_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"score.weight": head().to(dtype)}, tmp_path / "head")
    weight = load_score_weight(tmp_path / "head", 192)
    assert weight.dtype == torch.float32 and weight.equal(head().to(dtype).float())


def write(tensors: dict[str, Tensor]) -> Callable[[Path], object]:
    return lambda path: save_file(tensors, path)


def cut_short(path: Path) -> None:
    save_file({"score.weight": head()}, path)
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (write({"weight": head()}), r"must hold score.weight and nothing else, got \['weight'\]"),
        (write({"score.weight": head(), "score.bias": torch.zeros(1)}), "and nothing else"),
        (write({}), "and nothing else"),
        (write({"score.weight": head()[0]}), r"must have shape \(1, 192\), got \(192,\)"),
        (write({"score.weight": head()[:, :64]}), r"must have shape \(1, 192\), got \(1, 64\)"),
        (write({"score.weight": head() * math.nan}), "is not finite in float32"),
        (write({"score.weight": head().double() * 1e300}), "is not finite in float32"),
        (write({"score.weight": head().long()}), "has dtype 'I64', which is not supported"),
        (lambda path: torch.save({"score.weight": head()}, path), "truncated"),
        (cut_short, "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.mkdir(), "no such file"),
        (lambda path: None, "no such file"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    path = tmp_path / "head.safetensors"
    make(path)
    with pytest.raises(ValueError, match=words) as caught:
        load_score_weight(path, 192)
    assert str(path) in str(caught.value)


def test_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out, file = (tmp_path / name for name in ("rows.jsonl", "out.jsonl", "head"))
    prompt, responses = VOTED.messages[0].content, list(VOTED.responses)
    data.write_text(json.dumps({"id": "r", "prompt": prompt, "responses": responses}) + "\n")
    save_file({"score.weight": head()}, file)
    options = ["--k", "4", "--max-new-tokens", str(CUT), "--data", str(data), "--out", str(out)]
    with_file = [*options, "--meta-head", str(file)]
    assert command_line.main(with_file) == 0
    whole = out.read_bytes()
    judge = Judge.load(POCKET, meta_head=file)
    verdict = judge(prompt, responses, id="r", k=4, max_new_tokens=CUT)
    assert verdict.votes == min(2, verdict.valid) > 0 and to_line(verdict) == whole
    assert command_line.main([*with_file, "--resume"]) == 0
    assert out.read_bytes() == whole
    save_file({"score.weight": head(1)}, file)
    tiny.write_model(tmp_path / "meta", scalar=True)
    capfd.readouterr()
    for more, words in (
        (["--resume"], "not what line 1 of the input gives now"),
        (["--meta-model", str(tmp_path / "meta")], "a meta model and a meta head exclude each"),
        (["--until-decided", "0.9"], "until_decided has no meaning"),
        (["--meta-head", str(data)], str(data)),
    ):
        fresh = [] if more == ["--resume"] else ["--out", str(tmp_path / "fresh")]
        assert command_line.main([*with_file, *fresh, *more]) == 2
        assert words in capfd.readouterr().err
    assert out.read_bytes() == whole
