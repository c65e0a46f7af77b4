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
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from engine.prompt import PromptBuilder, read_judge_settings, read_judge_template
from kernels.linear_logprob import linear_logprob
from models import load
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from train.data import Batches, file_batches, world_batches
from train.optimizer import cosine_lr, make_optimizer, set_lr
from train.packing import PackedBatch, pack, packed_attention
from train.run import Run, check_args


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
    hidden = model(batch.token_ids, batch.positions, packed_attention(model.config, batch))
    return -linear_logprob(
        hidden[batch.predicting], model.head_weight, batch.target, model.config.final_softcap
    ).logp.mean()


def train(args: Args) -> None:
    """Train to args.steps, resuming where a checkpoint stands; writes the model to args.out.

    Raises ValueError for settings out of range or other than those of the checkpoint, and
    FloatingPointError naming the step at which loss or gradients are not finite.
    """
    check_args(args, "rows")
    model, tokenizer = load(args.model, dtype=torch.float32)
    batches = _batches(args, tokenizer, tokenizer.end_id(model.config.eos_token_ids))
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    started = time.monotonic()
    with Run(args, model, optimizer) as run:
        tokens = run.state.get("tokens", 0)
        for step, num_tokens, metrics in _steps(args, model, optimizer, batches, run.first):
            tokens += num_tokens
            run.record(step, {"tokens": tokens, **metrics}, tokens=tokens)
        run.finish()
    seconds = round(time.monotonic() - started, 1)
    summary = {"steps": args.steps, "steps_run": args.steps - run.first, "tokens": tokens}
    print(json.dumps(summary | {"seconds": seconds}), file=sys.stderr)


def _batches(args: Args, tokenizer: Tokenizer, end_id: int) -> Batches:
    template = read_judge_template(args.model)
    builder = PromptBuilder(tokenizer, template, read_judge_settings(args.model))
    if args.data:
        return file_batches(builder, end_id, args.data, args.rows, args.seed)
    return world_batches(builder, end_id, args.rows, args.seed)


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
        set_lr(optimizer, lr)
        optimizer.step()
        metrics = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
        num_tokens = batch.num_tokens
        tokens_per_s = num_tokens / (time.monotonic() - started)
        progress.set_postfix(loss=f"{metrics['loss']:.3f}", tokens_per_s=f"{tokens_per_s:.0f}")
        yield step + 1, num_tokens, metrics


def main() -> None:
    """The command line."""
    train(tyro.cli(Args, description=Args.__doc__))


if __name__ == "__main__":
    main()
