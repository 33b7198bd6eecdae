"""Memory of ranks that share copies: exported to the peers of a rank, and mapped from them."""

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack

from flexkv._core.device.cuda_driver import Device
from flexkv._core.device.cuda_memory import ImportedMemory, export_memory
from flexkv.errors import CudaError, RegistrationError
from flexkv.protocol.exchange import (
    HANDLE_BYTES,
    ID_BYTES,
    MAX_EXPORT_BYTES,
    NO_DEVICE,
    Allocation,
    Exchange,
    ExportedCopy,
    Exports,
    Peer,
)
from flexkv.protocol.registration import SegmentKind
from flexkv.rank.memory import PeerShare, RankMemory
from flexkv.rank.regions import TensorSpec

logger = logging.getLogger("flexkv.rank")

_process = os.urandom(ID_BYTES)                         # not the pid, which may be equal in two containers

_exported: set[tuple[int, int]] = set()
"""Address and size of the memory that ranks of this process have exported. Addresses in a message are used only if they
are here."""


def _forked() -> None:
    global _process
    _process = os.urandom(ID_BYTES)
    _exported.clear()


os.register_at_fork(after_in_child=_forked)


class _NoExchange(Exception):
    """The memory of a rank cannot be shared or mapped; the text is the reason."""


def export_copies(memory: RankMemory, device: Device | None, is_own: bool) -> Exports | None:
    """Export the memory of a rank's copies; None, with a line in the log, if it cannot be shared.

    Parameters
    ----------
    memory : RankMemory
    device : Device or None
        GPU of the tensors; None: they are in this process's memory.
    is_own : bool
        The tensors are of this process, not mapped from another one.
    """
    copied = [i for i, claim in enumerate(memory.segments) if claim.kind is SegmentKind.REPLICA]
    if not copied:
        return None
    try:
        if not is_own:
            raise _NoExchange("the tensors are those of another process")
        exports = _export(memory, device, copied)
        if len(exports.pack()) > MAX_EXPORT_BYTES:
            raise _NoExchange(f"too many tensors: {sum(len(copy.tensors) for copy in exports.copies)}")
    except (_NoExchange, RegistrationError, CudaError) as error:
        logger.info("each rank loads equal KV whole from host memory: this rank's memory cannot be shared: %s", error)
        return None
    _exported.update((each.address, each.num_bytes) for each in exports.allocations)
    return exports


def _export(memory: RankMemory, device: Device | None, segments: Sequence[int]) -> Exports:
    allocations: dict[Allocation, int] = {}
    copies = []
    for segment in segments:
        tensors = []
        for spec in memory.tensors_of[segment]:
            allocation, offset = _allocation_of(spec, device)
            tensors.append((allocations.setdefault(allocation, len(allocations)), offset))
        copies.append(ExportedCopy(memory.segments[segment].copy, _layout(memory, segment), tuple(tensors)))
    uuid = NO_DEVICE if device is None else device.uuid
    return Exports(_process, uuid, tuple(allocations), tuple(copies))


def _allocation_of(spec: TensorSpec, device: Device | None) -> tuple[Allocation, int]:
    """The allocation of a tensor, and the tensor's offset there."""
    if device is None:
        return Allocation(bytes(HANDLE_BYTES), spec.ptr, spec.num_bytes), 0
    handle, num_bytes, offset = export_memory(device, spec.ptr)
    if not isinstance(handle, bytes):
        os.close(handle)
        raise _NoExchange("it was made by cuMemCreate; only memory of cudaMalloc is shared between ranks")
    if offset + spec.num_bytes > num_bytes:
        raise _NoExchange("a tensor spans several allocations")
    return Allocation(handle, spec.ptr - offset, num_bytes), offset


def _layout(memory: RankMemory, segment: int) -> bytes:
    """Digest of the layout in memory of the tensors of a segment."""
    specs = [
        (spec.shape, spec.strides, spec.itemsize, spec.page_dim, spec.tokens_per_page)
        for spec in memory.tensors_of[segment]
    ]
    return hashlib.sha256(repr(specs).encode()).digest()[:ID_BYTES]


def open_peers(
    exchange: Exchange, memory: RankMemory, device: Device | None, opened: ExitStack
) -> list[PeerShare] | None:
    """Map the memory of a rank's peers, until ``opened`` is closed; None, with a line in the log, if that fails.

    Raises
    ------
    RegistrationError
        The exchange contradicts the rank's own tensors.
    """
    try:
        with ExitStack() as undo:
            shares = [share for peer in exchange.peers for share in _open(peer, memory, device, undo)]
            opened.push(undo.pop_all())
        logger.info("large loads read %d parts of equal KV from other ranks", len(shares))
        return shares
    except (_NoExchange, CudaError) as error:
        logger.info("each rank loads equal KV whole from host memory: %s", error)
        return None


def _open(peer: Peer, memory: RankMemory, device: Device | None, opened: ExitStack) -> list[PeerShare]:
    """Map the tensors of one peer."""
    found: list[tuple[PeerShare, tuple[tuple[int, int], ...]]] = []
    for share in peer.shares:
        claim, specs = memory.segments[share.segment], memory.tensors_of[share.segment]
        theirs = peer.exports.copy(claim.copy) if claim.kind is SegmentKind.REPLICA else None
        if theirs is None or len(theirs.tensors) != len(specs):
            raise RegistrationError(f"the controller has rank {peer.rank} read a segment that it does not export")
        if theirs.layout != _layout(memory, share.segment):
            raise _NoExchange(f"rank {peer.rank} has its tensors in another layout, or of another size")
        for spec, (allocation, offset) in zip(specs, theirs.tensors, strict=True):
            if offset + spec.num_bytes > peer.exports.allocations[allocation].num_bytes:
                raise RegistrationError(f"rank {peer.rank} exports a tensor that extends past its allocation")
        found.append((PeerShare(share, []), theirs.tensors))
    needed = {allocation for _, tensors in found for allocation, _ in tensors}
    bases = {number: _base(peer, peer.exports.allocations[number], device, opened) for number in sorted(needed)}
    return [
        PeerShare(share.share, [bases[allocation] + offset for allocation, offset in tensors])
        for share, tensors in found
    ]


def _base(peer: Peer, allocation: Allocation, device: Device | None, opened: ExitStack) -> int:
    """Address in this process of a peer's allocation."""
    exports = peer.exports
    if exports.process == _process:
        if exports.device != (NO_DEVICE if device is None else device.uuid):
            raise _NoExchange(f"rank {peer.rank} is in the same process on another device")
        if (allocation.address, allocation.num_bytes) not in _exported:
            raise RegistrationError(f"memory of rank {peer.rank} that this process has not exported")
        return allocation.address
    if device is None or exports.device == NO_DEVICE:
        raise _NoExchange(f"rank {peer.rank} is another process, and the memory is not that of a GPU")
    if (reason := device.driver.no_peer_access(device, exports.device)) is not None:
        raise _NoExchange(f"the memory of rank {peer.rank} cannot be read: {reason}")
    mapped = opened.enter_context(ImportedMemory(device, allocation.handle, allocation.num_bytes))
    if 0 < mapped.mapped_bytes < allocation.num_bytes:
        raise _NoExchange(f"rank {peer.rank} exports more memory than it has")
    return mapped.address
