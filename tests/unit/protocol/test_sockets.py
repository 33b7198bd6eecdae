"""Sockets in the file system: other files stay, one of two starts listens, and no connect waits for ever."""

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from flexkv.errors import FlexKVError, PinError, RegistrationError
from flexkv.protocol import sockets as socket_file
from flexkv.protocol.requests import ask
from flexkv.protocol.sockets import ListeningSocket, connect, remove_dead_sockets
from flexkv.rank.tp_client import KVTPClient
from tests.support.harness import Tensors, make_manager


def dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as gone:
        gone.bind(str(path))


@pytest.mark.parametrize("kind", ["file", "directory", "link to a file", "link to nothing", "pipe", "link to a socket"])
def test_what_is_no_socket_stays(tmp_path: Path, kind: str) -> None:
    path, precious = tmp_path / "weights.bin", tmp_path / "precious"
    precious.write_bytes(b"precious" * 1000)
    match kind:
        case "file":
            path.write_bytes(b"precious" * 1000)
        case "directory":
            path.mkdir()
        case "link to a file":
            path.symlink_to(precious)
        case "link to nothing":
            path.symlink_to(tmp_path / "nothing")
        case "pipe":
            os.mkfifo(path)
        case "link to a socket":
            dead_socket(tmp_path / "s")
            path.symlink_to(tmp_path / "s")
    before = os.lstat(path), sorted(os.listdir(tmp_path))
    with pytest.raises(FlexKVError, match="stays as it is"):
        make_manager(path)
    assert (os.lstat(path), sorted(os.listdir(tmp_path))) == before
    assert precious.read_bytes() == b"precious" * 1000


def test_a_socket_of_another_program_or_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()
        with pytest.raises(RegistrationError, match="another program"):
            ListeningSocket(tmp_path / "s")
    dead_socket(tmp_path / "theirs")
    monkeypatch.setattr(socket_file.os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(RegistrationError, match="socket of user"):
        ListeningSocket(tmp_path / "theirs")
    assert (tmp_path / "theirs").is_socket()


def test_of_many_starts_over_a_stale_socket_one_listens(tmp_path: Path) -> None:
    for round_number in range(20):
        path = tmp_path / f"s{round_number}"
        dead_socket(path)
        barrier = threading.Barrier(8)

        def start(path: Path = path, barrier: threading.Barrier = barrier) -> ListeningSocket | None:
            barrier.wait()
            with suppress(RegistrationError):
                return ListeningSocket(path)
            return None

        with ThreadPoolExecutor(8) as pool:
            made = [found.result() for found in [pool.submit(start) for _ in range(8)]]
        [listening] = [one for one in made if one is not None]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as rank:
            rank.connect(str(path))
        listening.socket.accept()[0].close()
        listening.close()
        assert not path.exists()


def test_closing_leaves_the_socket_of_a_successor(tmp_path: Path) -> None:
    first = ListeningSocket(tmp_path / "s")
    (tmp_path / "s").unlink()
    second = ListeningSocket(tmp_path / "s")
    first.close()
    first.close()
    assert (tmp_path / "s").is_socket()
    second.close()
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_locked_for_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_file, "_LOCK_S", 0.1)
    with socket_file._locked(tmp_path), pytest.raises(RegistrationError, match="locked by another process"):
        ListeningSocket(tmp_path / "s")


def test_dead_sockets_are_removed_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    runtime = tmp_path / "flexkv"
    runtime.mkdir(mode=0o700)
    for name in ("vllm-1.sock", "register-3.sock", "notes.sock"):
        dead_socket(runtime / name)
    (runtime / "vllm-2.sock").write_text("a file")
    mine = f"layers-{os.getpid()}-0-0.sock"
    for name in ("layers-4194305-0-0.sock", mine):             # the first: beyond every process number
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
            gone.bind(str(runtime / name))
    alive = ListeningSocket(runtime / "register-7.sock")
    manager = make_manager(tmp_path / "s")
    assert sorted(os.listdir(runtime)) == [mine, "notes.sock", "register-7.sock", "vllm-2.sock"]
    manager.shutdown()
    alive.close()
    assert remove_dead_sockets(tmp_path / "nowhere") == []


def full(path: Path) -> tuple[socket.socket, list[socket.socket]]:
    """A controller that is stopped, with a full queue of connections."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(1)
    queued = []
    while True:
        each = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        queued.append(each)
        try:
            each.connect(str(path))
        except BlockingIOError:
            return listener, queued


def test_a_stopped_controller_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener, queued = full(tmp_path / "s")
    monkeypatch.setattr("flexkv.protocol.requests._TIMEOUT_S", 0.3)
    start = time.monotonic()
    with pytest.raises(RegistrationError, match="accepts no connections"):
        connect(tmp_path / "s", time.monotonic() + 0.2)
    with pytest.raises(RegistrationError, match="another controller listens"):
        ListeningSocket(tmp_path / "s")
    with pytest.raises(PinError, match="accepts no connections"):
        ask(str(tmp_path / "s"), {"command": "pins"})
    for _ in queued[:-1]:
        listener.accept()[0].close()
    with pytest.raises(PinError, match="has not answered"):
        ask(str(tmp_path / "s"), {"command": "pins"})
    client = KVTPClient(str(tmp_path / "s"))
    client.register_tensors(Tensors().specs(), 0.3)
    with pytest.raises(RegistrationError, match="the controller is stopped"):
        client.wait_connected(5.0)
    client.close()
    assert time.monotonic() - start < 5
    for each in [listener, *queued]:
        each.close()


def test_closing_ends_a_connect(tmp_path: Path) -> None:
    listener, queued = full(tmp_path / "s")
    client = KVTPClient(str(tmp_path / "s"))
    client.register_tensors(Tensors().specs(), 60.0)
    start = time.monotonic()
    client.close()
    assert time.monotonic() - start < 2
    for each in [listener, *queued]:
        each.close()


def test_no_start_takes_over_a_path_whose_file_is_being_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new file could get the inode number of the old one, and be removed in its place."""
    path, locked, attempts = tmp_path / "s", socket_file._locked, list[str]()

    def start_meanwhile(directory: Path) -> AbstractContextManager[None]:
        monkeypatch.setattr(socket_file, "_locked", locked)
        try:
            ListeningSocket(path).close()
        except RegistrationError as error:
            attempts.append(str(error))
        return locked(directory)

    first = ListeningSocket(path)
    monkeypatch.setattr(socket_file, "_locked", start_meanwhile)
    first.close()
    assert "listens" in attempts[0]
    assert not path.exists()
    second = ListeningSocket(path)
    assert path.exists()
    second.close()
