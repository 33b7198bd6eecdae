"""Provisional puts: the blocks offered, their time and bytes; and the effect of the loads that they depend on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.cache.reasons import MissReason
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import ArgumentError
from flexkv.kvmanager import KVManager
from tests.support.harness import PAGES, Tensors, controller_of, local, tokens_of, until
from tests.support.ssd_stage import stage


def keys_of(manager: KVManager, num_blocks: int, seed: int = 0) -> NDArray[np.uint64]:
    hasher = manager.blocks.hasher()
    hasher.extend(tokens_of(num_blocks, seed))
    return hasher.keys


def pages_of(first: int, count: int) -> NDArray[np.int32]:
    return np.arange(first, first + count, dtype=np.int32)


def put(manager: KVManager, keys: NDArray[np.uint64], first_page: int = 0, fence: int = 0) -> int:
    task = manager.blocks.put_blocks(keys, 0, pages_of(first_page, len(keys)), fence, provisional=True)
    assert task is not None
    return task


def check_loaded(manager: KVManager, tensors: Tensors, keys: NDArray[np.uint64], expected: bytes) -> None:
    pages = pages_of(40, len(keys))
    task = manager.blocks.get_blocks(keys, 0, pages)
    assert manager.wait(task)[task].status is Status.SUCCESS
    assert tensors.read(pages) == expected


@pytest.mark.parametrize("when", ["before rest", "after rest", "after the result was taken"])
def test_blocks_are_offered_when_they_are_at_rest_and_accepted(tmp_path: Path, when: str) -> None:
    with local(tmp_path) as (manager, client, tensors):
        tensors.fill(range(4), 1)
        expected = tensors.read(range(4))
        keys = keys_of(manager, 4)
        task = put(manager, keys, fence=1)
        assert manager.blocks.lookup(keys).reason is MissReason.NOT_READY
        if when == "before rest":
            manager.blocks.accept_put(task)
            assert manager.blocks.lookup(keys).num_ready == 0
            client.advance_fence(save=1)
            assert manager.wait(task)[task].status is Status.SUCCESS
        else:
            client.advance_fence(save=1)
            until(lambda: controller_of(manager).tasks.is_settled(task))
            assert manager.blocks.lookup(keys).reason is MissReason.NOT_READY
            if when == "after the result was taken":
                assert manager.wait(task)[task].status is Status.SUCCESS
                assert manager.blocks.lookup(keys).num_ready == 0
            manager.blocks.accept_put(task)
        assert manager.blocks.lookup(keys).num_ready == 4
        check_loaded(manager, tensors, keys, expected)
        manager.blocks.accept_put(task, 0)                      # the first call has decided
        manager.cancel(task)
        assert manager.blocks.lookup(keys).num_ready == 4


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("early", [True, False])
def test_blocks_from_the_stop_on_are_dropped(tmp_path: Path, stop: int, early: bool) -> None:
    with local(tmp_path) as (manager, client, tensors):
        tensors.fill(range(4), 1)
        expected = tensors.read(range(4))
        keys = keys_of(manager, 4)
        task = put(manager, keys, fence=1)
        if early:
            manager.blocks.accept_put(task, stop)
        client.advance_fence(save=1)
        assert manager.wait(task)[task].status is Status.SUCCESS
        manager.blocks.accept_put(task, stop)
        manager.blocks.accept_put(task)
        count = min(stop, 4)
        assert manager.blocks.lookup(keys).num_ready == count
        assert manager.stats()["free_slots"] == 48 - count
        size = len(expected) // 4
        if count:
            check_loaded(manager, tensors, keys[:count], expected[: count * size])
        again = manager.blocks.put_blocks(keys, 0, pages_of(0, 4))        # what was dropped can be saved again
        assert (again is None) == (count == 4)
        if again is not None:
            assert manager.wait(again)[again].status is Status.SUCCESS
        check_loaded(manager, tensors, keys, expected)


def cancel_before_rest(manager: KVManager, task: int, release: Callable[[], None]) -> None:
    manager.cancel(task)
    manager.blocks.accept_put(task)
    release()
    assert manager.wait(task, completely=True)[task].status is Status.CANCELLED


def cancel_after_accept_before_rest(manager: KVManager, task: int, release: Callable[[], None]) -> None:
    manager.blocks.accept_put(task)
    manager.cancel(task)
    release()
    assert manager.wait(task, completely=True)[task].status is Status.CANCELLED


def cancel_at_rest(manager: KVManager, task: int, release: Callable[[], None]) -> None:
    release()
    assert manager.wait(task)[task].status is Status.SUCCESS
    manager.cancel(task)
    manager.blocks.accept_put(task)


def reset_before_rest(manager: KVManager, task: int, release: Callable[[], None]) -> None:
    manager.reset()
    release()
    manager.blocks.accept_put(task)
    response = manager.wait(task, completely=True)[task]
    assert response.status is Status.CANCELLED
    assert "reset" in response.reason


def reset_at_rest(manager: KVManager, task: int, release: Callable[[], None]) -> None:
    release()
    until(lambda: controller_of(manager).tasks.is_settled(task))
    manager.reset()
    manager.blocks.accept_put(task)


@pytest.mark.parametrize(
    "end", [cancel_before_rest, cancel_after_accept_before_rest, cancel_at_rest, reset_before_rest, reset_at_rest]
)
def test_a_put_that_was_ended_leaves_nothing(tmp_path: Path, end: Callable[..., None]) -> None:
    with local(tmp_path) as (manager, client, _tensors):
        keys = keys_of(manager, 4)
        task = put(manager, keys, fence=1)
        end(manager, task, lambda: client.advance_fence(save=1))
        assert manager.blocks.lookup(keys).num_ready == 0
        assert manager.stats()["free_slots"] == 48
        assert len(controller_of(manager).tasks._provisional) == 0


def test_a_put_that_is_never_accepted_is_dropped_without_any_further_call(tmp_path: Path) -> None:
    with local(tmp_path, op_timeout_s=0.2) as (manager, _client, _tensors):
        keys = keys_of(manager, 4)
        task = put(manager, keys)
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert manager.stats()["free_slots"] == 44
        until(lambda: manager.stats()["free_slots"] == 48)
        manager.blocks.accept_put(task)
        assert manager.blocks.lookup(keys).num_ready == 0


def test_a_put_that_timed_out_is_dropped(tmp_path: Path) -> None:
    with local(tmp_path, op_timeout_s=0.1) as (manager, client, _tensors):
        keys = keys_of(manager, 4)
        task = put(manager, keys, fence=1)
        manager.blocks.accept_put(task)
        response = manager.wait(task)[task]
        assert response.status is Status.TIMEOUT
        assert "op_timeout_s" in response.reason
        client.advance_fence(save=1)
        manager.wait(task, completely=True)
        assert manager.blocks.lookup(keys).num_ready == 0
        assert manager.stats()["free_slots"] == 48


def test_blocks_that_are_not_accepted_do_not_reach_ssd(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        keys = made.keys(5, 1)
        made.tensors.fill(range(5), 1)
        made.contents[1] = made.tensors.read(range(3))
        task = put(made.manager, keys)
        assert made.manager.wait(task)[task].status is Status.SUCCESS
        made.put(5, 2)                                   # its blocks are written meanwhile
        until(lambda: made.store.num_writes == 5)
        made.settle()
        assert {record.key for record in made.store.disk.records.values()} == {key.tobytes() for key in made.keys(5, 2)}
        made.manager.blocks.accept_put(task, 3)
        until(lambda: made.store.num_writes == 8)
        made.flood()
        made.get(3, 1)
        written = {record.key for record in made.store.disk.records.values()}
        assert {key.tobytes() for key in keys[:3]} <= written
        assert not {key.tobytes() for key in keys[3:]} & written


# ---- puts after loads -----------------------------------------------------------------------------------------------


def saved(manager: KVManager, tensors: Tensors, num_blocks: int, seed: int) -> NDArray[np.uint64]:
    keys = keys_of(manager, num_blocks, seed)
    tensors.fill(range(num_blocks), seed)
    task = manager.blocks.put_blocks(keys, 0, pages_of(0, num_blocks))
    assert task is not None
    assert manager.wait(task)[task].status is Status.SUCCESS
    return keys


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("good", [False, True])
def test_a_put_after_loads_that_have_ended(tmp_path: Path, good: bool, taken: bool) -> None:
    with local(tmp_path) as (manager, _client, tensors):
        loaded = saved(manager, tensors, 3, 1)
        pages = pages_of(10, 3)
        if not good:
            pages[1] = PAGES                             # does not exist
        load = manager.blocks.get_blocks(loaded, 0, pages)
        until(lambda: controller_of(manager).tasks.is_settled(load))
        if taken:
            manager.wait(load)
        keys = keys_of(manager, 4, 2)
        task = manager.blocks.put_blocks(keys, 0, pages_of(20, 4), after=[load])
        assert task is not None
        response = manager.wait(task)[task]
        assert response.status is (Status.SUCCESS if good else Status.FAILED)
        assert ("load" in response.reason) == (not good)
        assert manager.blocks.lookup(keys).num_ready == (4 if good else 0)


@pytest.mark.parametrize("end", ["arrive", "fail", "cancel", "reset", "time out"])
@pytest.mark.parametrize("provisional", [False, True])
def test_a_put_waits_for_the_loads_before_it(tmp_path: Path, end: str, provisional: bool) -> None:
    with local(tmp_path, op_timeout_s=0.2 if end == "time out" else 20.0) as (manager, client, tensors):
        loaded = saved(manager, tensors, 3, 1)
        good = manager.blocks.get_blocks(loaded, 0, pages_of(30, 3))
        pages = pages_of(10, 3)
        if end == "fail":
            pages[1] = PAGES
        load = manager.blocks.get_blocks(loaded, 0, pages, fence=1)
        keys = keys_of(manager, 4, 2)
        tensors.fill(range(20, 24), 7)
        expected = tensors.read(range(20, 24))
        loads = good, np.int64(load)
        task = manager.blocks.put_blocks(keys, 0, pages_of(20, 4), after=loads, provisional=provisional)
        assert task is not None
        manager.blocks.accept_put(task)
        assert manager.wait(task, timeout=0.05)[task].status is Status.TIMEOUT
        if end == "cancel":
            manager.cancel(load)
        if end == "reset":
            manager.reset(timeout=0.0)
        if end == "time out":
            assert manager.wait(load)[load].status is Status.TIMEOUT
        client.advance_fence(load=1)
        response = manager.wait(task, completely=True)[task]
        if end == "arrive":
            assert response.status is Status.SUCCESS
            check_loaded(manager, tensors, keys, expected)
        else:
            assert response.status is not Status.SUCCESS
            assert response.reason
            assert manager.blocks.lookup(keys).num_ready == 0


def test_a_put_after_what_is_not_known_to_have_succeeded_fails(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _client, tensors):
        loaded = saved(manager, tensors, 3, 1)
        load = manager.blocks.get_blocks(loaded, 0, pages_of(10, 3))
        manager.wait(load)
        other = manager.blocks.put_blocks(keys_of(manager, 2, 5), 0, pages_of(14, 2))
        assert other is not None
        manager.wait(other)
        keys = keys_of(manager, 2, 2)
        for unknown in (10**9, other):
            task = manager.blocks.put_blocks(keys, 0, pages_of(20, 2), after=[load, unknown])
            assert task is not None
            assert manager.wait(task)[task].status is Status.FAILED
        manager.reset()                                  # it had loaded KV of before
        task = manager.blocks.put_blocks(keys, 0, pages_of(20, 2), after=[load])
        assert task is not None
        assert manager.wait(task)[task].status is Status.FAILED
        assert manager.blocks.lookup(keys).num_ready == 0


def test_arguments_of_accept_put(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _client, _tensors):
        keys = keys_of(manager, 2)
        task = put(manager, keys)
        manager.wait(task)
        for wrong in (-1, 1.5, "3", True):
            with pytest.raises(ArgumentError, match="stop_block"):
                manager.blocks.accept_put(task, wrong)          # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="task id"):
            manager.blocks.accept_put("1")                      # type: ignore[arg-type]
        manager.blocks.accept_put(10**9)
        assert manager.blocks.lookup(keys).num_ready == 0
        manager.blocks.accept_put(np.int64(task), np.int32(2))  # type: ignore[arg-type]
        assert manager.blocks.lookup(keys).num_ready == 2
