"""Closes in a forked child the sockets of its parent, which would seem alive for as long as the child."""

import os
import socket
import weakref

_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def close_in_children(connection: socket.socket) -> None:
    """Close the child's copy of a socket in each process that is forked from this one.

    A connection hangs up, and a port is free, only when every copy is closed. With a copy in a child the other end
    would not notice the death of this process.
    """
    _sockets.add(connection)


def _close_copies() -> None:
    for connection in list(_sockets):
        connection.close()


os.register_at_fork(after_in_child=_close_copies)
