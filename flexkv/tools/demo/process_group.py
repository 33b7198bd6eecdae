"""A process group that ends completely: with its leader, and with the parent of its leader."""

import contextlib
import os
import select
import signal
import time
from pathlib import Path

GRACE_S = 3.0
"""Time for the other processes of a group to end by themselves after the leader."""


def end_with_parent(lifeline: int = 0) -> None:
    """Leave a watcher in this process's group, which ends the group with this process or with the parent.

    The watcher is a process. A thread would end with this process, and leave behind what this process has started; so
    would PR_SET_PDEATHSIG, which reaches one process alone. To be called first, by the leader of a group, before it has
    threads.

    Parameters
    ----------
    lifeline : int
        Reading end of a pipe whose writing end the parent alone has: the kernel closes it however the parent ends.
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
    os.dup2(nowhere, 1)                          # the parent reads until the last process has closed these
    os.dup2(nowhere, 2)
    while True:
        readable = select.select([lifeline, leader_fd], [], [])[0]
        if leader_fd in readable:
            wait_for_group(leader, GRACE_S)
            break
        if not os.read(lifeline, 4096):
            break
    signal_group(leader, signal.SIGKILL)         # this process too


def signal_group(group: int, number: int) -> None:
    """Send a signal to every process of a group that is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def wait_for_group(group: int, timeout_s: float) -> None:
    """Wait, at most so long, until all processes of a group have ended but its leader and this process."""
    deadline = time.monotonic() + timeout_s
    while (members := _members(group)) and (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):       # it has ended meanwhile
            fd = os.pidfd_open(members[0])
            try:
                select.select([fd], [], [], left)
            finally:
                os.close(fd)


def _members(group: int) -> list[int]:
    """Processes of a group that run, without its leader and this process."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) not in (group, os.getpid()):
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path("/proc", name, "stat").read_text(errors="replace")
                state, _, process_group = stat.rpartition(")")[2].split()[:3]
                if int(process_group) == group and state not in "ZX":
                    found.append(int(name))
    return found
