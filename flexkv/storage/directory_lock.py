"""One process a directory."""

import fcntl
import os
import socket
from pathlib import Path

from flexkv.errors import DirectoryInUseError, StorageError
from flexkv.storage.file_layer import open_private

LOCK_NAME = "flexkv.lock"


class DirectoryLock:
    """A lock on a directory, which the kernel drops when the process ends, however it ends.

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
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(fd, 1024, 0).decode(errors="replace").strip() or "another process"
    finally:
        os.close(fd)
    return ""
