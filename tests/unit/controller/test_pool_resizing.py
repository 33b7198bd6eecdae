"""Resizing of a pool that is in service: memory is given back when nothing is in it, and no rank has it pinned."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flexkv.controller.host_memory import HostMemory
from flexkv.controller.pool_resizing import PoolResizing
from flexkv.controller.space import Space
from flexkv.storage.layout import SlotLayout
from flexkv.transfer.executors.agent_link import AgentLink
from flexkv.transfer.pool_growth import PoolGrowth
from tests.support.harness import until
from tests.unit.transfer.test_pool_growth import Link

LAYOUT = SlotLayout.sharded([4096])


class Share:
    def begin(self, slot_bytes: int) -> tuple[int, int, int]:
        assert slot_bytes == 4096
        return 64, 16, 4


class Pool:
    """A pool with one rank, and an index of which the test says whether it is rid of the blocks."""

    def __init__(self) -> None:
        self.now = 0.0
        self.is_rid = True
        self.asked: list[int] = []
        self.memory = HostMemory(0, share=Share())
        self.growth = PoolGrowth(lambda slots: None, lambda: None, lambda: None)
        self.growth.may_lower()
        self.link = Link()
        self.resizing = PoolResizing(
            self.memory, cast(Space, SimpleNamespace(withdraw=self._withdraw)), self.growth, lambda: self.now
        )
        self.resizing.slots = 16
        self.host = self.memory.pool_for(LAYOUT, self.growth.populated)
        self.settle(16)

    def _withdraw(self, num_slots: int) -> bool:
        self.asked.append(num_slots)
        return self.is_rid

    def update(self) -> None:
        self.growth.update(cast(list[AgentLink], [self.link]))

    def settle(self, num_slots: int) -> None:
        """Wait until ``num_slots`` slots are populated, pinned and usable."""
        until(lambda: self.host.populated_slots == num_slots and not self.host.is_populating)
        self.link.rings.usable_slots = num_slots
        self.update()
        assert self.growth.usable == num_slots
        assert not self.resizing.is_growing
        assert self.resizing.may_shrink

    @property
    def memory_bytes(self) -> int:
        return os.fstat(self.host.fd).st_blocks * 512


@pytest.fixture
def pool() -> Any:
    made = Pool()
    yield made
    made.memory.close()


def test_it_grows_and_shrinks_and_grows_again(pool: Pool) -> None:
    assert (pool.host.num_slots, pool.host.fixed_slots, pool.memory_bytes) == (64, 4, 16 * 4096)
    pool.resizing.grow(40)
    assert pool.resizing.is_growing
    assert not pool.resizing.may_shrink
    pool.settle(40)
    pool.host.slot(39)[:] = b"x" * 4096
    pool.resizing.shrink(8)
    pool.resizing.step()
    pool.update()
    assert pool.link.rings.notes[-1] == (8, False)
    pool.resizing.step()
    assert (pool.resizing.slots, pool.memory_bytes) == (40, 40 * 4096)             # the rank has it pinned
    pool.link.rings.followed = pool.link.rings.lowered
    pool.update()
    pool.resizing.step()
    assert (pool.resizing.slots, pool.memory_bytes, pool.growth.usable) == (8, 8 * 4096, 8)
    assert not pool.resizing.is_shrinking
    pool.link.rings.usable_slots = 8
    pool.resizing.grow(40)
    pool.settle(40)
    assert bytes(pool.host.slot(39)) == bytes(4096)


def test_blocks_in_use_are_waited_for_and_then_kept(pool: Pool) -> None:
    pool.is_rid = False
    pool.resizing.shrink(4)
    pool.resizing.step()
    pool.update()
    assert pool.growth.usable == 4
    assert pool.resizing.is_shrinking
    pool.now = 31.0
    pool.resizing.step()
    pool.update()
    assert not pool.resizing.is_shrinking
    assert pool.growth.usable == 16 == pool.resizing.slots
    assert pool.link.rings.notes == [(16, False)]                                  # no rank knows of it


def test_a_rank_that_joins_meanwhile_hears_of_the_smaller_pool(pool: Pool) -> None:
    pool.resizing.shrink(8)
    pool.resizing.step()
    pool.memory.pool_for(LAYOUT, pool.growth.populated)                            # another engine's first rank
    assert pool.growth._populated == (8, False)


def test_a_pool_whose_ranks_have_left_before_they_had_pinned_it_can_shrink(pool: Pool) -> None:
    pool.resizing.grow(40)
    until(lambda: not pool.host.is_populating)
    pool.growth.update([])                                                         # the engine has ended
    assert pool.growth.usable == 16
    assert pool.resizing.is_growing                                                # so the budget does not grow it
    assert pool.resizing.may_shrink
    pool.resizing.shrink(0)
    pool.resizing.step()
    pool.link.is_at_rest = True
    pool.growth.update([])
    pool.resizing.step()
    assert (pool.resizing.slots, pool.memory_bytes) == (0, 0)


def test_memory_that_runs_out_leaves_a_pool_that_can_shrink_and_grow(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extent is not the last one: a rank would pin a part that is not whole, and no other after it."""
    def refuse(start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(pool.host, "_allocate", refuse)
        pool.resizing.grow(40)
        until(lambda: not pool.host.is_populating)
    assert (pool.resizing.slots_with_memory, pool.resizing.slots) == (16, 40)
    assert pool.growth._populated == (16, False)
    pool.resizing.shrink(16)
    for _ in range(2):
        pool.resizing.step()
        pool.update()
        pool.link.rings.followed = pool.link.rings.lowered
        pool.update()
    pool.resizing.step()
    assert (pool.resizing.slots_with_memory, pool.resizing.slots) == (16, 16)
    pool.resizing.grow(40)
    pool.settle(40)


def test_a_pool_that_ends_frees_its_memory_though_others_map_it(pool: Pool, tmp_path: Path) -> None:
    fd = os.dup(pool.host.fd)
    pool.memory.frees_at_close = True
    pool.memory.close()
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)
