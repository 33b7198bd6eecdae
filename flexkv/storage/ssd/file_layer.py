"""The file calls that the SSD store makes, as an interface, so that tests can inject faults."""

import errno
import os
from collections.abc import Sequence
from typing import Any, Protocol


class FileLayer(Protocol):
    """Calls with the names and signatures of module ``os``, which implements this protocol."""

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int, /) -> int: ...
    def pwrite(self, fd: int, data: Any, offset: int, /) -> int: ...
    def fdatasync(self, fd: int, /) -> None: ...
    def ftruncate(self, fd: int, length: int, /) -> None: ...
    def posix_fallocate(self, fd: int, offset: int, length: int, /) -> None: ...


def write_all(files: FileLayer, fd: int, data: memoryview, offset: int) -> None:
    """Write all bytes; raises OSError (EIO) if the file accepts no more."""
    while len(data):
        written = files.pwrite(fd, data, offset)
        if written <= 0:
            raise OSError(errno.EIO, "the file takes no more bytes")
        data, offset = data[written:], offset + written


def read_into(files: FileLayer, fd: int, buffer: memoryview, offset: int) -> int:
    """Read until the buffer is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(buffer):
        got = files.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


def open_private(path: os.PathLike[str], flags: int) -> int:
    """Open or create a file that only this user can read. Symbolic links are refused."""
    return os.open(path, flags | os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
