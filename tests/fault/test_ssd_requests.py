"""While an SSD fails in every way, no request fails that host memory could serve."""

import errno
import random
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import CacheConfig
from flexkv.storage.ssd.store import SsdStore
from tests.support.faulty_files import FaultyFiles, ThreadQueue
from tests.support.ssd_engine import Engine, length_of

HOT = range(0, 16, 4)           # they share nothing
ROUNDS = 15


class Trouble(FaultyFiles):
    """Files that fail, come short or hang.

    Attributes
    ----------
    share : float
        Of calls that fail.
    go_on : Event
        While it is not set, every call hangs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share = 0.0
        self.go_on = threading.Event()
        self.go_on.set()
        self.fault = self._decide

    def _decide(self, *_: Any) -> int:
        self.go_on.wait()
        return errno.EIO if random.random() < self.share else 0

    def make_store(self, config: CacheConfig, slot_bytes: int, domain: bytes, memory: Any) -> SsdStore:
        return SsdStore(
            config.ssd_directories, config.ssd_bytes, slot_bytes, domain, memory, files=self, deadline_s=0.2,
            probe_s=0.02, make_queue=partial(ThreadQueue, layer=self),
        )


def serve(engine: Engine, seeds: range) -> None:
    """What is saved is there at once; what is used again and again stays; both have the right bytes."""
    for seed in seeds:
        engine.put(seed)
        engine.load(seed, length_of(seed))
        for hot in HOT:
            engine.load(hot, length_of(hot))


@pytest.mark.parametrize("how", ["errors", "broken", "short", "hangs", "comes and goes"])
def test_what_host_memory_has_is_served(tmp_path: Path, how: str) -> None:
    trouble = Trouble()
    # LRU: what adaptive keeps depends on times, and so on how busy the machine is
    with Engine(tmp_path, 8 << 20, make_store=trouble.make_store, eviction_policy="lru") as engine:
        try:
            serve_in_trouble(engine, trouble, how)
        finally:
            trouble.go_on.set()
        engine.wait_until_usable()
        written = engine.stat("ssd_written_blocks")
        serve(engine, range(3000, 3040, 4))
        engine.settle()
        assert engine.stat("ssd_written_blocks") > written      # it works again


def serve_in_trouble(engine: Engine, trouble: Trouble, how: str) -> None:
    for hot in HOT:
        engine.put(hot)
    serve(engine, range(100, 100 + 4 * ROUNDS, 4))
    trouble.share = {"errors": 0.05, "broken": 1.0}.get(how, 0.0)
    trouble.short_share = 0.5 if how == "short" else 0.0
    if how == "hangs":
        trouble.go_on.clear()
    prefetches = [engine.manager.blocks.prefetch_blocks(engine.keys(seed)) for seed in (100, 104)]
    for first in range(1000, 1000 + 20 * ROUNDS, 20):
        if how == "comes and goes":
            trouble.share = 1.0 - trouble.share
        serve(engine, range(first, first + 20, 4))
        if how != "hangs":
            engine.load(100, max(1, engine.offered(100)), must=False)
    trouble.share, trouble.short_share = 0.0, 0.0
    trouble.go_on.set()
    engine.manager.wait([task for task in prefetches if task is not None], completely=True)
