"""An engine on two nodes, each process of its own: controller, storage host, ranks; and what may befall them."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.harness import PAGES, RankProcess, Tensors, until

ROOT = Path(__file__).parents[2]
SECRET = "a secret of the tests"
SLOTS = 48

_CONTROLLER = """
import json, sys, time
from tests.support.harness import *
settings = json.loads(sys.argv[1])
manager = KVManager(
    ModelConfig(num_layers=LAYERS, num_kv_heads=2, head_size=64, dtype="float16", tp_size=settings["ranks"], nnodes=2),
    CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=settings["slots"]), gpu_register_port=settings["port"],
    transfer_config=TransferConfig(**settings["transfer"]),
)
manager.start()

def ready():
    return manager.is_ready() and manager.stats().get("num_slots") == settings["slots"]

def put(blocks, seed, pages):
    task = manager.put_async(tokens_of(blocks, seed), mapping(pages))
    return manager.wait(task, timeout=5, completely=True)[task].status.name

def get(blocks, seed, pages):
    task, mask = manager.get_match(tokens_of(blocks, seed))
    found = int(mask.sum()) // TOKENS
    if not found:
        manager.cancel(task)
        return "NOTFOUND", 0
    manager.launch(task, mapping(pages[:found]))
    return manager.wait(task, timeout=5, completely=True)[task].status.name, found

def drained():
    check_drained(manager)
    return True

print("up", flush=True)
for line in sys.stdin:
    name, args = json.loads(line)
    start = time.monotonic()
    value = globals()[name](*args)
    print(json.dumps([value, time.monotonic() - start]), flush=True)
