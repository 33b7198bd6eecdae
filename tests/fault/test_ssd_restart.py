
"""Restarts of an engine with an SSD tier: stopped, or killed at any moment; every block that is offered is loaded.

Small here; ``RESTART_GB``, ``RESTART_SLOT_KB`` and ``RESTART_KILLS`` make it as large as one likes (``pytest -s`` tells
how long it took).
"""

import logging
import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.support.harness import space_of
from tests.support.ssd_engine import MAX_BLOCKS, SHARED, Engine, length_of

SLOT_BYTES = int(os.environ.get("RESTART_SLOT_KB", "4")) << 10
SSD_BYTES = int(float(os.environ.get("RESTART_GB", "0.03")) * (1 << 30))
KILLS = int(os.environ.get("RESTART_KILLS", "3"))

NUM_SLOTS = SSD_BYTES // SLOT_BYTES
HOST_SLOTS = max(64, min(NUM_SLOTS // 4, 1024))
FILLED = range(int(0.95 * NUM_SLOTS / ((MAX_BLOCKS - SHARED + 1) / 2 + SHARED / 4 + 0.5)))
"""Sequences that nearly fill the tier."""

SMALL_SLOTS = 3000
UNIVERSE = range(600)
"""Sequences of the small tier, of which many do not fit."""


def fill(engine: Engine, seeds: range) -> None:
    """Put sequences as fast as they are written."""
    for seed in seeds:
        engine.put(seed)
        until_room(engine)


def until_room(engine: Engine) -> None:
    if engine.stat("ssd_queued_blocks") > HOST_SLOTS // 8:
        engine.settle()


def fill_and_stop(place: Path, pipe: Connection) -> None:
    with Engine(place, SSD_BYTES, SLOT_BYTES, HOST_SLOTS, evict_start_threshold=1.0) as engine:
        begin = time.monotonic()
        fill(engine, FILLED)
        engine.settle()
        pipe.send((engine.stat("ssd_dropped_writes"), engine.on_ssd, time.monotonic() - begin))


def start_child(target: object, *args: object) -> tuple[multiprocessing.Process, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(*args, theirs), daemon=True)   # type: ignore[arg-type]
    child.start()
    theirs.close()
    return child, ours                                                          # type: ignore[return-value]


def test_a_clean_stop_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    child, pipe = start_child(fill_and_stop, tmp_path)
    dropped, on_ssd, fill_s = pipe.recv()
    child.join(60)
    assert child.exitcode == 0
    assert dropped == 0
    begin = time.monotonic()
    engine = Engine(tmp_path, SSD_BYTES, SLOT_BYTES, HOST_SLOTS, evict_start_threshold=1.0)
    serves_s = time.monotonic() - begin
    with engine:
        warm_s = time.monotonic() - begin
        assert engine.on_ssd == on_ssd
        assert all(engine.offered(seed) == length_of(seed) for seed in FILLED)
        begin = time.monotonic()
        assert len(engine.load_all(FILLED)) == on_ssd
        load_s = time.monotonic() - begin
        assert engine.stat("ssd_store_checksum_mismatches") == 0
    size = on_ssd * SLOT_BYTES / 1e9
    print(f"\n{on_ssd} blocks of {SLOT_BYTES} bytes, {size:.2f} GB: written in {fill_s:.1f} s, "
          f"serves after {serves_s:.2f} s, warm after {warm_s:.2f} s, loaded and compared in {load_s:.1f} s")
    print([record.getMessage() for record in caplog.records if "blocks found" in record.getMessage()])


def work_until_killed(place: Path, seed: int, pipe: Connection) -> None:
    """Start, put, load, stop, and start again; whoever kills this hits any of it."""
    rng = random.Random(seed)
    while True:
        with Engine(place, SMALL_SLOTS * 4096) as engine:
            pipe.send(None)
            for _ in range(rng.randint(1, 300)):
                number = rng.choice(UNIVERSE)
                if rng.random() < 0.8:
                    engine.put(number, rng.randint(1, length_of(number)))
                elif count := engine.offered(number):
                    engine.load(number, count, must=False)      # it may be evicted meanwhile


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """The page cache survives that: every block that is offered afterwards is right."""
    rng, loaded = random.Random(1), 0
    for seed in range(KILLS):
        child, pipe = start_child(work_until_killed, tmp_path, seed)
        pipe.recv()
        time.sleep(rng.random() ** 2)
        child.kill()
        child.join(10)
        pipe.close()
        with Engine(tmp_path, SMALL_SLOTS * 4096, evict_start_threshold=1.0) as engine:     # so that nothing goes
            on_ssd = engine.on_ssd
            found = engine.load_all(UNIVERSE)
            assert len(found) == on_ssd
            assert engine.stat("ssd_store_checksum_mismatches") == engine.stat("ssd_store_key_mismatches") == 0
        loaded += len(found)
    assert loaded > 10 * KILLS
    print(f"\n{KILLS} times killed, {loaded} blocks loaded and compared")


def test_a_stop_while_writes_are_queued_loses_nothing_that_was_admitted(tmp_path: Path) -> None:
    seeds = range(0, 12, 4)                             # they share nothing
    with Engine(tmp_path, SMALL_SLOTS * 4096, ssd_write_mb_per_s=0.1) as engine:
        for seed in seeds:
            engine.put(seed)
        assert engine.stat("ssd_queued_blocks") > 0
        assert engine.stat("ssd_dropped_writes") == 0
    with Engine(tmp_path, SMALL_SLOTS * 4096) as engine:
        assert [engine.offered(seed) for seed in seeds] == [length_of(seed) for seed in seeds]
        assert len(engine.load_all(seeds)) == sum(length_of(seed) for seed in seeds)


def test_a_second_engine_on_the_same_directories_runs_without_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child, pipe = start_child(hold_until_told, tmp_path)
    pipe.recv()
    (tmp_path / "second").mkdir()
    directories = f"{tmp_path / 'a'};{tmp_path / 'b'}"
    second = Engine(tmp_path / "second", SMALL_SLOTS * 4096, ssd_cache_dir=directories)
    try:
        second.put(1)
        second.load(1, length_of(1))
        assert second.offered(4) == 0
        space_of(second.manager).tiering._tiers[0]._thread.join(10)        # type: ignore[union-attr]
        assert "the SSD tier is not in service" in caplog.text
        assert f"{tmp_path / 'a'} is in use by process {child.pid}" in caplog.text
        second.load(1, length_of(1))
    finally:
        second.close()
    pipe.send(None)
    child.join(30)
    assert child.exitcode == 0
    with Engine(tmp_path, SMALL_SLOTS * 4096) as engine:
        assert len(engine.load_all(range(40))) == engine.on_ssd > 100


def hold_until_told(place: Path, pipe: Connection) -> None:
    with Engine(place, SMALL_SLOTS * 4096) as engine:
        for seed in range(20):
            engine.put(seed)
        engine.settle()
        pipe.send(None)
        pipe.recv()
        for seed in range(40):
            engine.put(seed)
            engine.load(seed, length_of(seed))
        engine.settle()
