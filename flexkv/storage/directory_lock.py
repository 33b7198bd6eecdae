"""One process a directory."""

import fcntl
import os
import socket
import struct
from pathlib import Path

from flexkv.errors import DirectoryInUseError, StorageError
from flexkv.storage.file_layer import open_private

LOCK_NAME = "flexkv.lock"

_FLOCK = struct.Struct("hhqqi0q")
"""struct flock of <fcntl.h>: type, whence, start, length, pid."""

_WHOLE_FILE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class DirectoryLock:
    """A lock on a directory, which the kernel drops when the process ends, however it ends.

    It is a lock of the open file (F_OFD_SETLK), as flock is, but one that others can ask for without taking it.

    Raises
    ------
    DirectoryInUseError
        Another process has it, or this one, by another object.
    StorageError
        The directory cannot be made, written or locked.
    """

    def __init__(self, directory: Path) -> None:
        self._fd = -1
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = open_private(directory / LOCK_NAME, 0)
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except BlockingIOError:
            owner = os.pread(self._fd, 1024, 0).decode(errors="replace").strip()
            self.release()
            raise DirectoryInUseError(str(directory), owner or "another process") from None
        except OSError as error:
            self.release()
            raise StorageError(f"{directory} cannot be used for the SSD tier: {error.strerror}") from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have it. Can be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def owner_of(directory: Path) -> str:
    """Who has the lock of a directory; empty: nobody."""
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        (kind, *_) = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WHOLE_FILE))
        return "" if kind == fcntl.F_UNLCK else os.pread(fd, 1024, 0).decode(errors="replace").strip()
    finally:
        os.close(fd)
