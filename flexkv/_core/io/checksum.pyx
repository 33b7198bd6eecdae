"""XXH3-64 of slots: taken when a block leaves host memory, verified when it comes back."""
import numpy as np

from libc.stdint cimport int32_t, uint8_t, uint64_t

from flexkv._core.xxhash cimport XXH3_64bits


def xxh3_64(const uint8_t[::1] data not None):
    """XXH3-64 (seed 0) of a contiguous buffer."""
    cdef uint64_t result
    with nogil:
        result = XXH3_64bits(&data[0] if data.shape[0] else NULL, data.shape[0])
    return result


def xxh3_64_slots(const uint8_t[::1] pool not None, Py_ssize_t slot_bytes, const int32_t[::1] slots not None):
    """XXH3-64 of each of ``slots`` ((n,) int32) of a pool. Returns (n,) uint64."""
    cdef Py_ssize_t i, n = slots.shape[0]
    for i in range(n):
        if slots[i] < 0 or (slots[i] + 1) * slot_bytes > pool.shape[0]:
            raise ValueError(f"slot {slots[i]} is outside of the pool")
    out_array = np.empty(n, dtype=np.uint64)
    cdef uint64_t[::1] out = out_array
    with nogil:
        for i in range(n):
            out[i] = XXH3_64bits(&pool[slots[i] * slot_bytes], slot_bytes)
    return out_array
