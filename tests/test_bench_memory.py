"""The memory calculator against what small models really take, and against plain arithmetic."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import memory
from bench.decode import config_of, random_model
from bench.memory import Load
from bench.shapes import SHAPES, Shape
from bench.train_step import loss_of
from engine.generate import Group
from engine.kv_cache import ALIGN, KVCache, cell_bytes
from kernels.route import Routing
from models.experts_config import Experts
from tests.allocations import peak_bytes
from tests.rows import needs_cpp
from tests.test_generate import make_generator
from tests.tiny import hf_config
from train.learner import Learner, LearnerArgs
from train.packing import pack
from train.trajectories import Trajectory

QWEN = Shape("small qwen", 4096, 256, 1024, 3, 8, 4, 32, tied=False)
GEMMA = Shape(
    "small gemma", 4096, 256, 1024, 3, 8, 4, 32, activation="gelu_tanh", norm_plus_one=True,
    qk_norm=False, softcap=50.0, final_softcap=30.0, window=64,
)  # fmt: skip
# Latent attention, and experts past the first layer.
DEEPSEEK = replace(
    SHAPES["v2-lite-small"], vocab_size=4096, num_layers=3,
    experts=Experts(8, 176, Routing(2), 352),
)  # fmt: skip
SMALL = Load(
    dtype=torch.float32, on_gpu=False, k=4, rows=2, prompt_tokens=96, new_tokens=33, group=8,
    rank=8, samples=False,
)  # fmt: skip
CPU = torch.device("cpu")


def training(load: Load, shape: Shape, how: str) -> Callable[[], int]:
    """A step of two micro-batches, from the making of the model; gives the tokens of one."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        drawn = torch.randint(shape.vocab_size, (count,), generator=generator)
        return tuple(drawn.tolist())

    def batch() -> list[Trajectory]:
        prompt = ids(load.prompt_tokens)
        return [Trajectory([prompt], ids(load.new_tokens)) for _ in range(load.group)]

    batches = [pack(batch()) for _ in range(2)]
    advantage = torch.randn(load.predicted, generator=generator)

    def run() -> int:
        model = random_model(config_of(shape, 256), load.dtype, CPU).requires_grad_()
        rank = load.rank if how == "lora" else 0
        learner = Learner(model, LearnerArgs(lora_rank=rank, recompute=load.recompute))
        for each in batches:
            loss_of(learner.model, each, advantage, 2 * load.predicted, False).backward()
        learner.update(0, 1.0)
        return len(batches[0].token_ids)

    return run


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("how", "shape", "dtype", "recompute"),
    [
        ("full", QWEN, torch.float32, True),
        pytest.param("full", GEMMA, torch.bfloat16, False, marks=pytest.mark.soak),
        ("lora", GEMMA, torch.float32, True),
        ("lora", QWEN, torch.bfloat16, False),
        ("full", DEEPSEEK, torch.float32, False),
    ],
)
def test_a_training_step_takes_what_is_told_within_a_tenth(
    how: str, shape: Shape, dtype: torch.dtype, recompute: bool
) -> None:
    load = replace(SMALL, dtype=dtype, recompute=recompute)
    measured, tokens = peak_bytes(training(load, shape, how))
    assert tokens == load.micro_tokens
    phases = memory.training_parts(config_of(shape, 256), load, how)
    told = memory.peak_of(phases)
    assert abs(told - measured) < 0.1 * measured


