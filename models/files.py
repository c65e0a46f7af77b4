"""Files of a model directory that hold JSON or text, read with care.

Every fault raises a ValueError that names the file, and the value where there is one.
"""

import json
import sys
from pathlib import Path
from typing import Any

MAX_TEXT = 1 << 20  # characters of a template; real ones have at most some 30,000


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file if it is not one or repeats a key."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return parse_json(path, path.read_bytes())


def read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file, of at most 2^20 characters; `what` it holds is for the ValueError,
    which names the file: for a pipe, a device, a directory, or text that is longer or not UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path}: {what} must be a file")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {what} must be UTF-8: {error}") from None
    if len(text) > MAX_TEXT:
        raise ValueError(f"{path}: {what} must have at most {MAX_TEXT} characters")
    return text


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """The JSON object in `text`, which was read from `path`; ValueError as in `read_json`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{path}: repeated key {key!r}")
            found[key] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def shown(value: object) -> str:
    """A value in a message, cut: an integer may have thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


class Reader:
    """Typed access to the keys of a config, with the file's name in every error."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{key} must be a positive integer, got {shown(value)}")
        if value > most:
            raise self.error(f"{key} must be at most {most}, got {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not (0 < value <= sys.float_info.max)
        ):
            raise self.error(f"{key} must be a positive number, got {shown(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, got {value!r}")
        return value

    def cap(self, key: str, architecture: str) -> float | None:
        """A positive number, or null; in gemma2, which has caps, the key itself must be there."""
        if key not in self.values and architecture == "gemma2":
            raise self.error(f"{key} is missing")
        return self.number(key) if self.has(key) else None
