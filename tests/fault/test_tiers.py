"""Requests from several threads against an SSD that fails, stalls, goes and comes back, and resets: no wrong bytes."""

import random
import threading
from pathlib import Path

import numpy as np
import pytest

from flexkv.controller.response import KVResponseStatus as Status
from tests.support.harness import LAYERS, PAGE_SHAPE
from tests.support.ssd_stage import SSD_SLOTS, Stage, stage

WORKERS = 3
REQUESTS = 400
FAMILIES = 8


def content(num_blocks: int, seed: int) -> bytes:
    """As ``Tensors.fill`` makes it."""
    return b"".join(
        np.random.default_rng([seed, position, layer]).integers(-30000, 30000, PAGE_SHAPE, dtype=np.int16).tobytes()
        for position in range(num_blocks)
        for layer in range(LAYERS)
    )


class Worker(threading.Thread):
    """Puts and gets, some of them cancelled, in pages of its own."""

    def __init__(self, made: Stage, number: int, seed: int) -> None:
        super().__init__()
        self._made = made
        self._first = 20 * number
        self._random = random.Random(seed * WORKERS + number)
        self.error: BaseException | None = None
        self.num_loaded = 0

    def run(self) -> None:
        try:
            for _ in range(REQUESTS):
                self._request(self._random.randrange(FAMILIES), self._random.randint(1, 6))
        except BaseException as error:  # noqa: BLE001  (raised again by the test)
            self.error = error

    def _request(self, family: int, num_blocks: int) -> None:
        manager, tensors = self._made.manager, self._made.tensors
        keys = self._made.keys(num_blocks, family)
        pages = np.arange(self._first, self._first + num_blocks, dtype=np.int32)
        if self._random.random() < 0.5:
            tensors.fill(pages, family)
            task = manager.blocks.put_blocks(keys, 0, pages)
            if task is not None:
                manager.wait(task, completely=True)
            return
        for array in tensors.layers:
            array[pages] = 0
        task = manager.blocks.get_blocks(keys, 0, pages)
        if self._random.random() < 0.1:
            manager.cancel(task)
        if manager.wait(task, completely=True)[task].status is Status.SUCCESS:
            self.num_loaded += num_blocks
            assert tensors.read(pages) == content(num_blocks, family)


def trouble(made: Stage, rng: random.Random) -> None:
    """One thing that can happen to a disk."""
    chance = rng.random()
    if chance < 0.1:
        made.store.held = True
    elif chance < 0.5:
        made.store.release(rng.randint(1, 4))
    elif chance < 0.8:
        made.store.release()
    elif chance < 0.9:
        made.store.broken = {rng.randrange(SSD_SLOTS)} if chance < 0.83 else set()
    elif chance < 0.91:
        made.manager.reset()
    elif chance < 0.93:
        made.store.is_usable = not made.store.is_usable
    made.manager.check_integrity()


@pytest.mark.parametrize("seed", range(3))
def test_no_wrong_bytes_whatever_the_disk_does(tmp_path: Path, seed: int) -> None:
    with stage(tmp_path) as made:
        workers = [Worker(made, number, seed) for number in range(WORKERS)]
        for worker in workers:
            worker.start()
        rng = random.Random(seed)
        while any(worker.is_alive() for worker in workers):
            trouble(made, rng)
            workers[0].join(0.002)
        made.store.is_usable, made.store.broken = True, set()
        made.store.release()
        for worker in workers:
            if worker.error is not None:
                raise worker.error
        assert sum(worker.num_loaded for worker in workers) > 0
        assert made.store.num_reads > 0
