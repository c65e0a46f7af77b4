"""Training runs that are killed and resumed, and runs of two processes: the same as if one process
had never stopped."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
from engine.command import flat, with_values
from tests import forks
from tests.args import args_of
from train import checkpoint, grpo, meta_rm, parallel, rft, scalar_rm, sft
from train.run import RunArgs
from train.world import BASE

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("resume")]
WEIGHTS, ADAPTER = "model.safetensors", "adapter/adapter_model.safetensors"
LONGEST = 220  # tokens of most judgements of the world

# Of rows and micro-batches there are so many that one rank has fewer than the other.
RUNS: dict[str, RunArgs] = {
    "sft": args_of(sft.Args,
        model=BASE, out=Path("sft"), steps=4, rows=3, micro_rows=2, lr=2e-5, warmup=1,
        log_every=1, save_every=2, eval_every=4, eval_rows=2, eval_k=2, max_new_tokens=LONGEST,
    ),
    "grpo": args_of(grpo.Args,
        out=Path("grpo"), steps=3, rows=2, group=3, micro_rows=1, minibatches=2,
        lr=2e-5, warmup=1, save_every=1, max_new_tokens=LONGEST,
    ),
    "meta_rm": args_of(meta_rm.Args,
        model=BASE, out=Path("meta_rm"), steps=3, rows=3, samples=3, micro_rows=1, lr=2e-5,
        warmup=1, save_every=1, eval_every=3, eval_rows=3, eval_k=3, max_new_tokens=LONGEST,
    ),
    "scalar_rm": args_of(scalar_rm.Args,
        out=Path("scalar_rm"), steps=3, rows=3, micro_rows=1, lr=2e-5, warmup=1, log_every=1,
        save_every=1, eval_every=2, eval_rows=5,
    ),
    "adapters": args_of(grpo.Args,
        out=Path("adapters"), steps=3, rows=3, group=2, micro_rows=1, lora_rank=4, recompute=True,
        lora_targets=("q_proj", "v_proj", "up_proj"), lr=1e-4, warmup=1, save_every=1,
        max_new_tokens=LONGEST,
    ),
}  # fmt: skip
TRAIN: dict[str, Any] = {"sft": sft.train, "grpo": grpo.train, "meta_rm": meta_rm.train}
TRAIN |= {"scalar_rm": scalar_rm.train, "adapters": grpo.train}
ROUNDED = args_of(sft.Args,
    model=BASE, out=Path("rounded"), steps=2, rows=3, micro_rows=1, lr=1e-3, warmup=1,
    dtype="bfloat16",
)  # fmt: skip
SAMPLED = args_of(
    rft.Args, out=Path("rft"), rows=5, chunk_rows=3, max_new_tokens=LONGEST, hinted=False
)
# One loop runs them all: in the suite one of them is killed, and two are run by two ranks.
KILLED = ["grpo", *(pytest.param(name, marks=pytest.mark.soak) for name in RUNS if name != "grpo")]
SHARED = "sft", "grpo", "rounded", "rft"
RANKS = [pytest.param(name, marks=[] if name in SHARED else pytest.mark.soak) for name in RUNS]


def run_in(out: Path, name: str) -> None:
    """One of all these runs."""
    if name == "rft":
        rft.sample(with_values(SAMPLED, out=out))
    elif name == "rounded":
        sft.train(with_values(ROUNDED, out=out))
    else:
        TRAIN[name](with_values(RUNS[name], out=out))


def run_as_rank(root: Path, names: Iterable[str]) -> None:
    """Those runs, one after another, as one of several processes."""
    with parallel.ranks():
        for name in names:
            run_in(root / name, name)


def options(args: RunArgs) -> list[str]:
    """A run's settings as its command line has them."""
    given = {name.replace("_", "-"): value for name, value in flat(args).items()}
    words = [f"--{name}={value}" for name, value in given.items()
             if value is not None and not isinstance(value, bool | tuple)]  # fmt: skip
    words += [f"--{name}" for name, value in given.items() if value is True]
    several = {name: value for name, value in given.items() if isinstance(value, tuple)}
    return words + [word for name, value in several.items() for word in (f"--{name}", *value)]


