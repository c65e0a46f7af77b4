"""Settings of training runs, whose values are given without saying in which group each is."""

from dataclasses import fields
from typing import Any, TypeVar

from engine.command import parts_of, with_values
from train.run import RunArgs

A = TypeVar("A", bound=RunArgs)


def args_of(kind: type[A], **values: Any) -> A:
    """Settings of a kind with these values."""
    own = {name: values.pop(name) for name in ("model", "out") if name in values}
    return with_values(kind(**own), **values)


def option_names(settings: Any) -> list[str]:
    """The names of all options of a class of settings."""
    parts = parts_of(settings)
    own = [field.name for field in fields(settings) if field.name not in parts]
    return own + [name for part in parts.values() for name in vars(part)]
