"""`python -m engine.serve`: a server of rewards over HTTP. The command line and its wiring.

What it answers is told by its own page, /docs (`engine/server/app.py` and `shapes.py`). Options are
those of `engine.sample`; those that decide how rows are judged are the defaults of every request.
The port is bound first, then the model is loaded, then the server listens: /ready says 200 as soon
as it answers at all.

The first SIGTERM, SIGINT or SIGHUP ends it: /ready and all routes that judge say 503, rows that
were accepted are finished and answered, for at most --drain-seconds. The second one kills.

Exit status: 0 when all that was accepted was answered, as service managers expect; 1 when some of
it was dropped, or an error came later than the start; 2 for wrong options, an unreadable model or
an address that is not free.
"""

import asyncio
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import command
from engine.sample import GROUPS as OF_SAMPLE
from engine.sample import LoadOptions, loader
from engine.server.limits import Limits
from engine.stopping import STOP_SIGNALS

if TYPE_CHECKING:
    from engine.server.app import Server

_CLOSE_SECONDS = 5  # for answers that are made, to be sent
_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
GROUPS = {
    "server": ("host", "port", "served_model_name", "api_keys", "response_end", "drain_seconds"),
    **{title: names for title, names in OF_SAMPLE.items() if title != "output"},
}
EXAMPLE = "--model DIR --port 8000 --k 8 --api-keys keys.txt"


@dataclass(frozen=True)
class Options(LoadOptions):
    """Serve rewards over HTTP: k judgements a row, then a vote."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is all of IPv4, :: of IPv6."""
    port: int = 8000
    """Port to listen at; 0 is any that is free."""
    served_model_name: str | None = None
    """What requests call the model; the path that --model gives, and its last part, do too."""
    api_keys: Path | None = None
    """File of keys, one a line; requests for judging must show one. Without it all are served."""
    response_end: str = ""
    """Text that /get_reward cuts off the end of a query, such as <|im_end|>."""
    limits: Limits = Limits()


def main(arguments: Sequence[str] | None = None, prog: str = "python -m engine.serve") -> int:
    """Run the command line and return its exit status."""
    return command.run(lambda: _serve(arguments, prog))


def _serve(arguments: Sequence[str] | None, prog: str) -> int:
    options = command.parse(Options, GROUPS, prog=prog, example=EXAMPLE, arguments=arguments)
    seconds = options.drain_seconds
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise ValueError(f"--drain-seconds {seconds} is not a number of at least 0")
    keys = () if options.api_keys is None else read_keys(options.api_keys)
    _check_packages()
    with bound_socket(options.host, options.port) as listener:
        server = load_server(options, keys)
        command.begin_work()
        address = listener.getsockname()
        dropped = asyncio.run(_run(server, listener, seconds, {
            "event": "listening", "host": address[0], "port": address[1],
            "model": server.shapes.names[0],
        }))  # fmt: skip
    if dropped:
        # The engine's thread may be in the middle of a long row, and cannot be ended from here.
        sys.stderr.flush()
        os._exit(1)
    server.shapes.judge.close()
    return 0


def load_server(options: Options, keys: Sequence[bytes] = ()) -> "Server":
    """The application, with its model loaded. Raises ValueError for options that have no meaning
    for it."""
    load = loader(options)
    from engine.server.app import Server  # loads torch
    from engine.server.shapes import Shapes

    judge = load()
    judge.check(**options.judging)
    own = [str(options.model), options.model.resolve().name]
    given = options.served_model_name
    names = [own[1], own[0]] if given is None else [given, *own]
    return Server(Shapes(judge, options.judging, options.limits, names, options.response_end), keys)


def read_keys(path: Path) -> list[bytes]:
    """The keys of a file, one a line; blank lines are passed over. Raises ValueError where there is
    none, and for one that no header could hold."""
    keys = [line.strip() for line in path.read_bytes().split(b"\n")]
    keys = [key for key in keys if key]
    if not keys:
        raise ValueError(f"{path} holds no key")
    for number, key in enumerate(keys, 1):
        if not all(0x21 <= byte <= 0x7E for byte in key):
            raise ValueError(f"{path}: key {number} holds blanks or other than ASCII")
    return keys


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the address, and does not listen yet. Raises OSError where it cannot."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port {port} is not from 0 to 65535")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return bound


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: pip install 'quorum-grm[serve]'")


async def _run(
    app: "Server", listener: socket.socket, drain_seconds: float, hello: dict[str, Any]
) -> int:
    """Serve until a signal; the number of rows that were accepted and dropped."""
    import uvicorn

    class Uvicorn(uvicorn.Server):
        def capture_signals(self) -> Any:
            return nullcontext()  # signals are ours

    config = uvicorn.Config(
        app, http="h11", loop="asyncio", ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, timeout_graceful_shutdown=_CLOSE_SECONDS,
    )  # fmt: skip
    uvicorn_server = Uvicorn(config)
    told = logging.getLogger("uvicorn")
    told.handlers, told.propagate = [_Lines(logging.WARNING)], False
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        for each in STOP_SIGNALS:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        _log({"event": "draining", "signal": number.name})
        stopped.set()

    for each in STOP_SIGNALS:
        loop.add_signal_handler(each, stop, each)
    serving = asyncio.create_task(uvicorn_server.serve(sockets=[listener]))
    while not uvicorn_server.started and not serving.done():
        await asyncio.sleep(0.01)
    _log(hello)
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    await app.drain(drain_seconds)
    uvicorn_server.should_exit = True
    await serving
    _log({"event": "stopped", "dropped": app.dropped})
    return app.dropped


class _Lines(logging.Handler):
    """What uvicorn has to say, such as of a request that is no HTTP, in the form of the log."""

    def emit(self, record: logging.LogRecord) -> None:
        _log({"event": record.levelname.lower(), "message": record.getMessage()})


def _log(fields: dict[str, Any]) -> None:
    print(json.dumps({"time": round(time.time(), 3), **fields}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