manager.shutdown()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Link:
    """A TCP connection between the nodes that can be cut, and can fall silent."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.is_cut = self.is_silent = False
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                theirs, _ = self._server.accept()
            except OSError:
                return
            try:
                if self.is_cut:
                    raise ConnectionRefusedError
                ours = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                theirs.close()
                continue
            self._connections += [ours, theirs]
            for pair in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                while self.is_silent:
                    time.sleep(0.01)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def cut(self) -> None:
        self.is_cut = True
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def mend(self) -> None:
        self.is_cut = self.is_silent = False

    def close(self) -> None:
        self.cut()
        self._server.close()


class VirtualLink:
    """Two network namespaces with a pair of virtual Ethernet devices between them. Needs root."""

    address = "10.90.0.1"

    def __init__(self) -> None:
        self._names = [f"flexkv{os.getpid()}{end}" for end in "ab"]
        self._is_silent = False
        devices = ["fkv0", "fkv1"]
        for name in self._names:
            _ip("netns", "add", name)
        _ip("link", "add", devices[0], "netns", self._names[0], "type", "veth", "peer", "name", devices[1], "netns",
            self._names[1])
        for number, (name, device) in enumerate(zip(self._names, devices, strict=True), 1):
            _ip("-n", name, "addr", "add", f"10.90.0.{number}/24", "dev", device)
            for each in ("lo", device):
                _ip("-n", name, "link", "set", each, "up")

    def inside(self, end: int) -> list[str]:
        """Command prefix of a process at one end."""
        return ["ip", "netns", "exec", self._names[end]]

    def cut(self) -> None:
        _ip("-n", self._names[0], "link", "set", "fkv0", "down")

    @property
    def is_silent(self) -> bool:
        """Whether packets are lost one way, at the other end."""
        return self._is_silent

    @is_silent.setter
    def is_silent(self, value: bool) -> None:
        self._is_silent = value
        _ip("-n", self._names[1], "link", "set", "fkv1", "down" if value else "up")

    def mend(self) -> None:
        _ip("-n", self._names[0], "link", "set", "fkv0", "up")
        self.is_silent = False

    def close(self) -> None:
        for name in self._names:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Cluster:
    """Controller, storage host and ranks. The first half of the ranks is on the controller's node.

    ``controller_in``, ``host_in``: command prefixes that run a process in a network namespace.
    """

    def __init__(
        self, path: Path, ranks: int, port: int, address: str = "127.0.0.1", link_port: int = 0,
        controller_in: Sequence[str] = (), host_in: Sequence[str] = (),
    ) -> None:
        self.path, self.num_ranks, self._port, self._address = path, ranks, port, address
        self._link_port = link_port or port
        self._controller_in, self._host_in = list(controller_in), list(host_in)
        self.socket = {node: str(path / f"node{node}") for node in (0, 1)}
        self.start_controller()
        self.start_host()
        self.ranks = [self._rank(rank) for rank in range(ranks)]

    # ---- processes --------------------------------------------------------------------------------------------

    def _settings(self, port: int) -> dict[str, Any]:
        return {"master_host": self._address, "master_ports": str(port), "node_secret": SECRET}

    def start_controller(self) -> None:
        settings = {"ranks": self.num_ranks, "slots": SLOTS, "port": self.socket[0],
                    "transfer": self._settings(self._port)}
        self.controller = subprocess.Popen(
            [*self._controller_in, sys.executable, "-c", _CONTROLLER, json.dumps(settings)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        assert self.controller.stdout is not None
        assert self.controller.stdout.readline() == "up\n"

    def start_host(self) -> None:
        settings = {f"FLEXKV_{key.upper()}": text for key, text in self._settings(self._link_port).items()}
        self.host = subprocess.Popen(
            [*self._host_in, sys.executable, "-m", "flexkv.cli", "node", "--register", self.socket[1]], cwd=ROOT,
            env={**os.environ, **settings, "FLEXKV_NUM_CPU_BLOCKS": str(SLOTS), "FLEXKV_LOG_LEVEL": "WARNING"},
        )

    def _rank(self, rank: int) -> RankProcess:
        return RankProcess(self.socket[int(rank >= self.num_ranks // 2)], rank)

    def kill_rank(self, rank: int) -> None:
        self.ranks[rank].signal(signal.SIGKILL)

    def restart_rank(self, rank: int) -> None:
        self.ranks[rank].kill()
        self.ranks[rank] = self._rank(rank)

    def kill_controller(self) -> None:
        self.controller.kill()
        self.controller.communicate()

    def kill_host(self) -> None:
        self.host.kill()
        self.host.wait()

    def close(self) -> None:
        for process in (self.controller, self.host):
            if process.poll() is None:
                process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.host.wait(20)
        self.controller.kill()
        self.controller.communicate()
        self.host.kill()
        self.host.wait()
        for rank in self.ranks:
            rank.kill()

    # ---- requests ---------------------------------------------------------------------------------------------

    def ask(self, name: str, *args: Any) -> tuple[Any, float]:
        """Value and duration of a call of the controller; ConnectionError if it was killed meanwhile."""
        assert self.controller.stdin is not None
        assert self.controller.stdout is not None
        try:
            self.controller.stdin.write(json.dumps([name, args]) + "\n")
            self.controller.stdin.flush()
            line = self.controller.stdout.readline()
        except OSError as error:
            raise ConnectionError from error
        if not line:
            raise ConnectionError
        value, seconds = json.loads(line)
        return value, seconds

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        until(lambda: bool(self.ask("ready")[0]), timeout_s)

    def fill(self, pages: Sequence[int], seed: int) -> None:
        for rank, process in enumerate(self.ranks):
            process("tensors", "fill", list(pages), 1000 * seed + rank)

    def check(self, pages: Sequence[int], seed: int, blocks: int) -> None:
        """The first ``blocks`` pages of every rank hold what the rank computed for the sequence ``seed``."""
        for rank, process in enumerate(self.ranks):
            expected = Tensors(PAGES)
            expected.fill(range(blocks), 1000 * seed + rank)
            assert process("tensors", "read", list(pages[:blocks])) == expected.read(range(blocks)), (rank, seed)


def in_background(function: Callable[[], None], after_s: float) -> threading.Thread:
    """Call a function a little later, on another thread."""
    timer = threading.Timer(after_s, function)
    timer.start()
    return timer
