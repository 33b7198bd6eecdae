"""Reads settings from environment variables, whose names begin with ``FLEXKV_``."""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from flexkv.config.field import nearest
from flexkv.config.files import parse_json, parse_yaml
from flexkv.config.paths import is_service_link
from flexkv.errors import ConfigError

logger = logging.getLogger("flexkv.config")

PREFIX = "FLEXKV_"
FILE_VARIABLE = "FLEXKV_CONFIG_PATH"
_BUILD_PREFIX = "FLEXKV_BUILD_"

_SERVICE = re.compile(r"(.*_)?SERVICE_(HOST|PORT(_.+)?)|(.*_)?PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_SERVICE_PORT = re.compile(r"(.*_)?PORT")


def variables(env: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Variable, name of the setting in lower case, and text of each variable that begins with ``FLEXKV_``.

    The variable that names the settings file, and variables of the build, are skipped.
    """
    for variable, text in env.items():
        is_ours = variable.startswith(PREFIX) and not variable.startswith(_BUILD_PREFIX)
        if is_ours and variable != FILE_VARIABLE:
            yield variable, variable.removeprefix(PREFIX).lower(), text


def is_of_service(variable: str, text: str) -> bool:
    """Whether Kubernetes made the variable for a Service (a service link), so that it is not a setting.

    For a Service ``flexkv-x`` of port 80: ``FLEXKV_X_SERVICE_HOST``, ``FLEXKV_X_SERVICE_PORT``, ``FLEXKV_X_PORT`` with
    the value ``tcp://10.0.0.1:80``, ``FLEXKV_X_PORT_80_TCP`` and more. Names and values: "Discovering services",
    https://kubernetes.io/docs/concepts/services-networking/service/ and Docker's legacy links, which they follow.
    """
    name = variable.removeprefix(PREFIX)
    return bool(_SERVICE.fullmatch(name) or (_SERVICE_PORT.fullmatch(name) and is_service_link(text)))


def unknown(variable: str, text: str, known: Mapping[str, Any]) -> ConfigError:
    """The error for a variable that is not a setting."""
    name = variable.removeprefix(PREFIX).lower()
    hint = nearest(name, known, lambda found: PREFIX + found.upper())
    return ConfigError(variable, text, f"is not a variable of FlexKV{hint}")


def parse_mapping(variable: str, text: str) -> Any:
    """A mapping that was given as a text.

    Raises
    ------
    ConfigError
        The text is neither JSON nor YAML, or has a key twice.
    """
    try:
        try:
            return parse_json(text)
        except ConfigError:
            raise
        except ValueError:
            return parse_yaml(text)               # JSON is YAML for the most part, but its errors read better
    except ConfigError as error:
        raise ConfigError.about(variable, str(error)) from None
    except ValueError as error:
        raise ConfigError(variable, text, f"must be a mapping, as JSON or YAML: {error}") from None
