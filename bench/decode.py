"""Sampling k continuations of one prompt, end to end, through the same `Generator` as `Judge`.

    python -m bench.decode --shape qwen3-107m | --model DIR  [--prefix 1024] [--k 32]
        [--new-tokens 64] [--levels 1] [--dtype bfloat16] [--device auto] [--repeats 5]
        [--numerics fast] [--no-sharing] [--compare transformers llama.cpp] [--json]

A named shape gets random weights, a directory its own; the prompt is random tokens. With L levels
the prefix is cut into L segments of equal length, of which the first is shared by all samples and
the i-th by the samples below one of k^((i-1)/L) nodes. --no-sharing gives every sample a prompt of
its own, of the same length: what engines compute that do not share. Sampling at temperature 1 and
score extraction run as in the engine; end-of-text is ignored, so all samples have --new-tokens.

A run begins with one round that is not counted, then takes --repeats rounds, every round with new
prompts, ours and the peers' in turn; figures are medians. The floor is the time in which the device
could move the bytes and do the operations, whichever takes longer, step by step, at the rates that
were measured in the same run. Ends in one JSON line (--json: prints nothing else).

Seconds are wall-clock. Tokens per second count generated tokens: over the whole run
(`total_tokens_per_s`), and after each sample's first over the decode seconds
(`decode_tokens_per_s`). Peak memory is the process's resident set on CPU, torch's on a GPU.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.decode_load import Round, Workload
from bench.decode_peers import peer
from bench.provenance import print_json
from bench.shapes import SHAPES, Shape, experts_met
from bench.timing import DEVICE, ON_GPU
from engine import command
from engine.forest import TokenIds
from engine.generate import Generation, Generator, Group, Usage
from engine.kv_cache import cell_bytes, round_up
from kernels.extract_scores import ScoreAutomaton
from kernels.forest_attention import AttentionOptions
from kernels.sample_token import SamplingOptions
from kernels.score_grammar import ScoreRules
from models import NUMERICS, load_weights, read_config
from models.config import DTYPES, ModelConfig, Rope
from models.transformer import Transformer

COMPARE = ("transformers", "llama.cpp")


def context_of(load: Workload) -> int:
    """A context with which the engine keeps room for all prompts of a workload at once."""
    return max(load.prefix + load.new_tokens + 16, load.distinct_tokens // 4)


def config_of(shape: Shape, context: int) -> ModelConfig:
    """A configuration with a shape's dimensions and room for `context` tokens."""
    gemma = shape.norm_plus_one
    scale = shape.head_dim**-0.5
    layers = [
        AttentionOptions(scale, shape.softcap, shape.window if i % 2 == 0 else None)
        for i in range(shape.num_layers)
    ]
    return ModelConfig(
        architecture=shape.architecture,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        v_head_dim=shape.v_head_dim,
        max_position_embeddings=context,
        rms_norm_eps=1e-6,
        rope=(Rope(10_000.0, None),) * shape.num_layers,
        attention=tuple(layers),
        experts=(None,) * shape.num_dense + (shape.experts,) * (shape.num_layers - shape.num_dense),
        attention_bias=False,
        qk_norm=shape.qk_norm,
        norm_plus_one=shape.norm_plus_one,
        sandwich_norms=gemma,
        embedding_scale=shape.hidden_size**0.5 if gemma else None,
        activation=shape.activation,
        final_softcap=shape.final_softcap,
        tied=shape.tied,
        eos_token_ids=frozenset(),
        dtype=shape.dtype,
        latent=shape.latent,
    )


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A decoder with random weights, made on the device in its dtype."""
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = Transformer(config)
        finally:
            torch.set_default_dtype(before)
    model.init_weights(torch.Generator(device).manual_seed(0))
    return model.eval()


def model_of(directory: Path | None, shape: str, dtype: str | None, context: int) -> Transformer:
    """The model of a directory, or without one of a named shape, with random weights and room for
    `context` tokens. dtype: by default the file's, or the shape's."""
    chosen = None if dtype is None else DTYPES[dtype]
    if directory is not None:
        return load_weights(directory, read_config(directory), chosen, DEVICE).eval()
    named = SHAPES[shape]
    return random_model(config_of(named, context), chosen or named.dtype, DEVICE)


class Ours:
    """The engine on one workload."""

    name = "quorum"

    def __init__(self, model: Transformer, load: Workload) -> None:
        self.load, self.vocab_size = load, model.config.vocab_size
        self.usage = Usage()
        # Room for the prompts of a round, and of three where that is little: earlier heads stay
        # until room is needed. The engine keeps some for one prompt as long as the context.
        cells = round_up(load.new_tokens) * load.k + 16 * load.k
        rounds = 4 if load.sharing else 1
        prompts = rounds * (load.distinct_tokens + 16 * load.k * load.levels)
        cells += max(prompts, 2 * (load.prefix + load.new_tokens + 64))
        texts = [f"{i} ".encode() for i in range(self.vocab_size)]
        weight = model.head_weight
        self.generator = Generator(
            model,
            ScoreAutomaton(texts, [], ScoreRules(first=True), weight.device),
            options=SamplingOptions(temperature=1.0),
            max_new_tokens=load.new_tokens,
            max_batch=load.k,
            max_scores=16,
            stop="eos",
            ignore_eos=True,
            cache_bytes=cells * cell_bytes(model.config, weight.dtype),
            usage=self.usage,
        )
        self.live: list[int] = []  # samples of each block of steps
        decoder = self.generator.decoder
        run = decoder.run

        def counted(steps: int) -> None:
            self.live.append(len(decoder.leaves))
            run(steps)

        decoder.run = counted  # type: ignore[method-assign]

    def sample(self, prompts: list[list[TokenIds]], seed: int) -> list[Generation]:
        """The samples of these prompts. Raises ValueError where they do not all fit at once."""
        self.live.clear()
        (result,) = self.generator.run([Group(prompts, (seed, 0), [4] * len(prompts))])
        if result.error is not None:
            raise ValueError(result.error)
        if self.live and self.live[0] != self.load.k:
            raise ValueError(f"{self.live[0]} of {self.load.k} samples fit in the cache at once")
        assert all(len(g.token_ids) == self.load.new_tokens for g in result.generations)
        return result.generations

    def round(self, seed: int) -> Round:
        """Sample once, with prompts of this seed."""
        prompts = self.load.prompts(self.vocab_size, seed)
        before = asdict(self.usage)
        started = time.perf_counter()
        self.sample(prompts, seed)
        total = time.perf_counter() - started
        used = {name: value - before[name] for name, value in asdict(self.usage).items()}
        assert used["prefill_tokens"] == self.load.distinct_tokens, "a prompt was kept or repeated"
        return Round(
            total, used["prefill_seconds"], used["decode_seconds"], int(used["decode_tokens"])
        )


def floor_seconds(
    config: ModelConfig, itemsize: int, load: Workload, ceilings: Ceilings
) -> tuple[float, float]:
    """The least seconds of prefill and of decode on a device with these ceilings."""
    hidden, heads = config.hidden_size, config.num_heads
    head = hidden * config.vocab_size
    with torch.device("meta"):
        model = Transformer(config)
    dense = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    mixtures = [(own, 3 * hidden * own.intermediate_size) for own in config.experts if own]
    multiplied = dense + sum(own.routing.per_token * size for own, size in mixtures)

    def read(rows: int) -> float:
        """Weights that so many tokens need."""
        return dense + sum(experts_met(own, rows) * size for own, size in mixtures)

    # Operations of one query and key.
    per_key = 2 * heads * (config.cached_key_dim + config.cached_value_dim)
    cell = config.num_layers * config.cell_width

    def keys(position: int) -> int:
        """Keys that a query at this position sees, over all layers."""
        return sum(min(position + 1, spec.window or position + 1) for spec in config.attention)

    seen = sum(
        nodes * sum(keys(first + i) for i in range(tokens))
        for nodes, first, tokens in load.prefix_lengths()
    )
    flops = 2 * multiplied * load.distinct_tokens + 2 * head * load.num_nodes(load.levels - 1)
    prefill, _ = ceilings.floor_ms(
        int(read(load.distinct_tokens) + head) * itemsize, flops + per_key * seen
    )
    decode = 0.0
    for made in range(1, load.new_tokens):
        cells = load.distinct_tokens + load.k * made
        flops = load.k * (2 * (multiplied + head) + per_key * keys(load.prefix + made - 1))
        decode += ceilings.floor_ms(int(read(load.k) + head + cell * cells) * itemsize, flops)[0]
    return prefill / 1e3, decode / 1e3


def peak_bytes() -> int:
    """The most memory that was in use: resident on CPU, torch's own on a GPU."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def measure(
    model: Transformer,
    load: Workload,
    repeats: int,
    compare: Sequence[str],
    ceilings: Ceilings,
    warm: bool = False,
) -> dict[str, Any]:
    """The figures of one workload, ours and the peers' measured in turn. warm: no round comes
    before them, since another workload has compiled all kernels."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    peers: list[Any] = [Ours(model, load)]
    weight = model.head_weight
    if not warm:
        peers[0].round(0)
    with_ours = peak_bytes()  # before any peer takes its own
    if compare:
        peers += [peer(name, model, load) for name in compare]
    for each in peers[1:]:
        each.round(0)
    rounds: dict[str, list[Round]] = {each.name: [] for each in peers}
    for seed in range(1, repeats + 1):
        for each in peers:
            rounds[each.name].append(each.round(seed))
    ours = rounds["quorum"]
    prefill, decode = _median([r.prefill for r in ours]), _median([r.decode for r in ours])
    assert prefill is not None and decode is not None
    total = statistics.median(r.total for r in ours)
    tokens, decode_tokens = load.k * load.new_tokens, ours[0].decode_tokens
    floors = floor_seconds(model.config, weight.dtype.itemsize, load, ceilings)
    figures: dict[str, Any] = {
        **asdict(load),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "prefill_s": prefill,
        "decode_s": decode,
        "total_s": total,
        "total_tokens_per_s": tokens / total,
        "decode_tokens_per_s": decode_tokens / decode if decode_tokens else None,
        "step_ms": 1e3 * decode / (load.new_tokens - 1) if decode_tokens else None,
        "peak_bytes": with_ours,
        "floor_prefill_s": floors[0],
        "floor_decode_s": floors[1],
        "fraction_of_floor": sum(floors) / (prefill + decode),
        "decode_fraction_of_floor": floors[1] / decode if decode_tokens else None,
        "ceilings": asdict(ceilings),
    }
    for name, taken in rounds.items():
        if name != "quorum":
            theirs = [r.total for r in taken]
            figures[name] = {
                "total_tokens_per_s": tokens / statistics.median(theirs),
                "prefill_s": _median([r.prefill for r in taken]),
                "decode_s": _median([r.decode for r in taken]),
                "ratio": statistics.median(t / r.total for t, r in zip(theirs, ours, strict=True)),
            }
    return figures


def _median(seconds: Sequence[float | None]) -> float | None:
    known = [x for x in seconds if x is not None]
    return statistics.median(known) if known else None


def describe(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    rate = figures["decode_tokens_per_s"]
    lines = [
        f"k={figures['k']}, prefix {figures['prefix']}, {figures['new_tokens']} new tokens, "
        f"{figures['levels']} level(s), {figures['dtype']}, {figures['device']}"
        + ("" if figures["sharing"] else ", nothing shared"),
        f"prefill {figures['prefill_s']:.3f} s (floor {figures['floor_prefill_s']:.3f}), "
        f"decode {figures['decode_s']:.3f} s (floor {figures['floor_decode_s']:.3f}), "
        f"{100 * figures['fraction_of_floor']:.0f} % of the floor's speed",
        f"{figures['total_tokens_per_s']:,.0f} tokens/s in all"
        + ("" if rate is None else f", {rate:,.0f} in decode, {figures['step_ms']:.2f} ms a step")
        + f"; peak memory {figures['peak_bytes'] / 2**20:,.0f} MiB",
    ]
    for name in COMPARE:
        if name in figures:
            peer = figures[name]
            lines.append(
                f"{name}: {peer['total_tokens_per_s']:,.1f} tokens/s in all; "
                f"ours is {peer['ratio']:.2f} times as fast (median of rounds)"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=sorted(SHAPES))
    which.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--prefix", type=int, default=1024, metavar="P")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64, metavar="T")
    parser.add_argument("--levels", type=int, default=1, metavar="L")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="default: the shape's or the file's"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--numerics", choices=NUMERICS, default="portable")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-sharing", action="store_true")
    parser.add_argument("--compare", nargs="+", choices=COMPARE, default=[], metavar="PEER")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} is less than 1")
    if args.device not in ("auto", DEVICE.type):
        hint = "hide the GPU with CUDA_VISIBLE_DEVICES=" if ON_GPU else "torch finds no GPU"
        parser.error(f"--device {args.device}: {hint}")
    try:
        load = Workload(args.prefix, args.k, args.new_tokens, args.levels, not args.no_sharing)
    except ValueError as error:
        parser.error(str(error))
    model = model_of(args.model, args.shape, args.dtype, context_of(load))
    if args.numerics == "fast":
        model.use_fast_numerics()
    ceilings = measure_ceilings()
    figures = measure(model, load, args.repeats, args.compare, ceilings)
    figures = {"model": args.shape or str(args.model), "numerics": args.numerics, **figures}
    if not args.json:
        print(ceilings.describe())
        print(describe(figures))
    print_json(figures)


if __name__ == "__main__":
    sys.exit(command.run(main))
