"""Settings of training runs, whose values are given without saying in which group each is."""

from typing import Any, TypeVar

from engine.command import with_values
from train.run import RunArgs

A = TypeVar("A", bound=RunArgs)


def args_of(kind: type[A], **values: Any) -> A:
    """Settings of a kind with these values."""
    own = {name: values.pop(name) for name in ("model", "out") if name in values}
    return with_values(kind(**own), **values)
