"""Worker side: the rank's tensors, the fences of its compute, and the reports that vLLM waits for."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexkv.config import ConnectorConfig
from flexkv.errors import RegistrationError
from flexkv.integration.vllm.audit import PageAudit
from flexkv.integration.vllm.metadata import FlexKVConnectorMetadata, LoadJob
from flexkv.protocol.ring import OpKind
from flexkv.rank.rank import RankClient
from flexkv.rank.regions import TensorSpec
from flexkv.rank.results import OpResult
from flexkv.rank.tensors import tensor_spec

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("flexkv.vllm")

_START_TIMEOUT_S = 60.0
"""Maximum time until a load is submitted to the GPU, in seconds. It normally takes a millisecond."""

_LOAD_TIMEOUT_S = 120.0
"""Maximum time of a layerwise load, in seconds. The controller ends it within ``op_timeout_s``, so a longer load means
that the agent is broken."""

_IDLE_WAIT_S = 0.005
"""Maximum time that a step without compute waits for a transfer, in seconds, so that such steps do not spin."""


def page_spec(tensor: "torch.Tensor", num_blocks: int | None) -> TensorSpec:
    """Describe one layer's KV cache by the dimension that counts vLLM's blocks.

    It is the first dimension of 3-D, 4-D and 5-D ``[blocks, 2, ...]`` tensors, and the second of ``[2, blocks, ...]``.

    Raises
    ------
    RegistrationError
        The shape is ambiguous, or does not fit ``num_blocks``.
    """
    shape = tuple(tensor.shape)
    page_dim = 0
    if len(shape) == 5 and shape[0] == 2:
        if shape[1] == 2:
            raise RegistrationError(f"a KV cache of shape {shape} is ambiguous: either of its first two dimensions may "
                                    "count blocks; use more than 2 blocks")
        page_dim = 1
    parts = None
    if num_blocks is not None and shape[page_dim] != num_blocks:
        if shape[page_dim] % num_blocks:
            raise RegistrationError(f"a KV cache of shape {shape} cannot hold {num_blocks} blocks")
        parts = shape[page_dim] // num_blocks          # the kernel's blocks are smaller than vLLM's
    return tensor_spec(tensor, page_dim, parts)


class WorkerSide:
    """The connector's half in a worker, for one rank. Every method must be called on the worker's main thread.

    Parameters
    ----------
    client : RankClient
    config : ConnectorConfig
    copy : str, optional
        Name of the copy that this rank shares with others (``RankMemory``); None: its KV is its own.
    leave_after_s : float
        Time in seconds after which a load that has not ended makes the rank leave its controller, a daemon that was
        perhaps stopped.
    """

    def __init__(
        self, client: RankClient, config: ConnectorConfig, copy: str | None = None, leave_after_s: float = math.inf,
        layout_name: Callable[[], str] = lambda: "",
    ) -> None:
        self._client = client
        self._copy, self._layout_name = copy, layout_name
        self._leave_after_s = leave_after_s
        self._config = config
        self._meta: FlexKVConnectorMetadata | None = None
        self.between_steps = True
        """Whether the last step has ended and no other has begun."""
        self._loads: dict[int, LoadJob] = {}                # launched, not reported
        self._outcomes: dict[int, OpResult] = {}            # of loads, until their job ends
        self._since: dict[int, float] = {}                  # when each load was first seen
        self._known_at: dict[int, int] = {}                 # the client's ``num_ended`` then, of each task under way
        self._saved: set[int] = set()                       # put tasks that ended on this rank
        self._finishing: dict[str, set[int]] = {}
        self._failed_pages: set[int] = set()
        self._layerwise: list[int] = []                     # loads that the step's compute waits for
        self._followed = -1                                 # index of the last tensor that compute waits for
        self._not_followed: set[int] = set()                # loads that compute did not wait for: they count as failed
        self._tensor_of: dict[str, int] = {}
        self._audit: PageAudit | None = None
        self._device: torch.device | None = None            # GPU of the tensors; None: CPU

    def register_kv_caches(
        self, kv_caches: "dict[str, torch.Tensor]", num_blocks: int | None, connect_timeout_s: float
    ) -> None:
        """Register the tensors; a background thread connects to the controller."""
        tensors: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
        for tensor in kv_caches.values():                   # layers may share a tensor
            tensors.setdefault((tensor.data_ptr(), tuple(tensor.shape)), tensor)
        order = {key: index for index, key in enumerate(tensors)}
        self._tensor_of = {
            name: order[tensor.data_ptr(), tuple(tensor.shape)] for name, tensor in kv_caches.items()
        }
        specs = [page_spec(tensor, num_blocks) for tensor in tensors.values()]
        self._device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        if self._config.audit:
            path = Path(f"{self._config.audit_path}-{self._client.name}") if self._config.audit_path else None
            self._audit = PageAudit(list(tensors.values()), specs, path)
        self._client.register_tensors(
            specs, connect_timeout_s, keep_alive=list(tensors.values()), copies=[self._copy] * len(specs),
            meaning=self._layout_name(),             # read late: another connector may change it in the workers
        )

    # ---- the hooks of a step, in the order in which vLLM calls them ----------------------------------------------

    def start_load(self, meta: FlexKVConnectorMetadata) -> None:
        """Let the step's loads start: compute that used their pages is done, or submitted before. Later calls in the
        same step do nothing."""
        if self._meta is not None and meta.step == self._meta.step:
            return
        self._meta, self.between_steps = meta, False
        for job in meta.loads:
            self._loads[job.task_id] = job
        self._layerwise = [job.task_id for job in meta.loads if job.layerwise]
        self._followed = -1
        for req_id, task_ids in meta.finishing.items():
            self._finishing[req_id] = set(task_ids)
        self._saved.update(meta.ended)
        self._known_at = {
            task_id: self._known_at.get(task_id, self._client.num_ended) for task_id in self._tasks_under_way()
        }
        self._client.advance_fence(load=meta.step, stream=self._stream())

    def wait_for_layer(self, layer_name: str) -> None:
        """Make compute of the layer wait until the step's layerwise loads have filled it. The loads run in order, so
        it waits for the last one."""
        if not self._layerwise:
            return
        tensor = self._tensor_of.get(layer_name)
        if tensor is None or tensor > self._followed:
            if not self._client.follow_load(self._layerwise[-1], tensor, _START_TIMEOUT_S, self._stream()):
                logger.error("the step's loads did not start; their blocks will be reported as failed")
                self._not_followed.update(self._layerwise)
                self._layerwise = []
            elif tensor is not None:
                self._followed = tensor

    def _stream(self) -> int | None:
        """Handle of the stream of the step's compute; None on the CPU, where compute is synchronous."""
        if self._device is None:
            return None
        import torch

        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def wait_for_save(self) -> None:
        """Let the saves of the step start after its compute."""
        self.between_steps = True
        if self._meta is not None:
            if self._audit is not None:
                for saved in self._meta.saved:
                    self._audit.record(saved.keys, saved.pages)
            self._client.advance_fence(save=self._meta.step, stream=self._stream())

    def get_finished(self) -> tuple[set[str], set[str]]:
        """Requests whose saves, and whose loads, have ended on this rank; each is reported once."""
        self._leave_if_late()
        pending = self._loads or self._finishing
        if pending and self._meta is not None and not self._meta.has_forward:
            self._client.wait_results(_IDLE_WAIT_S)
        self._wait_layerwise()
        # before the poll, so that no result is missed
        lost = {task_id for task_id in self._tasks_under_way() if self._has_lost(task_id)}
        self._take_results()
        ended = [job for job in self._loads.values() if self._end_load(job, job.task_id in lost)]
        loaded = {job.req_id for job in ended if not job.layerwise}
        saved = {
            req_id for req_id, task_ids in self._finishing.items()
            if not self._client.writes or task_ids <= self._saved | lost
        }
        for job in ended:                                   # last: an error before reports them as failed
            del self._loads[job.task_id]
        for req_id in saved:
            del self._finishing[req_id]
        self._forget_old()
        return saved, loaded

    def _tasks_under_way(self) -> set[int]:
        return self._loads.keys() | set().union(*self._finishing.values())

    def _has_lost(self, task_id: int) -> bool:
        return self._client.has_lost(task_id, self._known_at[task_id])

    def _leave_if_late(self) -> None:
        """Leave a controller that does not end a load: this rank's agent then accesses no page any more."""
        now = time.monotonic()
        self._since = {task_id: self._since.get(task_id, now) for task_id in self._loads}
        if any(now - since > self._leave_after_s for since in self._since.values()):
            logger.critical("a load has not ended within %g s: this rank leaves the controller", self._leave_after_s)
            self._since = {}
            self._client.leave()

    def _take_results(self) -> None:
        for result in self._client.poll_results():
            if result.kind is OpKind.H2D:
                self._outcomes[result.task_id] = result
            else:
                self._saved.add(result.task_id)

    def _wait_layerwise(self) -> None:
        """Wait for the step's layerwise loads. Their requests already have tokens, so this step must report whether the
        loads succeeded. If an agent does not end a load in bounded time, it is stopped and then accesses no page."""
        pending = {job.task_id for job in self._loads.values() if job.layerwise}
        deadline = time.monotonic() + _LOAD_TIMEOUT_S
        while not all(task_id in self._outcomes or self._has_lost(task_id) for task_id in pending):
            if time.monotonic() > deadline:
                logger.critical("a load has not ended within %g s: this rank leaves the controller", _LOAD_TIMEOUT_S)
                self._client.leave()
                deadline = math.inf
            self._client.wait_results(_IDLE_WAIT_S)
            self._take_results()

    def _end_load(self, job: LoadJob, lost: bool) -> bool:
        result = self._outcomes.pop(job.task_id, None)
        if result is None and not lost:
            return False
        failed = set(job.pages.tolist())
        if job.task_id in self._not_followed:
            self._not_followed.remove(job.task_id)
        elif result is not None:
            arrived = result.pages[result.ok]               # in the order in which they arrived, not in that of the job
            failed -= set(arrived.tolist())
            if self._audit is not None and job.keys is not None:
                self._audit.compare(job.keys, job.pages, np.isin(job.pages, arrived))
        if failed:
            logger.warning("%d of %d blocks of request %s were not loaded", len(failed), len(job.pages), job.req_id)
            self._failed_pages |= failed
        return True

    def _forget_old(self) -> None:
        if self._meta is not None:
            oldest = self._meta.oldest_task
            asked = set().union(*self._finishing.values()) if self._finishing else set()
            self._saved = {task_id for task_id in self._saved if task_id >= oldest or task_id in asked}

    def take_failed_pages(self) -> set[int]:
        """Return and forget the pages of failed loads, of the requests that ``get_finished`` has just reported."""
        failed, self._failed_pages = self._failed_pages, set()
        return failed

    def take_pending(self) -> tuple[list[LoadJob], set[str], set[int]]:
        """Return and forget unreported loads, requests with saves, and failed pages. The caller must report them."""
        pending = list(self._loads.values()), set(self._finishing), self._failed_pages
        self._loads, self._finishing, self._failed_pages = {}, {}, set()
        return pending

    def audit_counts(self) -> dict[str, int]:
        """Counts of the audit (``PageAudit.counts``); empty if it is off."""
        return self._audit.counts() if self._audit is not None else {}

    def shutdown(self) -> None:
        """Stop the agent."""
        self._client.close()


def find_metadata(owner: Any) -> FlexKVConnectorMetadata | None:
    """Metadata of the step, which vLLM binds to the connector that wraps ``owner``, also inside a MultiConnector; None:
    there is none."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return None
    group = get_kv_transfer_group()
    for connector in (group, *getattr(group, "_connectors", ())):
        if getattr(connector, "_flexkv_connector", None) is owner:
            meta = getattr(connector, "_connector_metadata", None)
            return meta if isinstance(meta, FlexKVConnectorMetadata) else None
    return None
