"""The SSD store against a dict, for random sequences of operations: restarts, kills and losses of power anywhere."""

import random
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.faulty_files import FaultyFiles, ThreadQueue
from tests.support.ssd_store import Tier

from .examples import EXAMPLES

SLOTS = 6
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["write", "write", "write", "read", "free", "clear", "restart", "kill", "no power", "other model"]
        ),
        st.integers(0, 1 << 30),
    ),
    max_size=25,
)


class Model:
    """The blocks that the store must hold, and those that it may hold.

    ``held`` is what slots in use hold for sure; ``may`` is what may come back after a restart: every block that
    was ever written and not cleared since.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.files = FaultyFiles(seed, track_power=True)
        self.held: dict[int, int] = {}                          # slot -> number
        self.durable: dict[int, int] = {}                       # slot -> number: must be found after a restart
        self.may: set[int] = set()
        self.tier = self.open()
        assert self.tier.recover() == {}

    def open(self, domain: bytes = b"model") -> Tier:
        queue = partial(ThreadQueue, layer=self.files, threads=1)
        return Tier([self.path / "a", self.path / "b"], SLOTS, make_queue=queue, files=self.files, domain=domain)

    def write(self, rng: random.Random) -> None:
        slots = self.tier.store.slots.allocate(rng.randint(1, 4))
        if slots is None:
            assert len(self.held) > 2 * SLOTS - 4
            return
        numbers = [rng.randrange(40) for _ in slots]
        assert self.tier.write(numbers, slots).all()
        for slot, number in zip(slots.tolist(), numbers, strict=True):
            self.held[slot] = self.durable[slot] = number
            self.may.add(number)

    def read(self, rng: random.Random) -> None:
        slots = [rng.randrange(2 * SLOTS) for _ in range(5)]
        numbers = [self.durable.get(slot, 7) if rng.random() < 0.7 else rng.randrange(40) for slot in slots]
        ok = self.tier.read(numbers, slots)
        for slot, number, good in zip(slots, numbers, ok.tolist(), strict=True):
            if slot in self.held:
                assert good == (self.held[slot] == number)

    def free(self, rng: random.Random) -> None:
        """The slot keeps its record until it is rewritten."""
        slots = rng.sample(sorted(self.held), min(len(self.held), 3))
        self.tier.store.slots.free(np.array(slots, dtype=np.int32))
        for slot in slots:
            del self.held[slot]

    def clear(self, _: random.Random) -> None:
        self.tier.store.clear()
        self.durable.clear()
        self.may.clear()
        self.free_all()

    def free_all(self) -> None:
        self.tier.store.slots.free(np.array(sorted(self.held), dtype=np.int32))
        self.held.clear()

    def restart(self, rng: random.Random) -> None:
        self.tier.close()
        self.reopen()

    def reopen(self) -> None:
        self.tier = self.open()
        found = self.tier.recover()
        assert set(found) == set(self.durable.values())
        assert all(self.durable[slot] == number for number, slot in found.items())
        assert self.tier.read(list(found), list(found.values())).all()
        self.held = {slot: number for number, slot in found.items()}

    def kill(self, rng: random.Random) -> None:
        """In the middle of a write, or of nothing."""
        self.files.writes_left = rng.randrange(12)
        self.half_a_write(rng)
        self.files.writes_left = None
        self.after_a_crash(all_good=True)

    def no_power(self, rng: random.Random) -> None:
        self.half_a_write(rng)
        self.files.lose_power()
        self.files.writes_left = None
        self.after_a_crash(all_good=False)

    def half_a_write(self, rng: random.Random) -> None:
        slots = self.tier.store.slots.allocate(3)
        if slots is not None:
            numbers = [rng.randrange(40) for _ in slots]
            self.tier.start_write(numbers, slots)
            self.may |= set(numbers)
            if rng.random() < 0.7:
                self.tier.wait(self.tier._job, 3)
        self.files.writes_left = min(self.files.writes_left or 0, 0)
        self.tier.close()

    def after_a_crash(self, all_good: bool) -> None:
        self.tier = self.open()
        found = self.tier.recover()
        assert set(found) <= self.may
        ok = self.tier.read(list(found), list(found.values()))
        assert ok.all() or not all_good
        self.held = {slot: number for (number, slot), good in zip(found.items(), ok, strict=True) if good}
        bad = [slot for slot, good in zip(found.values(), ok, strict=True) if not good]
        self.tier.store.slots.free(np.array(bad, dtype=np.int32))
        self.free_all()                                          # from here on, only what is certain counts
        self.tier.store.clear()
        self.durable.clear()
        self.may.clear()

    def other_model(self, _: random.Random) -> None:
        self.tier.close()
        other = self.open(domain=b"another")
        assert other.recover() == {}
        assert other.store.slots.num_free == 2 * SLOTS
        other.close()
        self.reopen()


@settings(max_examples=max(10, EXAMPLES // 50), deadline=None)
@given(st.integers(0, 1000), OPERATIONS)
def test_store_agrees_with_dict(seed: int, operations: list[tuple[str, int]]) -> None:
    with TemporaryDirectory() as path:
        model = Model(Path(path), seed)
        for name, number in operations:
            getattr(model, name.replace(" ", "_"))(random.Random(number))
            model.tier.store.slots.check_integrity()
            assert model.tier.store.slots.num_free == 2 * SLOTS - len(model.held)
        model.tier.close()
