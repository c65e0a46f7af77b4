"""The process in which templates are rendered: a line of JSON in, a line of JSON out.

`engine/templates.py` starts it and says what a request and a reply hold. It imports Jinja and
nothing of this project. A template may take MEMORY_BYTES of memory beyond what the process has when
it starts; how much time it has is watched by the parent. The process ends with its input.

The environment is that in which transformers renders chat templates: sandboxed, blocks trimmed,
loop controls, `{% generation %}`, `tojson`, `raise_exception`, `strftime_now`, and undefined names
that are empty. A judge template has all of it too, but there an undefined name is an error.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_BYTES = 512 << 20
MAX_CHARS = 1 << 25  # of a rendered text
MAX_MESSAGE_CHARS = 300


class _Generation(Extension):
    """`{% generation %}` marks what is learnt from; what it renders is its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` that stores no name with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that an entry may be called `self`
        own, *given = args
        entries = dict(*given, **kwargs)
        for name in entries:
            _require_public(name)
        Namespace.__init__(own, entries)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace stores no name with a leading underscore: {name}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


@lru_cache(maxsize=16)
def _compiled(source: str, date: str, strict: bool) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined if strict else Undefined,
        extensions=[_Generation, loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": datetime.fromisoformat(date).strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


def _turn(mark: str) -> Callable[[str], str]:
    def turn(role: str) -> str:
        if not (isinstance(role, str) and role.isidentifier()):
            raise TemplateError(f"turn({role!r}) names no role")
        return f"{mark}{role}{mark}"

    return turn


def _replaced(value: Any, old: str, new: str) -> Any:
    """The value with one text replaced by another in all its strings."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [_replaced(each, old, new) for each in value]
    if isinstance(value, dict):
        return {name: _replaced(each, old, new) for name, each in value.items()}
    return value


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request: `text`, or `error` with the `line` where one is known."""
    try:
        template = _compiled(request["source"], request["date"], request["strict"])
        variables = request["variables"]
        if variables is None:
            return {"text": ""}
        if request["long"] is not None:
            mark, long = request["long"]["mark"], request["long"]["text"] * request["long"]["times"]
            variables = _replaced(variables, mark, long)
        if request["turn_mark"] is not None:
            variables["turn"] = _turn(request["turn_mark"])
        text = template.render(variables)
        if request["long"] is not None:
            text = text.replace(long, mark)
        if len(text) > MAX_CHARS:
            return {"error": f"it renders {len(text)} characters, the most is {MAX_CHARS}"}
        return {"text": text}
    except TemplateSyntaxError as error:
        return _failure(f"syntax error: {error.message}", error.lineno)
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it recurses too deep"}
    except TemplateError as error:
        return _failure(str(error), _line_of(error))
    except Exception as error:  # a template can raise whatever Python's operators and methods do
        return _failure(f"{type(error).__name__}: {error}", _line_of(error))


def _failure(message: str, line: int | None) -> dict[str, Any]:
    shown = "".join(c if c.isprintable() else " " for c in message[:MAX_MESSAGE_CHARS])
    return {"error": shown, "line": line}


def _line_of(error: Exception) -> int | None:
    """The template's line that raised: Jinja puts it into the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if f.filename == "<template>"), None)


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        base = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most = base + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _limit_time(seconds: int) -> None:
    """Of the processor, for the next request: ends this process where no parent is left to."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, hard))


def main() -> None:
    _limit_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit_time(request["seconds"])
        sys.stdout.buffer.write(json.dumps(answer(request)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
