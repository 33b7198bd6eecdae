"""An engine's tensors, with their strides, as regions of pages and spans of layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv._core.device.agent import REGION_DTYPE, spans_of
from flexkv.errors import RegistrationError


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that holds KV, as its owner's framework describes it.

    Attributes
    ----------
    ptr : int
        Address of the first element.
    shape, strides : tuple of int
        Strides in elements.
    itemsize : int
        Bytes of an element.
    page_dim : int
        The dimension that counts pages, or tokens if ``tokens_per_page`` is given.
    tokens_per_page : int, optional
        Number of tokens in a page, if ``page_dim`` counts tokens.
    device : int, optional
        Ordinal of the GPU that has the memory; None: the memory of this process.
    """

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    page_dim: int = 0
    tokens_per_page: int | None = None
    device: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes from the first to the last element, inclusive."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.itemsize


def _chunks(spec: TensorSpec) -> tuple[int, int, list[tuple[int, int]]]:
    """(num_pages, page stride in bytes, [(offset, size)]) with the chunks of a page in logical order."""
    shape, strides = list(spec.shape), [stride * spec.itemsize for stride in spec.strides]
    if len(shape) != len(strides) or not 0 <= spec.page_dim < len(shape) or spec.itemsize < 1 or spec.ptr == 0:
        raise RegistrationError(f"{spec}: shape, strides, page_dim and address do not describe a tensor")
    if any(size < 1 for size in shape) or any(step < 1 for size, step in zip(shape, strides, strict=True) if size > 1):
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
    for extent, step in zip(shape, strides, strict=True):
        offsets = (offsets[:, None] + np.arange(extent, dtype=np.int64) * step).ravel()
    ends = np.sort(offsets)
    if (np.diff(ends) < size).any():
        raise RegistrationError(f"{spec}: elements of a page overlap")
    return pages, page_stride, [(int(offset), size) for offset in offsets]


def regions_from_tensors(specs: Sequence[TensorSpec]) -> tuple[NDArray[np.void], int, int]:
    """Regions of the tensors of one segment: for each, the place of its bytes in every page and in every slot.

    The segment holds the tensors in their order, each in the logical (row-major) order of its dimensions without
    ``page_dim``: two layouts in memory of the same tensors give the same bytes.

    Parameters
    ----------
    specs : sequence of TensorSpec

    Returns
    -------
    regions : (n,) REGION_DTYPE
        Offsets in the slot count from the start of the segment.
    num_pages : int
    segment_bytes : int
        Bytes of a page of all tensors together.

    Raises
    ------
    RegistrationError
        A tensor cannot be divided into pages, the tensors have different numbers of pages, or pages overlap.
    """
    regions: list[list[int]] = []
    num_pages, offset = 0, 0
    for spec in specs:
        pages, stride, chunks = _chunks(spec)
        if num_pages and pages != num_pages:
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


def clipped(regions: NDArray[np.void], start: int, stop: int) -> NDArray[np.void]:
    """(m,) REGION_DTYPE: the parts of ``regions`` ((n,) REGION_DTYPE) whose offsets in the slot are in ``[start,
    stop)``, in bytes. Regions outside of the range are left out."""
    first = np.maximum(regions["slot_offset"].astype(np.int64), start)
    last = np.minimum((regions["slot_offset"] + regions["chunk_bytes"]).astype(np.int64), stop)
    kept = first < last
    parts: NDArray[np.void] = regions[kept].copy()
    parts["base"] += (first[kept] - parts["slot_offset"].astype(np.int64)).astype(np.uint64)
    parts["slot_offset"], parts["chunk_bytes"] = first[kept], (last - first)[kept]
    return parts


def paired(mine: NDArray[np.void], theirs: NDArray[np.void]) -> tuple[NDArray[np.void], NDArray[np.uint64]]:
    """Regions that copy from a peer's pages to the pages of this rank.

    Parameters
    ----------
    mine, theirs : ndarray of REGION_DTYPE
        The same range of a slot, without gaps and in order, in the memory of each of the two.

    Returns
    -------
    regions : (n,) REGION_DTYPE
        ``slot_offset`` is the address of the bytes in page 0 of the peer.
    strides : (n,) uint64
        Distance of two pages of the peer, in bytes.
    """
    starts = np.union1d(mine["slot_offset"], theirs["slot_offset"])
    stops = np.append(starts[1:], mine["slot_offset"][-1:] + mine["chunk_bytes"][-1:]).astype(np.uint64)
    near, far = (
        regions[np.searchsorted(regions["slot_offset"], starts, side="right") - 1] for regions in (mine, theirs)
    )
    pairs: NDArray[np.void] = near.copy()
    pairs["base"] = near["base"] + (starts - near["slot_offset"])
    pairs["slot_offset"] = far["base"] + (starts - far["slot_offset"])
    pairs["chunk_bytes"] = stops - starts
    return pairs, far["page_stride"].astype(np.uint64)


def layer_spans(
    regions: NDArray[np.void], tensor_bytes: Sequence[int], num_groups: int
) -> tuple[NDArray[np.void], list[int]]:
    """Divide the regions of a segment into spans of consecutive layers, of about equal size, for layerwise loads.

    Parameters
    ----------
    regions : ndarray of REGION_DTYPE
        Regions of one segment, which may be at any offset in the slot.
    tensor_bytes : sequence of int
        Bytes of a page of each tensor, in the order of ``regions_from_tensors``. Their sum is the segment's size.
    num_groups : int
        Maximum number of spans of layers.

    Returns
    -------
    spans : ndarray of SPAN_DTYPE
        The first span has all regions; the others are the spans of layers. There is only the first if the regions
        cannot be divided, for example because one region has all layers.
    span_of : list of int
        For each tensor, the index in ``spans`` of the span with its last byte.
    """
    start = int(regions["slot_offset"][0])
    ends = np.cumsum(tensor_bytes) + start
    region_ends = (regions["slot_offset"] + regions["chunk_bytes"]).astype(np.int64)
    groups: list[tuple[int, int]] = []
    first, wanted = 0, (int(ends[-1]) - start) / num_groups
    for end in ends:
        upto = int(np.searchsorted(region_ends, end)) + 1
        if upto > first and region_ends[upto - 1] == end and end - start >= wanted * (len(groups) + 1) - 0.5:
            groups.append((first, upto))
            first = upto
    if len(groups) < 2:
        return spans_of(regions, [(0, len(regions))]), [0] * len(ends)
    group_ends = [int(region_ends[upto - 1]) for _, upto in groups]
    return spans_of(regions, [(0, len(regions)), *groups]), [1 + int(np.searchsorted(group_ends, end)) for end in ends]
