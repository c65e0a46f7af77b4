"""`quorum COMMAND ...`: the commands of the package under one name, each imported when it is asked
for. `python -m MODULE ...` is the same."""

import sys
from collections.abc import Sequence
from importlib import import_module

from engine import command

# Their modules, and what they do.
COMMANDS = {
    "sample": ("engine.sample", "judge rows with a model: k judgements a row, then a vote"),
    "cluster": ("engine.cluster", "judge many rows on many machines, with Ray"),
    "serve": ("engine.serve", "judge rows over HTTP, as trainers ask for rewards"),
    "sft": ("train.sft", "train a judge on trajectories"),
    "rft": ("train.rft", "train a judge on those of its own judgements that are right"),
    "grpo": ("train.grpo", "train a judge by reinforcement learning on labelled rows"),
    "meta_rm": ("train.meta_rm", "train a meta reward model: which judgements are right"),
    "scalar_rm": ("train.scalar_rm", "train a scalar reward model, the baseline: a number a text"),
    "world": ("train.world.cases", "write rows of the synthetic judging world"),
    "pocket": ("train.world.pocket", "train the judge that training begins from"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit status; 2 where there is no such command."""
    return command.run(lambda: _dispatch(sys.argv[1:] if arguments is None else arguments))


def _dispatch(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name!r}: quorum --help lists them")
    module, _ = COMMANDS[name]
    status: int = import_module(module).main(arguments[1:], f"quorum {name}")
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"    {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: quorum COMMAND [OPTIONS]", "", *lines, "", _EXAMPLE])


_EXAMPLE = """\
quorum COMMAND --help shows the options of a command. Without any,

    quorum sample

judges the bundled rows with the bundled model."""


if __name__ == "__main__":
    sys.exit(main())
