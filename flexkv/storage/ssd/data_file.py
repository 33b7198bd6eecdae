"""The file that holds the bytes of slots: fully allocated, and accessed with O_DIRECT where that is possible."""

import ctypes
import errno
import logging
import mmap
import os
import secrets
from pathlib import Path

from flexkv.errors import CapacityError, StorageError
from flexkv.storage.ssd.file_layer import FileLayer, open_private

logger = logging.getLogger("flexkv.storage")

PROBE_BYTES = 4096
"""Size of the page behind the last slot that ``DataFile.probe`` writes and reads to test the disk."""

_STEP_BYTES = 1 << 30
"""Size of one allocation request to the file system."""

_DROP_BYTES = 64 << 20
"""Without O_DIRECT: bytes moved after which the file is dropped from the page cache."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that mean that a disk or quota is full, or a file too large."""

_AT_EMPTY_PATH = 0x1000                    # <fcntl.h>
_STATX_DIOALIGN = 0x2000                   # <linux/stat.h>, Linux 6.1
_DIO_OFFSET_ALIGN = 156                    # offset of stx_dio_offset_align in struct statx
_MAX_ALIGNMENT = 4096                      # slots and host memory are multiples of it


def allocate(files: FileLayer, fd: int, path: Path, num_bytes: int) -> None:
    """Make a file ``num_bytes`` long, with all its space allocated by the file system.

    Raises
    ------
    CapacityError
        The disk or a quota is full; the file is not longer than before.
    """
    before = os.fstat(fd).st_size
    if before > num_bytes:
        files.ftruncate(fd, num_bytes)
    done = 0
    try:
        while done < num_bytes:
            step = min(_STEP_BYTES, num_bytes - done)
            files.posix_fallocate(fd, done, step)
            done += step
    except OSError as error:
        files.ftruncate(fd, min(before, num_bytes))
        if error.errno not in _FULL:
            raise
        room = os.statvfs(path.parent)
        missing = max(num_bytes - os.fstat(fd).st_blocks * 512 - room.f_bavail * room.f_frsize, 4096)
        raise CapacityError(
            f"{path.parent} has no room for {num_bytes} bytes of the SSD tier ({error.strerror}): at least {missing} "
            f"bytes ({missing / (1 << 30):.2f} GiB) are missing; set ssd_cache_gb lower"
        ) from error


class DataFile:
    """Slots of one directory; slot i is bytes [i*slot_bytes, (i+1)*slot_bytes).

    Attributes
    ----------
    fd : int
    is_direct : bool
        The file is open with O_DIRECT. If not, the reason is logged, and the file is dropped from the page cache now
        and then.

    Parameters
    ----------
    path : Path
    num_bytes : int
        Size of the file, including the probe's page.
    files : FileLayer

    Raises
    ------
    CapacityError
        As ``allocate``; a file created here is removed.
    StorageError
        The file cannot be opened.
    """

    def __init__(self, path: Path, num_bytes: int, files: FileLayer) -> None:
        self._path = path
        self._files = files
        self._probe_offset = num_bytes - PROBE_BYTES
        self._page = mmap.mmap(-1, PROBE_BYTES)         # aligned, as O_DIRECT requires
        self._unsynced = 0
        made = not path.exists()
        try:
            fd = open_private(path, 0)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be opened: {error.strerror}; remove it, or set ssd_cache_dir to another directory"
            ) from error
        try:
            allocate(files, fd, path, num_bytes)
        except BaseException:
            if made:
                path.unlink()
            raise
        finally:
            os.close(fd)
        self.fd, reason = _open_direct(path, self._probe_offset)
        self.is_direct = not reason
        if reason:
            logger.warning("%s is used through the page cache: %s", path, reason)

    def probe(self) -> None:
        """Write a page and read it back; raises OSError if that fails, or the content differs."""
        content = secrets.token_bytes(PROBE_BYTES)
        self._page[:] = content
        written = self._files.pwrite(self.fd, self._page, self._probe_offset)
        self._files.fdatasync(self.fd)
        self._page[:] = bytes(PROBE_BYTES)
        self._files.preadv(self.fd, [self._page], self._probe_offset)
        if written != PROBE_BYTES or self._page[:] != content:
            raise OSError(errno.EIO, "the page read differs from the page written")

    def moved(self, num_bytes: int) -> None:
        """Record that ``num_bytes`` bytes were moved. Without O_DIRECT, drops the file from the page cache every
        ``_DROP_BYTES`` bytes, which waits for the disk."""
        self._unsynced += num_bytes
        if self.is_direct or self._unsynced < _DROP_BYTES:
            return
        self._unsynced = 0
        try:
            self._files.fdatasync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:                        # a block lost by it fails its checksum when it is read
            logger.error("%s cannot be synced: %s", self._path, error.strerror)

    def close(self) -> None:
        """Close the file. Must be called once."""
        os.close(self.fd)
        self._page.close()


def _open_direct(path: Path, page_offset: int) -> tuple[int, str]:
    """Open a file; returns the descriptor, and the reason why it has no O_DIRECT, empty if it has."""
    reason = ""
    try:
        fd = open_private(path, os.O_DIRECT)
    except OSError as error:
        return open_private(path, 0), f"no O_DIRECT there ({error.strerror})"
    alignment = offset_alignment(fd)
    if not 0 < alignment <= _MAX_ALIGNMENT:
        reason = f"O_DIRECT there needs an alignment of {alignment} bytes" if alignment else "no O_DIRECT there"
    else:
        try:
            with mmap.mmap(-1, PROBE_BYTES) as page:
                os.preadv(fd, [page], page_offset)
        except OSError as error:
            reason = f"reading with O_DIRECT fails ({error.strerror})"
    if reason:
        os.close(fd)
        fd = open_private(path, 0)
    return fd, reason


def offset_alignment(fd: int) -> int:
    """Alignment of file offsets that O_DIRECT requires, in bytes; 0: no O_DIRECT. From statx, else the size of the
    device's logical block, else a page."""
    statx = getattr(ctypes.CDLL(None), "statx", None)
    buffer = ctypes.create_string_buffer(256)
    if statx is not None and statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) == 0:
        mask = int.from_bytes(buffer.raw[:4], "little")
        if mask & _STATX_DIOALIGN:
            return int.from_bytes(buffer.raw[_DIO_OFFSET_ALIGN : _DIO_OFFSET_ALIGN + 4], "little")
    device = os.fstat(fd).st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (node / "queue", node / "../queue"):       # a partition uses the queue of its disk
        try:
            return int((queue / "logical_block_size").read_text())
        except (OSError, ValueError):
            continue
    return PROBE_BYTES
