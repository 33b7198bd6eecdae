"""An engine on two nodes: bytes are those that its ranks computed, whatever process ends and whenever the link does."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import PAGES, until
from tests.support.node_cluster import SECRET, Cluster, Link, VirtualLink, free_port, in_background

MAX_WAIT_S = 5.5
"""The bound of a wait, 5 s, and the time that two processors need for all these processes."""


@pytest.fixture(autouse=True)
def ranks_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_NODE_SECRET", SECRET)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Cluster, Link]]:
    port = free_port()
    link = Link(port)
    cluster = Cluster(tmp_path, 4, port, link_port=link.port)
    try:
        cluster.wait_ready()
        yield cluster, link
    finally:
        cluster.close()
        link.close()


class Workload:
    """Random puts and gets on a cluster, and a record of the sequences that were put."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self.cluster, self.rng = cluster, rng
        self.next_seed, self.hits = 1, 0
        self.known: dict[int, int] = {}

    def put(self) -> str:
        blocks, seed = self.rng.randrange(1, 9), self.next_seed
        pages = self.rng.sample(range(PAGES), blocks)
        self.cluster.fill(pages, seed)
        status, seconds = self.cluster.ask("put", blocks, seed, pages)
        assert seconds < MAX_WAIT_S
        self.next_seed += 1
        self.known[seed] = blocks
        return str(status)

    def get(self, of_last: int = 12) -> str:
        if not self.known:
            return "NOTFOUND"
        seed = self.rng.choice(list(self.known)[-of_last:])
        pages = self.rng.sample(range(PAGES), self.known[seed])
        (status, found), seconds = self.cluster.ask("get", self.known[seed], seed, pages)
        assert seconds < MAX_WAIT_S
        if status == "SUCCESS":
            self.cluster.check(pages, seed, found)
            self.hits += found
        return str(status)


def strike(cluster: Cluster, link: Link | VirtualLink, rng: random.Random, work: Workload) -> str:
    """While requests run, kill a process or cut the link at a random moment; then make it good again."""
    half = cluster.num_ranks // 2
    what = rng.choice(["near rank", "far rank", "host", "controller", "cut", "silence"])
    victim = rng.randrange(half) + half * (what == "far rank")

    def blow() -> None:
        if what.endswith("rank"):
            cluster.kill_rank(victim)
        elif what == "host":
            cluster.host.kill()
        elif what == "controller":
            cluster.controller.kill()
        elif what == "cut":
            link.cut()
        else:
            link.is_silent = True

    timer = in_background(blow, rng.uniform(0, 0.1))
    seed = work.next_seed
    try:
        for _ in range(6):
            blocks = rng.randrange(1, 9)
            pages = rng.sample(range(PAGES), blocks)
            seed += 1
            work.next_seed = seed + 1
            # the pages are not filled, because a rank may be dead; these sequences are never looked up
            status, seconds = cluster.ask("put", blocks, 10_000_000 + seed, pages)
            assert seconds < MAX_WAIT_S, (what, status)
            if work.known:
                known = rng.choice(list(work.known))
                _, seconds = cluster.ask("get", work.known[known], known, rng.sample(range(PAGES), work.known[known]))
                assert seconds < MAX_WAIT_S, what
    except ConnectionError:
        assert what == "controller"
    timer.join()
    if what in ("cut", "silence"):
        time.sleep(rng.choice([0.1, 2.5]))
    link.mend()
    if what.endswith("rank"):
        cluster.restart_rank(victim)
    elif what == "host":
        cluster.kill_host()
        cluster.start_host()
    elif what == "controller":
        cluster.kill_controller()
        cluster.start_controller()
        work.known.clear()
    cluster.wait_ready(60)
    return what


def test_what_the_ranks_of_both_nodes_computed_comes_back(pair: tuple[Cluster, Link]) -> None:
    cluster, _ = pair
    work = Workload(cluster, random.Random(1))
    for _ in range(12):
        assert work.put() == "SUCCESS"
        assert work.get() == "SUCCESS"
    assert work.hits > 12
    assert cluster.ask("drained")[0]


def test_a_cut_link_is_mended_and_host_memory_keeps_its_blocks(pair: tuple[Cluster, Link]) -> None:
    cluster, link = pair
    work = Workload(cluster, random.Random(2))
    assert work.put() == "SUCCESS"
    link.cut()
    assert work.get() in ("NOTFOUND", "FAILED")
    link.mend()
    cluster.wait_ready()
    assert work.get() == "SUCCESS"
    assert work.hits > 0
    assert cluster.ask("drained")[0]


def test_a_storage_host_that_was_killed_has_lost_its_blocks(pair: tuple[Cluster, Link]) -> None:
    cluster, _ = pair
    work = Workload(cluster, random.Random(3))
    assert work.put() == "SUCCESS"
    cluster.kill_host()
    cluster.start_host()
    cluster.wait_ready()
    assert work.get() == "NOTFOUND"
    assert work.put() == "SUCCESS"
    assert cluster.ask("drained")[0]


def test_cuts_of_the_link_leave_no_descriptor_behind(pair: tuple[Cluster, Link]) -> None:
    cluster, link = pair
    work = Workload(cluster, random.Random(5))

    def descriptors() -> list[int]:
        pids = [cluster.controller.pid, cluster.host.pid, *(rank.process.pid for rank in cluster.ranks)]
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]

    before = descriptors()
    for _ in range(6):
        work.put()
        link.cut()
        work.put()
        link.mend()
        cluster.wait_ready()
    until(lambda: descriptors() == before)
    assert cluster.ask("drained")[0]


def test_random_kills_and_cuts(pair: tuple[Cluster, Link]) -> None:
    cluster, link = pair
    rng = random.Random(4)
    work = Workload(cluster, rng)
    for _ in range(12):
        work.put()
        work.get()
        strike(cluster, link, rng, work)
    assert work.put() == "SUCCESS"
    assert work.get(of_last=1) == "SUCCESS"
    assert cluster.ask("drained")[0]


@pytest.mark.nightly
def test_sixteen_ranks_in_two_network_namespaces(tmp_path: Path) -> None:
    """NODE_KILLS: how many times a process is killed or the link is cut."""
    link = VirtualLink()
    cluster = None
    rng = random.Random(seed := int(os.environ.get("NODE_SEED", str(random.randrange(1 << 30)))))
    print(f"NODE_SEED={seed}")
    try:
        cluster = Cluster(
            tmp_path, 16, 5556, link.address, controller_in=link.inside(0), host_in=link.inside(1)
        )
        cluster.wait_ready(60)
        work = Workload(cluster, rng)
        counts: dict[str, int] = {}
        for _ in range(int(os.environ.get("NODE_KILLS", "200"))):
            work.put()
            work.get()
            what = strike(cluster, link, rng, work)
            counts[what] = counts.get(what, 0) + 1
        assert work.put() == "SUCCESS"
        assert work.get(of_last=1) == "SUCCESS"
        assert cluster.ask("drained")[0]
        print(counts, work.hits, "blocks came back")
    finally:
        if cluster is not None:
            cluster.close()
        link.close()
