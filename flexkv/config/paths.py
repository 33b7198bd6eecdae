"""Reads settings that are paths: expands ``~``, and refuses paths that are certainly a mistake."""

import os
import re
from collections.abc import Sequence

from flexkv.errors import ConfigError

SEPARATOR = ";"
"""Separator between directories."""

_MAX_SOCKET_BYTES = 107
"""Longest path of a Unix socket: ``sun_path`` of <sys/un.h> less its final NUL."""

_VARIABLE = re.compile(r"\$[A-Za-z_{(]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ADDRESS = re.compile(r"[^/]*:\d+|\d+|unix:.*", re.DOTALL)
_WRONG_SEPARATOR = re.compile(r"(,)|([:|\s])\s*[/~]")


def expand(key: str, value: object) -> object:
    """Replace ``~`` or ``~user`` at the start of a path by the home directory. An empty text or a value of another type
    is returned unchanged.

    Raises
    ------
    ConfigError
        There is no such home directory, or the text is certainly not a path.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    text = value.strip()
    if "\0" in text:
        raise ConfigError(key, value, "must not contain a NUL character")
    if _VARIABLE.search(text):
        raise ConfigError(key, value, "environment variables are not expanded in paths: write the directory itself")
    if _SCHEME.match(text):
        raise ConfigError(key, value, "must be a path of this machine, without a scheme such as file://")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigError(key, value, "is not a path: it has characters that no file name can have") from None
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text:
        user = text[1:].split("/")[0]
        whose = f"the user {user!r}" if user else "this user (HOME is not set)"
        raise ConfigError(key, value, f"there is no home directory of {whose}: write the path in full")
    return expanded


def expand_directories(key: str, value: object) -> object:
    """Expand directories that are separated by ``;``, each as ``expand`` does. A list of them becomes such a text.

    Raises
    ------
    ConfigError
        Another separator was used, or a directory is named twice.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if not all(isinstance(part, str) and SEPARATOR not in part for part in value):
            raise ConfigError(key, value, f"must be a list of texts, each a directory without {SEPARATOR!r}")
        value = SEPARATOR.join(value)
    if not isinstance(value, str):
        return value
    parts = [str(expand(key, part)) for part in value.split(SEPARATOR) if part.strip()]
    for part in parts:
        if found := _WRONG_SEPARATOR.search(part):
            wrong = found[1] or found[2]
            raise ConfigError(
                key, value, f"{wrong!r} cannot stand between directories: separate them by {SEPARATOR!r}, as in "
                f"/disk1/kv{SEPARATOR}/disk2/kv",
            )
    real = [os.path.realpath(part) for part in parts]
    for number, place in enumerate(real):
        if place in real[:number]:
            raise ConfigError(key, value, f"the directory {parts[number]!r} is named twice: name each directory once")
    return SEPARATOR.join(parts) if parts else value


def register_port(key: str, value: object) -> object:
    """Unix socket at which ranks register: a path or ``ipc://PATH``. The path is expanded as ``expand`` does.

    Raises
    ------
    ConfigError
        The value is a network address, or too long for a socket.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    text = value.strip()
    scheme = _SCHEME.match(text)
    if (scheme and scheme[1].lower() != "ipc") or (not scheme and _ADDRESS.fullmatch(text)):
        raise ConfigError(key, value, "FlexKV listens at a Unix socket: give a path or ipc://PATH")
    path = text[scheme.end():] if scheme else text
    expanded = str(expand(key, path))
    if not expanded or expanded.endswith("/"):
        raise ConfigError(key, value, "must name the file of a Unix socket: give a path or ipc://PATH")
    if len(os.fsencode(expanded)) > _MAX_SOCKET_BYTES:
        raise ConfigError(key, value, f"must have at most {_MAX_SOCKET_BYTES} bytes: it is the path of a Unix socket")
    return f"ipc://{expanded}" if scheme else expanded


def is_service_link(text: str) -> bool:
    """Whether a value has the form that Kubernetes gives to variables of services: ``tcp://10.0.0.1:8080``."""
    return re.match(r"(tcp|udp|sctp)://", text.strip()) is not None
