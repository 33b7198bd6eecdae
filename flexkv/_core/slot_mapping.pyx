"""Pages of an engine, of its slot mapping: a slot for each token."""
import numpy as np

from libc.stdint cimport int32_t, int64_t

from flexkv.errors import SlotMappingError

ctypedef fused slot_t:
    int32_t
    int64_t


cdef Py_ssize_t fill_pages(const slot_t *mapping, Py_ssize_t num_pages, Py_ssize_t tokens_per_page,
                           int32_t *pages) noexcept nogil:
    """Return the first token that is out of place, or -1."""
    cdef Py_ssize_t page, i
    cdef slot_t first, wrong
    for page in range(num_pages):
        first = mapping[page * tokens_per_page]
        wrong = (first < 0) | (first % tokens_per_page != 0) | (first // tokens_per_page > 0x7fffffff)
        for i in range(tokens_per_page):
            wrong |= mapping[page * tokens_per_page + i] != first + i
        if wrong:
            return page * tokens_per_page
        pages[page] = <int32_t>(first // tokens_per_page)
    return -1


def pages_from_slot_mapping(slot_mapping, Py_ssize_t tokens_per_block):
    """Pages of a sequence of token slots.

    Parameters
    ----------
    slot_mapping : (num_tokens,) int32 or int64
        Slot ``page * tokens_per_block + offset`` of each token; whole pages, each in order.
    tokens_per_block : int

    Returns
    -------
    (num_tokens // tokens_per_block,) int32

    Raises
    ------
    SlotMappingError
        Naming the first token that is not where it must be.
    """
    mapping = np.ascontiguousarray(slot_mapping)
    if mapping.size == 0:
        return np.empty(0, dtype=np.int32)
    if mapping.ndim != 1 or mapping.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        raise SlotMappingError(f"a slot mapping of {mapping.dtype} {mapping.shape}; give int32 or int64 (num_tokens,)")
    if tokens_per_block < 1 or mapping.size % tokens_per_block:
        raise SlotMappingError(f"{mapping.size} token slots are not whole blocks of {tokens_per_block} tokens")
    cdef Py_ssize_t num_pages = mapping.size // tokens_per_block, bad
    pages_array = np.empty(num_pages, dtype=np.int32)
    cdef int32_t[::1] pages = pages_array
    cdef const int32_t[::1] int32s
    cdef const int64_t[::1] int64s
    if mapping.dtype == np.int32:
        int32s = mapping
        with nogil:
            bad = fill_pages(&int32s[0], num_pages, tokens_per_block, &pages[0])
    else:
        int64s = mapping
        with nogil:
            bad = fill_pages(&int64s[0], num_pages, tokens_per_block, &pages[0])
    if bad >= 0:
        raise SlotMappingError(
            f"tokens {bad} to {bad + tokens_per_block - 1} have slots "
            f"{mapping[bad : bad + tokens_per_block].tolist()}: no whole page of {tokens_per_block} tokens in order"
        )
    return pages_array
