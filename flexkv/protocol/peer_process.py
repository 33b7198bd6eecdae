"""The process at the other end of a Unix socket, watched until it has ended."""

import os
import select
import socket
import struct

_SO_PEERPIDFD = 77
"""<asm-generic/socket.h>, Linux 6.5; Python has no name for it."""

_CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of the process that connected; the process id is 0 if it is in another pid namespace."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    return pid, uid


class PeerProcess:
    """The process that connected to a socket.

    The kernel closes a socket while its process is still being torn down: on an H200, 50 ms before the driver has
    released the GPU. A pidfd is readable only when every thread of the process has ended and all its descriptors are
    closed, including those of the GPU's driver, so that none of its copies can be in progress.

    Parameters
    ----------
    connection : socket
        The accepted end.

    Attributes
    ----------
    pid : int
        Process id; 0 if the process is in another pid namespace.
    fd : int
        The pidfd, readable when the process has ended; -1 if the kernel provides none. Owned by this object.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.pid, _ = peer_credentials(connection)
        self.fd = -1
        self._is_gone = False
        try:
            self.fd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except ProcessLookupError:
            self._is_gone = True
        except OSError:                                  # before Linux 6.5, or no descriptor is free
            self._open_by_pid()

    def _open_by_pid(self) -> None:
        try:
            self.fd = os.pidfd_open(self.pid) if self.pid > 0 else -1
        except ProcessLookupError:
            self._is_gone = True
        except OSError:
            self.fd = -1

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended and released all its resources; False if that is unknown."""
        if not self._is_gone and self.fd >= 0:
            poll = select.poll()
            poll.register(self.fd, select.POLLIN)
            self._is_gone = bool(poll.poll(0))
        return self._is_gone

    def close(self) -> None:
        """Close the descriptor. Can be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
