"""Ranks in this process whose tensors are in several segments and layer groups, with a model of their bytes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.config import TransferConfig
from flexkv.kvmanager import KVManager
from flexkv.protocol.ring import OpKind
from flexkv.rank.rank import RankClient
from flexkv.rank.tensors import tensor_spec
from flexkv.transfer.graph import Dependency, TransferGraph, TransferOp
from tests.support.harness import controller_of, make_manager, wait_ready


@dataclass(frozen=True)
class Kind:
    """One tensor of a rank: bytes of a page, layer group, and the name of the copy that holds it, or None."""

    page_bytes: int
    group: int = 0
    copy: str | None = None


class SegmentRank:
    """Tensors, and a client that registers them."""

    def __init__(
        self, path: Path, rank: int, kinds: Sequence[Kind], num_pages: Sequence[int], device: int | None = None,
        **transfer: Any,
    ) -> None:
        self.kinds = kinds
        self.tensors = [np.zeros((num_pages[kind.group], kind.page_bytes), dtype=np.uint8) for kind in kinds]
        self.client = RankClient(str(path), intra_client_id=rank, transfer_config=TransferConfig(**transfer))
        self._rank, self._device = rank, device

    def register(self) -> None:
        groups, copies = [kind.group for kind in self.kinds], [kind.copy for kind in self.kinds]
        specs = [replace(tensor_spec(tensor), device=self._device) for tensor in self.tensors]
        self.client.register_tensors(specs, 10.0, self.tensors, groups=groups, copies=copies)

    def fill(self, seed: int) -> None:
        """Random bytes; those of a copy are equal on all ranks that have it."""
        for index, (kind, tensor) in enumerate(zip(self.kinds, self.tensors, strict=True)):
            nth = sum(other.copy == kind.copy for other in self.kinds[:index])      # of the tensors of the copy
            name = [self._rank] if kind.copy is None else [1000, *kind.copy.encode()]
            tensor[:] = np.random.default_rng([seed, nth, *name]).integers(0, 256, tensor.shape)


@contextmanager
def segmented(
    path: Path, kinds: Sequence[Sequence[Kind]], num_pages: Sequence[int], num_slots: int = 8,
    device: int | None = None, **transfer: Any,
) -> Iterator[tuple[KVManager, list[SegmentRank]]]:
    """A manager whose rank i has tensors ``kinds[i]``."""
    manager = make_manager(path, num_slots, len(kinds), **transfer)
    ranks = [SegmentRank(path, rank, mine, num_pages, device, **transfer) for rank, mine in enumerate(kinds)]
    try:
        for rank in ranks:
            rank.register()
        wait_ready(manager, num_slots)
        yield manager, ranks
    finally:
        manager.shutdown()
        for rank in ranks:
            rank.client.close()


def begin(
    manager: KVManager, kind: OpKind, slots: Sequence[int], pages: Sequence[Sequence[int]],
    second: Mapping[str, Any] = {}, **options: Any,
) -> tuple[TransferGraph, list[TransferGraph]]:
    """Submit an op with the pages of each layer group; the graph is in the list once it is at rest. A load with an
    ``exchange`` has a second op, with the options ``second``."""
    transfer = controller_of(manager)._cache.transfer
    slot_array, table = np.array(slots, dtype=np.int32), np.array(pages, dtype=np.int32)
    src, dst = (slot_array, table[0]) if kind is OpKind.H2D else (table[0], slot_array)
    options["further_pages"] = table[1:] if len(table) > 1 else None
    ops = [TransferOp(kind, src, dst, **options)]
    if options.get("exchange"):
        ops.append(TransferOp(OpKind.P2D, src, dst, depends_on=[Dependency.each(ops[0])], **{**options, **second}))
    graph = TransferGraph(next(transfer.task_ids), ops)
    done: list[TransferGraph] = []
    transfer.submit(graph, done.append)
    return graph, done


def move(
    manager: KVManager, kind: OpKind, slots: Sequence[int], pages: Sequence[Sequence[int]], **options: Any
) -> NDArray[np.bool_]:
    """Run an op; returns whether each block was moved."""
    graph, done = begin(manager, kind, slots, pages, **options)
    assert controller_of(manager)._cache.transfer.wait(lambda: bool(done), 5.0)
    return graph.ops[-1].ok


def exchange_of(manager: KVManager) -> int:
    """Number of the exchange of the manager's ranks, as for a large load; 0: there is none."""
    return controller_of(manager)._cache.transfer.exchange_of(0, 1 << 40)


class SlotModel:
    """The bytes that slots and pages must hold: one value for each slot and each tensor of each rank."""

    def __init__(self, ranks: Sequence[SegmentRank], num_slots: int) -> None:
        self._ranks = ranks
        self.pages = [[tensor.copy() for tensor in rank.tensors] for rank in ranks]
        self._slots = [[np.zeros((num_slots, kind.page_bytes), np.uint8) for kind in rank.kinds] for rank in ranks]

    def move(self, kind: OpKind, slots: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        for block, slot in enumerate(slots):
            for rank, stored, tensors in zip(self._ranks, self._slots, self.pages, strict=True):
                for index, tensor in enumerate(rank.kinds):
                    page = pages[tensor.group][block]
                    if page >= 0 and kind is OpKind.D2H:
                        stored[index][slot] = tensors[index][page]
                    elif page >= 0:
                        tensors[index][page] = stored[index][slot]

    def check(self) -> None:
        for rank, tensors in zip(self._ranks, self.pages, strict=True):
            for mine, expected in zip(rank.tensors, tensors, strict=True):
                np.testing.assert_array_equal(mine, expected)
