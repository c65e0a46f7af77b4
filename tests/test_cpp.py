"""The C++ decoder, which is as exact as torch, and the library: built once, trusted only if ours,
and of several threads at a time. Operations are tested in tests/spec."""

import ctypes
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.generate import GroupResult
from engine.judge import Judge
from engine.sample import POCKET
from engine.verdict import to_line
from kernels import cpp
from kernels.cpp import build
from kernels.rms_norm import rms_norm
from kernels.sample_token import SamplingOptions
from models import load
from models.decoder import CppDecoder
from models.transformer import Transformer
from tests.forests import Grove, Shape, crowd
from tests.implementations import Implementation
from tests.test_generate import drawn, make_generator, make_groups, run
from tests.tiny import FAMILIES, write_model
from train.world.rows import split_rows

pytestmark = pytest.mark.skipif(
    not cpp.runs_cpp(torch.zeros(1)), reason="operations run in torch here"
)


CPP, TORCH = Implementation("cpp"), Implementation("torch")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder(family: str, tmp_path: Path) -> None:
    """Samples of rows with shared segments, joining and retiring: tokens and log-probs."""
    write_model(tmp_path, family)
    model, _ = load(tmp_path)
    groups = make_groups(4, k=5, longest=90)

    def sample() -> list:
        generator = make_generator(model, max_batch=11, options=SamplingOptions(0.8))
        return [drawn(result) for result in run(generator, groups)]

    with CPP.counted() as calls:
        ours = sample()
    # Each stands for all the steps between two looks.
    assert calls["decode"] > 5 and calls["accept_token"] > 5 and not calls["attend_tiles"]
    with TORCH.counted(), cpp.torch_only():
        assert_alike(sample(), ours)


def assert_alike(ours: list, theirs: list) -> None:
    """The same tokens, and log-probs within float32 rounding of a few layers."""
    pairs = zip(chain(*ours), chain(*theirs), strict=True)
    for (tokens, *logprobs, finish), (expected, *exact, end) in pairs:
        assert (tokens, finish) == (expected, end)
        for found, right in zip(logprobs, exact, strict=True):
            np.testing.assert_allclose(found, right, rtol=0, atol=2e-5)