def outcome(out: Path) -> dict[str, bytes]:
    """The bytes of the trained parameters and of the metrics, and of the best model."""
    names = (WEIGHTS, "metrics.jsonl", "best.json", f"best/{WEIGHTS}")
    return {name: (out / name).read_bytes() for name in names if (out / name).exists()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where a run of each kind is that nobody disturbs."""
    root = tmp_path_factory.mktemp("whole")
    for name in RUNS:
        run_in(root / name, name)
    return {name: root / name for name in RUNS}


def logged(args: Any) -> list[int]:
    """The steps that have a line: all, and the start where it is evaluated."""
    first = 0 if args.evaluation.eval_every else 1
    return list(range(first, args.learning.steps + 1))


def metrics_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timings_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]


def test_what_a_run_leaves_behind(whole: dict[str, Path]) -> None:
    for name, args in RUNS.items():
        out = whole[name]
        assert [line["step"] for line in metrics_of(out)] == logged(args)
        assert len(list((out / "checkpoints").iterdir())) == args.logging.keep == 2
        trained, first = load_file(out / "model.safetensors"), load_file(BASE / WEIGHTS)
        moved = {key.removeprefix("model.") for key, value in trained.items()
                 if key in first and not value.equal(first[key])}  # fmt: skip
        assert "layers.0.self_attn.q_proj.weight" in moved
        assert ("embed_tokens.weight" in moved) == (name != "adapters")
        assert ("layers.0.mlp.gate_proj.weight" in moved) == (name != "adapters")
        assert (out / ADAPTER).exists() == (name == "adapters")
        assert set(os.listdir(out)) >= {"config.json", "tokenizer.json", "judge_template.jinja"}


def test_sampler_and_trainer_agree(whole: dict[str, Path]) -> None:
    """Also where a copy of the model with merged adapters samples."""
    for name in ("grpo", "adapters"):
        for line in metrics_of(whole[name]):
            assert line["logp_difference"] < 1e-5 and line["ratio_off"] == 0
    # The reference is the model with its adapters off: nothing has moved before the first update.
    kl = [line["kl"] for line in metrics_of(whole["adapters"])]
    assert kl[0] < 1e-9 < kl[1]


def test_tensorboard_shows_what_is_logged(whole: dict[str, Path]) -> None:
    for name in RUNS:
        events = EventAccumulator(str(whole[name] / "tensorboard"))
        events.Reload()
        for figure, values in (("metrics", metrics_of), ("timings", timings_of)):
            for line in values(whole[name]):
                for key, value in line.items():
                    if key != "step":
                        points = {e.step: e.value for e in events.Scalars(f"{figure}/{key}")}
                        shown = torch.tensor(points[int(line["step"])])
                        assert shown.isclose(torch.tensor(float(value)), equal_nan=True)


def test_the_best_of_all_evaluations_is_kept(whole: dict[str, Path]) -> None:
    figures = {"sft": "dev_vote", "meta_rm": "dev_weighed_vote", "scalar_rm": "dev_accuracy"}
    for name, figure in figures.items():
        scores = {m["step"]: m[figure] for m in metrics_of(whole[name]) if figure in m}
        best = json.loads((whole[name] / "best.json").read_text())
        assert best == {"step": best["step"], "score": max(scores.values())}
        assert best["step"] == max(step for step in scores if scores[step] == best["score"])
        load = models.load if name == "sft" else models.load_scalar
        load(whole[name] / "best")
        last = load_file(whole[name] / WEIGHTS)
        kept = load_file(whole[name] / "best" / WEIGHTS)
        is_last = best["step"] == RUNS[name].learning.steps
        assert all(kept[key].equal(value) for key, value in last.items()) == is_last


def run_to_second_checkpoint(*words: str) -> None:
    """In a fork: a command that waits to be killed when it has logged a step past its first
    checkpoint, and would write the second."""
    save, saved = checkpoint.save, list[Path]()

    def save_once(*arguments: Any, **options: Any) -> Path:
        if saved:
            signal.pause()
        saved.append(save(*arguments, **options))
        return saved[0]

    checkpoint.save = save_once
    forks.command(*words)


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_resumes_to_the_bit(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL when a checkpoint has been written and a step after it has been logged."""
    args = with_values(RUNS[name], out=tmp_path / name)
    process = forks.start(run_to_second_checkpoint, type(args).__module__, *options(args))
    metrics = args.out / "metrics.jsonl"
    first = 1 + logged(args).index(args.logging.save_every + 1)
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < first:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    newest = checkpoint.latest(args.out / "checkpoints")
    assert newest and checkpoint.read_state(newest)["step"] == args.logging.save_every
    assert not (args.out / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"other settings: lr = .*, not 0\.5"):
        TRAIN[name](with_values(args, lr=0.5))
    TRAIN[name](args)
    assert outcome(args.out) == outcome(whole[name])
    timed = timings_of(args.out)
    assert [line["step"] for line in timed] == logged(args)
    assert all(line["memory"] > 0 for line in timed)
    assert all(line["update"] > 0 for line in timed if line["step"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the runs by two processes over gloo, in the environment that torchrun makes."""
    root = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        forks.start(
            run_as_rank, root, SHARED,
            environment={"RANK": rank, "TORCHELASTIC_RUN_ID": "tests"} | common,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    return root


@pytest.fixture(scope="module")
def more_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs that the suite leaves out, by torchrun itself."""
    root = tmp_path_factory.mktemp("more")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "tests.test_resume", str(root), *RUNS.keys() - {*SHARED}],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_are_one_process(
    name: str, whole: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    ranks: Path = request.getfixturevalue("ranks" if name in SHARED else "more_ranks")
    for file in (WEIGHTS, *([ADAPTER] if name == "adapters" else [])):
        ours, theirs = (load_file(root / file) for root in (ranks / name, whole[name]))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert (value - theirs[key]).abs().max() < 1e-6
    for mine, other in zip(metrics_of(ranks / name), metrics_of(whole[name]), strict=True):
        assert mine.keys() == other.keys()
        for key, figure in mine.items():
            assert figure == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    shards = [path.name for path in checkpoint_of(ranks / name).glob("shard-*")]
    assert len(shards) == 2


def test_two_ranks_sample_what_one_process_does(ranks: Path, tmp_path: Path) -> None:
    rft.sample(with_values(SAMPLED, out=tmp_path))
    for name in ("trajectories.jsonl", "judgements.jsonl", "progress.jsonl", "counts.json"):
        assert (ranks / "rft" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_ranks_add_bfloat16_gradients_up_in_float32(ranks: Path, tmp_path: Path) -> None:
    """What two of them learn is as near to one process as rounding each gradient once allows."""
    args = with_values(ROUNDED, out=tmp_path)
    sft.train(args)
    ours, theirs = (load_file(root / WEIGHTS) for root in (ranks / "rounded", tmp_path))
    start = load_file(BASE / WEIGHTS)
    assert ours.keys() == theirs.keys()
    apart = moved = 0.0
    for key, value in ours.items():
        assert value.dtype == torch.bfloat16
        apart += float((value.float() - theirs[key].float()).square().sum())
        moved += float((value.float() - start[key].bfloat16().float()).square().sum())
    assert apart < 0.1 * moved


def test_a_model_directory_that_is_a_runs_own(whole: dict[str, Path], tmp_path: Path) -> None:
    """What another run has left there belongs to it, and decides nothing."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(whole["sft"], base, ignore=shutil.ignore_patterns("checkpoints"))
    args = args_of(sft.Args, model=base, out=out, steps=2, rows=2)
    sft.train(args)
    shutil.copyfile(base / "metrics.jsonl", base / "timings.jsonl")
    sft.train(args)


def checkpoint_of(out: Path) -> Path:
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    return newest


def test_one_process_continues_what_two_have_begun(ranks: Path, whole: dict[str, Path]) -> None:
    """From the checkpoint before the last one."""
    args = with_values(RUNS["sft"], out=ranks / "sft")
    shutil.rmtree(checkpoint_of(args.out))
    sft.train(args)  # type: ignore[arg-type]
    ours, theirs = (load_file(root / WEIGHTS) for root in (args.out, whole["sft"]))
    assert all((value - theirs[key]).abs().max() < 1e-6 for key, value in ours.items())
    assert len(list(checkpoint_of(args.out).glob("shard-*"))) == 1


if __name__ == "__main__":  # under torchrun: DIR NAME...
    run_as_rank(Path(sys.argv[1]), sys.argv[2:])
