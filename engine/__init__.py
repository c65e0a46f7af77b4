"""The engine: rows in, verdicts out. `Judge` and `Row` are imported when they are first asked for,
so that `engine.generate` and the benches need neither templates nor JSON."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.judge import Judge
    from engine.request import Row, make_row

__all__ = ["Judge", "Row", "make_row"]


def __getattr__(name: str) -> Any:
    if name == "Judge":
        from engine.judge import Judge

        return Judge
    if name in ("Row", "make_row"):
        from engine import request

        return getattr(request, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
