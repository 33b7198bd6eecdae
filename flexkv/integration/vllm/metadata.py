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
        vLLM block ids that the load fills.
    keys : (n, 2) uint64 or None
        Keys of the blocks; only when the audit is on.
    layerwise : bool
        Whether the request runs in the same step, layer by layer behind its load.
    """

    req_id: str
    task_id: int
    pages: NDArray[np.int32]
    keys: NDArray[np.uint64] | None = None
    layerwise: bool = False


@dataclass
class SavedBlocks:
    """Blocks that the next step completes and that are saved after it; only when the audit is on."""

    pages: NDArray[np.int32]
    keys: NDArray[np.uint64]


@dataclass
class FlexKVConnectorMetadata(KVConnectorMetadata):
    """Metadata of one step.

    Attributes
    ----------
    step : int
        Number of the scheduler's step; loads and saves of the step wait for this fence.
    has_forward : bool
        Whether the step computes tokens.
    loads : list of LoadJob
    finishing : dict from request id to task ids
        Put tasks of ended requests, whose blocks must stay allocated until these tasks are done.
    oldest_task : int
        The scheduler does not refer to tasks before this one any more.
    ended : list of int
        Put tasks that have ended without success, perhaps before they reached a rank, so that it has no result of them.
    saved : list of SavedBlocks
    off : bool
        KV caching has ended permanently: ``loads`` were not launched, or have been abandoned.
    """

    step: int
    has_forward: bool
    loads: list[LoadJob] = field(default_factory=list)
    finishing: dict[str, list[int]] = field(default_factory=dict)
    oldest_task: int = 0
    ended: list[int] = field(default_factory=list)
    saved: list[SavedBlocks] = field(default_factory=list)
    off: bool = False
