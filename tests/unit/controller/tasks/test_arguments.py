"""Bad arguments: each raises a named error with a remedy, and changes nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import ArgumentError, FlexKVError, SlotMappingError, TaskError
from flexkv.kvmanager import KVManager
from flexkv.protocol.layer_signals import MAX_COUNTERS
from tests.support.harness import PAGES, TOKENS, Tensors, controller_of, local, mapping, tokens_of

NO_TEXT = "\ud800"
RAGGED = [[1], [2, 3]]


class Door:
    """A manager with one saved sequence of four blocks, and that sequence."""

    def __init__(self, manager: KVManager, tensors: Tensors) -> None:
        self.manager, self.tensors = manager, tensors
        self.tokens = tokens_of(4)
        tensors.fill(range(4), 1)
        self.content = tensors.read(range(4))
        task = manager.put_async(self.tokens, mapping(range(4)))
        assert manager.wait(task)[task].status is Status.SUCCESS
        hasher = manager.blocks.hasher()
        hasher.extend(self.tokens)
        self.keys: NDArray[np.uint64] = hasher.keys
        other = manager.blocks.hasher()
        other.extend(tokens_of(6, 9))
        self.absent: NDArray[np.uint64] = other.keys
        self.held, _ = manager.get_match(self.tokens)
        self.before = self.state()

    def state(self) -> tuple[Any, ...]:
        stats = self.manager.stats()
        return (stats["free_slots"], stats["indexed_blocks"], stats["tasks"], stats["pinned_blocks"],
                controller_of(self.manager).tasks.unsettled(), self.manager.blocks.lookup(self.keys).num_ready)

    def refuses(self, call: Callable[[], object], error: type[FlexKVError] = ArgumentError) -> None:
        with pytest.raises(error) as caught:
            call()
        assert len(str(caught.value)) > 20
        assert self.state() == self.before
        self.manager.check_integrity()

    def still_works(self) -> None:
        self.manager.launch(self.held, mapping(range(20, 24)))
        assert self.manager.wait(self.held)[self.held].status is Status.SUCCESS
        assert self.tensors.read(range(20, 24)) == self.content
        task = self.manager.blocks.put_blocks(self.absent, 0, list(range(6)))  # type: ignore[arg-type]
        assert task is not None
        assert self.manager.wait(task)[task].status is Status.SUCCESS


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with local(tmp_path_factory.mktemp("door")) as (manager, _, tensors):
        made = Door(manager, tensors)
        yield made
        made.still_works()


FENCES = [-1, 1 << 63, 1 << 64, None, 1.0, "1", True, np.float64(2), np.int64(-5), [1]]
BAD_PAGES = [
    [-1, 0], [0.0, 1.0], "ab", None, 3, [[0, 1]], [1 << 31, 0], [1 << 70, 0], RAGGED, [True, False],
    np.array([1, -2], dtype=np.int64), np.array([0, 1], dtype=np.float32), list(range(7)), {"a": 1},
]
BLOCKS = [-1, 1.5, None, "0", 1 << 31, 1 << 70, True, np.int32(-1)]


@pytest.mark.parametrize("fence", FENCES, ids=repr)
def test_fences(door: Door, fence: Any) -> None:
    pages = np.arange(2, dtype=np.int32)
    door.refuses(lambda: door.manager.blocks.put_blocks(door.absent, 0, pages, fence=fence))
    door.refuses(lambda: door.manager.blocks.put_blocks(door.absent, 0, pages, fence=fence, provisional=True))
    door.refuses(lambda: door.manager.blocks.get_blocks(door.keys, 0, pages, fence=fence))
    door.refuses(lambda: door.manager.launch(door.held, mapping(range(4)), fence=fence))


@pytest.mark.parametrize("pages", BAD_PAGES, ids=lambda value: repr(value)[:30])
def test_pages(door: Door, pages: Any) -> None:
    door.refuses(lambda: door.manager.blocks.put_blocks(door.absent, 0, pages))
    door.refuses(lambda: door.manager.blocks.get_blocks(door.keys, 0, pages))


@pytest.mark.parametrize("block", BLOCKS, ids=repr)
def test_positions(door: Door, block: Any) -> None:
    pages = np.arange(2, dtype=np.int32)
    door.refuses(lambda: door.manager.blocks.put_blocks(door.absent, block, pages))
    door.refuses(lambda: door.manager.blocks.get_blocks(door.keys, block, pages))
    door.refuses(lambda: door.manager.blocks.lookup(door.keys, block))
    door.refuses(lambda: door.manager.blocks.prefetch_blocks(door.keys, block))


def test_more_pages_than_keys(door: Door) -> None:
    door.refuses(lambda: door.manager.blocks.put_blocks(door.absent, 5, np.arange(2, dtype=np.int32)))
    door.refuses(lambda: door.manager.blocks.get_blocks(door.keys, 3, np.arange(2, dtype=np.int32)))


@pytest.mark.parametrize("keys", [
    None, [], [[1, 2]], "keys", np.zeros((2, 2)), np.zeros((2, 3), dtype=np.uint64), np.zeros(4, dtype=np.uint64),
    np.zeros((2, 2), dtype=np.int64), np.zeros((2, 2, 2), dtype=np.uint64),
], ids=lambda value: repr(value)[:40])
def test_keys(door: Door, keys: Any) -> None:
    pages = np.arange(2, dtype=np.int32)
    door.refuses(lambda: door.manager.blocks.put_blocks(keys, 0, pages))
    door.refuses(lambda: door.manager.blocks.get_blocks(keys, 0, pages))
    door.refuses(lambda: door.manager.blocks.lookup(keys))
    door.refuses(lambda: door.manager.blocks.prefetch_blocks(keys))


@pytest.mark.parametrize("tenant", [-1, 1, 1 << 40, None, "a", 0.0])
def test_tenants(door: Door, tenant: Any) -> None:
    pages = np.arange(2, dtype=np.int32)
    door.refuses(lambda: door.manager.blocks.put_blocks(door.absent, 0, pages, tenant=tenant))
    door.refuses(lambda: door.manager.blocks.get_blocks(door.keys, 0, pages, tenant=tenant))
    door.refuses(lambda: door.manager.blocks.lookup(door.keys, 0, tenant))


@pytest.mark.parametrize("namespace", ["tenant", b"tenant", ["a", 1], [b"a"], [None], 7, [NO_TEXT]], ids=ascii)
def test_namespaces(door: Door, namespace: Any) -> None:
    manager, tokens = door.manager, tokens_of(2, 3)
    for call in (manager.get_match, manager.put_match, manager.prefetch_async, manager.pin):
        door.refuses(lambda call=call: call(tokens, namespace=namespace))  # type: ignore[misc]
    door.refuses(lambda: manager.put_async(tokens, mapping([0, 1]), namespace=namespace))
    door.refuses(lambda: manager.blocks.hasher(namespace))
    door.refuses(lambda: manager.blocks.tenant(namespace))


@pytest.mark.parametrize("tokens", [
    [[1, 2]], [1.0] * 8, "12345678", None, 5, [-1] * 8, [1 << 32] * 8, [1 << 64] * 8, RAGGED, [True] * 8, {1: 2},
    np.full(8, 1 << 40, dtype=np.uint64), np.zeros(8, dtype=np.complex128),
], ids=lambda value: repr(value)[:30])
def test_tokens(door: Door, tokens: Any) -> None:
    manager = door.manager
    for call in (manager.get_match, manager.put_match, manager.prefetch_async, manager.pin):
        door.refuses(lambda call=call: call(tokens))  # type: ignore[misc]
    door.refuses(lambda: manager.put_async(tokens, mapping([0, 1])))


@pytest.mark.parametrize("mask", [
    np.ones(7, dtype=np.bool_), np.ones((8, 1), dtype=np.bool_), np.ones(8, dtype=np.int64), [True, False] * 4, "x" * 8,
], ids=lambda value: repr(value)[:30])
def test_masks(door: Door, mask: Any) -> None:
    for call in (door.manager.get_match, door.manager.put_match):
        door.refuses(lambda call=call: call(tokens_of(2), mask))  # type: ignore[misc]


@pytest.mark.parametrize("extras", [{-1: b"x"}, {0: "x"}, {0: None}, {"0": b"x"}, {0: 3}, [b"x"]], ids=repr)
def test_extras(door: Door, extras: Any) -> None:
    for call in (door.manager.get_match, door.manager.put_match):
        door.refuses(lambda call=call: call(tokens_of(2), block_extras=extras))  # type: ignore[misc]


@pytest.mark.parametrize("slots", [
    mapping([0, 1, 2]), mapping(range(4)) + 1, mapping(range(4))[::-1], mapping(range(4)).astype(np.float64),
    mapping(range(4)).reshape(4, -1), mapping([-1, 0, 1, 2]), mapping([1 << 40, 0, 1, 2]), None, "slots", RAGGED, 5,
], ids=lambda value: repr(value)[:30])
def test_slot_mappings(door: Door, slots: Any) -> None:
    door.refuses(lambda: door.manager.launch([door.held], [slots]), SlotMappingError)
    door.refuses(lambda: door.manager.launch(door.held, slots), SlotMappingError)
    door.refuses(lambda: door.manager.launch([door.held], slots), FlexKVError)
    door.refuses(lambda: door.manager.put_async(tokens_of(4, 5), slots), SlotMappingError)
    door.refuses(lambda: door.manager.get_async(door.tokens, slots), SlotMappingError)


@pytest.mark.parametrize("task_id", [-1, 1.5, None, "1", True, 1 << 70, [None], ["a"], [1.0]], ids=repr)
def test_task_ids(door: Door, task_id: Any) -> None:
    manager = door.manager
    for call in (manager.wait, manager.try_wait, manager.cancel):
        door.refuses(lambda call=call: call(task_id))  # type: ignore[misc]
    door.refuses(lambda: manager.launch(task_id, [mapping(range(4))]))
    door.refuses(lambda: manager.blocks.put_blocks(door.absent, 0, np.arange(2, dtype=np.int32), after=[task_id]))
    if not isinstance(task_id, list):
        for call in (manager.blocks.task_blocks, manager.task_match, manager.blocks.accept_put):
            door.refuses(lambda call=call: call(task_id))  # type: ignore[misc]


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), None, "1", 1e300, 1 << 70, -0.001], ids=repr)
def test_times(door: Door, seconds: Any) -> None:
    door.refuses(lambda: door.manager.wait(door.held, timeout=seconds))
    door.refuses(lambda: door.manager.reset(timeout=seconds))
    door.refuses(lambda: door.manager.wait_ready(timeout=seconds))
    rate = door.manager.blocks.set_prefill_rate
    door.refuses(lambda: rate(seconds) if seconds != 1 << 70 else door.manager.wait(0, -1))


@pytest.mark.parametrize("counter", [-1, MAX_COUNTERS, None, "0", 1.0], ids=repr)
def test_counters(door: Door, counter: Any) -> None:
    door.refuses(lambda: door.manager.launch(door.held, mapping(range(4)), layerwise_transfer=True, counter_id=counter))


def test_launch_of_tasks_that_do_not_wait_for_it(door: Door) -> None:
    door.refuses(lambda: door.manager.launch(10**6, mapping([])), TaskError)
    door.refuses(lambda: door.manager.launch([door.held, 10**6], [mapping(range(4))] * 2), TaskError)
    door.refuses(lambda: door.manager.launch([door.held] * 2, [mapping(range(4))] * 2), TaskError)
    door.refuses(lambda: door.manager.launch([door.held], []), SlotMappingError)


# ---- what is accepted -----------------------------------------------------------------------------------------------


def test_numpy_integers_and_lists_are_as_good(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, tensors):
        tensors.fill(range(4), 1)
        expected = tensors.read(range(4))
        tokens = tokens_of(4)
        put, mask = manager.put_match(tokens.tolist(), [True] * 4 * TOKENS)    # type: ignore[arg-type]
        assert mask.all()
        ids = manager.launch(np.int64(put), mapping(range(4)).tolist(), fence=np.uint64(0))  # type: ignore[arg-type]
        assert ids == [put]
        assert manager.wait(np.int64(put))[put].status is Status.SUCCESS       # type: ignore[call-overload]
        get, mask = manager.get_match(tokens.astype(np.uint64))
        assert mask.all()
        manager.launch(np.array([get]), [mapping(range(10, 14)).astype(np.int32)], fence=np.int8(0))  # type: ignore[arg-type]
        assert manager.wait(np.array([get, get]), timeout=np.float32(5))[get].status is Status.SUCCESS  # type: ignore[arg-type]
        assert tensors.read(range(10, 14)) == expected
        hasher = manager.blocks.hasher(("a",))
        hasher.extend(tokens)
        task = manager.blocks.put_blocks(np.asfortranarray(hasher.keys), np.int16(0), (0, 1, 2, 3))  # type: ignore[arg-type]
        assert task is not None
        assert manager.wait({task})[task].status is Status.SUCCESS
        task = manager.blocks.get_blocks(hasher.keys, 0, np.arange(30, 34, dtype=np.uint8), tenant=np.int64(0))  # type: ignore[arg-type]
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert tensors.read(range(30, 34)) == expected
        assert manager.try_wait(np.int32(task))[task].status is Status.NOTFOUND       # type: ignore[arg-type]


def test_pages_are_taken_as_they_are_at_the_call(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, client, tensors):
        tensors.fill(range(4), 1)
        expected = tensors.read(range(4))
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(4))
        pages = np.arange(4, dtype=np.int32)
        put = manager.blocks.put_blocks(hasher.keys, 0, pages, fence=1)
        assert put is not None
        pages[:] = PAGES - 1
        client.advance_fence(save=1)
        assert manager.wait(put)[put].status is Status.SUCCESS
        pages = np.arange(10, 14, dtype=np.int32)
        get = manager.blocks.get_blocks(hasher.keys, 0, pages, fence=1)
        pages[:] = 40
        client.advance_fence(load=1)
        assert manager.wait(get)[get].status is Status.SUCCESS
        assert tensors.read(range(10, 14)) == expected


def test_a_result_of_an_id_given_twice_is_given_once(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        task = manager.put_async(tokens_of(2), mapping([0, 1]))
        assert manager.wait([task, task])[task].status is Status.SUCCESS
        task = manager.put_async(tokens_of(2, 1), mapping([0, 1]))
        manager.wait(task, timeout=0)
        while not (ended := manager.try_wait([task, task])):
            pass
        assert ended[task].status in (Status.SUCCESS, Status.NOTFOUND)


def test_after_a_shutdown_nothing_is_found_and_nothing_saved(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        held, _ = manager.put_match(tokens_of(2))
        get, _ = manager.get_match(tokens_of(2, 1))
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(2, 2))
        pages = np.arange(2, dtype=np.int32)
        manager.shutdown()
        assert not manager.is_ready()
        assert manager.blocks.put_blocks(hasher.keys, 0, pages) is None
        assert manager.blocks.lookup(hasher.keys).num_ready == 0
        assert not manager.put_match(tokens_of(2, 3))[1].any()
        load = manager.blocks.get_blocks(hasher.keys, 0, pages)
        manager.launch([held], [mapping([0, 1])])
        manager.launch([get], [mapping([])])
        ended = manager.wait([held, get, load], timeout=1)
        assert {ended[held].status, ended[load].status} == {Status.CANCELLED}
        manager.blocks.accept_put(held)
        manager.cancel([held, get, load])
        manager.reset()