def test_a_model_that_is_trained_between_samples(tmp_path: Path) -> None:
    """The decoder follows weights that change in place, also within one generator."""
    write_model(tmp_path, "qwen3")
    model, _ = load(tmp_path)
    generator = make_generator(model)
    groups = make_groups(1)  # not the rows of before: the keys of their head are kept
    run(generator, make_groups(1, seed=1))
    first = [drawn(r) for r in run(make_generator(model), groups)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    changed = [drawn(r) for r in run(generator, groups)]
    assert changed != first
    with cpp.torch_only():
        assert_alike([drawn(r) for r in run(make_generator(model), groups)], changed)


def test_bfloat16_decoder_is_as_exact_as_torch(tmp_path: Path) -> None:
    """Log-probs of the same tokens, against float64."""
    write_model(tmp_path, "gemma2")
    exact = load(tmp_path, dtype="bfloat16")[0].double()
    model, _ = load(tmp_path, dtype="bfloat16")
    ours = logprob_errors(exact, run(make_generator(model), make_groups(2)))
    with cpp.torch_only():
        theirs = logprob_errors(exact, run(make_generator(model), make_groups(2)))
    assert ours.abs().max() <= 2 * theirs.abs().max()


def logprob_errors(exact: Transformer, results: list[GroupResult]) -> Tensor:
    """How far the log-probs of all drawn tokens are from those of a model in float64."""
    errors = []
    for result in results:
        for prompt, generation in zip(result.group.prompts, result.generations, strict=True):
            ids = torch.tensor(generation.token_ids)
            logits = exact.logits([*chain(*prompt), *generation.token_ids])[-len(ids) - 1 : -1]
            expected = logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
            errors.append(expected - torch.tensor(generation.logprobs))
    return torch.cat(errors)


def test_slots_of_a_forward_are_checked(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3")
    model, _ = load(tmp_path)
    grove = Grove(crowd(), Shape(2, 2, 24, 24), capacity=304)
    decoder = CppDecoder(model, grove.cache.k * 3, grove.cache.v * 3)
    _, plan = grove.decode()
    tokens = torch.ones(len(plan.positions), dtype=torch.int64)
    with pytest.raises(ValueError, match="distinct and within the cache"):
        decoder.forward(tokens, plan.positions, tokens, plan)


# -- what is loaded --------------------------------------------------------------------------------

TINY = """
#include "tiny.h"
#include <cstdint>
#include <cstring>
extern "C" int64_t quorum_interface(char *text, int64_t size) {
    if (size) std::memcpy(text, LINE, sizeof LINE - 1);
    return sizeof LINE - 1;
}
"""
LINE = '#define LINE "struct Pair 16 first:l:0 second:f:8\\n"'


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A small library in place of ours, built in seconds; gives the folder that libraries go to."""
    (tmp_path / "tiny.cpp").write_text(TINY)
    (tmp_path / "tiny.h").write_text(LINE)
    monkeypatch.setattr(build, "_ROOT", tmp_path)
    monkeypatch.setattr(build, "_SOURCES", ("tiny.cpp",))
    monkeypatch.setattr(build, "_HEADERS", (".",))
    monkeypatch.setattr(build, "_FLAGS", ("-fPIC",))
    monkeypatch.setattr(build, "_check_bits", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.forget()
    yield tmp_path / "quorum"
    monkeypatch.undo()
    build.forget()


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counter: Counter[str] = Counter()
    made = build._build

    def counted(*arguments: Any) -> Path:
        counter["build"] += 1
        return made(*arguments)

    monkeypatch.setattr(build, "_build", counted)
    return counter


def loaded_again() -> build.Library:
    build.forget()
    library = build.library()
    assert library is not None and set(library.structures) == {"Pair"}
    return library


def test_it_is_built_once_and_kept(tiny: Path, builds: Counter[str]) -> None:
    pair = loaded_again().structures["Pair"](3, 0.5)
    assert (pair.first, pair.second) == (3, 0.5)
    (made,) = tiny.iterdir()  # nothing half made is left
    loaded_again()
    assert builds == {"build": 1} and [*tiny.iterdir()] == [made]
    (tiny.parent / "tiny.h").write_text(LINE + " ")
    loaded_again()
    assert builds == {"build": 2}  # a header has changed


@pytest.mark.parametrize("fault", ["cut short", "a bit turned", "planted"])
def test_a_library_that_is_not_ours_is_built_anew(
    fault: str, tiny: Path, builds: Counter[str]
) -> None:
    loaded_again()
    (made,) = tiny.iterdir()
    content = made.read_bytes()
    made.unlink()  # what is loaded stays as it was
    made.write_bytes(content)
    made.chmod(0o700)
    if fault == "cut short":
        made.write_bytes(content[: len(content) // 2])
    elif fault == "a bit turned":
        made.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    else:
        made.chmod(0o777)  # somebody else could have written it
    loaded_again()
    assert builds == {"build": 2}
    (again,) = tiny.iterdir()
    assert again.stat().st_mode & 0o777 == 0o700 and again.read_bytes()[:4] == b"\x7fELF"


def test_a_folder_that_others_can_write_is_not_used(tiny: Path, builds: Counter[str]) -> None:
    tiny.mkdir()
    tiny.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="others can write"):
        loaded_again()
    assert not [*tiny.iterdir()] and builds == {"build": 1}


FAULTS = {
    "no compiler": ("PATH", "", "no C\\+\\+ compiler"),
    "a broken one": ("CXX", "false", "false failed"),
    "no such compiler": ("CXX", "no-such-compiler", "no-such-compiler"),
    "no such set": ("QUORUM_ISA", "mmx", "QUORUM_ISA must be one of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_library_torch_runs(
    fault: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says why, once, and gives the same within rounding."""
    x, weight = randn(20, 64), randn(64)
    monkeypatch.delenv("CXX", raising=False)
    variable, value, message = FAULTS[fault]
    monkeypatch.setenv(variable, value)
    with pytest.warns(RuntimeWarning, match=message) as warned, TORCH.counted():
        out = rms_norm(x, weight, 1e-6)
        rms_norm(x, weight, 1e-6)
        assert cpp.implementation() == "torch"
    assert len(warned) == 1
    assert isinstance(out, Tensor) and out.isfinite().all()


def test_a_compiler_may_be_several_words(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env g++")
    loaded_again()


@pytest.mark.parametrize(
    "line", ["struct Pair 24 first:l:0 second:f:8", "struct Pair 16 first:l:8"]
)
def test_another_layout_is_refused(line: str, tiny: Path) -> None:
    (tiny.parent / "tiny.h").write_text(f'#define LINE "{line}\\n"')
    with pytest.warns(RuntimeWarning, match="another layout"):
        assert build.library() is None


def test_other_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at loading fails for a library that is one unit off in one result."""
    library = build.library()
    assert library is not None
    path = Path("cpp.so")
    build._check_bits(path, library)
    product = library.functions["linear_f32"]

    def nudged(*arguments: Any) -> None:
        product(*arguments)
        address, (rows, columns) = arguments[6], (arguments[1], arguments[4])
        y = (ctypes.c_float * (rows * columns)).from_address(address)
        y[5] = float(np.nextafter(np.float32(y[5]), np.float32(np.inf)))

    other = build.Library({**library.functions, "linear_f32": nudged}, library.structures)
    with pytest.raises(OSError, match="other results"):
        build._check_bits(path, other)


# -- several threads -------------------------------------------------------------------------------


def test_judges_side_by_side(tmp_path: Path) -> None:
    """Two generators of one model and one of another, each in a thread of its own and under several
    threads of the pool: each gives what it gives alone."""
    models = []
    for family in ("qwen3", "gemma2"):
        write_model(tmp_path / family, family)
        models.append(load(tmp_path / family)[0])
    jobs = [(models[0], 1), (models[0], 2), (models[1], 3)]

    def sample(job: tuple[Transformer, int]) -> list:
        model, seed = job
        generator = make_generator(model, max_batch=11, options=SamplingOptions(0.8))
        return [drawn(result) for result in run(generator, make_groups(4, k=5, seed=seed))]

    alone = [sample(job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(3):
            assert list(pool.map(sample, jobs)) == alone


def test_one_judge_in_two_threads() -> None:
    """Two calls of one judge at once, and one of another: the lines of calls that had it alone."""
    judges = [Judge.load(POCKET, dtype="float32") for _ in range(2)]
    jobs = [(judges[0], 0), (judges[0], 1), (judges[1], 0)]

    def lines(job: tuple[Judge, int]) -> list[bytes]:
        judge, seed = job
        rows = split_rows("threads", "dev", 3, "dev")
        return [to_line(v) for v in judge.rows(rows, k=4, seed=seed, max_new_tokens=60)]

    alone = [lines(job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(lines, jobs)) == alone


def test_switches_and_recordings_are_a_threads_own() -> None:
    with cpp.torch_only(), ThreadPoolExecutor(1) as pool:
        assert cpp.implementation() == "torch"
        assert pool.submit(cpp.implementation).result() == "cpp"
    x, weight, out = randn(4, 64), randn(64), torch.zeros(1)

    def step() -> None:
        cpp.call("row_dots", torch.float32, x[:1], 1, 64, weight, out)
        with ThreadPoolExecutor(1) as pool:  # another thread's calls are not recorded
            pool.submit(rms_norm, x, weight, 1e-6).result()

    results = []
    for _ in cpp.replayed(step, 3):
        results.append(float(out))
        x[0] *= 2
    assert results[2] == 2 * results[1] != 0 and float(out) == 2 * results[2]


def test_transformer_is_the_definition() -> None:
    """It names no C++: what runs there is each operation's to choose, and none is without it."""
    assert "cpp" not in Transformer.forward.__code__.co_names
