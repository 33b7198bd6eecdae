"""Unix sockets in the file system: creation, probe and removal without harm to other files and processes."""

import errno
import fcntl
import logging
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flexkv.at_fork import close_in_children
from flexkv.config import register_port
from flexkv.errors import RegistrationError

logger = logging.getLogger("flexkv.protocol")

_LOCK_S = 5.0
"""Maximum wait for another start in the same directory, in seconds; a start holds the lock for milliseconds."""

_RETRY_S = 0.05
"""Pause between two attempts to connect or to lock, in seconds: no event reports when the next can succeed."""

_OURS = ("register-*.sock", "vllm-*.sock", "layers-*.sock")
"""Names of the sockets that FlexKV creates."""

_KINDS = {
    stat.S_IFREG: "an ordinary file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}


def socket_path(port: str) -> Path:
    """Socket file of a port, which is a path or an ``ipc://`` address as upstream uses it; ConfigError for another
    address."""
    return Path(str(register_port("gpu_register_port", port)).removeprefix("ipc://"))


class ListeningSocket:
    """A non-blocking listening socket that only this user can connect to. It replaces the socket file of a dead
    controller.

    Probe, removal, ``bind`` and ``listen`` are done under a lock of the directory, so that one of two concurrent starts
    fails.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    path : Path
    socket : socket

    Raises
    ------
    RegistrationError
        Another controller listens at the path, the path names a file that is not a socket of this user, or the path
        cannot be used. Nothing has changed then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _refuse_other_files(path)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
            close_in_children(self.socket)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            with _locked(path.parent):
                _refuse_other_files(path)
                if path.exists():
                    _remove_dead(path)
                self.socket.bind(str(path))
                os.chmod(path, 0o600)     # before listen: no process can have connected yet
                self.socket.listen(64)
            self.socket.setblocking(False)
            self._file = _identity(path)
        except OSError as error:
            self.socket.close()
            raise _unusable(path, error) from error
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        """Stop listening, and remove the file unless another process has replaced it. Can be called again.

        The file is removed first: while the socket listens, no other start takes the path over, so the file is not one
        that has its inode number by reuse."""
        if self.socket.fileno() < 0:
            return
        with suppress(OSError, RegistrationError), _locked(self.path.parent):
            if _identity(self.path) == self._file:
                self.path.unlink()
        self.socket.close()


def remove_dead_sockets(directory: Path) -> list[Path]:
    """Remove the sockets of dead controllers of this user from ``directory``; returns their paths.

    A socket is dead if no process listens at it while the directory's lock is held, which excludes a start.
    """
    removed = []
    try:
        with _locked(directory):
            for path in [path for pattern in _OURS for path in directory.glob(pattern)]:
                if _owner_lives(path):
                    continue
                with suppress(OSError, RegistrationError):
                    _refuse_other_files(path)
                    _remove_dead(path)
                    removed.append(path)
    except (OSError, RegistrationError) as error:
        logger.debug("dead sockets in %s stay: %s", directory, error)
    return removed


def _owner_lives(path: Path) -> bool:
    """Whether the process named in the path of a ``layers-`` socket exists. A probe by connecting would disturb it."""
    number = re.fullmatch(r"layers-(\d{1,10})-.*", path.name)
    return number is not None and Path("/proc", number[1]).exists()


def listen_at(listener: socket.socket, path: Path, backlog: int) -> None:
    """Bind a socket and listen, replacing the socket file of a dead process at the path.

    The directory is locked meanwhile, so that ``remove_dead_sockets`` never sees a socket that does not listen yet.

    Raises
    ------
    RegistrationError
        Another process holds the directory's lock for longer than ``_LOCK_S``.
    OSError
        The path cannot be used.
    """
    with _locked(path.parent):
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(backlog)


def connect(
    path: Path, deadline: float, closing: threading.Event | None = None, wait_for_it: bool = False
) -> socket.socket:
    """Connect to a controller, by ``deadline`` (``time.monotonic``), or until ``closing`` is set.

    The deadline holds also for a controller that is stopped or overloaded and whose queue of connections is full.

    Parameters
    ----------
    wait_for_it : bool
        Retry while no controller listens at the path, instead of failing at once.

    Returns
    -------
    socket
        Non-blocking.

    Raises
    ------
    RegistrationError
        No controller listens at the path, it accepts no connection in time, or ``closing`` was set.
    OSError
        The path cannot be reached.
    """
    while closing is None or not closing.is_set():
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            connection.connect(str(path))
            return connection
        except BlockingIOError:
            connection.close()
            reason = f"the controller at {path} accepts no connections: it is stopped or overloaded"
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            reason = f"no controller listens at {path}; start the engine (or KVManager), or check the path"
            if not wait_for_it:
                raise RegistrationError(reason) from None
        except BaseException:
            connection.close()
            raise
        if time.monotonic() >= deadline:
            raise RegistrationError(reason)
        if closing is None:
            time.sleep(_RETRY_S)
        else:
            closing.wait(_RETRY_S)
    raise RegistrationError("closed while connecting")


def _unusable(path: Path, error: OSError) -> RegistrationError:
    return RegistrationError(
        f"cannot listen at {path}: {error.strerror or error}; set gpu_register_port to a path of at most 107 bytes in "
        "a directory of this user"
    )


def _refuse_other_files(path: Path) -> None:
    """Raise RegistrationError if the path names anything but a socket of this user."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no socket")
        raise RegistrationError(f"{path} is {kind}, and stays as it is: set gpu_register_port to the path of a socket")
    if status.st_uid != os.getuid():
        raise RegistrationError(f"{path} is a socket of user {status.st_uid}: set gpu_register_port to another path")


def _remove_dead(path: Path) -> None:
    """Remove a socket at which no process listens. Under the lock of its directory.

    Raises
    ------
    RegistrationError
        A process listens there.
    """
    kind = socket.SOCK_STREAM if path.name.startswith("layers-") else socket.SOCK_SEQPACKET
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(str(path))
    if code == errno.EPROTOTYPE:
        raise RegistrationError(f"another program listens at {path}: set gpu_register_port to another path")
    if code in (0, errno.EAGAIN):
        raise RegistrationError(f"another controller listens at {path}: give each its gpu_register_port")
    if code != errno.ECONNREFUSED:
        raise OSError(code, os.strerror(code))
    path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock (flock) of a directory. It needs no file, and the kernel releases it when the process ends."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _retry(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), _LOCK_S):
            raise RegistrationError(f"{directory} has been locked by another process for {_LOCK_S:g} s: try again, or "
                                    "set gpu_register_port to a path in another directory")
        yield
    finally:
        os.close(fd)


def _retry(attempt: Callable[[], None], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            attempt()
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_RETRY_S)
