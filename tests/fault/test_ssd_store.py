"""The SSD store while things go wrong: killed, without power, files cut, changed or removed.

Every block that a read calls good is compared with what was written under its key (``tests.support.ssd_store``).
"""

import errno
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv._core.io.io_queue import IoQueue
from flexkv.errors import StorageError
from tests.support.faulty_files import FaultyFiles, ThreadQueue
from tests.support.ssd_store import Tier, check_what_is_offered, one_thread

SLOTS = 12


def write_at_random(tier: Tier, rng: random.Random, rounds: int) -> None:
    """Rewrite random slots with new blocks, a few jobs at a time."""
    tier.recover()
    tier.store.slots.free(tier.store.slots._in_use.nonzero()[0].astype(np.int32))
    slots = tier.allocate(tier.store.num_slots)
    for _ in range(rounds):
        chosen = np.array(rng.sample(slots.tolist(), rng.randint(1, 8)), dtype=np.int32)
        tier.write([rng.randrange(1000) for _ in chosen], chosen)


# ---- killed ---------------------------------------------------------------------------------------------------


def killed_while_it_writes(directories: list[Path], seed: int) -> None:
    """A process of its own writes until it is killed, from outside, at any moment."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        tier = Tier(directories, SLOTS, make_queue=IoQueue)
        os.write(writes, b"!")
        write_at_random(tier, random.Random(seed), 1 << 30)
    os.close(writes)
    assert os.read(reads, 1) == b"!", "the writer did not start"
    os.close(reads)
    time.sleep(random.Random(seed).random() * 0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """As the page cache survives, each slot is old, new or empty: all that is offered is good."""
    directories = [tmp_path / "a", tmp_path / "b"]
    offered = 0
    for seed in range(60):
        killed_while_it_writes(directories, seed)
        tier = Tier(directories, SLOTS, make_queue=IoQueue)      # the lock of the dead is free
        found = tier.recover()
        assert tier.read(list(found), list(found.values())).all()
        offered += len(found)
        tier.close()
    assert offered > 200


def test_killed_at_each_write(tmp_path: Path) -> None:
    """One write at a time is the last one, and done in part."""
    directories = [tmp_path / "a"]
    for after in range(300):
        files = FaultyFiles(seed=after)
        tier = Tier(directories, SLOTS, **one_thread(files))
        files.writes_left = after % 60
        write_at_random(tier, random.Random(after), 12)
        tier.close()
        found = check_what_is_offered(directories, num_slots=SLOTS)
        again = check_what_is_offered(directories, num_slots=SLOTS)
        assert found == again


def test_killed_while_it_is_opened(tmp_path: Path) -> None:
    for after in range(40):
        directories = [tmp_path / str(after)]
        tier = Tier(directories, SLOTS)
        assert tier.write(range(SLOTS)).all()
        tier.close()
        calls = [after]

        def stop(name: str, *_: int, calls: list[int] = calls) -> int:
            calls[0] -= 1
            return errno.EIO if calls[0] < 0 else 0

        files = FaultyFiles()
        files.fault = stop
        for num_slots in (SLOTS // 2, SLOTS, 2 * SLOTS):
            calls[0] = after
            with suppress(StorageError):
                Tier(directories, num_slots, files=files, probe_s=1000).close()
        assert check_what_is_offered(directories, num_slots=SLOTS) <= set(range(SLOTS))


# ---- without power --------------------------------------------------------------------------------------------


def test_power_lost_at_any_write(tmp_path: Path) -> None:
    """Any sector that was not synced may be as it was: what is offered may be bad, but never passes for good."""
    directories = [tmp_path / "a", tmp_path / "b"]
    good = bad = 0
    for seed in range(150):
        files = FaultyFiles(seed, track_power=True)
        tier = Tier(directories, SLOTS, **one_thread(files))
        files.writes_left = files.rng.randrange(100)
        write_at_random(tier, files.rng, 10)
        tier.close()
        files.lose_power()
        tier = Tier(directories, SLOTS)
        found = tier.recover()
        ok = tier.read(list(found), list(found.values()))
        good, bad = good + int(ok.sum()), bad + int((~ok).sum())
        tier.close()
    assert good > 100
    assert bad > 100                              # else the power was not really lost


def test_after_a_clean_close_power_takes_nothing(tmp_path: Path) -> None:
    for seed in range(20):
        files = FaultyFiles(seed, track_power=True)
        tier = Tier([tmp_path / str(seed)], SLOTS, **one_thread(files))
        assert tier.write(range(SLOTS)).all()
        tier.close()
        files.lose_power()
        assert check_what_is_offered([tmp_path / str(seed)], num_slots=SLOTS) == set(range(SLOTS))


def test_cleared_is_cleared_without_power_too(tmp_path: Path) -> None:
    for seed in range(20):
        files = FaultyFiles(seed, track_power=True)
        tier = Tier([tmp_path / str(seed)], SLOTS, **one_thread(files))
        assert tier.write(range(SLOTS)).all()
        tier.store.clear()
        files.writes_left = 0
        tier.close()
        files.lose_power()
        assert check_what_is_offered([tmp_path / str(seed)], num_slots=SLOTS) == set()


# ---- files that others change ---------------------------------------------------------------------------------


def test_bits_that_flip(tmp_path: Path) -> None:
    rng = random.Random(5)
    tier = Tier([tmp_path / "a"], SLOTS)
    assert tier.write(range(SLOTS)).all()
    tier.close()
    names = ("flexkv.data", "flexkv.table")
    kept = {name: (tmp_path / "a" / name).read_bytes() for name in names}
    hurt = 0
    for _ in range(300):
        name = rng.choice(names)
        raw = bytearray(kept[name])
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw) if name == names[0] else 4096 + SLOTS * 64)] ^= 1 << rng.randrange(8)
        (tmp_path / "a" / name).write_bytes(raw)
        hurt += check_what_is_offered([tmp_path / "a"], num_slots=SLOTS) != set(range(SLOTS))
        for name, content in kept.items():
            (tmp_path / "a" / name).write_bytes(content)
    assert hurt > 100


@pytest.mark.parametrize("name", ["flexkv.data", "flexkv.table"])
@pytest.mark.parametrize("queue", [ThreadQueue, IoQueue])
def test_files_cut_short_behind_its_back(tmp_path: Path, name: str, queue: Any) -> None:
    tier = Tier([tmp_path / "a"], SLOTS, make_queue=queue)
    slots = tier.allocate(SLOTS)
    assert tier.write(range(SLOTS), slots).all()
    os.truncate(tmp_path / "a" / name, 4096 * 3 + 100)
    ok = tier.read(range(SLOTS), slots)
    assert ok.tolist() == [name == "flexkv.table" or slot < 3 for slot in slots]
    tier.write(range(50, 50 + SLOTS), slots)
    tier.read(range(50, 50 + SLOTS), slots)
    tier.close()
    check_what_is_offered([tmp_path / "a"], num_slots=SLOTS)


@pytest.mark.parametrize("queue", [ThreadQueue, IoQueue])
def test_a_directory_that_is_removed(tmp_path: Path, queue: Any) -> None:
    tier = Tier([tmp_path / "a", tmp_path / "b"], SLOTS, make_queue=queue)
    slots = tier.allocate(2 * SLOTS)
    assert tier.write(range(2 * SLOTS), slots).all()
    shutil.rmtree(tmp_path / "a")
    tier.read(range(2 * SLOTS), slots)
    tier.write(range(2 * SLOTS), slots)
    tier.close()
    assert len(check_what_is_offered([tmp_path / "a", tmp_path / "b"], num_slots=SLOTS)) == SLOTS
