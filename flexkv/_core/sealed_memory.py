"""Shared memory of a fixed size: a memfd that no process can shrink or grow.

A process that touches mapped memory beyond the end of a memfd dies of SIGBUS. Every process that has the descriptor
could shrink the memfd; seals (fcntl(2), F_ADD_SEALS) prevent that.
"""

import fcntl
import os

from flexkv.errors import RegistrationError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_HUGETLB_SHIFT = 26
"""MFD_HUGE_SHIFT of <linux/memfd.h>."""


def sealed_memfd(name: str, num_bytes: int, hugepage_bytes: int = 0) -> int:
    """Make a memfd of ``num_bytes`` bytes whose size is final.

    Parameters
    ----------
    name : str
        Shown in ``/proc/PID/maps``.
    num_bytes : int
    hugepage_bytes : int
        0: ordinary pages; else the size of the hugepages to use.

    Returns
    -------
    int
        A descriptor; the caller's to close.

    Raises
    ------
    OSError
        No descriptor is free, or the kernel has no hugepages of that size.
    OverflowError
        ``num_bytes`` does not fit a file offset.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if hugepage_bytes:
        flags |= os.MFD_HUGETLB | (hugepage_bytes.bit_length() - 1) << _HUGETLB_SHIFT
    fd = os.memfd_create(name, flags)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_sealed(fd: int, num_bytes: int, name: str) -> None:
    """Raise RegistrationError unless ``fd`` is a memfd of ``num_bytes`` bytes whose size is final.

    To be called before memory that another process made is mapped.
    """
    try:
        seals, size = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
    except OSError as error:
        raise RegistrationError(f"{name} is not a memfd ({error}): use the controller of this version") from error
    if seals & _SEALS != _SEALS or size != num_bytes:
        raise RegistrationError(
            f"{name} has {size} bytes and seals {seals:#x}; it must have {num_bytes} bytes and be sealed against "
            "resizing: use the controller of this version"
        )
