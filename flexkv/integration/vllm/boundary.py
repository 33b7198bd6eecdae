"""The boundary to the engine, which no exception of FlexKV crosses.

vLLM calls every hook of a connector inside its scheduler's or worker's loop, where an exception ends the engine. So
each hook is called through ``HookGuard.call``. After an unexpected exception KV caching is off permanently: no block is
offered or saved, loads in progress are reported as failed and saves as finished, and the engine continues without
FlexKV.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from flexkv.integration.vllm.metadata import FlexKVConnectorMetadata, LoadJob
from flexkv.integration.vllm.off import OffScheduler, OffWorker
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.worker import WorkerSide

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")

_Half = TypeVar("_Half", SchedulerSide | OffScheduler, WorkerSide | OffWorker)
_Value = TypeVar("_Value")


class HookGuard(Generic[_Half]):
    """Calls the hooks of one half of the connector, until one fails.

    Parameters
    ----------
    side : SchedulerSide, WorkerSide, OffScheduler, OffWorker or None
        The half; None: this process has no half of this role, or the half has failed.
    """

    def __init__(self, side: _Half | None) -> None:
        self.side: _Half | None = side

    def call(self, hook: Callable[[_Half], _Value], otherwise: _Value) -> _Value:
        """Call a hook and return its result; return ``otherwise`` if caching is off or the hook fails."""
        if self.side is None:
            return otherwise
        try:
            return hook(self.side)
        except Exception:
            logger.critical(
                "KV caching is off until the engine is restarted, because of an error in FlexKV; the engine continues "
                "without it. Please report this:", exc_info=True,
            )
            failed, self.side = self.side, None
            self.turn_off(failed)
        return otherwise

    def turn_off(self, failed: _Half) -> None:
        """Stop the transfers of the failed half."""
        try:
            failed.shutdown()
        except Exception:
            logger.exception("FlexKV could not be stopped cleanly")

    def shutdown(self) -> None:
        """Stop the half, if there is one, when the engine ends."""
        self.call(lambda side: side.shutdown(), None)


class GuardedScheduler(HookGuard[SchedulerSide | OffScheduler]):
    """Guard of the scheduler's hooks. ``block_size``: tokens of a page of vLLM's scheduler."""

    def __init__(self, side: SchedulerSide | OffScheduler | None, block_size: int) -> None:
        super().__init__(side)
        self._block_size = block_size
        self._offers: dict[str, tuple[int, bool]] = {}      # by request: tokens computed, whether asynchronous
        self._orphans: list[LoadJob] = []                   # loads that the workers must report as failed
        self._finishing: dict[str, list[int]] = {}
        self._step = 0

    def turn_off(self, failed: SchedulerSide | OffScheduler) -> None:
        """Take the loads and finished requests that the workers do not know yet. The next step passes them on."""
        loads, self._finishing = failed.take_pending()
        self._orphans += loads
        super().turn_off(failed)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """Number of tokens that can be loaded, and whether the load is asynchronous."""
        nothing: tuple[int | None, bool] = (0, False)
        offer = self.call(lambda side: side.get_num_new_matched_tokens(request, num_computed_tokens), nothing)
        if offer[0]:
            self._offers[request.request_id] = (num_computed_tokens, offer[1])
        return offer

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Launch the load of a request whose blocks were allocated. If that fails, the load is reported as failed."""
        computed, is_async = self._offers.pop(request.request_id, (0, False))

        def launch(side: SchedulerSide | OffScheduler) -> bool:
            side.update_state_after_alloc(request, blocks, num_external_tokens)
            return True

        if not self.call(launch, False) and num_external_tokens:
            first = computed // self._block_size
            pages = blocks.get_block_ids()[0][first : first - (-num_external_tokens // self._block_size)]
            self._orphans.append(
                LoadJob(request.request_id, -1, np.array(pages, dtype=np.int32), layerwise=not is_async)
            )

    def build_connector_meta(self, output: "SchedulerOutput") -> FlexKVConnectorMetadata:
        """Metadata of the next step for the workers."""
        self._step += 1
        meta: FlexKVConnectorMetadata | None = self.call(lambda side: side.build_connector_meta(output), None)
        if meta is None:
            meta = FlexKVConnectorMetadata(
                self._step, output.total_num_scheduled_tokens > 0, loads=self._orphans, finishing=self._finishing,
                off=True,
            )
            self._orphans, self._finishing = [], {}
        return meta

    def update_connector_output(self, output: "KVConnectorOutput") -> None:
        """Record the workers' report of a step."""
        self.call(lambda side: side.step_reported(output), None)

    def step_ended(self) -> None:
        """Record that vLLM has processed a step."""
        self.call(lambda side: side.step_ended(), None)

    def on_new_request(self, request: "Request") -> None:
        """Start the prefetch of a queued request."""
        self.call(lambda side: side.on_new_request(request), None)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the request's blocks must stay until its saves are done."""
        nothing: tuple[bool, dict[str, Any] | None] = (False, None)
        self._offers.pop(request.request_id, None)
        return self.call(lambda side: side.request_finished(request, block_ids), nothing)

    def reset_cache(self) -> bool:
        """Drop all cached KV; True also if caching is off, since no KV is cached then."""
        return self.call(lambda side: side.reset_cache(), True)


class GuardedWorker(HookGuard[WorkerSide | OffWorker]):
    """Guard of the worker's hooks on one rank."""

    def __init__(self, side: WorkerSide | OffWorker | None) -> None:
        super().__init__(side)
        self._lost = LostTransfers()

    def turn_off(self, failed: WorkerSide | OffWorker) -> None:
        """Stop the half, and take its transfers, which are reported as failed in this step."""
        super().turn_off(failed)                            # first: afterwards no transfer accesses a page
        self._lost.take(failed)

    def start_load(self, meta: FlexKVConnectorMetadata | None) -> None:
        """Let the step's loads start."""
        if meta is None:
            return
        if meta.off and self.side is not None:
            logger.error("KV caching is off: FlexKV has failed in the scheduler process, see its log")
            failed, self.side = self.side, None
            self.turn_off(failed)

        def start(side: WorkerSide | OffWorker) -> bool:
            side.start_load(meta)
            return True

        if not self.call(start, False):
            self._lost.add(meta)

    def wait_for_layer(self, layer_name: str, find_metadata: Callable[[], FlexKVConnectorMetadata | None]) -> None:
        """Wait until a layer's loads have arrived. The first call of a step starts the step's loads."""
        if self.side is None or self.call(lambda side: side.between_steps, False):
            self.start_load(find_metadata())
        self.call(lambda side: side.wait_for_layer(layer_name), None)

    def wait_for_save(self) -> None:
        """Let the saves of the step start after its compute."""
        self.call(lambda side: side.wait_for_save(), None)

    def get_finished(self) -> tuple[set[str], set[str]]:
        """Requests whose saves have ended, and requests whose loads have ended."""
        nothing: tuple[set[str], set[str]] = (set(), set())
        saved, loaded = self.call(lambda side: side.get_finished(), nothing)
        lost = self._lost.take_finished()
        return saved | lost[0], loaded | lost[1]

    def take_failed_pages(self) -> set[int]:
        """Return and forget the pages of failed loads."""
        nothing: set[int] = set()
        return self.call(lambda side: side.take_failed_pages(), nothing) | self._lost.take_pages()


class LostTransfers:
    """Transfers that a rank must still report, once, after caching is off: loads as failed, saves as ended."""

    def __init__(self) -> None:
        self._step = -1
        self._saved: set[str] = set()
        self._loaded: set[str] = set()
        self._pages: set[int] = set()

    def take(self, failed: WorkerSide | OffWorker) -> None:
        """Record the transfers of a half that has failed."""
        loads, saves, pages = failed.take_pending()
        self._add(loads, saves)
        self._pages |= pages

    def add(self, meta: FlexKVConnectorMetadata) -> None:
        """Record the transfers that a step begins; each step counts once."""
        if meta.step != self._step:
            self._step = meta.step
            self._add(meta.loads, set(meta.finishing))

    def _add(self, loads: list[LoadJob], saves: set[str]) -> None:
        self._saved |= saves
        self._loaded.update(job.req_id for job in loads if not job.layerwise)
        self._pages.update(page for job in loads for page in job.pages.tolist())

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Return and forget the requests with saves, and the requests with loads."""
        finished, self._saved, self._loaded = (self._saved, self._loaded), set(), set()
        return finished

    def take_pages(self) -> set[int]:
        """Return and forget the pages of the recorded loads."""
        pages, self._pages = self._pages, set()
        return pages
