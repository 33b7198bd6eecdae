"""A table of tasks over a data plane that is stepped, and compared with a model after each step.

A step is what one thread does between two moments at which another one may run. Each slot, page and record on disk
holds what would have been copied there, so that a block that is offered, now or after a restart, and a load that
succeeds, is compared with what computing writes.
"""

import math
from typing import Any

import numpy as np

from flexkv.cache.eviction import LRU
from flexkv.cache.plan import GetPlan, PutPlan
from flexkv.cache.tier import HOST
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.controller.tasks import reasons
from flexkv.controller.tasks.table import TaskTable
from flexkv.controller.tasks.task import KVTask
from flexkv.errors import TaskError
from flexkv.protocol.ring import OpKind
from flexkv.transfer.graph import OpStatus, TransferOp

from .model_tasks import ACCEPT_WITHIN_S, TOKENS_PER_BLOCK, ModelTask
from .model_tree import Prefix, key_of, keys_of
from .stepped_plane import Below, Index, Lock, Plane, Record, guard

NUM_SLOTS, NUM_SSD = 5, 4


class CheckedTable:
    """A table over a data plane that is stepped, and the model of its tasks."""

    def __init__(self, with_ssd: bool) -> None:
        self.now, self.next_page, self.num_refused = 0.0, 0, 0
        self.known: dict[int, ModelTask] = {}
        self.owner: dict[int, ModelTask] = {}              # of each host slot: the put that filled it
        lock = Lock()
        self.plane = Plane(lock, self.begins)
        self.copies = self.plane.copies
        self.cache = Index(NUM_SLOTS, LRU, 1.0, 0.0, clock=self.clock, lower={"ssd": NUM_SSD} if with_ssd else None)
        self.cache.grow(NUM_SLOTS)
        self.below = Below(self.cache, self.copies, NUM_SSD) if with_ssd else None
        transfer: Any = self.plane
        tiering: Any = self.below
        self.table: Any = TaskTable(transfer, 0, TOKENS_PER_BLOCK, tiering, ACCEPT_WITHIN_S, clock=lambda: self.now)
        guard(self.table, lock)

    def clock(self) -> float:
        self.now += 0.001
        return self.now

    def step(self, name: str, sequence: Prefix = (), seed: int = 0) -> None:
        """Take a step, then compare the table with the model."""
        getattr(self, name)(sequence, seed)
        self.compare()
        self.check(sequence)

    def pick(self, seed: int, *stages: str, **wanted: bool) -> ModelTask | None:
        """A task in one of these stages; a late one more often."""
        found = [task for task in self.known.values() if task.stage in stages and all(
            getattr(task, name) == value for name, value in wanted.items())]
        return found[-1 - seed % (len(found) if seed % 4 == 3 else min(2, len(found)))] if found else None

    # ---- calls ------------------------------------------------------------------------------------------------

    def plan_put(self, sequence: Prefix, seed: int, provisional: bool = False) -> ModelTask:
        copies, epoch = self.copies, self.cache.epoch
        busy = copies.touched(OpKind.D2H) | copies.touched(OpKind.H2D, source=True)
        busy_ssd = copies.touched(OpKind.D2STORE, OpKind.ERASE) | copies.touched(OpKind.STORE2D, source=True)
        num_tokens = TOKENS_PER_BLOCK * len(sequence)
        task = self.table.new_put(self.cache, keys_of(sequence), 0, len(sequence), num_tokens, 0, provisional)
        known = self._plan(task, sequence, epoch)
        known.provisional = provisional
        assert isinstance(task.plan, PutPlan)
        known.uses = []
        for move in task.plan.moves:
            assert not provisional or move.target == HOST
            assert not (busy if move.target == HOST else busy_ssd) & set(move.dst.tolist())   # nothing touches them
            slots: Any = self.cache._tiers[move.target].slots
            known.uses.append((slots, move.blocks, move.dst, slots.generations(move.dst)))
            for slot in move.dst.tolist() if move.target == HOST else ():
                self.owner[slot], copies.slots[slot] = known, None
        for page, block in zip(known.pages.tolist(), known.blocks, strict=True):
            copies.pages[page] = known.content(block)
        return known

    def plan_provisional(self, sequence: Prefix, seed: int) -> ModelTask:
        return self.plan_put(sequence, seed, provisional=True)

    def plan_get(self, sequence: Prefix, seed: int) -> ModelTask:
        epoch, stop = self.cache.epoch, len(sequence) if seed % 2 else None
        num_tokens = TOKENS_PER_BLOCK * len(sequence)
        return self._plan(self.table.new_get(self.cache, keys_of(sequence), 0, stop, num_tokens), sequence, epoch)

    def _plan(self, task: KVTask, sequence: Prefix, epoch: int) -> ModelTask:
        pages = np.arange(self.next_page, self.next_page + len(task.blocks), dtype=np.int32)
        self.next_page += len(pages)
        known = self.known[task.task_id] = ModelTask(task, sequence, pages, epoch)
        return known

    def put(self, sequence: Prefix, seed: int) -> None:
        """A put that is handed over, mostly; as all of these."""
        self._start(self.plan_put(sequence, seed), seed)

    def put_provisional(self, sequence: Prefix, seed: int) -> None:
        self._start(self.plan_provisional(sequence, seed), seed)

    def get(self, sequence: Prefix, seed: int) -> None:
        self._start(self.plan_get(sequence, seed), seed)

    def put_after(self, sequence: Prefix, seed: int) -> None:
        """A put after one or two loads that run or have ended, seldom after other tasks."""
        stages, loads = ("running", "settled") if seed % 8 else ("matched", "running", "settled", "gone"), {}
        for each in (seed, seed // 4)[: 1 + seed % 2]:
            loads[each] = self.pick(each, *stages, **({"loading": True} if seed % 8 else {}))
        plan = self.plan_provisional if seed % 3 == 2 else self.plan_put
        self._start(plan(sequence, seed), seed, [load for load in loads.values() if load is not None])

    def save(self, sequence: Prefix, seed: int) -> None:
        self.put(sequence, seed)
        self.rest(sequence, seed)

    def save_provisional(self, sequence: Prefix, seed: int) -> None:
        self.put_provisional(sequence, seed)
        self.rest(sequence, seed)

    def load(self, sequence: Prefix, seed: int) -> None:
        self.get(sequence, seed)
        self.rest(sequence, seed)

    def rest(self, sequence: Prefix, seed: int) -> None:
        """All that was begun comes to rest."""
        for _ in range(400):
            if self.plane.is_idle:
                return
            for take_step in (self.stop, self.hand_over, self.begin, self.end, self.fire):
                take_step((), 0)
                self.compare()
        raise AssertionError("it does not come to rest")

    def run(self, sequence: Prefix, seed: int) -> None:
        known = self.pick(seed, "planned")
        if known is not None:
            self._run(known)

    def _start(self, known: ModelTask, seed: int, after: list[ModelTask] | None = None) -> None:
        self._run(known, after)
        if seed % 16 < 12 and self.plane.pending and self.plane.pending[-1][0].task_id == known.id:
            self.hand_over((), len(self.plane.pending) - 1)

    def _run(self, known: ModelTask, after: list[ModelTask] | None = None) -> None:
        known.launch(self.cache.epoch, after or [])
        self.table.run(known.task, known.pages, 0, after=[each.id for each in known.after])
        self.compare()

    def hold(self, sequence: Prefix, seed: int) -> None:
        known = self.pick(seed, "planned")
        if known is not None:
            known.stage, known.since = "matched", self.now
            self.table.hold(known.task)

    def discard(self, sequence: Prefix, seed: int) -> None:
        known = self.pick(seed, "planned")
        if known is not None:
            known.end_before_launch()
            self.table.discard(known.task)

    def launch(self, sequence: Prefix, seed: int) -> None:
        """Held tasks, also with one that was launched or has ended meanwhile, or twice: then none is launched."""
        chosen = [known for known in (
            self.pick(seed, "matched"),
            self.pick(seed // 2, "matched", "running", "settled", "gone") if seed % 3 == 0 else None,
        ) if known is not None]
        is_good = len(set(chosen)) == len(chosen) and all(known.stage == "matched" for known in chosen)
        for known in chosen if is_good else ():
            known.launch(self.cache.epoch, [])
        try:
            self.table.launch([(known.task, known.pages) for known in chosen], 0)
        except TaskError:
            assert not is_good
        else:
            assert is_good

    def cancel(self, sequence: Prefix, seed: int) -> None:
        known = self.pick(seed, "matched", "running", "settled", "gone")
        if known is not None:
            self.plane.defers = seed % 8 > 5
            known.cancel(self.cache.epoch)
            self.table.cancel(known.id)
            self.plane.defers = False

    def accept(self, sequence: Prefix, seed: int) -> None:
        known = self.pick(seed, "running", "settled", provisional=True)
        if known is not None:
            stop = seed // 4 % 4 if seed % 3 == 2 else math.inf
            known.decide(stop, self.cache.epoch)
            self.table.accept(known.id, stop)

    def reset_index(self, sequence: Prefix, seed: int) -> None:
        """The first half of a reset; seldom."""
        if seed < 24:
            self.cache.reset()
            self.copies.clear()

    def reset(self, sequence: Prefix, seed: int) -> None:
        if seed < 24:
            self.reset_index(sequence, seed)
            for known in self.known.values():
                known.cancel(self.cache.epoch, reasons.WAS_RESET)
            self.plane.defers = seed % 2 > 0
            self.table.reset()
            self.plane.defers = False

    def reset_amid(self, sequence: Prefix, seed: int) -> None:
        """The index is reset while the next task is planned."""
        if seed < 24:
            when = "before" if seed % 2 else "after"
            setattr(self.cache, when, lambda: self.reset_index((), 0))

    def pass_time(self, sequence: Prefix, seed: int) -> None:
        self.now += 61.0 if seed % 2 else 30.0
        for known in self.known.values():
            known.expire(self.now, self.cache.epoch)
        self.table.run_background_work()

    def evict(self, sequence: Prefix, seed: int) -> None:
        tier = self.cache._lower[0] if self.below is not None and seed % 4 == 3 else self.cache._host
        tier.evict(self.cache._tree, NUM_SLOTS if seed % 2 else 1, self.clock())

    def write_back(self, sequence: Prefix, seed: int) -> None:
        """Ready blocks of a sequence are written to SSD."""
        if not sequence or self.below is None:
            return
        if (plan := self.cache.begin_write_back(1, keys_of(sequence), NUM_SSD)) is not None:
            for block, host, ssd in zip(plan.blocks, plan.src.tolist(), plan.dst.tolist(), strict=True):
                key = plan.keys[block].tobytes()
                self.copies.disk[ssd] = Record(key, self.copies.slots[host], self.owner[host].id)
                self.copies.bad.discard(ssd)
            self.cache.end_move(plan, np.ones(len(plan), dtype=np.bool_))

    # ---- the data plane ---------------------------------------------------------------------------------------

    def refuse(self, sequence: Prefix, seed: int) -> None:
        """The data plane does not take the next graph; seldom."""
        self.plane.fails = seed < 16

    def hand_over(self, sequence: Prefix, seed: int) -> None:
        self.plane.hand_over(seed)

    def stop(self, sequence: Prefix, seed: int) -> None:
        self.plane.stop(seed)

    def begin(self, sequence: Prefix, seed: int) -> None:
        self.copies.begin(seed)

    def end(self, sequence: Prefix, seed: int) -> None:
        self.copies.end(seed, True)

    def lose(self, sequence: Prefix, seed: int) -> None:
        self.copies.end(seed, False)

    def late(self, sequence: Prefix, seed: int) -> None:
        if (known := self.pick(seed, "running")) and self.plane.end_early(known.id, OpStatus.TIMEOUT):
            known.verdict = Status.TIMEOUT

    def lose_rank(self, sequence: Prefix, seed: int) -> None:
        if (known := self.pick(seed, "running")) and self.plane.end_early(known.id, OpStatus.FAILED, is_lost=True):
            known.verdict = Status.FAILED

    def abandon(self, sequence: Prefix, seed: int) -> None:
        """The data plane goes out of service, with no part in this task."""
        if (known := self.pick(seed, "running")) and self.plane.end_early(known.id, OpStatus.FAILED):
            known.given_up = True

    def fire(self, sequence: Prefix, seed: int) -> None:
        self.plane.fire()

    def begins(self, op: TransferOp, i: int) -> None:
        """A copy begins: its task may move blocks, and the pages of a put hold what its loads brought."""
        known = self.known.get(op.task_id)
        assert (known is None) == (op.kind is OpKind.ERASE)
        if known is not None:
            assert not known.refused
            assert known.id not in self.plane.stopped
            assert all(self.has_arrived(load) for load in known.after)

    def has_arrived(self, load: ModelTask) -> bool:
        """Every block of a load is in its page."""
        expected = [load.content(block) for block in load.blocks]
        return load.loading and [self.copies.pages.get(page) for page in load.pages.tolist()] == expected

    # ---- results ----------------------------------------------------------------------------------------------

    def take(self, sequence: Prefix, seed: int) -> None:
        known = self.pick(seed, "matched", "running", "settled", "gone")
        if known is not None:
            self._take(known)

    def _take(self, known: ModelTask) -> None:
        """Once its caller has a result, it gives the pages of a put away; those of a get once that has settled."""
        response = self.table.take(known.id)
        known.check_response(response, self.cache.epoch)
        is_over = known.stage == "settled" or known.early is not None
        if is_over and not known.loading:
            self.copies.pages.update(dict.fromkeys(known.pages.tolist()))
        if known.stage == "settled" and known.loading and not known.is_taken:
            assert not self.copies.touched(OpKind.H2D, OpKind.P2D, OpKind.STORE2D) & set(known.pages.tolist())
            moved = response.return_mask[::TOKENS_PER_BLOCK]
            for page, block in zip(known.pages.tolist(), known.blocks, strict=True):
                assert not moved[block] or self.copies.pages[page] == (self.cache.epoch, known.sequence[: block + 1])
        known.is_taken |= known.stage == "settled"

    def again(self, sequence: Prefix, seed: int) -> None:
        """A result comes a second time: nothing changes."""
        known = self.pick(seed, "settled")
        if known is None:
            return
        if known.id in self.plane.over:
            self.plane.over[known.id]()
        if known.kept is not None and isinstance(known.plan, PutPlan):
            if seed % 2:                                   # as if the plan did not know that it has ended
                for move, (_, _, _, generations) in zip(known.plan.moves, known.uses, strict=True):
                    move.filled = generations
            self.num_refused += sum(int(freed.sum()) if seed % 2 else len(freed) for freed in known.freed())
            self.cache.end_put(known.plan, np.ones(len(known.blocks), dtype=np.bool_))
        elif isinstance(known.plan, GetPlan):
            self.cache.end_get(known.plan)
            self.num_refused += len(known.plan)

    # ---- promises ---------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Tasks, provisional puts, and slots of puts that are over are those of the model."""
        epoch, known = self.cache.epoch, self.known.values()
        for task in known:
            if task.stage == "running" and self.table.is_settled(task.id):
                moved = self.copies.moved.get(task.id, {})
                arrived = {task.blocks[i] for i, ok in moved.items() if ok}
                excused = task.id in self.copies.hurt or not all(
                    self.has_arrived(load) and load.id not in self.plane.stopped for load in task.after)
                task.settle(self.now, epoch, arrived, task.id not in self.plane.refused, excused)
            if task.kept is not None and not task.is_compared:
                task.is_compared = True
                for (_, blocks, _, _), freed in zip(task.uses, task.freed(), strict=True):
                    for block, is_free in zip(blocks.tolist(), freed.tolist(), strict=True):
                        # an accepted block of before a reset is free once nothing behind it is being written
                        assert is_free == (block not in task.kept) or (task.epoch != epoch and block in task.moved)
            if task.stage == "running":
                assert self.table.has_result(task.id) == (task.early is not None)
                assert not task.cancelled or task.id in self.plane.stopped | self.plane.stopping
        unsettled = {task.id for task in known if task.stage in ("matched", "running")}
        assert set(self.table.unsettled()) == unsettled
        assert len(self.table) == len(unsettled) + sum(task.stage == "settled" and not task.is_taken for task in known)
        assert self.table.num_provisional == sum(task.is_resting for task in known)
        assert self.plane.lock.depth == 0
        self.check_disk()

    def check_disk(self) -> None:
        """Records that a restart would offer are blocks of puts that run, or have saved them."""
        for record in self.copies.disk.values():
            put = self.known[record.put]
            if put.kept is not None or put.provisional:
                assert record.content is not None
                epoch, prefix = record.content
                assert (epoch, key_of(prefix)) == (self.cache.epoch, record.key)
                assert len(prefix) - 1 in (put.kept or ())

    def check(self, sequence: Prefix) -> None:
        """Blocks that are offered are what puts that have saved them computed."""
        match = self.cache._tree.match(keys_of(sequence), self.now, 0)
        for block in range(match.num_ready):
            slot, expected = int(match.slots[block]), (self.cache.epoch, sequence[: block + 1])
            if match.tiers[block] == HOST:
                assert self.copies.slots[slot] == expected
                assert block in (self.owner[slot].kept or ())
            else:
                assert self.copies.disk[slot].content == expected
        self.cache.check_integrity()
        stats = self.cache.stats()
        assert stats["stale_results"] + stats.get("ssd_stale_results", 0) == self.num_refused

    def drain(self) -> None:
        """Without its callers everything comes to rest, and nothing is held."""
        while any(task.stage == "planned" for task in self.known.values()):
            self.step("discard")
        self.step("rest")
        for _ in range(3):
            self.step("pass_time")
        assert self.table.unsettled() == []
        assert self.table.num_provisional == 0
        for known in self.known.values():
            self._take(known)
        assert len(self.table) == 0
        self.reset((), 0)
        stats = self.cache.stats()
        assert (stats["free_slots"], stats.get("ssd_free_slots", NUM_SSD)) == (NUM_SLOTS, NUM_SSD)
