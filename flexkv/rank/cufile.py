"""NVIDIA's cuFile: batches of reads and writes between files and device memory."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import GdsUnavailableError

NUM_BATCHES = 2
"""Number of batches: while the GPU processes one, the disk works on the other."""

MAX_BATCH = 24
"""Maximum number of reads or writes of a batch. Without a direct path between GPU and disk, cuFile has 64 bounce
buffers for all batches of a process, and hangs if it needs another (docs/design/0011-gpudirect-storage.md)."""

_driver_is_open = False


def _open_driver() -> None:
    """Open the driver, once in each process; GdsUnavailableError if that fails."""
    global _driver_is_open
    if _driver_is_open:
        return
    try:
        from cuda.bindings import cufile

        cufile.driver_open()
    except Exception as error:                  # a missing library raises RuntimeError or an error of the package
        raise GdsUnavailableError(
            f"cuFile cannot be used ({error}): pip install nvidia-cufile, or install CUDA's gds packages"
        ) from error
    _driver_is_open = True


class CuFile:
    """Files, and a buffer in device memory, that are registered with cuFile.

    Not thread safe. The device's context must be current on the calling thread.

    Parameters
    ----------
    fds : sequence of int
        Descriptors of the files. The caller keeps owning them.
    address, num_bytes : int
        Address and size of the buffer.

    Raises
    ------
    GdsUnavailableError
        The library is missing or refuses one of the files. Nothing stays registered then.
    """

    def __init__(self, fds: Sequence[int], address: int, num_bytes: int) -> None:
        _open_driver()
        from cuda.bindings import cufile

        self._cufile = cufile
        self._address, self._registered = address, False
        self._fds: list[int] = []
        self._handles: list[int] = []
        self._batches: list[int] = []
        self._params = np.zeros((NUM_BATCHES, MAX_BATCH), dtype=cufile.io_params_dtype)
        self._under_way = [0] * NUM_BATCHES
        self._events = np.zeros(MAX_BATCH, dtype=cufile.io_events_dtype)
        try:
            for fd in fds:
                self._fds.append(_reopened(fd))
                descriptor = _descriptor(cufile, self._fds[-1])
                self._handles.append(cufile.handle_register(descriptor.ptr))
            cufile.buf_register(address, num_bytes, 0)
            self._registered = True
            for _ in range(NUM_BATCHES):
                self._batches.append(cufile.batch_io_set_up(MAX_BATCH))
        except cufile.cuFileError as error:
            self.close()
            raise GdsUnavailableError(
                f"cuFile refuses the files of ssd_cache_dir ({error}): it needs ext4 or xfs on a local disk, and in a "
                "container the host's /run/udev"
            ) from error

    def submit(
        self, batch: int, write: bool, files: NDArray[np.int32], file_offsets: NDArray[np.uint64],
        memory_offsets: NDArray[np.uint64], size: int,
    ) -> None:
        """Submit n reads or writes of ``size`` bytes each.

        Parameters
        ----------
        batch : int
            Number of an idle batch, less than NUM_BATCHES.
        write : bool
            True: from memory to the files; False: from the files to memory.
        files : (n,) int32
            Indices into ``fds``; n at most MAX_BATCH.
        file_offsets, memory_offsets : (n,) uint64
            Offsets in the files, and offsets from ``address``, in bytes.

        Raises
        ------
        GdsUnavailableError
            cuFile has failed and cannot be used any more.
        """
        cufile, count = self._cufile, len(files)
        params = self._params[batch, :count]
        params["mode"] = cufile.BatchMode.BATCH
        params["opcode"] = cufile.Opcode.WRITE if write else cufile.Opcode.READ
        params["fh"] = np.array(self._handles, dtype=np.int64)[files]
        params["cookie"] = np.arange(count)
        where = params["u"]["batch"]
        where["dev_ptr_base"], where["dev_ptr_offset"] = self._address, memory_offsets
        where["file_offset"], where["size_"] = file_offsets, size
        try:
            cufile.batch_io_submit(self._batches[batch], count, params.ctypes.data, 0)
        except cufile.cuFileError as error:
            raise GdsUnavailableError(f"cuFile has failed ({error})") from error
        self._under_way[batch] = count

    def wait(self, batch: int) -> NDArray[np.int32]:
        """Wait for all reads or writes of the batch.

        Returns
        -------
        (n,) int32
            0 or a negative errno for each.

        Raises
        ------
        GdsUnavailableError
            cuFile has failed and cannot be used any more; the results of the batch are unknown.
        """
        cufile, count = self._cufile, self._under_way[batch]
        self._under_way[batch] = 0
        results = np.full(count, -errno.EIO, dtype=np.int32)
        sizes = self._params[batch]["u"]["batch"]["size_"]
        try:
            while count:
                got = ctypes.c_uint(count)
                cufile.batch_io_get_status(self._batches[batch], 1, ctypes.addressof(got), self._events.ctypes.data, 0)
                events = self._events[: got.value]
                pieces = events["cookie"].astype(np.intp)
                good = (events["status"] == cufile.Status.COMPLETE) & (events["ret"] == sizes[pieces])
                results[pieces[good]] = 0
                count -= got.value
        except cufile.cuFileError as error:
            raise GdsUnavailableError(f"cuFile has failed ({error})") from error
        return results

    def close(self) -> bool:
        """Wait for all batches, then deregister files and buffer. Can be called again.

        Returns
        -------
        bool
            False: cuFile has failed and may still read or write.
        """
        at_rest = True
        for number, batch in enumerate(self._batches):
            try:
                self.wait(number)
            except GdsUnavailableError:
                at_rest = False
            self._cufile.batch_io_destroy(batch)
        if self._registered:
            self._cufile.buf_deregister(self._address)
        for handle in self._handles:
            self._cufile.handle_deregister(handle)
        for fd in self._fds:
            os.close(fd)
        self._batches, self._registered, self._handles, self._fds = [], False, [], []
        return at_rest


def _reopened(fd: int) -> int:
    """Open the same file again, without flags that cuFile refuses (O_NOFOLLOW)."""
    direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | direct)


def _descriptor(cufile: Any, fd: int) -> Any:
    descriptor = cufile.Descr()
    descriptor.type = cufile.FileHandleType.OPAQUE_FD
    descriptor.handle.fd = fd
    descriptor.fs_ops = 0                       # uninitialized, and cuFile dereferences it
    return descriptor
