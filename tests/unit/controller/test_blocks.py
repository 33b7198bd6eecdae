"""KVManager with namespaces: quotas by request, reasons and counts, pins, by API and by the command line."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.cache.reasons import MissReason
from flexkv.cli.main import main
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import ConfigError, PinError
from flexkv.kvmanager import KVManager
from flexkv.protocol.requests import Pin, ask
from tests.support.harness import TOKENS, Tensors, local, make_manager, mapping, space_of, tokens_of, until

NAMESPACES = {"calm": {"guaranteed": 0.5}, "flood": {"limit": 0.5}, "default": {"priority": -1}}


def put(manager: KVManager, tensors: Tensors, count: int, seed: int, name: str) -> None:
    pages = list(range(count))
    tensors.fill(pages, seed)
    task = manager.put_async(tokens_of(count, seed), mapping(pages), namespace=["salt", name])
    assert manager.wait(task, completely=True)[task].status is Status.SUCCESS


def matched(manager: KVManager, count: int, seed: int, name: str) -> int:
    task, mask = manager.get_match(tokens_of(count, seed), namespace=["salt", name])
    manager.cancel(task)
    return int(mask.sum()) // TOKENS


def test_a_flood_cannot_push_another_under_its_guarantee(tmp_path: Path) -> None:
    cache = {"namespaces": NAMESPACES, "evict_start_threshold": 1.0}
    with local(tmp_path, 16, cache=cache) as (manager, _, tensors):
        put(manager, tensors, 8, 1, "calm")
        expected = tensors.read(range(8))
        for seed in range(10, 40):
            put(manager, tensors, 7, seed, "flood" if seed % 2 else "unknown")
        stats = manager.stats()
        assert stats["namespace_calm_blocks"] == 8
        assert stats["namespace_flood_blocks"] + stats["namespace_default_blocks"] <= 8
        tensors.zero()
        task = manager.get_async(tokens_of(8, 1), mapping(range(8)), namespace=["salt", "calm"])
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert tensors.read(range(8)) == expected               # the right bytes, not only a hit
        put(manager, tensors, 12, 2, "flood")
        assert manager.stats()["namespace_flood_blocks"] == 8   # its limit
        assert matched(manager, 12, 2, "flood") == 8
        assert manager.stats()["partial_over_quota"] == 1


def test_every_match_has_a_reason_and_is_counted(tmp_path: Path) -> None:
    with local(tmp_path, 16, cache={"namespaces": NAMESPACES}) as (manager, _, tensors):
        assert matched(manager, 3, 1, "calm") == 0
        put(manager, tensors, 3, 1, "calm")
        task, _ = manager.get_match(np.concatenate([tokens_of(3, 1), tokens_of(2, 9)]), namespace=["calm"])
        found = manager.task_match(task)
        assert found is not None
        assert (found.num_ready, found.reason) == (0, MissReason.NEVER_SEEN)   # another namespace
        manager.cancel(task)
        assert manager.task_match(task) is None
        assert matched(manager, 3, 1, "calm") == 3
        for seed in range(10, 20):
            put(manager, tensors, 8, seed, "calm")
        hasher = manager.blocks.hasher(["salt", "calm"])
        hasher.extend(tokens_of(3, 1))
        tenant = manager.blocks.tenant(["salt", "calm"])
        lookup = manager.blocks.lookup(hasher.keys, 0, tenant, count=True)
        assert (lookup.num_ready, lookup.reason) == (0, MissReason.EVICTED)
        assert lookup.evicted_at > 0
        manager.blocks.lookup(hasher.keys, 0, tenant)                   # not counted
        told = {name: count for name, count in manager.stats().items() if name.startswith(("miss", "part", "full"))}
        assert {name: count for name, count in told.items() if count} == {
            "full_hits": 1, "miss_never_seen": 2, "miss_evicted": 1
        }


def test_what_has_expired_is_computed_again(tmp_path: Path) -> None:
    with local(tmp_path, 16, cache={"namespaces": {"short": {"ttl_s": 1000}}}) as (manager, _, tensors):
        put(manager, tensors, 3, 1, "short")
        assert matched(manager, 3, 1, "short") == 3
        cache = space_of(manager).index
        assert cache is not None
        clock = cache._clock
        cache._clock = lambda: clock() + 2000.0
        assert matched(manager, 3, 1, "short") == 0
        assert manager.stats()["miss_expired"] == 1
        put(manager, tensors, 3, 2, "short")                    # after it the tier is swept
        assert manager.stats()["expired_blocks"] == 3
        put(manager, tensors, 3, 1, "short")
        assert matched(manager, 3, 1, "short") == 3


def test_pins(tmp_path: Path) -> None:
    with local(tmp_path, 16) as (manager, _, tensors):
        put(manager, tensors, 5, 1, "calm")
        with pytest.raises(PinError, match="no block"):
            manager.pin(tokens_of(5, 1), name="p")              # another namespace
        assert manager.pin(tokens_of(5, 1)[: 3 * TOKENS + 1], ["salt", "calm"], "p") == Pin("p", 3)
        for seed in range(10, 20):
            put(manager, tensors, 8, seed, "flood")
        assert matched(manager, 5, 1, "calm") == 3
        assert manager.pins() == [Pin("p", 3)]
        assert manager.stats()["pinned_blocks"] == 3
        put(manager, tensors, 6, 2, "calm")
        with pytest.raises(PinError, match="max_pinned_share allows 8"):
            manager.pin(tokens_of(6, 2), ["salt", "calm"], "q")
        manager.reset()
        assert manager.pins() == []


def test_before_the_ranks_are_there_nothing_can_be_pinned(tmp_path: Path) -> None:
    manager = make_manager(tmp_path / "s")
    try:
        with pytest.raises(PinError, match="no rank has registered"):
            manager.pin(tokens_of(2))
        with pytest.raises(PinError, match="no rank has registered"):
            manager.unpin("p")
        assert manager.pins() == []
    finally:
        manager.shutdown()
    with pytest.raises(ConfigError, match="namespaces: a: limit"):
        make_manager(tmp_path / "s", cache={"namespaces": {"a": {"limit": "all"}}})


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    status = main(args)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_pins_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port, tokens = ["--socket", str(tmp_path / "s")], tokens_of(5, 1)
    (tmp_path / "list").write_text(json.dumps(tokens.tolist()))
    (tmp_path / "words").write_text("\n".join(str(token) for token in tokens[: 2 * TOKENS]))
    with local(tmp_path, 16) as (manager, _, tensors):
        put(manager, tensors, 5, 1, "calm")
        namespace = ["--namespace", "salt", "calm"]
        assert command(capsys, "pins", *port) == (0, "nothing is pinned\n")
        told = command(capsys, "pin", *port, "--tokens", str(tmp_path / "list"), *namespace, "--name", "all")
        assert told == (0, "all: 5 blocks are pinned\n")
        assert command(capsys, "pin", *port, "--tokens", str(tmp_path / "words"), *namespace)[0] == 0
        assert [pin.num_blocks for pin in manager.pins()] == [5, 2]
        assert "all: 5 blocks\n" in command(capsys, "pins", *port)[1]
        assert command(capsys, "unpin", *port, "--name", "all") == (0, "all: 5 blocks are unpinned\n")
        assert command(capsys, "unpin", *port, "--name", "all") == (
            1, "flexkv unpin: nothing is pinned as 'all'; flexkv pins lists all pins\n"
        )
        assert "no block" in command(capsys, "pin", *port, "--tokens", str(tmp_path / "list"))[1]
        assert len(manager.pins()) == 1
        manager.reset()
    assert command(capsys, "pins", *port)[0] == 1
    assert "no controller listens" in command(capsys, "pins", *port)[1]


@pytest.mark.parametrize("letter", ["n", "\\", "\u00e9", '"'])
def test_all_pins_are_listed(tmp_path: Path, letter: str) -> None:
    """As many as are allowed, with names as long as they may be, however long they are in JSON."""
    length = 120 // len(letter.encode())
    with local(tmp_path, 16) as (manager, _, tensors):
        put(manager, tensors, 2, 1, "calm")
        names = [f"{number:04d}" + letter * length for number in range(256)]
        made = [manager.pin(tokens_of(2, 1), ["salt", "calm"], name) for name in names]
        listed = ask(str(tmp_path / "s"), {"command": "pins"})
        assert listed == made
        for pin in made:
            manager.unpin(pin.name)
        assert ask(str(tmp_path / "s"), {"command": "pins"}) == []


@pytest.mark.parametrize("text", ["", "1 2 x", "[1, [2]]", "-1", "4294967296", "1.5"])
def test_tokens_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "t").write_text(text)
    status, told = command(capsys, "pin", "--socket", str(tmp_path / "s"), "--tokens", str(tmp_path / "t"))
    assert status == 1
    assert "tokens" in told


def say(path: Path, message: bytes, fds: tuple[int, ...] = ()) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10.0)
        connection.connect(str(path))
        socket.send_fds(connection, [message], fds)
        reply: dict[str, Any] = json.loads(connection.recv(1 << 17))
        return reply


def test_bad_requests_are_refused_and_change_nothing(tmp_path: Path) -> None:
    pin = {"command": "pin", "name": "p", "namespace": ["salt", "calm"], "num_tokens": 2 * TOKENS}
    with local(tmp_path, 16) as (manager, _, tensors):
        put(manager, tensors, 5, 1, "calm")
        before = len(os.listdir("/proc/self/fd"))
        for message, error in [
            (b"FLEXKVC9{}", "another version"),
            (b"FLEXKVC1", "no JSON object"),
            (b"FLEXKVC1[" + b"[" * 1500, "no JSON object"),
            (b"FLEXKVC1\xff\xfe", "no JSON object"),
            (b"FLEXKVC1" + b" " * 5000, "no JSON object"),
            (b'FLEXKVC1{"command": "drop"}', "is no request"),
            (b'FLEXKVC1{"command": "pins", "x": 1}', "is no request"),
            (b'FLEXKVC1{"command": "unpin", "name": 7}', "is no request"),
            (b'FLEXKVC1{"command": "unpin", "name": "q"}', "nothing is pinned"),
            (b"FLEXKVC1" + json.dumps({**pin, "namespace": [1]}).encode(), "is no request"),
            (b"FLEXKVC1" + json.dumps({**pin, "num_tokens": 1 << 40}).encode(), "give 1 to"),
            (b"FLEXKVC1" + json.dumps(pin).encode(), "sealed memfd"),
        ]:
            assert error in say(tmp_path / "s", message)["error"]
        read_end, write_end = os.pipe()
        memory = os.memfd_create("tokens", os.MFD_ALLOW_SEALING)
        os.write(memory, tokens_of(2, 1).astype(np.uint32).tobytes())
        for fds in ((read_end,), (memory,), (memory, memory)):      # could hang, or change
            assert "sealed memfd" in say(tmp_path / "s", b"FLEXKVC1" + json.dumps(pin).encode(), fds)["error"]
        for fd in (read_end, write_end, memory):
            os.close(fd)
        assert manager.pins() == []
        assert matched(manager, 5, 1, "calm") == 5
        until(lambda: len(os.listdir("/proc/self/fd")) == before)       # it answers before it closes them
