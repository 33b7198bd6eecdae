"""Checksums, against the reference implementation in the package xxhash."""

import numpy as np
import pytest
import xxhash

from flexkv._core.io.checksum import xxh3_64, xxh3_64_slots


def test_checksums() -> None:
    pool = np.random.default_rng(0).integers(0, 256, 5 * 4096, dtype=np.uint8)
    assert xxh3_64(pool) == xxhash.xxh3_64_intdigest(pool.tobytes())
    assert xxh3_64(b"") == xxhash.xxh3_64_intdigest(b"")
    got = xxh3_64_slots(pool, 4096, np.array([4, 0], dtype=np.int32))
    assert got.tolist() == [xxhash.xxh3_64_intdigest(pool[i * 4096 : (i + 1) * 4096].tobytes()) for i in (4, 0)]
    with pytest.raises(ValueError, match="slot 5"):
        xxh3_64_slots(pool, 4096, np.array([5], dtype=np.int32))
