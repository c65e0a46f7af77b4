"""What all commands share: how options are read and shown, and what becomes of an error.

What the user or the machine got wrong (ValueError, OSError, FloatingPointError) is one line on
standard error. The exit status is 2 until `begin_work`, then 1; 130 after Ctrl-C; 141, without a
word, where the reader of the output has gone. `python -X dev` shows the traceback too.

Standard streams may be closed: what is written to standard error is then lost, and what would be
read from or written to the others is an error.

This needs no torch, so that --help is quick; tyro is imported when options are read.
"""

import ast
import dataclasses
import fcntl
import inspect
import io
import os
import signal
import sys
import textwrap
import tokenize
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, TypeVar, get_type_hints

S = TypeVar("S")
_status_of_errors = 2


def begin_work() -> None:
    """From here on an error is no longer one in what the user gave: exit status 1."""
    global _status_of_errors
    _status_of_errors = 1


def run(command: Callable[[], int | None]) -> int:
    """Call a command and return its exit status; None is 0. Its errors are told as this module's
    docstring says, and those of writing what it printed are among them."""
    global _status_of_errors
    _status_of_errors = 2
    _open_closed_streams()
    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, FloatingPointError) as error:
        _drop_output()
        with suppress(OSError):
            if sys.flags.dev_mode:
                traceback.print_exc()
            print("error: " + _one_line(str(error)), file=sys.stderr)
        return _status_of_errors
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _one_line(text: str) -> str:
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _open_closed_streams() -> None:
    """Give closed standard streams a descriptor, which a file opened later would have got."""
    streams = (("stdin", os.O_WRONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY))
    for number, (name, flags) in enumerate(streams):  # no reading, no writing, nothing to be seen
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            assert opened == number, "the lowest one that is free"
        if getattr(sys, name) is None:
            raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, line_buffering=number == 2))


def check_stream(number: int) -> None:
    """Raise OSError where standard input (0) or output (1) is closed, or opened the other way."""
    wrong = os.O_WRONLY if number == 0 else os.O_RDONLY
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == wrong:
        raise OSError(f"standard {'output' if number else 'input'} is closed")


def _drop_output() -> None:
    """Drop what standard output does not take, which the interpreter would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


# -- options ---------------------------------------------------------------------------------------


def parse(
    settings: type[S],
    groups: Mapping[str, Sequence[str]],
    *,
    prog: str,
    example: str,
    arguments: Sequence[str] | None = None,
    flags_in_pairs: bool = False,
) -> S:
    """The settings, a dataclass, that a command line gives.

    groups: by title, the fields in the order in which --help shows them; names that the settings do
    not have are passed over, and fields in no group are shown last. The help of a field is the
    string or the comment after it, as for its base class where there is none. example: of the
    command's options, a line or several, shown after `prog`. flags_in_pairs: a truth value has
    --no-name too. Exits with status 0 after --help and 2 for options that do not parse; raises
    ValueError where the settings do.
    """
    import tyro

    fields = {field.name: field for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    hints = get_type_hints(settings)
    texts = help_of(settings)
    titles = {title: [name for name in names if name in fields] for title, names in groups.items()}
    listed = {name for names in titles.values() for name in names}
    titles["other"] = [name for name in fields if name not in listed]

    def option(name: str) -> tuple[str, Any, Any]:
        shown = tyro.conf.arg(help=texts.get(name, ""), prefix_name=False)
        default = fields[name].default
        given = {} if default is dataclasses.MISSING else {"default": default}
        return name, Annotated[hints[name], shown], dataclasses.field(**given)

    kinds = [
        (title, dataclasses.make_dataclass(
            title, map(option, names), kw_only=True, namespace={"__doc__": ""},
        ))
        for title, names in titles.items() if names
    ]  # fmt: skip
    form: type[Any] = dataclasses.make_dataclass("Options", kinds)
    found = tyro.cli(
        form,
        prog=prog,
        description=_description(settings, prog, example),
        args=arguments,
        config=() if flags_in_pairs else (tyro.conf.FlagCreatePairsOff,),
    )
    values: dict[str, Any] = {}
    for title, _ in kinds:
        values |= vars(getattr(found, title))
    return settings(**values)


def _description(settings: type, prog: str, example: str) -> str:
    lines = textwrap.indent(f"{prog} {example}", "    ", lambda line: True).splitlines()
    return f"{settings.__doc__}\n\nExample:\n\n" + "\n".join(lines)


def help_of(settings: type) -> dict[str, str]:
    """What is said of each field of a dataclass: the string after it, else the comment beside it,
    else what its base class says."""
    texts: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        source = textwrap.dedent(inspect.getsource(kind))
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (tree,) = ast.parse(source).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            text = comments.get(node.end_lineno or 0)
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            if text:
                texts[node.target.id] = text
    return texts
