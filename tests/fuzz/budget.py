"""How long a fuzzer runs, and on which inputs.

``FUZZ_SECONDS`` sets the time of each fuzzer (default 1.5; nightly: 600), ``FUZZ_SEED`` the first seed. Input
n depends on seed n alone: a failure names its seed, and ``FUZZ_SEED=n`` plays it again at once.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from types import FrameType

SECONDS = float(os.environ.get("FUZZ_SECONDS", "1.5"))
FIRST = int(os.environ.get("FUZZ_SEED", "0"))

_HANG_S = 60
"""No input may take longer."""

_TOKENS = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r", b"\t", b"{", b"}", b"[", b"]", b'"', b"'",
           b":", b": ", b",", b"- ", b"&a ", b"*a", b"<<: ", b"!!int ", b"!!binary ", b"? ", b"#", b"|", b">", b"%",
           b"@", b"~", b"1e999",
           b"-1", b"9" * 20, b"9" * 400, b"NaN", b"null", b"true", b"0x", b".inf", b"2020-01-01", b"\\u0000",
           b"\\ud800", b"[" * 2000, b"{\"a\":" * 2000, b"default", b"FLEXKV_", b";", b"$HOME", b"tcp://"]


def seeds() -> Iterator[int]:
    """Seeds, one after the other, until the time is over."""
    end = time.monotonic() + SECONDS
    seed = FIRST
    while time.monotonic() < end or seed == FIRST:
        yield seed
        seed += 1


@contextmanager
def case(seed: int) -> Iterator[Random]:
    """Random numbers of a seed. An error within names the seed, and so does an input that takes too long."""
    def hang(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"an input hangs: {_HANG_S} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(_HANG_S)
    try:
        yield Random(seed)
    except BaseException as error:
        error.add_note(f"FUZZ_SEED={seed} plays it again")
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(rng: Random, content: bytes, limit: int = 1 << 16) -> bytes:
    """Content with a few changes: bytes flipped, cut, repeated, moved, and tokens that parsers trip over."""
    data = bytearray(content)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) + 1)
        stop = min(len(data), at + rng.choice([1, 2, 8, 64, 1024]))
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:stop]
            case 2:
                data[at:at] = rng.choice(_TOKENS)
            case 3:
                data[at:stop] = rng.choice(_TOKENS)
            case 4:
                data[at:at] = data[at:stop] * rng.choice([1, 1, 3])
            case 5:
                data[at:stop] = rng.randbytes(stop - at)
            case 6 if rng.random() < 0.3:
                del data[at:]
    return bytes(data[:limit])
