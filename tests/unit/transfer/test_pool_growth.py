"""Growth of the pool: the usable slots, with ranks that pin, report wrong numbers, die and register again."""

from typing import Any, cast

import pytest

from flexkv.transfer.executors.agent_link import AgentLink
from flexkv.transfer.pool_growth import PoolGrowth


class Rings:
    def __init__(self) -> None:
        self.usable_slots = 0
        self.takes_part = True
        self.notes: list[tuple[int, bool]] = []
        self.lowered = self.followed = 0

    def note_populated(self, num_slots: int, last: bool) -> None:
        self.notes.append((num_slots, last))

    def note_lowered(self, count: int) -> None:
        self.lowered = count


class Engine:
    def __init__(self, client: int) -> None:
        self.dp_client_id = client


class Link:
    def __init__(self, client: int = 0, is_node: bool = False) -> None:
        self.hello = Engine(client)
        self.rings = Rings()
        self.caught_up, self.needs_slots = False, is_node
        self.is_at_rest = False


class Pool:
    def __init__(self, *links: Link) -> None:
        self.capacities: list[int] = []
        self.growth = PoolGrowth(self.capacities.append, lambda: None, lambda: None)
        self.links = list(links)
        self.growth.joined()

    def update(self) -> None:
        self.growth.update(cast(list[AgentLink], self.links))

    def populate(self, num_slots: int, last: bool = False) -> None:
        self.growth.populated(num_slots, last)
        self.update()

    def join(self, client: int = 0, is_node: bool = False) -> Link:
        self.links.append(Link(client, is_node))
        self.growth.joined()
        return self.links[-1]

    def pin(self, link: Any, num_slots: int) -> None:
        link.rings.usable_slots = num_slots
        self.update()


def test_slots_are_usable_when_every_rank_has_pinned_them() -> None:
    pool = Pool(Link(), Link())
    first, second = pool.links
    pool.populate(100)
    assert pool.capacities == []
    pool.pin(first, 40)
    assert pool.capacities == []
    pool.pin(second, 16)
    assert pool.capacities == [16]
    pool.pin(second, 64)
    assert pool.capacities == [16, 40]
    pool.pin(first, 100)
    pool.pin(second, 100)
    assert pool.capacities[-1] == 100 == pool.growth.usable
    assert pool.growth.complete


def test_each_extent_is_announced_once_to_each_rank() -> None:
    pool = Pool(Link())
    pool.populate(10)
    pool.update()
    late = pool.join()
    pool.update()
    pool.populate(25, last=True)
    pool.update()
    assert pool.links[0].rings.notes == [(10, False), (25, True)]
    assert late.rings.notes == [(10, False), (25, True)]


@pytest.mark.parametrize("claimed", [11, 2**31, 2**64 - 1])
def test_a_rank_cannot_claim_more_than_is_populated(claimed: int) -> None:
    pool = Pool(Link())
    pool.populate(10)
    pool.pin(pool.links[0], claimed)
    assert pool.capacities == [10]
    pool.populate(20)
    assert pool.capacities == [10, min(claimed, 20)]


def test_a_rank_that_takes_slots_back_changes_nothing() -> None:
    pool = Pool(Link())
    pool.populate(10)
    pool.pin(pool.links[0], 10)
    pool.pin(pool.links[0], 3)
    assert pool.growth.usable == 10
    assert pool.capacities == [10]


def test_a_rank_that_was_restarted_takes_part_at_once() -> None:
    pool = Pool(Link(), Link())
    pool.populate(50)
    for link in pool.links:
        pool.pin(link, 50)
    assert pool.growth.complete
    del pool.links[1]
    again = pool.join()
    pool.populate(80)
    assert pool.growth.complete
    assert again.caught_up
    pool.pin(pool.links[0], 80)
    for pinned in (0, 16, 50):
        pool.pin(again, pinned)
        assert pool.growth.usable == 50
    pool.pin(again, 60)
    assert pool.capacities == [50, 60]


def test_a_rank_is_sent_nothing_before_its_process_knows_the_agent() -> None:
    """A worker takes a task as lost while there is no agent, and the engine uses the pages again."""
    pool = Pool(Link())
    pool.links[0].rings.takes_part = False
    pool.populate(10)
    pool.pin(pool.links[0], 10)
    assert not pool.links[0].caught_up
    assert not pool.growth.complete
    pool.links[0].rings.takes_part = True
    pool.update()
    assert pool.links[0].caught_up
    assert pool.growth.complete


