"""A setting: its default, what it means, and what it may be."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from flexkv.errors import ConfigError

T = TypeVar("T")


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] = (),
    secret: bool = False,
) -> Any:
    """A dataclass field that carries its documentation and its limits (both inclusive)."""
    metadata = {"help": help, "unit": unit, "low": low, "high": high, "choices": tuple(choices), "secret": secret}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def allowed(field: dataclasses.Field[Any], kind: type) -> str:
    """What a field may be, in words."""
    meta = field.metadata
    if meta["choices"]:
        return "one of " + ", ".join(meta["choices"])
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Mapping: "a mapping"}[kind]
    if meta["low"] is not None:
        words += f", at least {meta['low']:g}"
    if meta["high"] is not None:
        words += f", at most {meta['high']:g}"
    return words + (f" ({meta['unit']})" if meta["unit"] else "")


def kind_of(owner: type, field: dataclasses.Field[Any]) -> tuple[type, bool]:
    """The plain type of a field, and whether None is allowed too."""
    hint = get_type_hints(owner)[field.name]
    members = [member for member in get_args(hint) if member is not type(None)]
    return (get_origin(members[0]) or members[0], True) if members else (hint, False)


def check(config: Any) -> None:
    """Check every field of a dataclass of settings.

    Raises
    ------
    ConfigError
        For the first that is of a wrong type or out of range.
    """
    for field in dataclasses.fields(config):
        kind, optional = kind_of(type(config), field)
        value = getattr(config, field.name)
        if optional and value is None:
            continue
        meta = field.metadata
        shown = "***" if meta["secret"] else value
        right_type = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not right_type or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(field.name, shown, f"must be {allowed(field, kind)}")
        if kind in (int, float):
            too_low = meta["low"] is not None and value < meta["low"]
            too_high = meta["high"] is not None and value > meta["high"]
            if too_low or too_high or not math.isfinite(value):
                raise ConfigError(field.name, shown, f"must be {allowed(field, kind)}")
        if meta["choices"] and value not in meta["choices"]:
            raise ConfigError(field.name, shown, f"must be {allowed(field, kind)}")


def parse(key: str, text: str, field: dataclasses.Field[Any], kind: type) -> Any:
    """Read a value from an environment variable.

    Raises
    ------
    ConfigError
        The text is no value of that type.
    """
    try:
        if kind is bool:
            return {"1": True, "true": True, "yes": True, "on": True,
                    "0": False, "false": False, "no": False, "off": False, "": False}[text.strip().lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise ConfigError(key, text, f"must be {allowed(field, kind)}") from None


def nearest(key: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` where something similar is known."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
