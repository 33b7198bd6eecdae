"""A setting: its default, meaning and allowed values."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from flexkv.config.values import read_value
from flexkv.errors import ConfigError


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] = (),
    secret: bool = False,
    read: Callable[[str, object], object] | None = None,
) -> Any:
    """A dataclass field that carries its documentation and its limits (both inclusive).

    ``read`` takes the field's name and the value as given, and returns the value that it stands for (see
    ``flexkv.config.paths``).
    """
    metadata = {
        "help": help, "unit": unit, "low": low, "high": high, "choices": tuple(choices), "secret": secret, "read": read,
    }
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def allowed(field: dataclasses.Field[Any], kind: type) -> str:
    """Describe the allowed values of a field."""
    meta = field.metadata
    if meta["choices"]:
        return "one of " + ", ".join(meta["choices"])
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Mapping: "a mapping"}[kind]
    if meta["low"] is not None:
        words += f", at least {meta['low']:g}"
    if meta["high"] is not None:
        words += f", at most {meta['high']:g}"
    return words + (f" ({meta['unit']})" if meta["unit"] else "")


@cache
def kinds(owner: type) -> Mapping[str, tuple[type, bool]]:
    """Plain type of each field of a dataclass of settings, and whether None is allowed too."""
    found = {}
    for name, hint in get_type_hints(owner).items():
        members = [member for member in get_args(hint) if member is not type(None)]
        found[name] = (get_origin(members[0]) or members[0], True) if members else (hint, False)
    return found


def read_field(owner: type, field: dataclasses.Field[Any], value: object) -> Any:
    """Read the value that a user gave for a field. Text is converted as ``flexkv.config.values`` documents.

    Raises
    ------
    ConfigError
        The value is of a wrong type or out of range.
    """
    kind, optional = kinds(owner)[field.name]
    value = read_value(field.name, value, field, kind, optional)
    if not (optional and value is None) and not _is_allowed(value, field, kind):
        shown = "***" if field.metadata["secret"] else value
        raise ConfigError(field.name, shown, f"must be {allowed(field, kind)}")
    return value


def _is_allowed(value: Any, field: dataclasses.Field[Any], kind: type) -> bool:
    meta = field.metadata
    right_type = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not right_type or (isinstance(value, bool) and kind is not bool):
        return False
    if kind in (int, float):
        try:
            if not math.isfinite(value):
                return False
        except OverflowError:                   # a whole number beyond all floating-point numbers
            return False
        too_low = meta["low"] is not None and value < meta["low"]
        too_high = value > (meta["high"] if meta["high"] is not None else _MAX_WHOLE)
        return not too_low and not too_high
    if kind is str and meta["read"] is None and not is_plain_text(value):
        return False
    return not meta["choices"] or value in meta["choices"]


_MAX_WHOLE = (1 << 63) - 1
"""Maximum value of a setting without a limit of its own, because the native code uses 64-bit integers."""


def is_plain_text(text: str) -> bool:
    """Whether a text can be encoded as UTF-8, and has no NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def nearest(key: str, known: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """``; did you mean X?`` if a similar key is known, else empty. ``spell`` converts X to the spelling of the source
    of the key."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {spell(close[0])}?" if close else ""
