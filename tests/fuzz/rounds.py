"""Rounds of a fuzzer: each has its own seed, and all of them together a bounded time."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator

SECONDS = float(os.environ.get("FUZZ_SECONDS", "1.5"))
"""Time of each fuzzer. ``./build.sh nightly`` gives ten minutes."""

_SEED = os.environ.get("FUZZ_SEED", "")
"""Of one round to play again."""


last_seed = [0]
"""Of the round that was begun last."""


def rounds() -> Iterator[random.Random]:
    """A generator of random numbers for each round, until the time is over. With ``FUZZ_SEED`` only that round; the
    seed of the last round of a test is printed at its end."""
    if _SEED:
        last_seed[0] = int(_SEED)
        yield random.Random(last_seed[0])
        return
    first, until = random.SystemRandom().getrandbits(48), time.monotonic() + SECONDS
    number = 0
    while time.monotonic() < until:
        last_seed[0] = first + number
        yield random.Random(first + number)
        number += 1


def mutated(rng: random.Random, message: bytes) -> bytes:
    """A message with some of its bytes changed, cut, doubled, or replaced by numbers at which code errs."""
    data = bytearray(message)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                data[at:] = b""
            case 2:
                data[at:at] = data[: rng.randrange(len(data) + 1)]
            case 3:
                data[at : at + 4] = rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]).to_bytes(4, "little")
            case 4:
                data[at : at + 8] = rng.choice([0, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1]).to_bytes(8, "little")
            case 5:
                data[at:at] = rng.randbytes(rng.randrange(16))
    return bytes(data)


class Leaks:
    """Descriptors and threads of this process, to be compared."""

    def __init__(self) -> None:
        self._before = self._count()

    def _count(self) -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def check(self, settled: Callable[[Callable[[], bool]], None]) -> None:
        """There are no more than at the start, at the latest when ``settled(condition)`` has waited for that."""
        settled(lambda: all(now <= then for now, then in zip(self._count(), self._before, strict=True)))
