"""Directories of this user: for sockets, and for files that can be recreated."""

import contextlib
import logging
import os
import stat
import tempfile
from functools import cache
from pathlib import Path

from flexkv.errors import ConfigError

logger = logging.getLogger("flexkv.config")

_VARIABLE = "XDG_RUNTIME_DIR"

_MAX_BYTES = 70
"""Maximum length of the directory's path, in bytes. A socket's path may have 107 bytes; the names of sockets take up to
37 of them."""


def runtime_directory() -> Path:
    """Directory of this user's sockets: ``$XDG_RUNTIME_DIR/flexkv``, or ``flexkv-UID`` among the temporary files.

    The second is used where the variable is not set, or where its directory cannot be used: it does not exist, is not
    writable, belongs to another user, or has too long a name for a socket. The log names the reason once.

    Raises
    ------
    ConfigError
        The second directory cannot be used either, or others could write to it.
    """
    base = os.environ.get(_VARIABLE)
    reason = ""
    if base:
        directory = Path(base) / "flexkv"
        reason = _why_not_base(Path(base)) or _why_not(directory)
        if not reason:
            return directory
    fallback = _temporary_directory() / f"flexkv-{os.geteuid()}"
    why = _why_not(fallback)
    if why:
        also = f"; {_VARIABLE} = {base!r} cannot be used either: {reason}" if reason else ""
        raise ConfigError(
            "runtime directory", str(fallback), f"{why}{also}; set {_VARIABLE} to a directory of this user alone "
            f"(mode 0700), or remove this one",
        )
    if reason:
        _log_once(f"{_VARIABLE} = {base!r} cannot be used: {reason}; sockets are in {fallback}")
    return fallback


def _why_not_base(base: Path) -> str:
    """Reason why the directory that the variable names cannot be used; empty: it can be used."""
    if not base.is_absolute():
        return "it is not an absolute path"
    if len(os.fsencode(base / "flexkv")) > _MAX_BYTES:
        return "its name is too long for the path of a socket"
    try:
        status = base.stat()
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"
    return "" if status.st_uid == os.geteuid() else f"it belongs to user {status.st_uid}"


def _why_not(directory: Path) -> str:
    """Create a directory for this user alone. Returns the reason why it cannot be used; empty: it can be used."""
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        status = directory.lstat()
    except OSError as error:
        return f"{directory}: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{directory} is not a directory, or is a symbolic link"
    if status.st_uid != os.geteuid():
        return f"{directory} belongs to user {status.st_uid}"
    if status.st_mode & 0o077:
        return f"{directory} is open to other users (mode {stat.S_IMODE(status.st_mode):04o}, must be 0700)"
    return "" if os.access(directory, os.W_OK | os.X_OK) else f"{directory} cannot be written to"


def _temporary_directory() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise ConfigError.about("TMPDIR", f"there is no directory for temporary files ({error.strerror})") from error


@cache
def _log_once(text: str) -> None:
    logger.warning("%s", text)


def cache_directory() -> Path:
    """Directory of files that can be recreated: ``$XDG_CACHE_HOME/flexkv``, or ``~/.cache/flexkv``.

    Without a home directory it is in the runtime directory.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():         # the XDG Base Directory Specification: relative paths are ignored
        return Path(base) / "flexkv"
    home = os.path.expanduser("~")
    return runtime_directory() / "cache" if home == "~" else Path(home) / ".cache" / "flexkv"
