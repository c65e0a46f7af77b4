"""The engine: rows in, verdicts out. What this module names is imported when it is first asked for,
so that `engine.generate` and the benches need neither templates nor JSON."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.judge import Judge
    from engine.request import Row, make_row
    from engine.verdict import RowFailure, Sample, Verdict, to_line

__all__ = ["Judge", "Row", "RowFailure", "Sample", "Verdict", "make_row", "to_line"]


def __getattr__(name: str) -> Any:
    if name == "Judge":
        from engine.judge import Judge

        return Judge
    if name in ("Row", "make_row"):
        from engine import request

        return getattr(request, name)
    if name in ("RowFailure", "Sample", "Verdict", "to_line"):
        from engine import verdict

        return getattr(verdict, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
