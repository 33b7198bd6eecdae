"""Reads a settings file in YAML or JSON. A fault is a ConfigError that names the file and, if known, the line."""

import json
import os
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from flexkv.errors import ConfigError

_MAX_BYTES = 1 << 20
"""Maximum size of a file. Settings need some KiB; the YAML parser needs seconds for 1 MiB."""

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Loader of YAML that refuses a key that is given twice. Keys from a merge (``<<``) may be given again."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._flat: set[yaml.MappingNode] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if node in self._flat:
            return
        self._flat.add(node)
        self._refuse_twice(node)
        super().flatten_mapping(node)
        # the last of equal keys counts; dropping the others bounds the size of merges of merges
        unique: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            unique[name] = (key, value)
        node.value = list(unique.values())

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key_node, _ in node.value:
            key = "<<" if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue                         # the base class refuses it
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError.about(str(key), f"is given twice, again in line {line}: give it once")
            seen.add(key)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError.about(key, "is given twice: give it once")
        found[key] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def read_file(key: str, path: Path) -> dict[str, Any]:
    """Settings by name, as they are written in a file.

    Parameters
    ----------
    key : str
        Name under which the user gave the path.

    Raises
    ------
    ConfigError
        The file cannot be read, is neither YAML nor JSON, or has a key twice.
    """
    if path.suffix.lower() not in (".yml", ".yaml", ".json"):
        raise ConfigError(key, str(path), "must be a .yml, .yaml or .json file")
    text = _decode(key, path, _content(key, path))
    try:
        content = parse_json(text) if path.suffix.lower() == ".json" else parse_yaml(text)
    except ConfigError as error:
        raise ConfigError.about(str(path), str(error)) from None
    except ValueError as error:
        raise ConfigError(key, str(path), f"cannot be parsed: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(key, str(path), "must hold a mapping from names to values")
    return content


def _content(key: str, path: Path) -> bytes:
    try:
        # without waiting for a writer, if the path is a named pipe
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(key, str(path), "must be an ordinary file")
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        why = getattr(error, "strerror", None) or error
        raise ConfigError(key, str(path), f"cannot be read: {why}") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(key, str(path), f"is larger than {_MAX_BYTES >> 20} MiB: it is not a settings file")
    return content


def _decode(key: str, path: Path, content: bytes) -> str:
    """UTF-8, with or without a byte order mark, in every locale."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(key, str(path), "cannot be parsed: it is UTF-16 or UTF-32; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(key, str(path), f"cannot be parsed: line {line} is not UTF-8; save it as UTF-8") from None


def parse_yaml(text: str) -> Any:
    """The content of a YAML text.

    Raises
    ------
    ConfigError
        A key is there twice.
    ValueError
        It is not YAML; the message says where.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # PyYAML's constructors raise these for odd scalars, such as !!bool maybe, !!int "" or a time zone of 99 hours
        raise ValueError(f"a value cannot be understood: {type(error).__name__} {error}") from None


def parse_json(text: str) -> Any:
    """The content of a JSON text; errors as ``parse_yaml``."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