def test_a_storage_host_takes_part_when_it_has_the_usable_slots() -> None:
    pool = Pool(Link(), Link(is_node=True))
    pool.populate(50)
    for link in pool.links:
        pool.pin(link, 50)
    assert pool.growth.complete
    del pool.links[1]
    again = pool.join(is_node=True)
    assert not pool.growth.complete                                             # before any update
    pool.populate(80)
    pool.pin(pool.links[0], 80)
    for pinned in (0, 16, 49):
        pool.pin(again, pinned)
        assert not pool.growth.complete
        assert not again.caught_up
        assert pool.growth.usable == 50
    pool.pin(again, 60)
    assert again.caught_up
    assert pool.growth.complete
    assert pool.capacities == [50, 60]


def test_slots_of_a_pool_that_served_before_are_usable_as_they_are_populated() -> None:
    pool = Pool(Link())
    pool.growth.keep(100)
    pool.update()
    assert pool.capacities == []
    pool.populate(30)
    pool.populate(100, last=True)
    assert pool.capacities == [30, 100]
    assert pool.growth.complete


def test_without_ranks_nothing_grows() -> None:
    pool = Pool()
    pool.populate(10, last=True)
    assert pool.capacities == []


def test_one_engine_does_not_wait_for_the_ranks_of_another() -> None:
    pool = Pool(Link(1), Link(1), Link(2))
    one, other, stopped = pool.links
    pool.populate(100, last=True)
    pool.pin(stopped, 16)
    pool.pin(one, 100)
    pool.pin(other, 60)
    assert pool.capacities == [16, 60]
    assert pool.growth.complete                      # the third copies from and to 44 slots that it has not pinned
    pool.pin(other, 100)
    assert pool.capacities[-1] == 100


def test_the_ranks_of_one_engine_wait_for_each_other() -> None:
    pool = Pool(Link(1), Link(1))
    pool.populate(100, last=True)
    pool.pin(pool.links[0], 100)
    assert pool.capacities == []


def lowered(*links: Link) -> Pool:
    """A pool of 100 slots that is about to shrink to 40."""
    pool = Pool()
    pool.growth.may_lower()
    pool.links += links
    pool.populate(100)
    for link in links:
        pool.pin(link, 100)
    pool.growth.limit(40)
    pool.update()
    assert pool.growth.usable == 40
    pool.growth.lower(40)
    assert not pool.growth.is_lowered                # no rank knows of it yet
    pool.update()
    return pool


def test_memory_is_free_when_every_rank_has_confirmed() -> None:
    one, two = Link(1), Link(2)
    pool = lowered(one, two)
    assert [link.rings.notes[-1] for link in (one, two)] == [(40, False)] * 2
    one.rings.followed = one.rings.lowered
    pool.update()
    assert not pool.growth.is_lowered
    two.rings.followed = two.rings.lowered
    pool.update()
    assert pool.growth.is_lowered
    assert pool.growth.usable == 40
    pool.growth.raise_limit()
    pool.pin(one, 100)                               # a rank may report any number
    assert pool.growth.usable == 40


def test_a_rank_that_leaves_counts_until_it_is_at_rest() -> None:
    one, two = Link(1), Link(2)
    pool = lowered(one, two)
    pool.links.remove(two)
    one.rings.followed = one.rings.lowered
    pool.update()
    assert not pool.growth.is_lowered
    assert pool.growth.num_pinning == 2
    two.is_at_rest = True
    pool.update()
    assert pool.growth.is_lowered
    assert pool.growth.num_pinning == 1


def test_a_rank_that_has_left_before_counts_too() -> None:
    gone = Link(2)
    pool = Pool()
    pool.growth.may_lower()
    pool.links += [Link(1), gone]
    pool.populate(100)
    pool.links.remove(gone)
    pool.growth.limit(40)
    pool.growth.lower(40)
    pool.links[0].rings.followed = 99
    pool.update()
    assert not pool.growth.is_lowered
    gone.is_at_rest = True
    pool.update()
    assert pool.growth.is_lowered


def test_a_rank_that_joins_during_a_shrink_is_not_waited_for() -> None:
    one = Link(1)
    pool = lowered(one)
    late = pool.join(2)
    one.rings.followed = one.rings.lowered
    pool.update()
    assert late.rings.notes == [(40, False)]
    assert pool.growth.is_lowered


def test_a_limit_can_be_raised_while_no_rank_knows_of_it() -> None:
    pool = Pool(Link())
    pool.growth.may_lower()
    pool.populate(100)
    pool.pin(pool.links[0], 100)
    pool.growth.limit(10)
    pool.update()
    assert pool.growth.usable == 10
    pool.growth.raise_limit()
    pool.update()
    assert pool.growth.usable == 100 == pool.capacities[-1]
