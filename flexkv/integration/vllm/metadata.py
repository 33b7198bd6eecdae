"""Metadata that the scheduler sends to the workers with each step."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass
class LoadJob:
    """A load that was launched.

    Attributes
    ----------
    pages : (n,) int32
        vLLM block ids that it fills.
    keys : (n, 2) uint64 or None
        Keys of the blocks; only when the audit is on.
    layerwise : bool
        The request runs in this very step, layer after layer behind its load.
    """

    req_id: str
    task_id: int
    pages: NDArray[np.int32]
    keys: NDArray[np.uint64] | None = None
    layerwise: bool = False


@dataclass
class SavedBlocks:
    """Blocks that the coming step completes, and that are being saved; only when the audit is on."""

    pages: NDArray[np.int32]
    keys: NDArray[np.uint64]


@dataclass
class FlexKVConnectorMetadata(KVConnectorMetadata):
    """One step.

    Attributes
    ----------
    step : int
        Counts the steps of the scheduler; loads and saves of the step wait for this fence.
    has_forward : bool
        The step computes something.
    loads : list of LoadJob
    finishing : dict from request id to task ids
        Requests that have ended, whose blocks must stay until these saves are done.
    oldest_task : int
        The scheduler no longer asks about tasks before this one.
    saved : list of SavedBlocks
    off : bool
        KV caching has ended for good: ``loads`` were never launched, or are given up.
    """

    step: int
    has_forward: bool
    loads: list[LoadJob] = field(default_factory=list)
    finishing: dict[str, list[int]] = field(default_factory=dict)
    oldest_task: int = 0
    saved: list[SavedBlocks] = field(default_factory=list)
    off: bool = False
