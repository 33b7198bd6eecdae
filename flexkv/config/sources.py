"""Reads settings from their sources, by precedence: keyword arguments, a file, the environment, defaults."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexkv.config import environment
from flexkv.config.effects import lost_directory, without_effect
from flexkv.config.environment import FILE_VARIABLE
from flexkv.config.field import kinds, nearest, read_field
from flexkv.config.files import read_file
from flexkv.config.paths import expand, is_service_link
from flexkv.config.settings import CacheConfig, ConnectorConfig, FlexKVConfig, TransferConfig
from flexkv.config.upstream import MEANINGLESS, UNAVAILABLE
from flexkv.errors import ConfigError

logger = logging.getLogger("flexkv.config")

GROUPS: dict[str, Any] = {"cache": CacheConfig, "transfer": TransferConfig, "connector": ConnectorConfig}
FIELDS = {field.name: (group, owner, field) for group, owner in GROUPS.items() for field in dataclasses.fields(owner)}

_OFF = ("0", "0.0", "false", "no", "off", "none", "")


@dataclass
class Findings:
    """Settings of all sources, and the faults found in them.

    Attributes
    ----------
    values : dict
        Settings that were given, by name. Each value is valid by itself.
    given : dict of str to str
        Place where each setting was given.
    problems : list of ConfigError
        Faults; if there are none, ``config`` returns the settings.
    warnings, notes : list of str
        Lines for the log.
    """

    values: dict[str, Any] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    problems: list[ConfigError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, group: str) -> dict[str, Any]:
        """Settings of a group."""
        return {name: value for name, value in self.values.items() if FIELDS[name][0] == group}

    def in_effect(self) -> dict[str, Any]:
        """All settings, with defaults for settings that were not given."""
        return {name: self.values.get(name, spec.default) for name, (_, _, spec) in FIELDS.items()}

    def config(self) -> FlexKVConfig:
        """The settings; ConfigError for the first problem."""
        for problem in self.problems:
            raise problem
        groups = {group: owner(**self.of(group)) for group, owner in GROUPS.items()}
        return FlexKVConfig(**groups, given=dict(self.given))


@dataclass(frozen=True)
class _Source:
    """A source of settings. ``key`` is the name as the user wrote it, ``name`` the name of the setting."""

    place: str
    is_variable: bool = False

    def problem(self, key: str, error: ConfigError) -> ConfigError:
        """The error in the words of this source: with its key, or its place."""
        if self.is_variable:
            hint = ""
            if isinstance(error.value, str) and is_service_link(error.value):
                hint = "; it looks like a Kubernetes service link (enableServiceLinks: false)"
            return ConfigError(key, error.value, error.allowed + hint)
        return error.given_by(self.place) if self.place else error


def gather(
    path: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Findings:
    """Read all sources; arguments as ``load_config``. Raises nothing: problems are among the findings."""
    env = os.environ if env is None else env
    found = Findings()
    _gather_environment(found, env)
    named = "configuration file" if path else FILE_VARIABLE
    path = path or env.get(FILE_VARIABLE, "").strip() or None
    if path:
        try:
            path = str(expand(named, os.fspath(path)))
            content = read_file(named, Path(path))
        except ConfigError as error:
            found.problems.insert(0, error)
        else:
            _gather_mapping(found, content, _Source(f"in {path}"))
    _gather_mapping(found, overrides or {}, _Source(""))
    _gather_conflicts(found)
    return found


def _gather_environment(found: Findings, env: Mapping[str, str]) -> None:
    services = []
    for variable, name, text in environment.variables(env):
        try:
            if _skip(found, variable, name, text):
                continue
            if name not in FIELDS:
                if environment.is_of_service(variable, text):
                    services.append(variable)
                    continue
                raise environment.unknown(variable, text, FIELDS)
            if not text.strip():
                continue                              # an empty variable counts as not set
            _, owner, _ = FIELDS[name]
            is_mapping = kinds(owner)[name][0] is Mapping
            value = environment.parse_mapping(variable, text) if is_mapping else text
        except ConfigError as error:
            found.problems.append(error)
        else:
            _add(found, variable, name, value, _Source(variable, is_variable=True))
    if services:
        found.notes.append(f"variables of Kubernetes services are not settings; ignored: {', '.join(services)}")


def _gather_mapping(found: Findings, content: Mapping[str, Any], source: _Source) -> None:
    for key, value in content.items():
        try:
            if not isinstance(key, str):
                raise ConfigError("name of a setting", key, "must be text")
            if _skip(found, key, key, value):
                continue
            if key not in FIELDS:
                raise ConfigError(key, value, f"is not a setting of FlexKV{nearest(key, FIELDS)}")
        except ConfigError as error:
            found.problems.append(source.problem(key, error))
        else:
            _add(found, key, key, value, source)


def _add(found: Findings, key: str, name: str, value: Any, source: _Source) -> None:
    """Enter a value, which overrides the value of an earlier source."""
    _, owner, spec = FIELDS[name]
    found.values.pop(name, None)
    found.given[name] = source.place or "argument"
    try:
        found.values[name] = read_field(owner, spec, value)
    except ConfigError as error:
        found.problems.append(source.problem(key, error))


def _skip(found: Findings, key: str, name: str, value: object) -> bool:
    """Whether ``name`` is a setting of upstream that is accepted and has no effect."""
    if name in UNAVAILABLE:
        is_off = value.strip().lower() in _OFF if isinstance(value, str) else value is None or value == 0
        if not is_off:
            raise ConfigError(key, value, UNAVAILABLE[name])
        return True
    if name in MEANINGLESS:
        found.notes.append(f"{key} has no effect: {MEANINGLESS[name]}")
        return True
    return False


def _gather_conflicts(found: Findings) -> None:
    if found.problems:
        return
    values = found.in_effect()
    lost = lost_directory(values, found.given)
    conflicts = [lost] if lost is not None else []
    for group, owner in GROUPS.items():
        conflicts += owner.conflicts_of(found.of(group))
    for error in conflicts:
        place = found.given.get(error.key.split(":")[0], "argument")
        found.problems.append(error if place == "argument" else error.given_by(place))
    defaults = {name: spec.default for name, (_, _, spec) in FIELDS.items()}
    found.warnings += without_effect(values, defaults, found.given)


def load_config(
    path: str | os.PathLike[str] | None = None, env: Mapping[str, str] | None = None, **overrides: Any
) -> FlexKVConfig:
    """Read and check the settings.

    Parameters
    ----------
    path : path, optional
        YAML or JSON file, in UTF-8; default: the file that ``FLEXKV_CONFIG_PATH`` names, if it is set.
    env : mapping, optional
        Default: this process's environment.
    **overrides
        Settings by name. They override the file, which overrides the environment.

    Raises
    ------
    ConfigError
        A key is unknown, given twice, of a wrong type, or out of range; settings contradict each other; or the file
        cannot be read. No other exception is raised.
    """
    return _logged(gather(path, env, overrides))


def engine_config(
    settings: Mapping[str, Any] | None, set_up_log: Callable[[str], None] | None = None
) -> FlexKVConfig:
    """The settings of an engine that has its own mapping for them, which overrides file and environment.

    Parameters
    ----------
    settings : mapping from str to any type
        The engine's mapping; None: it has none.
    set_up_log : callable, optional
        Called with ``log_level`` before anything is logged.

    Raises
    ------
    ConfigError
        As ``load_config``.
    """
    if not isinstance(settings, Mapping | None):
        raise ConfigError("settings of the engine", settings, "must be a mapping from names to values")
    return _logged(gather(overrides=settings), set_up_log)


def _logged(found: Findings, set_up_log: Callable[[str], None] | None = None) -> FlexKVConfig:
    config = found.config()
    if set_up_log is not None:
        set_up_log(config.connector.log_level)
    for line in found.notes:
        logger.info("%s", line)
    for line in found.warnings:
        logger.warning("%s", line)
    return config


def process_environment(**changes: str) -> dict[str, str]:
    """A copy of this process's environment with ``changes``, for a child process."""
    return {**os.environ, **changes}
