"""The ropes of a `config.json`, read and written.

`rope_theta` + `rope_scaling` and `rope_parameters` say the same in two spellings, keys of the
config itself say some of it again, and Gemma-3 has one rope for layers with a window and one for
the others. A parameter without a meaning for its type of rope raises a ValueError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from models.files import Reader, shown
from models.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)

MAX_CONTEXT = 2**31 - 1
KINDS = "full_attention", "sliding_attention"  # of layers
_SCALINGS: dict[str, type[RopeScaling]] = {
    kind.rope_type: kind for kind in (LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling)
}


def read_ropes(
    reader: Reader, architecture: str, windows: Sequence[int | None], context: int
) -> tuple[Rope, ...]:
    """The rope of each layer. Gemma-3 has one for layers with a window and one for the others."""
    parameters = _rope_objects(reader)
    by_kind = bool(parameters) and set(parameters) <= {*KINDS}
    if architecture != "gemma3_text":
        if by_kind:
            parameters = _same_for_all_layers(reader, parameters)
        return (_rope(reader, _with_outer(reader, parameters), context),) * len(windows)
    # What is said of no kind is said of the full one, as transformers has it.
    of_full = {name: value for name, value in parameters.items() if name not in KINDS}
    ropes = []
    for kind, more, outer, theta in zip(
        KINDS, (of_full, {}), ("rope_theta", "rope_local_base_freq"), (1e6, 1e4), strict=True
    ):
        own = {} if parameters.get(kind) is None else parameters[kind]
        if not isinstance(own, dict):
            raise reader.error(f"rope_parameters.{kind} must be an object, got {shown(own)}")
        ropes.append(_rope(reader, _with_outer(reader, own | more, outer), context, theta))
    return tuple(ropes[window is not None] for window in windows)


def _rope(
    reader: Reader, parameters: dict[str, Any], context: int, default_theta: float = 1e4
) -> Rope:
    """The rope of these parameters, in a config whose max_position_embeddings is `context`."""
    inner = Reader(reader.path, parameters)
    kind = inner.values.get("rope_type", inner.values.get("type", "default"))
    if inner.values.get("type", kind) != kind:
        raise reader.error(f"rope type is both {kind!r} and {inner.values['type']!r}")
    for source in (inner, reader):
        if source.number("partial_rotary_factor", default=1.0) != 1.0:
            raise reader.error("partial_rotary_factor other than 1 is not supported")
    theta = inner.number("rope_theta", default=default_theta)
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if kind != "default":
        scaling = _SCALINGS.get(kind) if isinstance(kind, str) else None
        if scaling is None:
            supported = ", ".join(["default", *_SCALINGS])
            raise reader.error(f"rope type {shown(kind)} is not supported (only {supported})")
        known |= {field.name for field in fields(scaling)}
    for key in inner.values:
        if key not in known:
            raise reader.error(f"{key!r} has no meaning for rope type {kind!r}")
    if kind in ("linear", "dynamic") and inner.number("factor") == 1:
        kind = "default"
    match kind:
        case "linear":
            return Rope(theta, LinearScaling(inner.number("factor")))
        case "dynamic":
            return Rope(theta, DynamicScaling(inner.number("factor")))
        case "llama3":
            return Rope(theta, _llama3(inner))
        case "yarn":
            if theta <= 1:
                raise reader.error(f"rope_theta must exceed 1 for yarn, got {theta}")
            return Rope(theta, _yarn(inner, context))
    return Rope(theta, None)


def _rope_objects(reader: Reader) -> dict[str, Any]:
    """What rope_scaling and rope_parameters say together."""
    parameters: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = reader.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise reader.error(f"{key} must be an object, got {shown(value)}")
        for name, entry in (value or {}).items():
            if parameters.setdefault(name, entry) != entry:
                raise reader.error(f"rope_scaling and rope_parameters disagree on {name!r}")
    return parameters


def _with_outer(
    reader: Reader, parameters: Mapping[str, Any], theta: str = "rope_theta"
) -> dict[str, Any]:
    """Rope parameters with what keys of the config itself say; null says nothing. theta: the key of
    the base there."""
    found = {name: value for name, value in parameters.items() if value is not None}
    outer = {theta: "rope_theta"}
    if found.get("rope_type", found.get("type")) in ("llama3", "yarn"):
        name = "original_max_position_embeddings"
        outer[name] = name
    for name, inner in outer.items():
        value = reader.values.get(name)
        if value is not None and found.setdefault(inner, value) != value:
            raise reader.error(f"{name} {shown(value)} contradicts {shown(found[inner])}")
    return found


def _llama3(inner: Reader) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=inner.number("factor"),
        low_freq_factor=inner.number("low_freq_factor"),
        high_freq_factor=inner.number("high_freq_factor"),
        original_max_position_embeddings=inner.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise inner.error(
            f"high_freq_factor {scaling.high_freq_factor} must exceed low_freq_factor "
            f"{scaling.low_freq_factor}"
        )
    return scaling


def _yarn(inner: Reader, context: int) -> YarnScaling:
    """With the defaults of transformers: of the original context it is `context`, of the factor how
    much longer `context` is than the original one. One of the two must be there."""
    old = inner.integer("original_max_position_embeddings", default=context)
    factor = inner.number("factor", default=context / old if old != context else None)
    if factor * old > MAX_CONTEXT:
        raise inner.error(
            f"factor {factor} times original_max_position_embeddings {old} exceeds {MAX_CONTEXT}"
        )
    # 0 is what DeepSeek's own code takes for none.
    mscales = [
        inner.number(key) if inner.values.get(key) else None for key in ("mscale", "mscale_all_dim")
    ]
    scaling = YarnScaling(
        factor=factor,
        original_max_position_embeddings=old,
        attention_factor=inner.number(
            "attention_factor", default=yarn_attention_factor(factor, *mscales)
        ),
        beta_fast=inner.number("beta_fast", default=32.0),
        beta_slow=inner.number("beta_slow", default=1.0),
        truncate=inner.flag("truncate", default=True),
        mscale=mscales[0],
        mscale_all_dim=mscales[1],
    )
    if scaling.beta_fast < scaling.beta_slow:
        raise inner.error(
            f"beta_fast {scaling.beta_fast} must not be less than beta_slow {scaling.beta_slow}"
        )
    return scaling


def _same_for_all_layers(reader: Reader, parameters: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters that stand once for each type of layer, where all types have the same."""
    (name, first), *others = parameters.items()
    for other, values in others:
        if values != first:
            raise reader.error(
                f"rope_parameters.{name} and rope_parameters.{other} differ, which is not supported"
            )
    if not isinstance(first, dict):
        raise reader.error(f"rope_parameters.{name} must be an object, got {shown(first)}")
    return dict(first)


def rope_values(rope: Rope) -> dict[str, Any]:
    """Rope parameters as `config.json` has them."""
    values: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
    if rope.scaling is not None:
        values |= {"rope_type": rope.scaling.rope_type, **vars(rope.scaling)}
    return values
