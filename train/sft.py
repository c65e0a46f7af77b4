"""Supervised training of a judge on trajectories; resumable bit for bit.

    python -m train.sft --model DIR --out DIR [--data FILE.jsonl] [--steps N] ...

Without --data the trajectories are fresh rows of the synthetic world, judged by its teacher. Loss
is the mean cross-entropy over the tokens of the judgements. A run continues from the newest whole
checkpoint under OUT/checkpoints; the finished model is written to OUT as a Hugging Face directory.
Metrics go to OUT/metrics.jsonl, one line every --log-every steps.

Not done here: several devices, gradient accumulation, LoRA.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from engine.prompt import DEFAULT_TEMPLATE, PromptBuilder, read_judge_settings
from models import load
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
    attend = packed_attention(model.config, batch.lengths)
    hidden = model(batch.token_ids, batch.positions, attend)
    return cross_entropy(model.head(hidden[batch.predicting]).float(), batch.target)


def train(args: Args) -> None:
    """Train to args.steps, resuming where a checkpoint stands; writes the model to args.out."""
    model, tokenizer = load(args.model, dtype=torch.float32)
    template = args.model / "judge_template.jinja"
    builder = PromptBuilder(
        tokenizer,
        (template if template.exists() else DEFAULT_TEMPLATE).read_text(encoding="utf-8"),
        read_judge_settings(args.model),
    )
    end_id = min(model.config.eos_token_ids)
    batches: Batches = (
        file_batches(builder, end_id, args.data, args.rows, args.seed)
        if args.data
        else world_batches(builder, end_id, args.rows, args.seed)
    )
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    root = args.out / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    settings = {
        k: str(v) for k, v in asdict(args).items() if k not in ("out", "log_every", "save_every")
    }
    first = 0
    newest = checkpoint.latest(root)
    if newest:
        state = checkpoint.restore(newest, model, optimizer)
        if state["settings"] != settings:
            raise ValueError(f"{newest} was made with other settings: {state['settings']}")
        first = state["step"]
    with (args.out / "metrics.jsonl").open("a", encoding="utf-8") as log:
        for step, metrics in _steps(args, model, optimizer, batches, first):
            if metrics:
                log.write(json.dumps(metrics) + "\n")
                log.flush()
            if step % args.save_every == 0 or step == args.steps:
                checkpoint.save(root, step, model, optimizer, {"settings": settings})
    for path in args.model.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not (args.out / path.name).exists():
            shutil.copy(path, args.out / path.name)
    save_pretrained(model, args.out)


def _steps(
    args: Args,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    first: int,
) -> Iterator[tuple[int, dict[str, float] | None]]:
    """Run steps first .. args.steps; yields (steps done, metrics when due).

    Raises FloatingPointError naming the step when loss or gradients are not finite.
    """
    tokens, started = 0, time.monotonic()
    progress = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step")
    for step in progress:
        batch = pack(batches(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: loss {loss.item()}, gradient norm {norm.item()}"
            )
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, args.steps, args.lr, args.warmup)
        optimizer.step()
        tokens += len(batch.token_ids)
        metrics = None
        if (step + 1) % args.log_every == 0:
            metrics = {
                "step": step + 1,
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "lr": optimizer.param_groups[0]["lr"],
                "tokens_per_s": tokens / (time.monotonic() - started),
            }
            progress.set_postfix(loss=f"{metrics['loss']:.3f}")
            tokens, started = 0, time.monotonic()
        yield step + 1, metrics


def main() -> None:
    train(tyro.cli(Args, description=__doc__.splitlines()[0] if __doc__ else None))


if __name__ == "__main__":
    main()
