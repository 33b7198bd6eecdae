# cython: wraparound=True
"""From an engine's terms (token slots, tensors with strides) to pages, regions and runs."""
from dataclasses import dataclass

import numpy as np

from libc.stdint cimport int32_t, int64_t

from flexkv.errors import RegistrationError, SlotMappingError

REGION_DTYPE = np.dtype([("base", "u8"), ("page_stride", "i8"), ("chunk_bytes", "u8"), ("slot_offset", "u8")])
"""For page p: ``chunk_bytes`` bytes at ``base + p * page_stride`` <-> ``slot_offset`` within the rank's segment."""

SPAN_DTYPE = np.dtype(
    [("first", np.uint32), ("num_regions", np.uint32), ("slot_offset", np.uint64), ("bytes", np.uint64),
     ("max_chunk", np.uint64)]
)
"""Regions whose bytes follow one another in a slot: ``struct flexkv_span``."""

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


def merge_runs(const int32_t[::1] a not None, const int32_t[::1] b not None):
    """Runs along which both ``a`` and ``b`` (equally long) go up by one.

    Returns
    -------
    (num_runs, 3) int32
        ``a`` and ``b`` at the start of the run, and its length.
    """
    cdef Py_ssize_t n = a.shape[0], i, runs = 0
    if b.shape[0] != n:
        raise ValueError(f"{n} and {b.shape[0]} ids; need as many of both")
    out_array = np.empty((n, 3), dtype=np.int32)
    cdef int32_t[:, ::1] out = out_array
    with nogil:
        for i in range(n):
            if i > 0 and a[i] == a[i - 1] + 1 and b[i] == b[i - 1] + 1:
                out[runs - 1, 2] += 1
            else:
                out[runs, 0], out[runs, 1], out[runs, 2] = a[i], b[i], 1
                runs += 1
    return out_array[:runs]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that holds KV, as its owner's framework describes it.

    Attributes
    ----------
    ptr : int
        Address of its first element.
    shape, strides : tuple of int
        Strides in elements.
    itemsize : int
        Bytes of an element.
    page_dim : int
        The dimension that counts pages, or tokens if ``tokens_per_page`` is given.
    tokens_per_page : int, optional
        ``page_dim`` counts tokens; so many of them are a page.
    device : int, optional
        The GPU that has the memory; without it, the process.
    """

    ptr: int
    shape: tuple
    strides: tuple
    itemsize: int
    page_dim: int = 0
    tokens_per_page: object = None
    device: object = None


def _chunks(spec):
    """(num_pages, page stride in bytes, [(offset, size)]) with the chunks of a page in logical order."""
    shape, strides = list(spec.shape), [stride * spec.itemsize for stride in spec.strides]
    if len(shape) != len(strides) or not 0 <= spec.page_dim < len(shape) or spec.itemsize < 1 or spec.ptr == 0:
        raise RegistrationError(f"{spec}: shape, strides, page_dim and address do not describe a tensor")
    if any(size < 1 for size in shape) or any(step < 1 for size, step in zip(shape, strides) if size > 1):
        raise RegistrationError(f"{spec}: an empty or broadcast dimension; register the whole tensor, not a view of it")
    pages, page_stride = shape.pop(spec.page_dim), strides.pop(spec.page_dim)
    if spec.tokens_per_page is not None:
        shape.insert(0, spec.tokens_per_page)
        strides.insert(0, page_stride)
        pages, page_stride = pages // spec.tokens_per_page, page_stride * spec.tokens_per_page
        if pages < 1:
            raise RegistrationError(f"{spec}: fewer tokens than one page of {spec.tokens_per_page}")
    size = spec.itemsize
    while shape and (strides[-1] == size or shape[-1] == 1):
        size *= shape.pop()
        strides.pop()
    offsets = np.zeros(1, dtype=np.int64)
    for extent, step in zip(shape, strides):
        offsets = (offsets[:, None] + np.arange(extent, dtype=np.int64) * step).ravel()
    ends = np.sort(offsets)
    if (np.diff(ends) < size).any():
        raise RegistrationError(f"{spec}: elements of a page overlap")
    return pages, page_stride, [(int(offset), size) for offset in offsets]


def regions_from_tensors(specs):
    """Where the bytes of a page are, over all tensors of a rank, and where they go in its segment of a slot.

    The segment holds the tensors in their order, each in the logical (row-major) order of its dimensions without
    ``page_dim``: two layouts in memory of the same tensors give the same bytes.

    Parameters
    ----------
    specs : sequence of TensorSpec

    Returns
    -------
    regions : ndarray of REGION_DTYPE
    num_pages : int
    segment_bytes : int

    Raises
    ------
    RegistrationError
        A tensor is no tensor of whole pages, or they have different numbers of pages, or pages overlap.
    """
    regions = []
    num_pages, offset = None, 0
    for spec in specs:
        pages, stride, chunks = _chunks(spec)
        if num_pages is not None and pages != num_pages:
            raise RegistrationError(f"tensors of {num_pages} and of {pages} pages; all must have as many")
        num_pages = pages
        for start, size in chunks:
            base = spec.ptr + start
            last = regions[-1] if regions else None
            if last and last[1] == stride and last[0] + last[2] == base and last[3] + last[2] == offset:
                last[2] += size
            else:
                regions.append([base, stride, size, offset])
            offset += size
    if not regions:
        raise RegistrationError("no tensors to register")
    if num_pages > 1 and any(size > stride for _, stride, size, _ in regions):
        raise RegistrationError("pages overlap: the page dimension steps by less than a page's bytes")
    table = np.array([tuple(region) for region in regions], dtype=REGION_DTYPE)
    return table, num_pages, offset


def whole_span(regions):
    """(1,) SPAN_DTYPE: one span, of all regions."""
    return _spans(regions, [(0, len(regions))])


def layer_spans(regions, tensor_bytes, int num_groups):
    """Groups of layers of about equal size, for loads layer by layer.

    Parameters
    ----------
    regions : ndarray of REGION_DTYPE
    tensor_bytes : sequence of int
        Bytes of a page of each tensor, in the order of ``regions_from_tensors``: together the segment.
    num_groups : int
        At most so many.

    Returns
    -------
    spans : ndarray of SPAN_DTYPE
        All regions first, then the groups; without groups where a region is of more than one layer.
    span_of : list of int
        The span with the last byte of each tensor.
    """
    ends = np.cumsum(tensor_bytes)
    region_ends = (regions["slot_offset"] + regions["chunk_bytes"]).astype(np.int64)
    groups, first, wanted = [], 0, int(ends[-1]) / num_groups
    for end in ends:
        upto = int(np.searchsorted(region_ends, end)) + 1
        if upto > first and region_ends[upto - 1] == end and end >= wanted * (len(groups) + 1) - 0.5:
            groups.append((first, upto))
            first = upto
    if len(groups) < 2:
        return whole_span(regions), [0] * len(ends)
    group_ends = [int(region_ends[upto - 1]) for _, upto in groups]
    return _spans(regions, [(0, len(regions)), *groups]), [1 + int(np.searchsorted(group_ends, end)) for end in ends]


def _spans(regions, ranges):
    spans = np.zeros(len(ranges), dtype=SPAN_DTYPE)
    for span, (first, end) in zip(spans, ranges):
        part = regions[first:end]
        span["first"], span["num_regions"], span["slot_offset"] = first, end - first, part["slot_offset"][0]
        span["bytes"] = part["slot_offset"][-1] + part["chunk_bytes"][-1] - part["slot_offset"][0]
        span["max_chunk"] = part["chunk_bytes"].max()
    return spans
