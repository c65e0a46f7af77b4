"""Supervised training of a judge on trajectories; resumable bit for bit.

    python -m train.sft --model DIR --out DIR [--data FILE.jsonl] [--steps N] ...

Without --data the trajectories are fresh rows of the synthetic world, judged by its teacher. Loss
is the mean cross-entropy over the tokens of the judgements. The finished model is written to OUT as
a Hugging Face directory. OUT/metrics.jsonl gets a line every --log-every steps, which holds nothing
that varies from run to run; speed goes to the progress bar and to the closing line of JSON.

A run continues from the newest whole checkpoint under OUT/checkpoints and ends as if it had never
stopped: same parameters, same metrics. With other settings, model or data it is refused.

Not done here: several devices, gradient accumulation, LoRA.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from engine.prompt import PromptBuilder, read_judge_settings, read_judge_template
from models import load
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import save_pretrained
from train import checkpoint
from train.data import Batches, file_batches, world_batches
from train.optimizer import cosine_lr, make_optimizer
from train.packing import PackedBatch, pack, packed_attention


@dataclass(frozen=True)
class Args:
    """Supervised training of a judge."""

    model: Path
    out: Path
    data: Path | None = None  # a JSONL file of trajectories; the synthetic world when left out
    steps: int = 1000
    rows: int = 20  # rows per step
    lr: float = 1e-4
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    autocast: bool = False  # bf16 matmuls over fp32 weights
    log_every: int = 20
    save_every: int = 500


def loss_of(model: Transformer, batch: PackedBatch) -> Tensor:
    """Mean cross-entropy (nats) over the batch's target tokens, a scalar with gradient."""
    attend = packed_attention(model.config, batch.lengths, batch.token_ids.device)
    hidden = model(batch.token_ids, batch.positions, attend)
    return cross_entropy(model.head(hidden[batch.predicting]).float(), batch.target)


def train(args: Args) -> None:
    """Train to args.steps, resuming where a checkpoint stands; writes the model to args.out.

    Raises ValueError for settings out of range or other than those of the checkpoint, and
    FloatingPointError naming the step at which loss or gradients are not finite.
    """
    for name in ("steps", "rows", "log_every", "save_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} = {getattr(args, name)} is less than 1")
    if args.out.resolve() == args.model.resolve():
        raise ValueError(f"out is the directory of the model itself, {args.model}")
    model, tokenizer = load(args.model, dtype=torch.float32)
    batches = _batches(args, tokenizer, tokenizer.end_id(model.config.eos_token_ids))
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    root = args.out / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    settings = _settings(args)
    first = tokens = 0
    if newest := checkpoint.latest(root):
        made_with = checkpoint.read_state(newest)["settings"]
        if made_with != settings:
            raise ValueError(f"{newest} was made with other settings: {_diff(made_with, settings)}")
        state = checkpoint.restore(newest, model, optimizer)
        first, tokens = state["step"], state["tokens"]
    metrics_path = args.out / "metrics.jsonl"
    _cut_metrics(metrics_path, first)
    started = time.monotonic()
    with metrics_path.open("a", encoding="utf-8") as log:
        for step, num_tokens, metrics in _steps(args, model, optimizer, batches, first):
            tokens += num_tokens
            if step % args.log_every == 0:
                log.write(json.dumps({"step": step, "tokens": tokens, **metrics}) + "\n")
                log.flush()
            if step % args.save_every == 0 or step == args.steps:
                os.fsync(log.fileno())
                state = {"settings": settings, "tokens": tokens}
                checkpoint.save(root, step, model, optimizer, state)
    for path in args.model.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, args.out / path.name)
    save_pretrained(model, args.out)
    seconds = round(time.monotonic() - started, 1)
    summary = {"steps": args.steps, "steps_run": args.steps - first, "tokens": tokens}
    print(json.dumps(summary | {"seconds": seconds}), file=sys.stderr)


def _batches(args: Args, tokenizer: Tokenizer, end_id: int) -> Batches:
    builder = PromptBuilder(
        tokenizer, read_judge_template(args.model), read_judge_settings(args.model)
    )
    if args.data:
        return file_batches(builder, end_id, args.data, args.rows, args.seed)
    return world_batches(builder, end_id, args.rows, args.seed)


def _settings(args: Args) -> dict[str, Any]:
    """All that decides the outcome of a run; of files, what they hold and not where they are."""
    places = ("model", "data", "out", "log_every", "save_every")
    settings = {name: value for name, value in asdict(args).items() if name not in places}
    for path in sorted(args.model.iterdir()):
        if path.is_file():
            settings[f"model/{path.name}"] = checkpoint.sha256(path)
    settings["data"] = checkpoint.sha256(args.data) if args.data else None
    return settings


def _diff(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ", ".join(f"{name} = {old.get(name)}, not {new.get(name)}" for name in names)


def _cut_metrics(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, a torn line included."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _steps(
    args: Args,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    first: int,
) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Run steps first .. args.steps; yields steps done, tokens of this step, and its metrics."""
    device = model.head_weight.device
    progress = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step")
    for step in progress:
        started = time.monotonic()
        batch = pack(batches(step), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.autocast):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: loss {loss.item()}, gradient norm {norm.item()}"
            )
        lr = cosine_lr(step, args.steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        metrics = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
        num_tokens = len(batch.token_ids)
        tokens_per_s = num_tokens / (time.monotonic() - started)
        progress.set_postfix(loss=f"{metrics['loss']:.3f}", tokens_per_s=f"{tokens_per_s:.0f}")
        yield step + 1, num_tokens, metrics


def main() -> None:
    """The command line."""
    train(tyro.cli(Args, description=Args.__doc__))


if __name__ == "__main__":
    main()
