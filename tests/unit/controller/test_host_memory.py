"""The host pool: it is made once, its last user gets the populated slots, and a pool that is shared is not replaced."""

import pytest

from flexkv.controller.host_memory import HostMemory
from flexkv.errors import CapacityError, RegistrationError
from flexkv.storage.host_pool import HostPool
from flexkv.storage.layout import SlotLayout
from tests.support.harness import until

LAYOUT, OTHER = SlotLayout.sharded([5000]), SlotLayout.sharded([5000, 5000])


def test_each_user_hears_of_all_slots_once_it_has_come() -> None:
    memory = HostMemory(1 << 20, 16)
    first: list[tuple[int, bool]] = []
    pool = memory.pool_for(LAYOUT, lambda *extent: first.append(extent))
    until(lambda: (16, True) in first)
    second: list[tuple[int, bool]] = []
    assert memory.pool_for(LAYOUT, lambda *extent: second.append(extent)) is pool
    assert second == [(16, True)]
    memory.leave()
    count = len(second)
    memory._populated(16, True)
    assert len(second) == count
    memory.close()
    memory.close()


def test_a_shared_pool_is_not_replaced() -> None:
    memory = HostMemory(1 << 20, 16)
    pool = memory.pool_for(LAYOUT, lambda *_: None)
    incarnation = memory.incarnation
    with pytest.raises(RegistrationError, match="layout"):
        memory.pool_for(OTHER, lambda *_: None)
    assert (memory.pool, memory.incarnation) == (pool, incarnation)
    memory.close()


def test_a_pool_of_one_engine_is_replaced_and_its_content_is_another() -> None:
    memory = HostMemory(1 << 20, 16, replaces=True)
    pool = memory.pool_for(LAYOUT, lambda *_: None)
    incarnation = memory.incarnation
    again: list[tuple[int, bool]] = []
    other = memory.pool_for(OTHER, lambda *extent: again.append(extent))
    assert other is not pool
    assert memory.incarnation != incarnation
    assert pool.fd == -1
    until(lambda: (16, True) in again)
    memory.close()


def test_a_pool_that_cannot_be_made_leaves_nothing() -> None:
    memory = HostMemory(100)
    with pytest.raises(CapacityError):
        memory.pool_for(LAYOUT, lambda *_: None)
    assert memory.pool is None
    memory.close()


@pytest.mark.parametrize("size", [2 << 20, 1 << 30])
def test_without_hugepages_it_has_ordinary_pages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """More than any system has reserved: the kernel refuses at once."""
    monkeypatch.setattr(HostPool, "populate", lambda self, on_extent, num_slots: None)
    memory = HostMemory(0, 1 << 24, size)
    try:
        pool = memory.pool_for(SlotLayout.sharded([1 << 20]), lambda *_: None)
        assert pool.num_bytes == 1 << 44
        assert caplog.text.count("no hugepages of") == (2 if size > 2 << 20 else 1)
        assert "nr_hugepages" in caplog.text
    finally:
        memory.close()
