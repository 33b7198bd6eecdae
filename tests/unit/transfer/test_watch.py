"""Handlers of descriptors and timers: an exception stays with its descriptor, and the thread goes on."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv.protocol import peer_process
from flexkv.protocol.peer_process import PeerProcess
from flexkv.transfer import background
from flexkv.transfer.background import BackgroundThread
from flexkv.transfer.repeated_log import RepeatedLog
from flexkv.transfer.watch import Watch
from tests.support.harness import until


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.close()


def event() -> int:
    return os.eventfd(1, os.EFD_NONBLOCK)


def test_a_handler_that_fails_holds_up_no_other(watch: Watch) -> None:
    fds, called, failed = [event() for _ in range(3)], [], []
    watch.add(fds[0], lambda: called.append(0), lambda error: None)
    watch.add(fds[1], lambda: 1 // 0, failed.append)
    watch.add(fds[2], lambda: called.append(2), lambda error: None)
    watch.turn(0.0)
    assert sorted(called) == [0, 2]
    assert isinstance(failed[0], ZeroDivisionError)
    for fd in fds:
        watch.remove(fd)
        watch.remove(fd)
        os.close(fd)
    watch.turn(0.0)
    assert len(called) == 2


def test_a_descriptor_that_is_removed_by_another_handler_is_not_called(watch: Watch) -> None:
    fds, called = [event(), event()], []
    for fd, other in (fds, fds[::-1]):
        watch.add(fd, lambda fd=fd, other=other: (called.append(fd), watch.remove(other)), lambda error: None)
    watch.turn(0.0)
    assert len(called) == 1
    for fd in fds:
        watch.remove(fd)
        os.close(fd)


def test_pauses_and_timers(watch: Watch) -> None:
    fd, called = event(), []
    watch.add(fd, lambda: called.append(0), lambda error: None)
    watch.pause(fd, 0.05)
    watch.turn(0.0)
    assert called == []
    start = time.monotonic()
    while not called:
        watch.turn(1.0)
    assert 0.04 < time.monotonic() - start < 0.9
    watch.remove(fd)
    os.close(fd)
    watch.pause(fd, 0.01)                                # unknown by now
    for seconds in (0.02, 0.01):
        watch.after(seconds, lambda seconds=seconds: called.append(seconds))
    while len(called) < 3:
        watch.turn(1.0)
    assert called[1:] == [0.01, 0.02]
    watch.wake()
    start = time.monotonic()
    watch.turn(5.0)
    assert time.monotonic() - start < 1


def test_lines_that_come_back_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    log = RepeatedLog(logging.getLogger("flexkv.test"), interval_s=0.05)
    for _ in range(1000):
        log.write(logging.ERROR, "again")
    assert len(caplog.records) == 1
    time.sleep(0.06)
    log.write(logging.ERROR, "again", ValueError("x"))
    assert caplog.records[1].getMessage().startswith("again (999 more lines")
    assert caplog.records[1].exc_info


def test_a_thread_survives_and_gives_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(background, "_MAX_PAUSE_S", 0.001)
    turns, given_up = [0], [0]

    def turn() -> None:
        turns[0] += 1
        if turns[0] % 5:                                 # never five in a row, at first
            raise SystemExit(1)

    def abandon() -> None:
        given_up[0] += 1
        raise KeyError("and that fails, too")

    thread = BackgroundThread("test", turn, lambda: False, abandon)
    thread.start()
    until(lambda: turns[0] > 20)
    assert given_up == [0]
    turns[0] = -10_000_000 + 1                           # now they are
    monkeypatch.setattr(thread, "_turn", lambda: 1 // 0)
    until(lambda: given_up == [1])
    time.sleep(0.05)
    assert given_up == [1]
    assert thread.is_alive()
    thread.stop()
    thread.join(5.0)
    assert not thread.is_alive()


CHILD = """
import socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
connection.close()
print("hung up", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("option", [peer_process._SO_PEERPIDFD, 9999])
def test_a_process_that_hung_up_is_there_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: int
) -> None:
    """With SO_PEERPIDFD, and on kernels that have none."""
    monkeypatch.setattr(peer_process, "_SO_PEERPIDFD", option)
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            connection, _ = listener.accept()
            assert child.stdout is not None
            assert child.stdout.readline() == "hung up\n"
            assert connection.recv(1) == b""
            process = PeerProcess(connection)
            assert process.pid == child.pid
            assert not process.is_gone
            child.kill()
            until(lambda: process.is_gone)
        process.close()
        assert process.is_gone
        late = PeerProcess(connection)                   # it is reaped
        assert late.is_gone
        late.close()
        late.close()
        connection.close()
    assert len(os.listdir("/proc/self/fd")) == before
