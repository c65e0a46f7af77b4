"""What all commands share: how options are read and shown, and what becomes of an error.

What the user or the machine got wrong (ValueError, OSError, FloatingPointError) is one line on
standard error. The exit status is 2 until `begin_work`, then 1; 130 after Ctrl-C, 143 and 129 after
SIGTERM and SIGHUP; 141, without a word, where the reader of the output has gone. `python -X dev`
shows the traceback too.

Standard streams may be closed: what is written to standard error is then lost, and what would be
read from or written to the others is an error.

This needs no torch, so that --help is quick; tyro is imported when options are read.
"""

import ast
import dataclasses
import fcntl
import functools
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

from engine.stopping import Stopped

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
    except Stopped as stopped:
        return 128 + stopped.number
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
    not have are passed over, and fields in no group are shown last. A field whose default is a
    dataclass itself is a group under its own name, and the fields of that are options like all
    others. The help of a field is the string or the comment after it, as for its base class where
    there is none. example: of the command's options, a line or several, shown after `prog`.
    flags_in_pairs: a truth value has --no-name too. Exits with status 0 after --help and 2 for
    options that do not parse; raises ValueError where the settings do.
    """
    import tyro

    parts = parts_of(settings)
    plain = {field.name: field.default for field in dataclasses.fields(settings)  # type: ignore[arg-type]
             if field.name not in parts}  # fmt: skip
    titles = {title: [name for name in names if name in plain] for title, names in groups.items()}
    listed = {name for names in titles.values() for name in names}
    titles["other"] = [name for name in plain if name not in listed]

    def form_of(kind: type, defaults: Mapping[str, Any]) -> type[Any]:
        hints, texts = get_type_hints(kind), help_of(kind)
        options = []
        for name, default in defaults.items():
            shown = tyro.conf.arg(help=texts.get(name, ""), prefix_name=False)
            given = {} if default is dataclasses.MISSING else {"default": default}
            options.append((name, Annotated[hints[name], shown], dataclasses.field(**given)))
        return dataclasses.make_dataclass("Group", options, kw_only=True, namespace={"__doc__": ""})

    kinds = {
        title: form_of(settings, {name: plain[name] for name in names})
        for title, names in titles.items() if names
    }  # fmt: skip
    kinds |= {name: form_of(type(part), vars(part)) for name, part in parts.items()}
    silent = tyro.conf.arg(help="")  # else tyro searches source text for words about a group
    groups_of_options = [(title, Annotated[kind, silent]) for title, kind in kinds.items()]
    found: Any = tyro.cli(
        dataclasses.make_dataclass("Options", groups_of_options),
        prog=prog,
        description=_description(settings, prog, example),
        args=arguments,
        config=() if flags_in_pairs else (tyro.conf.FlagCreatePairsOff,),
    )
    values: dict[str, Any] = {}
    for title in kinds:
        given = vars(getattr(found, title))
        values |= {title: type(parts[title])(**given)} if title in parts else given
    return settings(**values)


def parts_of(settings: type | object) -> dict[str, Any]:
    """The dataclasses within settings, by the names of their fields: of an instance its own, of a
    class the defaults."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = field.default if isinstance(settings, type) else getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = value
    return found


def flat(settings: object) -> dict[str, Any]:
    """All values of settings by name, those of the dataclasses within among them."""
    parts = parts_of(settings)
    values = {name: value for name, value in vars(settings).items() if name not in parts}
    for part in parts.values():
        assert not values.keys() & vars(part).keys(), "one option, one place"
        values |= vars(part)
    return values


def with_values(settings: S, **values: Any) -> S:
    """The settings with other values, each in the place of its name. Raises TypeError for a name
    that they do not have, and ValueError where the settings do."""
    changed: dict[str, Any] = {}
    for name, part in parts_of(settings).items():
        own = {field: values.pop(field) for field in vars(part) if field in values}
        if own:
            changed[name] = dataclasses.replace(part, **own)
    return dataclasses.replace(settings, **changed, **values)  # type: ignore[type-var]


def _description(settings: type, prog: str, example: str) -> str:
    lines = textwrap.indent(f"{prog} {example}", "    ", lambda line: True).splitlines()
    return f"{settings.__doc__}\n\nExample:\n\n" + "\n".join(lines)


@functools.cache
def help_of(settings: type) -> Mapping[str, str]:
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
