"""Lock of a directory of the SSD tier: one process at a time may use it."""

import fcntl
import os
import socket
import struct
import weakref
from pathlib import Path

from flexkv.errors import DirectoryInUseError, StorageError
from flexkv.storage.ssd.file_layer import open_private

LOCK_NAME = "flexkv.lock"

_FLOCK = struct.Struct("hhqqi0q")
"""struct flock of <fcntl.h>: type, whence, start, length, pid."""

_WHOLE_FILE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class DirectoryLock:
    """A lock on a directory. The kernel drops it when the process ends, for any reason.

    It is a lock of the open file description (F_OFD_SETLK), like flock, but other processes can query it without taking
    it. A forked child inherits the open file and would keep the lock beyond the end of this process; ``os.fork`` closes
    the file there.

    Raises
    ------
    DirectoryInUseError
        Another process has locked the directory, or another object in this process.
    StorageError
        The directory cannot be made, written or locked.
    """

    def __init__(self, directory: Path) -> None:
        self._fd = -1
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = open_private(directory / LOCK_NAME, 0)
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
            owner = f"process {os.getpid()} on {socket.gethostname()}\n".encode()
            os.pwrite(self._fd, owner, 0)               # overwrites the old text: possible on a full disk, too
            os.ftruncate(self._fd, len(owner))
        except BlockingIOError:
            name = os.pread(self._fd, 1024, 0).decode(errors="replace").strip()
            self.release()
            raise DirectoryInUseError(str(directory), name or "another process") from None
        except OSError as error:
            self.release()
            is_file = isinstance(error, (FileExistsError, NotADirectoryError))
            reason = "it, or a directory above it, is a file" if is_file else error.strerror
            raise StorageError(
                f"{directory} cannot be used for the SSD tier: {reason}; set ssd_cache_dir to a directory that "
                f"this user can write to, on a disk with room"
            ) from error
        _held.add(self)

    def release(self) -> None:
        """Release the lock. May be called again."""
        fd, self._fd = self._fd, -1                     # first: a forked child must not close a reused descriptor
        if fd >= 0:
            os.close(fd)


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_leave_to_parent)


def owner_of(directory: Path) -> str:
    """Process and host that have locked a directory, as text; empty: it is not locked."""
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        (kind, *_) = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WHOLE_FILE))
        return "" if kind == fcntl.F_UNLCK else os.pread(fd, 1024, 0).decode(errors="replace").strip()
    finally:
        os.close(fd)
