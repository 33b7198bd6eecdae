"""Reads values that a user gave as text: numbers with units, switches, names of choices, ``none``."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flexkv.errors import ConfigError

SWITCH = {
    "1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False,
}
"""Words of a switch; case does not count."""

_NONE = ("none", "null")

_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*)?\.?\d*(?:e[+-]?\d+)?)\s*([a-z/]*)", re.IGNORECASE | re.ASCII)

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_BYTES = {f"{prefix}{end}": factor for prefix, factor in (_DECIMAL | _BINARY).items() for end in ("", "b") if prefix}
_BYTES |= {"b": 1, "byte": 1, "bytes": 1}
_SECONDS = {"ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}

_UNITS: dict[str, tuple[float, Mapping[str, float]]] = {
    "GiB": (1 << 30, _BYTES),
    "MiB": (1 << 20, _BYTES),
    "bytes": (1, _BYTES),
    "MiB/s": (1 << 20, _BYTES | {f"{name}/s": factor for name, factor in _BYTES.items()}),
    "s": (1, _SECONDS),
    "tokens/s": (1, {name: factor for name, factor in _DECIMAL.items() if name} | {"tokens/s": 1}),
}
"""For each unit of a setting: its size, and the size of each unit that may be written behind a number."""

COUNTS: tuple[float, Mapping[str, float]] = (1, {name: size for name, size in (_DECIMAL | _BINARY).items() if name})
"""For numbers of things: ``1M`` is 1,000,000, ``1Mi`` 1,048,576."""


def read_number(text: str, kind: type, unit: str | tuple[float, Mapping[str, float]] = "") -> float | None:
    """Read a number, which may have a unit behind it: ``32``, ``32GB``, ``32 GiB``.

    Parameters
    ----------
    kind : type
        ``int`` or ``float``. A number with a unit is rounded down to a whole one for ``int``.
    unit : str or tuple
        Unit of the result.

    Returns
    -------
    int, float or None
        None: the text is not a number in such a unit.
    """
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    number, suffix = found[1], found[2].lower()
    try:
        if not suffix:
            plain: float = kind(number)
            return plain
        base, sizes = _UNITS.get(unit, (1, {})) if isinstance(unit, str) else unit
        if suffix not in sizes:
            return None
        scaled: float = kind(_plain(number) * sizes[suffix] / base)
        return scaled
    except (ValueError, OverflowError):
        return None


def _plain(number: str) -> float:
    try:
        return int(number)
    except ValueError:
        return float(number)


def read_value(key: str, value: object, field: dataclasses.Field[Any], kind: type, optional: bool) -> Any:
    """Convert a value given as text for a setting of type ``kind``; other values are returned as they are.

    Raises
    ------
    ConfigError
        The text is certainly not a path. ``flexkv.config.field.read_field`` makes all other checks.
    """
    meta = field.metadata
    if meta["read"] is not None:
        value = meta["read"](key, value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if optional and text.lower() in _NONE:
        return None
    if kind is bool:
        return SWITCH.get(text.lower(), value)
    if kind in (int, float):
        number = read_number(text, kind, meta["unit"])
        return value if number is None else number
    by_lower = {choice.lower(): choice for choice in meta["choices"]}
    return by_lower.get(text.lower(), value)


def ports(key: str, value: object) -> object:
    """TCP ports, separated by commas; a whole number is one port.

    Raises
    ------
    ConfigError
        A part is not a number from 1 to 65535.
    """
    is_port = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16
    text = str(value) if is_port else value
    if not isinstance(text, str):
        return value
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 1 << 16 for part in parts):
        raise ConfigError(key, value, "must be a TCP port from 1 to 65535, or several with commas between them")
    return ",".join(parts)
