"""Many reads of a store on which everything goes wrong at once: no read that is called good has wrong bytes.

Small here; ``SOAK_READS`` says how many good reads there are to be (``pytest -s`` tells what happened meanwhile).
"""

import errno
import os
import random
import select
import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv._core.io.io_queue import READ, WRITE
from tests.native.faulty_io_queue import FAILS, HANGS, SHORT, FaultyIoQueue
from tests.support.faulty_files import FaultyFiles, ThreadQueue, wait_until
from tests.support.ssd_store import SLOT_BYTES, Tier, content_of

READS = int(os.environ.get("SOAK_READS", "20000"))

SLOTS = 80                      # of each directory
NUMBERS = 1000
CONTENT = np.stack([content_of(number) for number in range(NUMBERS)])
BATCH = 16
STEPS = 150

DEADLINE_S = 0.3
CODES = (errno.EIO, errno.ENOSPC, errno.ENODEV)


class Soak:
    """A store in three directories, from one start to the next.

    Attributes
    ----------
    counts : Counter
        What happened.
    """

    def __init__(self, directories: list[Path], rng: random.Random, native: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._rng = rng
        self._directories = directories
        self._files = FaultyFiles(rng.randrange(1 << 30))
        self._queues: list[FaultyIoQueue] = []
        make: Any = self._make_native if native else partial(ThreadQueue, layer=self._files, threads=4)
        self._tier = Tier(directories, SLOTS, files=self._files, make_queue=make, deadline_s=DEADLINE_S, probe_s=0.01)
        self._share = 0.0                                       # of accesses that fail
        self._bad_fd, self._slow_fd = -1, -1
        self._where: dict[int, int] = {slot: number for number, slot in self._tier.recover().items()}

    def _make_native(self, *args: Any, **options: Any) -> FaultyIoQueue:
        self._queues.append(FaultyIoQueue(*args, method="threads", **options))
        return self._queues[-1]

    def run(self) -> None:
        """Some steps of work and trouble; then all is well again, and the store is as good as before."""
        self._files.fault = self._fault
        self._files.short_share = 0.2
        for _ in range(STEPS):
            self._trouble()
            self._step()
        self._calm()
        self._usable_again()
        for name, count in self._tier.store.stats().items():
            self.counts[name] += count
        self._tier.close()

    # ---- work -------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """A write, beside two reads, of which one may be of the same slots."""
        slots = self._rewritten()
        numbers = [self._rng.randrange(NUMBERS) for _ in slots]
        before = dict(self._where)
        jobs = [self._start_read(before, 16)]
        writing = self._tier.start_write(numbers, slots) if len(slots) else 0
        jobs.append(self._start_read(before, 32))
        for slot, number in zip(slots.tolist(), numbers, strict=True):
            self._where[slot] = number                          # unless it fails, which reads find out
        for job, asked, host in jobs:
            self._check(job, asked, host)
        if writing:
            ok = self._wait(writing, len(slots))
            self.counts["written"] += int(ok.sum())
            gone = slots[~ok]
            self._tier.store.slots.free(gone)
            for slot in gone.tolist():
                del self._where[slot]

    def _rewritten(self) -> NDArray[np.int32]:
        """Some slots: new ones while there are any, else those of blocks that go."""
        store = self._tier.store
        taken = store.slots.allocate(min(self._rng.randint(1, BATCH), store.slots.num_free))
        if taken is not None and len(taken):
            return taken
        going = self._rng.sample(sorted(self._where), min(len(self._where), self._rng.randint(1, BATCH)))
        for slot in going:
            del self._where[slot]
        store.slots.free(np.array(going, dtype=np.int32))
        taken = store.slots.allocate(min(len(going), store.slots.num_free))
        return np.empty(0, dtype=np.int32) if taken is None else taken

    def _start_read(self, where: dict[int, int], host: int) -> tuple[int, list[int], int]:
        slots = self._rng.sample(sorted(where), min(BATCH, len(where)))
        numbers = [where[slot] if self._rng.random() > 0.02 else self._rng.randrange(NUMBERS) for slot in slots]
        return (self._tier.start_read(numbers, slots, host) if slots else 0), numbers, host

    def _check(self, job: int, numbers: list[int], host: int) -> None:
        if not numbers:
            return
        ok = self._wait(job, len(numbers))
        got = self._tier.host[host : host + len(numbers)][ok]
        assert (got == CONTENT[np.array(numbers)[ok]]).all(), "wrong KV"
        self.counts["good"] += int(ok.sum())
        self.counts["not good"] += int((~ok).sum())

    def _wait(self, job: int, count: int) -> NDArray[np.bool_]:
        """What hangs goes on when nothing else happens: after the deadline."""
        end = time.monotonic() + 20.0
        while self._tier.num_told(job) < count and time.monotonic() < end:
            if not select.select([self._tier.store.event_fd], [], [], 1.5 * DEADLINE_S)[0]:
                self._release()
            self._tier.take()
        return self._tier.wait(job, count)

    # ---- trouble ----------------------------------------------------------------------------------------------

    def _fault(self, name: str, fd: int, *_: int) -> int:
        chance = random.random()
        if fd == self._slow_fd and chance < 0.01:
            time.sleep(2 * DEADLINE_S)                          # the slot table hangs for a while
        elif chance > 0.999:
            time.sleep(0.002)
        return random.choice(CODES) if fd == self._bad_fd or chance < self._share else 0

    def _trouble(self) -> None:
        """One thing that can happen."""
        rng, directory = self._rng, self._rng.choice(self._tier.store._directories)
        chance = rng.random()
        if chance < 0.08:
            self._share = rng.choice([0.0, 0.0, 0.003, 0.05])
        elif chance < 0.10:
            self._bad_fd = directory.data.fd if rng.random() < 0.7 else directory._table_fd
        elif chance < 0.25:
            self._bad_fd = self._slow_fd = -1
        elif chance < 0.255:
            self._slow_fd = directory._table_fd
        elif chance < 0.34:
            self._flip(directory.path)
        elif chance < 0.345:
            self._cut(directory.path)
        elif chance < 0.35:
            shutil.rmtree(directory.path, ignore_errors=True)
            self.counts["removed"] += 1
        elif chance < 0.42:
            self._plan(rng.choice([READ, WRITE]), rng.choice([FAILS, SHORT]))
        elif chance < 0.425:
            self._plan(rng.choice([READ, WRITE]), HANGS)

    def _flip(self, directory: Path) -> None:
        """A bit, in the data of some slot or in some record."""
        name = "flexkv.data" if self._rng.random() < 0.8 else "flexkv.table"
        size = SLOT_BYTES * SLOTS if name == "flexkv.data" else SLOT_BYTES + 64 * SLOTS
        if (directory / name).exists():
            with (directory / name).open("r+b") as file:
                at = self._rng.randrange(size)
                file.seek(at)
                if byte := file.read(1):
                    file.seek(at)
                    file.write(bytes([byte[0] ^ 1 << self._rng.randrange(8)]))
                    self.counts["flipped"] += 1

    def _cut(self, directory: Path) -> None:
        path = directory / self._rng.choice(["flexkv.data", "flexkv.table"])
        if path.exists():
            os.truncate(path, self._rng.randrange(path.stat().st_size + 1))
            self.counts["cut"] += 1

    def _plan(self, kind: int, fault: int) -> None:
        for queue in self._queues:
            if queue.num_planned < 4:
                queue.plan(kind, fault, {FAILS: errno.EIO, SHORT: 512}.get(fault, -1), 1)
                self.counts["hung"] += fault == HANGS

    def _release(self) -> None:
        for queue in self._queues:
            queue.release()

    # ---- the end ----------------------------------------------------------------------------------------------

    def _calm(self) -> None:
        self._files.fault = lambda *_: 0
        self._files.short_share = 0.0
        self._release()
        self._back_in_service()                                 # else nothing of what is planned can happen
        for _ in range(100):                                    # what is planned still happens
            if not any(queue.num_planned for queue in self._queues):
                break
            self._step()
        self._release()
        wait_until(lambda: self._tier.take() or not any(len(queue.busy()) for queue in self._queues))
        assert not any(queue.num_planned for queue in self._queues)

    def _usable_again(self) -> None:
        store = self._tier.store
        self._back_in_service()
        store.slots.check_integrity()
        retired = int(store.slots._retired.sum())
        assert store.slots.capacity + int((store.slots._retired & ~store.slots._in_use).sum()) == store.num_slots
        store.slots.free(np.fromiter(self._where, dtype=np.int32))
        assert store.slots.num_free == store.num_slots - retired       # none is lost
        slots = self._tier.allocate(min(48, store.slots.num_free))
        numbers = [self._rng.randrange(NUMBERS) for _ in slots]
        assert self._tier.write(numbers, slots).all()
        assert self._tier.read(numbers, slots).all()
        self.counts["good"] += len(slots)

    def _back_in_service(self) -> None:
        stats = self._tier.store.stats
        wait_until(lambda: self._tier.take() or stats()["directories_usable"] == len(self._directories))


def test_reads_while_everything_goes_wrong(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    directories = [tmp_path / name for name in "abc"]
    begin, starts = time.monotonic(), 0
    while counts["good"] < READS or starts < 4:
        soak = Soak(directories, random.Random(starts), native=starts % 2 == 1)
        soak.run()
        counts += soak.counts
        starts += 1
    print(f"\n{starts} starts, {time.monotonic() - begin:.0f} s: {dict(counts)}")
    for kind in ("not good", "read_errors", "write_errors", "table_errors", "checksum_mismatches", "key_mismatches",
                 "slots_retired", "directories_gone_offline", "flipped"):
        assert counts[kind] > 0, kind
