"""The experts of a `config.json`, read and written.

Qwen3-MoE and DeepSeek-V2 say the same with other keys. `num_experts`, `num_local_experts` and
`n_routed_experts` are three spellings of one number. Keys of the load-balancing loss
(`router_aux_loss_coef`, `aux_loss_alpha`, `seq_aux`, `output_router_logits`) are read by nothing
here: they change no logits, and training does without that loss.

Not read are routers other than softmax (`scoring_func`), `topk_method` "noaux_tc", `moe_layer_freq`
other than 1, which transformers ignores, and DeepSeek-V2's `norm_topk_prob`, which its authors'
code and transformers read differently. All of them raise a ValueError.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kernels.route import Routing
from models.files import Reader, shown

_COUNTS = "num_experts", "num_local_experts", "n_routed_experts"
_FAMILIES = "qwen3_moe", "deepseek_v2"
_MAX_EXPERTS = 1024


@dataclass(frozen=True)
class Experts:
    """The experts of one layer: how many, how wide each is, and how tokens are routed to them.
    shared_intermediate_size: the width of the block that all tokens go through as well, 0 for
    none."""

    count: int
    intermediate_size: int
    routing: Routing
    shared_intermediate_size: int = 0


def read_experts(reader: Reader, architecture: str, num_layers: int) -> tuple[Experts | None, ...]:
    """The experts of each layer, None where it has a dense block. architecture: "qwen3_moe",
    "deepseek_v2", or another, which has none. Raises ValueError naming the file and the value for
    what is missing, malformed or unsupported."""
    if architecture not in _FAMILIES:
        return (None,) * num_layers
    if architecture == "qwen3_moe":
        sparse = _sparse(reader, num_layers)
    else:
        first = _not_negative(reader, "first_k_dense_replace")
        sparse = [layer >= first for layer in range(num_layers)]
    experts = _experts(reader, architecture) if any(sparse) else None
    return tuple(experts if own else None for own in sparse)


def _experts(reader: Reader, architecture: str) -> Experts:
    count = _count(reader)
    if reader.values.get("scoring_func") not in (None, "softmax"):
        found = shown(reader.values["scoring_func"])
        raise reader.error(f"scoring_func must be 'softmax', got {found}")
    per_token = reader.integer("num_experts_per_tok", most=count)
    width = reader.integer("moe_intermediate_size")
    normalise = reader.flag("norm_topk_prob", default=False)
    if architecture == "qwen3_moe":
        plain = {"topk_method": "greedy", "routed_scaling_factor": 1, "n_group": 1,
                 "topk_group": 1, "n_shared_experts": 0, "first_k_dense_replace": 0}  # fmt: skip
        for key, value in plain.items():
            if reader.values.get(key) not in (None, value):
                raise reader.error(f"{key} has no meaning for {architecture}")
        return Experts(count, width, Routing(per_token, normalise))
    if normalise:
        raise reader.error("norm_topk_prob is not supported for deepseek_v2")
    if reader.integer("moe_layer_freq", default=1) != 1:
        raise reader.error("moe_layer_freq other than 1 is not supported")
    groups, kept = _groups(reader, count, per_token)
    shared = _not_negative(reader, "n_shared_experts") * width
    scale = reader.number("routed_scaling_factor", default=1.0)
    return Experts(count, width, Routing(per_token, False, scale, groups, kept), shared)


def _count(reader: Reader) -> int:
    """How many experts the keys that say so agree on."""
    found = {key: reader.integer(key, most=_MAX_EXPERTS) for key in _COUNTS if reader.has(key)}
    if not found:
        raise reader.error(f"one of {', '.join(_COUNTS)} is missing")
    if len({*found.values()}) > 1:
        said = ", ".join(f"{key} {count}" for key, count in found.items())
        raise reader.error(f"{said} contradict each other")
    return next(iter(found.values()))


def _sparse(reader: Reader, num_layers: int) -> list[bool]:
    """Which layers of a Qwen3-MoE have experts."""
    step = reader.integer("decoder_sparse_step", default=1)
    dense = reader.values.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise reader.error(f"mlp_only_layers must be a list of integers, got {shown(dense)}")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]


def _groups(reader: Reader, count: int, per_token: int) -> tuple[int, int]:
    """Groups of experts, and how many of them are chosen from."""
    method = reader.values.get("topk_method")
    if method in (None, "greedy"):
        return 1, 1
    if method != "group_limited_greedy":
        raise reader.error(
            f"topk_method must be 'greedy' or 'group_limited_greedy', got {shown(method)}"
        )
    groups = reader.integer("n_group")
    kept = reader.integer("topk_group", most=groups)
    if count % groups:
        raise reader.error(f"n_group {groups} does not divide {count} experts")
    if per_token > count // groups * kept:
        raise reader.error(
            f"num_experts_per_tok {per_token} exceeds the experts of topk_group {kept} groups"
        )
    return groups, kept


def _not_negative(reader: Reader, key: str) -> int:
    value = reader.values.get(key)
    return 0 if value is None or (type(value) is int and value == 0) else reader.integer(key)


def experts_values(architecture: str, experts: Sequence[Experts | None]) -> dict[str, Any]:
    """What `config.json` says of the experts of all layers, as `read_experts` reads it; nothing of
    an architecture without."""
    if architecture not in _FAMILIES:
        return {}
    dense = [layer for layer, own in enumerate(experts) if own is None]
    if architecture == "qwen3_moe":
        values: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    else:
        assert dense == [*range(len(dense))], "dense layers past one with experts"
        values = {"first_k_dense_replace": len(dense)}
    first = next((own for own in experts if own is not None), None)
    if first is None:
        return values
    routing = first.routing
    values |= {
        "num_experts_per_tok": routing.per_token,
        "moe_intermediate_size": first.intermediate_size,
        "norm_topk_prob": routing.normalise,
    }
    if architecture == "qwen3_moe":
        return values | {"num_experts": first.count}
    return values | {
        "n_routed_experts": first.count,
        "n_shared_experts": first.shared_intermediate_size // first.intermediate_size,
        "routed_scaling_factor": routing.scale,
        "topk_method": "greedy" if routing.groups == 1 else "group_limited_greedy",
        "n_group": routing.groups,
        "topk_group": routing.groups_kept,
    }
