"""A process group that ends as a whole when its leader or the leader's parent ends."""

import contextlib
import os
import select
import signal
import time
from pathlib import Path

GRACE_S = 3.0
"""Time that the other processes of a group have to end after the leader, in seconds; then they are killed."""


def end_with_parent(lifeline: int = 0) -> None:
    """Start a watcher process in this process's group, which ends the group when this process or its parent ends.

    The watcher is a process, because a thread would end with this process and leave its children running.
    PR_SET_PDEATHSIG would also leave them, because it signals one process only. Must be called by the leader of a
    group, before it starts threads.

    Parameters
    ----------
    lifeline : int
        Reading end of a pipe whose writing end only the parent has; the kernel closes it however the parent ends.
        Standard input by default.
    """
    leader = os.getpid()
    leader_fd = os.pidfd_open(leader)
    if os.fork() == 0:
        try:
            _watch(lifeline, leader, leader_fd)
        finally:
            os._exit(0)
    os.close(leader_fd)


def _watch(lifeline: int, leader: int, leader_fd: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)                          # the parent reads until all processes have closed these
    os.dup2(nowhere, 2)
    while True:
        readable = select.select([lifeline, leader_fd], [], [])[0]
        if leader_fd in readable:
            wait_for_group(leader, GRACE_S)
            break
        if not os.read(lifeline, 4096):
            break
    signal_group(leader, signal.SIGKILL)         # including this process


def signal_group(group: int, number: int) -> None:
    """Send a signal to every remaining process of a group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def wait_for_group(group: int, timeout_s: float) -> None:
    """Wait until all processes of a group except its leader and this process have ended, at most ``timeout_s``
    seconds."""
    deadline = time.monotonic() + timeout_s
    while (members := _members(group)) and (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):       # it has ended meanwhile
            fd = os.pidfd_open(members[0])
            try:
                select.select([fd], [], [], left)
            finally:
                os.close(fd)


def _members(group: int) -> list[int]:
    """Ids of the running processes of a group, without its leader and this process."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) not in (group, os.getpid()):
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path("/proc", name, "stat").read_text(errors="replace")
                state, _, process_group = stat.rpartition(")")[2].split()[:3]
                if int(process_group) == group and state not in "ZX":
                    found.append(int(name))
    return found
