"""The size of the cache: from what is free, and smaller where memory runs out."""

from pathlib import Path

import pytest
import torch

import engine.generate as generate
from engine import memory
from engine.kv_cache import KVCache, cell_bytes
from models import load
from models.transformer import Transformer
from tests.test_generate import drawn, make_generator, make_groups, run
from tests.tiny import write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    directory = tmp_path_factory.mktemp("tiny")
    write_model(directory, "qwen3")
    return load(directory)[0]


def bytes_of(generator: generate.Generator) -> int:
    cache = generator.cache
    return sum(cells.nbytes for cells in (*cache.k, *cache.v))


def test_the_cache_is_cut_to_what_is_free(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(6, longest=60, k=4)
    expected = [drawn(result) for result in run(make_generator(tiny), groups)]
    config, dtype = tiny.config, torch.float32
    working = memory.working_bytes(config, dtype, 16, generate.PREFILL_TOKENS)
    cell = cell_bytes(config, dtype)
    sizes = []
    for cells in (1 << 20, 600, 500):
        monkeypatch.setattr(memory, "free_bytes", lambda _, n=cells: 2 * (working + n * cell))
        generator = make_generator(tiny)
        assert bytes_of(generator) <= cells * cell
        sizes.append(generator.cache.size)
        assert [drawn(result) for result in run(generator, groups)] == expected
    assert sizes == [16 + 4 * config.max_position_embeddings + 2 * 16 * 32, 592, 496]
    # What the caller names is not looked up.
    assert make_generator(tiny, cache_bytes=600 * cell).cache.size == sizes[1]
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2 * working + 100)
    with pytest.raises(ValueError, match="50 bytes of cache hold 0 tokens: not 32 of a sample"):
        make_generator(tiny)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match="0 bytes of cache"):
        make_generator(tiny)


def test_free_memory_is_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    7000 kB\nHugePages: 0\n"
    )
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes(CPU) == 7000 << 10
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(CPU) == 7000 << 10
    (tmp_path / "memory.max").write_text("6000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert memory.free_bytes(CPU) == 5_000_000
    (tmp_path / "memory.current").write_text("7000000\n")
    assert memory.free_bytes(CPU) == 0
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    assert memory.free_bytes(CPU) > 1 << 20


class Scarce(KVCache):
    """A cache that asks for more than any machine has when it has more than `most` cells."""

    most = 500

    def __init__(self, config, slots, block, cells, *rest) -> None:
        if cells > self.most:
            torch.empty(1 << 55, dtype=torch.uint8)
        super().__init__(config, slots, block, cells, *rest)


def test_a_cache_that_memory_does_not_hold_is_halved(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(3, longest=60, k=4)
    expected = [drawn(result) for result in run(make_generator(tiny), groups)]
    cell = cell_bytes(tiny.config, torch.float32)
    monkeypatch.setattr(generate, "KVCache", Scarce)
    message = f"no memory for {800 * cell} bytes of cache: trying {400 * cell}"
    with pytest.warns(RuntimeWarning, match=message):
        generator = make_generator(tiny, cache_bytes=816 * cell)
    assert generator.cache.size - generator.cache.base == 400
    assert [drawn(result) for result in run(generator, groups)] == expected
    monkeypatch.setattr(Scarce, "most", 0)
    with (
        pytest.warns(RuntimeWarning, match=f": trying {48 * cell}"),
        pytest.raises(
            ValueError, match=rf"no memory for {48 * cell} bytes of cache for one sample: .*alloc"
        ),
    ):
        make_generator(tiny, cache_bytes=96 * cell)


def test_other_errors_are_not_taken_for_a_want_of_memory(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> KVCache:
        raise RuntimeError("something else")

    monkeypatch.setattr(generate, "KVCache", broken)
    with pytest.raises(RuntimeError, match="something else"):
        make_generator(tiny)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("no"))
