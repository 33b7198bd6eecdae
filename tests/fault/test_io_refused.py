"""Where the kernel refuses io_uring, threads replace it, and the log names the cause."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

REFUSED = """
import ctypes, mmap, os, select, struct, sys
import numpy as np
from flexkv._core.io.io_queue import READ, IoQueue
code, path = int(sys.argv[1]), sys.argv[2]
SETUP = 425
program = b"".join(struct.pack("HBBI", *step) for step in (
    (0x20, 0, 0, 0), (0x15, 0, 1, SETUP), (0x06, 0, 0, 0x00050000 | code), (0x06, 0, 0, 0x7FFF0000)))
memory = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("steps", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0                         # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(memory))), 0, 0) == 0      # PR_SET_SECCOMP
fd = os.open(path, os.O_RDWR)
pool = mmap.mmap(-1, 16384)
try:
    IoQueue([fd], pool, method="uring")
    raise AssertionError("io_uring is there")
except OSError as error:
    assert error.errno == code, error
queue = IoQueue([fd], pool)
queue.register(16384)
zero = np.zeros(1, dtype=np.int64)
queue.submit(READ, zero.astype(np.uint64), zero.astype(np.int32), zero, zero, 16384)
assert select.select([queue.event_fd], [], [], 20)[0]
assert queue.take()[1].tolist() == [0]
assert pool[:] == os.pread(fd, 16384, 0)
print(queue.method, queue.reason)
queue.close()
"""


@pytest.mark.parametrize(("code", "blame"), [(errno.EPERM, "seccomp"), (errno.ENOSYS, "5.11")])
def test_where_io_uring_is_refused_threads_do_it(tmp_path: Path, code: int, blame: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(16384))
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(code), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("threads ")
    assert blame in done.stdout


UNREGISTERED = """
import ctypes, mmap, os, resource, select, sys
import numpy as np
from flexkv._core.io.io_queue import READ, WRITE, IoQueue
SIZE = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
sets[0] &= ~(1 << 14)                                          # CAP_IPC_LOCK, effective
sets[1] &= ~(1 << 14)                                          # and permitted
assert libc.capset(header, sets) == 0
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
fd = os.open(sys.argv[1], os.O_RDWR)
pool = mmap.mmap(-1, 2 * SIZE)
queue = IoQueue([fd], pool, method="uring")
queue.register(2 * SIZE)
def move(kind, file_offset, offset):
    zero = np.zeros(1, dtype=np.int64)
    queue.submit(kind, zero.astype(np.uint64), zero.astype(np.int32), zero + file_offset, zero + offset, SIZE)
    assert select.select([queue.event_fd], [], [], 20)[0]
    assert queue.take()[1].tolist() == [0]
move(READ, 0, 0)
assert pool[:SIZE] == os.pread(fd, SIZE, 0)
pool[SIZE:] = os.urandom(SIZE)
move(WRITE, SIZE, SIZE)
assert pool[SIZE:] == os.pread(fd, SIZE, SIZE)
print(queue.method, queue.registered_bytes, queue.reason)
queue.close()
"""


def test_where_memory_cannot_be_locked_it_works_unregistered(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2 << 20))
    done = subprocess.run(
        [sys.executable, "-c", UNREGISTERED, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("uring 0 ")
    assert "memlock limit (ulimit -l)" in done.stdout
