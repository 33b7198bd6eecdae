"""Where settings come from: keyword arguments, a file, the environment, defaults, in that order."""

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flexkv.config.field import kind_of, nearest, parse
from flexkv.config.settings import CacheConfig, ConnectorConfig, FlexKVConfig, TransferConfig
from flexkv.config.upstream import MEANINGLESS, UNAVAILABLE
from flexkv.errors import ConfigError

logger = logging.getLogger("flexkv.config")

PREFIX = "FLEXKV_"
FILE_VARIABLE = "FLEXKV_CONFIG_PATH"
_BUILD_PREFIX = "FLEXKV_BUILD_"
GROUPS: dict[str, type] = {"cache": CacheConfig, "transfer": TransferConfig, "connector": ConnectorConfig}
FIELDS = {field.name: (group, owner, field) for group, owner in GROUPS.items() for field in dataclasses.fields(owner)}


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, not the last one's win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(str(key), "given twice", "must be there once")
        return super().construct_mapping(node, deep=deep)


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix not in (".yml", ".yaml", ".json"):
        raise ConfigError(FILE_VARIABLE, str(path), "must be a .yml, .yaml or .json file")
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(FILE_VARIABLE, str(path), f"cannot be read: {error.strerror}") from error
    try:
        # JSON is YAML, but for tabs
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(FILE_VARIABLE, str(path), f"cannot be parsed: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(FILE_VARIABLE, str(path), "must hold a mapping from names to values")
    return content


def _parse_mapping(key: str, text: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(key, text, f"must be a mapping, as JSON or YAML: {error}") from None


def _is_on(value: object) -> bool:
    return str(value).strip().lower() not in ("0", "0.0", "false", "no", "off", "none", "")


def _skip(key: str, name: str, value: object) -> bool:
    """Whether ``name`` is a key of upstream's that is accepted and has no effect."""
    if name in UNAVAILABLE:
        if _is_on(value):
            raise ConfigError(key, value, UNAVAILABLE[name])
        return True
    if name in MEANINGLESS:
        logger.info("%s has no effect: %s", key, MEANINGLESS[name])
        return True
    return False


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, text in env.items():
        if not key.startswith(PREFIX) or key == FILE_VARIABLE or key.startswith(_BUILD_PREFIX):
            continue
        name = key.removeprefix(PREFIX).lower()
        if _skip(key, name, text):
            continue
        if name not in FIELDS:
            known = [PREFIX + field.upper() for field in FIELDS]
            raise ConfigError(key, text, f"is no variable of FlexKV{nearest(key, known)}")
        _, owner, field = FIELDS[name]
        kind, _ = kind_of(owner, field)
        values[name] = _parse_mapping(key, text) if kind is Mapping else parse(key, text, field, kind)
    return values


def load_config(
    path: str | os.PathLike[str] | None = None, env: Mapping[str, str] | None = None, **overrides: Any
) -> FlexKVConfig:
    """Gather the settings.

    Parameters
    ----------
    path : path, optional
        YAML or JSON file; default: what ``FLEXKV_CONFIG_PATH`` names, if it is set.
    env : mapping, optional
        Default: this process's environment.
    **overrides
        Settings by name; they win over the file, which wins over the environment.

    Raises
    ------
    ConfigError
        A key is unknown, given twice, of a wrong type, or out of range; or the file cannot be read.
    """
    env = os.environ if env is None else env
    path = path or env.get(FILE_VARIABLE) or None
    from_file = _read_file(Path(path)) if path else {}
    values = _from_environment(env)
    for source in (from_file, overrides):
        for key, value in source.items():
            if _skip(key, key, value):
                continue
            if key not in FIELDS:
                raise ConfigError(key, value, f"is no setting of FlexKV{nearest(key, FIELDS)}")
            values[key] = value
    grouped: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in values.items():
        grouped[FIELDS[name][0]][name] = value
    return FlexKVConfig(**{group: owner(**grouped[group]) for group, owner in GROUPS.items()})


def runtime_directory() -> Path:
    """Where this user's sockets go: ``XDG_RUNTIME_DIR``, or a private directory among the temporary files."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    directory = Path(base) / "flexkv" if base else Path(tempfile.gettempdir()) / f"flexkv-{os.getuid()}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError("runtime directory", str(directory), "must belong to this user alone (mode 0700)")
    return directory


def cache_directory() -> Path:
    """Where files go that can be made again: ``XDG_CACHE_HOME``, or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flexkv"


def process_environment(**changes: str) -> dict[str, str]:
    """A copy of this process's environment, changed, for a child process."""
    return {**os.environ, **changes}