@needs_cpp
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(QWEN, torch.float32), (QWEN, torch.bfloat16), (DEEPSEEK, torch.float32)],
)
def test_a_judge_takes_what_is_told(
    shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, packed weights and cache are exact; what a forward takes is told for more tokens
    than these. With so many cells all samples have all their blocks at once, and with fewer not."""
    load, shape = replace(SMALL, dtype=dtype, new_tokens=300), replace(shape, num_layers=2)
    config = config_of(shape, 512)
    blocks: list[int] = []
    take_block = KVCache.take_block

    def taken(cache: KVCache) -> int | None:
        found = take_block(cache)
        blocks.append(len(cache._blocks))
        return found

    monkeypatch.setattr(KVCache, "take_block", taken)

    def judge(cells: int) -> None:
        model = random_model(config, dtype, CPU)
        generator = make_generator(
            model, max_new_tokens=load.new_tokens, max_batch=load.rows * load.k,
            cache_bytes=cells * cell_bytes(config, dtype),
        )  # fmt: skip
        prompt = tuple(range(5, 5 + load.prompt_tokens))
        groups = [
            Group([[(row, *prompt[1:])]] * load.k, (row, 0), [2] * load.k)
            for row in range(load.rows)
        ]
        assert len(list(generator.run(iter(groups)))) == load.rows

    parts = memory.judging_parts(config, load, None)
    cells = memory.cache_cells(load, load.k)
    measured, _ = peak_bytes(lambda: judge(cells))
    told = memory.peak_of(parts)
    assert told - parts["sampling"]["forward"] < measured < told
    most = load.rows * load.k * 2
    assert max(blocks) == most
    blocks.clear()
    judge(cells - ALIGN)
    assert max(blocks) < most


def test_parts_of_models_that_are_not_there() -> None:
    """By the numbers of parameters that these models are known to have."""
    qwen, gemma = (config_of(SHAPES[name], 4096) for name in ("qwen3-8b", "gemma2-27b"))
    full = memory.training_parts(qwen, Load(), "full")
    count = 8_190_735_360
    assert full["held"]["weights"] == full["held"]["reference"] == 2 * count
    assert full["held"]["masters"] == full["update"]["gradients"] == 4 * count
    assert full["held"]["moments"] == 8 * count
    lora = memory.training_parts(gemma, Load(rank=16), "lora")
    # Inputs and outputs of q, k, v; of o; of gate, up; of down.
    widths = (4608 + 8192) + (4096 + 4608) + (4608 + 2 * 36864) + (36864 + 4608)
    adapters = 46 * 16 * widths
    base = 27_227_128_320
    assert lora["held"]["weights"] == 2 * (base + adapters) and "reference" not in lora["held"]
    assert lora["held"]["moments"] == 8 * adapters
    assert memory.judging_parts(gemma, Load(), None)["held"]["packed"] == 0
    on_cpu = memory.judging_parts(gemma, Load(on_gpu=False), None)["held"]
    assert on_cpu["weights"] - on_cpu["packed"] == 2 * (46 * 4 + 1) * 4608  # but for norms


def test_a_directory_with_a_config_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, scalar in (("judge", False), ("meta", True)):
        config = hf_config("qwen3", **({"num_labels": 1} if scalar else {}))
        kind = "SequenceClassification" if scalar else "CausalLM"
        config.architectures = [f"Qwen3For{kind}"]
        config.save_pretrained(tmp_path / name)
    directories = ["--model", str(tmp_path / "judge"), "--meta-model", str(tmp_path / "meta")]
    memory.main([*directories, "--rows", "4", "--gpus", "0.06", "0.001", "80"])
    told = capsys.readouterr()
    line = json.loads(told.out)
    assert line["bytes"].keys() == {"none", "lora", "full"} and line["rows"] == 4
    judging = line["bytes"]["none"]
    per_layer = 64 * 288 + 64 * 96 * 3 + 2 * (64 + 24)
    assert judging["held"]["meta weights"] == 2 * (320 * 64 + 3 * per_layer + 64)
    assert judging["peak"] == sum(sum(judging[phase].values()) for phase in ("held", "sampling"))
    assert judging["rows_that_fit"] == {"0.06": 3, "0.001": 0, "80": 4}
    assert "fits with 3 of 4 rows at a time: 0.06 GB" in told.err
    assert "does not fit: 0.001 GB" in told.err and "fits: 80 GB" in told.err
    with pytest.raises(ValueError, match="rows = 0 is less than 1"):
        memory.main([*directories, "--rows", "0"])
    with pytest.raises(ValueError, match="5012 tokens exceed max_position_embeddings 4096"):
        memory.main([*directories, "--prompt-tokens", "4500"])
