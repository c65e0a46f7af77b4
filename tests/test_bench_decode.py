"""`python -m bench.decode`: the tree it samples from, its floor, and what it prints."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import decode, growth, rows, voting
from bench.ceilings import Ceilings
from bench.decode import config_of, floor_seconds, random_model
from bench.decode_load import Workload
from bench.decode_peers import peer
from bench.shapes import SHAPES
from engine.decode import Decoder
from engine.judge import Judge
from models.transformer import causal_attend


def words(command: str) -> list[str]:
    return command.split()


SMALL = words("--model models/pocket --prefix 40 --k 3 --new-tokens 4 --repeats 1 --json")


@pytest.mark.parametrize(("k", "levels"), [(1, 1), (8, 1), (9, 2), (32, 3), (5, 3)])
def test_prompts_are_a_tree(k: int, levels: int) -> None:
    load = Workload(prefix=100, k=k, new_tokens=2, levels=levels)
    prompts = load.prompts(475, seed=3)
    assert len(prompts) == k and all(len(prompt) == levels for prompt in prompts)
    assert {sum(map(len, prompt)) for prompt in prompts} == {100}
    nodes = {tuple(prompt[: i + 1]) for prompt in prompts for i in range(levels)}
    assert sum(len(path[-1]) for path in nodes) == load.distinct_tokens
    for level in range(levels):
        assert len({tuple(p[: level + 1]) for p in prompts}) == round(k ** (level / levels))
    assert load.prompts(475, seed=4)[0] != prompts[0]
    assert load.prompts(475, seed=3) == prompts


def test_nothing_is_shared_where_it_is_told_not_to() -> None:
    load = Workload(prefix=30, k=6, new_tokens=2, levels=3, sharing=False)
    prompts = load.prompts(475, seed=0)
    assert len({prompt[0] for prompt in prompts}) == 6
    assert load.distinct_tokens == 180


@pytest.mark.parametrize("wrong", [{"k": 0}, {"prefix": 0}, {"new_tokens": -1}, {"levels": 31}])
def test_impossible_workloads_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = {next(iter(wrong.values()))}"):
        replace(Workload(30, 4, 5), **wrong)


def test_the_floor_counts_what_a_step_has_to_do() -> None:
    """Against the parameters of a model and the matrix products of its attention, one by one; a
    device that is bound by memory alone, then one that is bound by arithmetic alone."""
    shape = SHAPES["pocket"]
    load = Workload(prefix=50, k=3, new_tokens=4)
    config = config_of(shape, 100)
    model = random_model(config, torch.float32, torch.device("cpu"))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)  # tied: the head once
    cell = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    read = [4 * (matrices + cell * (50 + 3 * made)) for made in (1, 2, 3)]
    slow_memory = Ceilings(1.0, 1.0, 1e9, "float32")
    prefill, decode_s = floor_seconds(config, 4, load, slow_memory)
    assert decode_s == pytest.approx(sum(read) / 1e9)
    assert prefill == pytest.approx(4 * matrices / 1e9)

    pairs = 0  # of a query and a key, counted by a forward
    plain = causal_attend(config)

    def counted(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        nonlocal pairs
        pairs += len(q) * (len(q) + 1) // 2
        return plain(layer, q, k, v)

    ids = torch.arange(50)
    with torch.no_grad():
        model(ids, ids, counted)
    head = shape.vocab_size * shape.hidden_size
    per_pair = 4 * shape.num_heads * shape.head_dim
    slow_arithmetic = Ceilings(1e9, 1e9, 1e-3, "float32")
    prefill, decode_s = floor_seconds(config, 4, load, slow_arithmetic)
    assert prefill == pytest.approx(
        (2 * 50 * (matrices - head) + 2 * head + per_pair * pairs) / 1e9
    )
    seen = shape.num_layers * (51 + 52 + 53)
    assert decode_s == pytest.approx(3 * (3 * 2 * matrices + per_pair * seen) / 1e9)


@pytest.mark.parametrize("sharing", [True, False])
def test_the_command_measures_and_ends_in_json(
    sharing: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "measure_ceilings", lambda: Ceilings(20.0, 20.0, 0.2, "float32"))
    arguments = "--model models/pocket --prefix 60 --k 5 --new-tokens 7 --levels 2 --repeats 2"
    decode.main([*arguments.split(), *([] if sharing else ["--no-sharing"])])
    *text, line = capsys.readouterr().out.splitlines()
    assert any("tokens/s in all" in each for each in text)
    figures = json.loads(line)
    assert figures["sharing"] == sharing and figures["repeats"] == 2
    tokens, seconds = 5 * 7, figures["total_s"]
    assert figures["total_tokens_per_s"] == pytest.approx(tokens / seconds)
    assert figures["decode_tokens_per_s"] == pytest.approx(5 * 6 / figures["decode_s"])
    assert figures["prefill_s"] + figures["decode_s"] <= seconds
    assert figures["fraction_of_floor"] > 0 and figures["peak_bytes"] > 2**20

    decode.main([*arguments.split(), "--json"])
    (only,) = capsys.readouterr().out.splitlines()
    assert json.loads(only).keys() == figures.keys()


def test_transformers_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    decode.main([*SMALL, "--compare", "transformers"])
    figures = json.loads(capsys.readouterr().out)
    theirs = figures["transformers"]
    assert theirs["total_tokens_per_s"] > 0 and theirs["ratio"] > 0
    assert theirs["prefill_s"] is None


def test_llama_cpp_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """Also that the file with our weights is one that llama.cpp takes."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    decode.main([*SMALL, "--compare", "llama.cpp"])
    assert json.loads(capsys.readouterr().out)["llama.cpp"]["total_tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape pocket --k 0", "k = 0 is less than 1"),
        ("--shape pocket --repeats 0", "--repeats 0 is less than 1"),
        ("--shape pocket --model models/pocket", "not allowed with argument"),
        ("--prefix 3", "required"),
    ],
)
def test_wrong_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decode.main(arguments.split())
    assert message in capsys.readouterr().err


def test_peers_say_what_they_cannot_do() -> None:
    config = config_of(SHAPES["pocket"], 100)
    model = random_model(config, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="levels = 2"):
        peer("transformers", model, Workload(10, 2, 2, levels=2))


@pytest.mark.soak
def test_growth_measures_and_plots_every_axis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "growth.png"
    command = "--model models/pocket --repeats 1 --k 1 2 --prefix 20 40 --suffix 3 9"
    growth.main([*words(command), "--plot", str(path)])
    *text, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert [point["k"] for point in found["k"]] == [1, 2]
    assert [point["suffix"] for point in found["suffix"]] == [3, 9]
    for point in (*found["k"], *found["prefix"], *found["suffix"]):
        assert point["token_ms"] > 0
        assert point["fraction_of_floor"] == pytest.approx(
            point["floor_token_ms"] / point["token_ms"]
        )
    assert len(text) == 7 and path.read_bytes().startswith(b"\x89PNG")


def test_rows_are_measured_beside_decode_and_transformers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "PEER_BATCHES", (2, 3))
    rows.main(
        rows.Args(
            rows=3, k=2, max_new_tokens=20, repeats=2, beside_decode=True,
            compare_transformers=True,
        )
    )  # fmt: skip
    *text, line = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert len(text) == 4 and len(figures["rounds"]) == 2
    assert figures["tokens"] <= 3 * 2 * 20 and figures["judgement_tokens"] <= 20
    assert 0 < figures["live"] <= 6
    assert 0 < figures["outside_share"] < 1 and 0 < figures["prefill_share"] < 1
    assert figures["decode"]["tokens_per_s"] > 0 and figures["decode"]["ratio"] > 0
    assert list(figures["transformers"]["tokens_per_s"]) == ["2", "3"]
    assert figures["transformers"]["ratio"] > 0


def test_the_time_inside_is_counted_once_and_only_meanwhile() -> None:
    judge = Judge.load("models/pocket", device="cpu")
    before = Decoder.forward, Decoder._steps
    args = rows.Args(rows=2, k=3, max_new_tokens=12)
    judged = rows.judge_rows(judge, voting.read_labelled(None, "final", 2, 0), args)
    assert (Decoder.forward, Decoder._steps) == before
    assert 0 < judged.inside_s < judged.total_s
    # Six samples of at most 12 tokens, of which a step decodes one of each but the first.
    assert 1 < judged.live <= 6 and judged.tokens <= 72
    assert judged.decode_rate > judged.tokens / judged.total_s
