"""Scheduler side: decides which blocks are loaded and saved, and launches the transfers."""

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexkv.config import ConnectorConfig
from flexkv.controller.blocks import Blocks
from flexkv.controller.response import KVResponseStatus
from flexkv.integration.vllm.lora_versions import LoraVersions
from flexkv.integration.vllm.metadata import FlexKVConnectorMetadata, LoadJob, SavedBlocks
from flexkv.integration.vllm.prefill_rate import PrefillRate
from flexkv.integration.vllm.request_log import RequestLog
from flexkv.integration.vllm.steps import StepLedger, Trust, Verdict, Write
from flexkv.integration.vllm.tracked_request import NEVER_SAVED, TrackedRequest, is_cacheable

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")

_DRAIN_TIMEOUT_S = 5.0
"""Maximum delay of a step, in seconds, while saves of preempted requests release their pages."""


def skips_prefix_cache(request: "Request") -> bool:
    """Whether vLLM must compute the whole prompt of a request, for example for prompt log probabilities."""
    skips = getattr(request, "skip_reading_prefix_cache", None)
    if skips is None and (ask := getattr(request, "get_skip_reading_prefix_cache", None)) is not None:
        skips = ask()
    return bool(skips)


class SchedulerSide:
    """The connector's half in vLLM's scheduler; owns the controller. Every method must be called on one thread.

    Parameters
    ----------
    controller : Blocks
        A controller that was started.
    block_size : int
        Tokens of a page of vLLM's scheduler.
    config : ConnectorConfig
    may_load, may_save : bool
        Whether the engine's role allows loads and saves.
    max_in_flight : int
        Number of steps that vLLM schedules before the oldest has ended (``VllmConfig.max_concurrent_batches``). If it
        is more than 1, no load is layerwise: vLLM cannot revoke the step that follows a failed step.
    """

    def __init__(
        self, controller: Blocks, block_size: int, config: ConnectorConfig, *, may_load: bool = True,
        may_save: bool = True, max_in_flight: int = 1,
    ) -> None:
        self._loras = LoraVersions()
        self._controller = controller
        self._may_load, self._may_save = may_load, may_save
        self._layerwise = config.layerwise_loads if max_in_flight == 1 else "never"
        self._steps = StepLedger(several=max_in_flight > 1)
        self._block_size = block_size
        self._config = config
        self._requests: dict[str, TrackedRequest] = {}
        self._step = 0
        self._loads: list[LoadJob] = []
        self._saved: list[SavedBlocks] = []
        self._finishing: dict[str, list[int]] = {}
        self._outstanding: set[int] = set()
        self._ended: list[int] = []                         # without success, since the last step
        self._newest_task = 0                               # the latest task that was launched
        self._prefetches: set[int] = set()
        self._must_compute: list[Request] = []              # these compute the whole prompt from the next step on
        self._loaded: set[str] = set()                      # requests with a load since they were last preempted
        self._prefill = PrefillRate()
        self._running: set[str] = set()                     # requests that compute in the last step
        self._num_layerwise = 0
        self._log = RequestLog(config.num_log_interval_requests, block_size, lambda: self._controller.stats())

    # ---- loads ------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """Number of tokens after ``num_computed_tokens`` that can be loaded, and whether the load is asynchronous.

        Acquires no blocks, and may be called any number of times. None: the request must wait until it is known whether
        vLLM's own copy of its prefix is good.
        """
        if not is_cacheable(request):
            return 0, False
        tracked = self._track(request)
        tracked.num_computed = num_computed_tokens
        if num_computed_tokens and self._must_wait(tracked, num_computed_tokens):
            return None, False
        if not self._may_load or not self._controller.is_ready() or skips_prefix_cache(request):
            return 0, False
        if request.request_id in self._loaded:              # its load was of no use
            return 0, False
        keys = tracked.lookup_keys = tracked.keys()
        match = self._controller.lookup(
            keys, num_computed_tokens // self._block_size, tracked.tenant, count=not tracked.counted
        )
        if not tracked.counted:
            self._log.matched(request.request_id, len(keys), num_computed_tokens // self._block_size, match)
        tracked.counted = True
        num_new = match.num_ready * self._block_size - num_computed_tokens
        if num_new <= 0:
            return 0, False
        if match.num_to_fetch:
            self._prefetch(tracked, match.num_ready, num_computed_tokens // self._block_size)
        tracked.layerwise = match.num_to_fetch == 0 and self._may_run_behind_load(request)
        if tracked.layerwise:          # vLLM must compute at least one token, in a page that is not loaded
            whole = (request.num_tokens - 1) // self._block_size * self._block_size
            num_new = max(0, min(num_new, whole - num_computed_tokens))
        return num_new, not tracked.layerwise and num_new > 0

    def _must_wait(self, tracked: TrackedRequest, num_computed_tokens: int) -> bool:
        """Whether a request must wait: vLLM caches the pages of a layerwise load before the load has succeeded, and
        keeps them if it fails. A request must not use such pages. If its prefix has bad pages, it computes all."""
        trust = self._steps.trust(tracked.keys(), num_computed_tokens // self._block_size)
        if trust is Trust.BAD:
            self._must_compute.append(tracked.request)      # in the next step: vLLM would ignore that it must wait
        return trust is not Trust.GOOD

    def on_new_request(self, request: "Request") -> None:
        """Prefetch the SSD blocks of a queued request into host memory while it waits."""
        if not self._may_load or skips_prefix_cache(request):
            return
        if self._controller.is_ready() and is_cacheable(request):
            tracked = self._track(request)
            match = self._controller.lookup(tracked.keys(), tenant=tracked.tenant)
            if match.num_to_fetch:
                self._prefetch(tracked, match.num_ready)

    def _prefetch(self, tracked: TrackedRequest, num_blocks: int, start_block: int = 0) -> None:
        """Start the prefetch of a request, once, so that it is read before it is scheduled. Its load joins the read."""
        if not tracked.prefetched:
            task_id = self._controller.prefetch_blocks(tracked.keys()[:num_blocks], start_block, tracked.tenant)
            if task_id is not None:
                tracked.prefetched = True
                self._prefetches.add(task_id)

    def _may_run_behind_load(self, request: "Request") -> bool:
        """Whether the request should run at once, layer by layer behind its load. The whole step is then as slow as the
        load, which delays other requests in it."""
        mode = self._layerwise
        return mode == "always" or (mode == "auto" and not self._running - {request.request_id})

    def _track(self, request: "Request") -> TrackedRequest:
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.request is not request:
            tracked = TrackedRequest(request, self._controller, self._block_size, self._loras)
            self._requests[request.request_id] = tracked
            self._controller.record_request(tracked.keys())
        return tracked

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Record the blocks that vLLM allocated to a request, and launch the load of ``num_external_tokens`` tokens.

        The load starts when the workers reach the next step, after the compute that last used these blocks.
        """
        if not is_cacheable(request):
            return
        tracked = self._track(request)
        tracked.set_pages(blocks.get_block_ids()[0])
        if num_external_tokens == 0:
            return
        first = tracked.num_computed // self._block_size
        last = first + -(-num_external_tokens // self._block_size)
        pages, keys = tracked.pages[first:last].copy(), tracked.lookup_keys[:last]
        task_id = self._controller.get_blocks(keys, first, pages, self._step + 1, tracked.layerwise, tracked.tenant)
        tracked.num_offered = last
        self._loaded.add(request.request_id)
        self._launched(task_id)
        self._steps.load_started(request.request_id, pages, tracked.layerwise, first, keys[first].tobytes())
        self._loads.append(
            LoadJob(
                request.request_id, task_id, pages, keys[first:].copy() if self._config.audit else None,
                tracked.layerwise,
            )
        )
        if tracked.layerwise:
            self._num_layerwise += 1
            self._running.add(request.request_id)
        self._log.loading(request.request_id, task_id, num_external_tokens)

    # ---- steps ------------------------------------------------------------------------------------------------

    def build_connector_meta(self, output: "SchedulerOutput") -> FlexKVConnectorMetadata:
        """Launch the saves of the next step; returns its metadata for the workers."""
        self._step += 1
        for request in self._must_compute:
            request.skip_reading_prefix_cache = True
        self._must_compute = []
        self._running = set(output.num_scheduled_tokens)
        self._time_step(output)
        self._collect()
        self._release_preempted(output)
        computed = self._take_pages(output)
        self._begin_step(output, computed)
        if self._config.save_mode == "as_computed":
            for req_id, num_scheduled in output.num_scheduled_tokens.items():
                tracked = self._requests.get(req_id)
                if tracked is not None:
                    self._save(tracked, computed[req_id] + num_scheduled)
        meta = FlexKVConnectorMetadata(
            step=self._step, has_forward=output.total_num_scheduled_tokens > 0, loads=self._loads,
            finishing=self._finishing, oldest_task=min(self._outstanding, default=self._newest_task + 1),
            ended=self._ended, saved=self._saved,
        )
        self._loads, self._finishing, self._ended, self._saved = [], {}, [], []
        return meta

    def _take_pages(self, output: "SchedulerOutput") -> dict[str, int]:
        """Record the pages of the step's requests; returns the number of tokens of each that are computed before it.

        A request that is started or resumed has all of its pages in ``output``. A MultiConnector of vLLM 0.23 calls
        ``update_state_after_alloc`` only for loads, so its pages may be unknown before.
        """
        computed = {}
        for new in output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            tracked, block_ids = self._requests.get(new.req_id), getattr(new, "block_ids", None)
            if tracked is not None and block_ids:
                tracked.set_pages(block_ids[0])
        cached = output.scheduled_cached_reqs
        for req_id, block_ids, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            computed[req_id] = num_computed
            tracked = self._requests.get(req_id)
            if tracked is None or block_ids is None:
                continue
            if req_id in cached.resumed_req_ids:
                tracked.set_pages(block_ids[0])
            else:
                tracked.add_pages(block_ids[0])
        return computed

    def _time_step(self, output: "SchedulerOutput") -> None:
        if output.total_num_scheduled_tokens == 0:
            self._prefill.forget_steps()
        elif any(job.layerwise for job in self._loads):     # the step lasts as long as the load
            self._prefill.began(())
        else:
            self._prefill.began(output.num_scheduled_tokens.values())

    def _begin_step(self, output: "SchedulerOutput", computed: dict[str, int]) -> None:
        writes = []
        for req_id, num_scheduled in output.num_scheduled_tokens.items():
            if (tracked := self._requests.get(req_id)) is not None:
                start, stop = computed[req_id], computed[req_id] + num_scheduled
                size = self._block_size
                writes.append(Write(tracked, tracked.pages[: -(-stop // size)], start // size, -(-start // size)))
        was_lost = self._steps.lost
        for task_id in self._steps.begin(output.total_num_scheduled_tokens > 0, writes):
            self._controller.accept_put(task_id, 0)
        if self._steps.lost and not was_lost:
            self._may_save = False
            logger.error("vLLM schedules steps that it does not report, so no KV is saved any more. Please report this "
                         "with vLLM's version")

    def step_reported(self, output: "KVConnectorOutput") -> None:
        """Record the workers' report of the oldest step. It is not called for an empty report."""
        if rate := self._prefill.ended():
            self._controller.set_prefill_rate(rate)
        self._steps.report(output.invalid_block_ids or (), output.finished_recving or ())

    def step_ended(self) -> None:
        """Record that vLLM has processed the oldest step. Must be called once for each step, in order."""
        if (verdict := self._steps.end()) is not None:
            self._decide(verdict)

    def _decide(self, verdict: Verdict) -> None:
        for task_id, stop_block in verdict.accepted:
            self._controller.accept_put(task_id, stop_block)
        if verdict.spoiled:
            for tracked in self._requests.values():         # recomputed blocks must be saved again
                if tracked.num_offered != NEVER_SAVED:
                    first = self._steps.first_suspect(tracked.pages[: tracked.num_offered])
                    tracked.num_offered = tracked.num_offered if first is None else first

    def _drop_puts(self, task_ids: set[int] | None = None) -> None:
        for task_id in self._steps.drop_puts(task_ids):
            self._controller.accept_put(task_id, 0)

    def _save(self, tracked: TrackedRequest, num_tokens: int) -> None:
        """Save the blocks that are full when the first ``num_tokens`` tokens are computed."""
        keys, full = tracked.keys(), num_tokens // self._block_size
        if full > len(tracked.pages):                       # some pages are unknown, so positions are too
            return
        last = min(full, len(keys))
        if last <= tracked.num_offered or not self._may_save or not self._controller.is_ready():
            return
        first, tracked.num_offered = tracked.num_offered, last
        task_id = self._put(tracked, keys[:last], first)
        if task_id is None and first > 0:
            # either all blocks are cached, or earlier blocks were evicted meanwhile and must be saved again
            task_id = self._put(tracked, keys[:last], 0)
        if task_id is None:
            return
        self._steps.add_put(task_id, tracked.pages[:last])
        tracked.saves.add(task_id)
        self._launched(task_id)
        if self._config.audit:
            positions = self._controller.task_blocks(task_id)
            self._saved.append(SavedBlocks(tracked.pages[positions].copy(), keys[positions].copy()))

    def _put(self, tracked: TrackedRequest, keys: NDArray[np.uint64], first: int) -> int | None:
        """Save blocks from ``first`` on. They become visible when the step has ended and if their pages are good."""
        pages = tracked.pages[first : len(keys)]
        return self._controller.put_blocks(keys, first, pages, self._step, tracked.tenant, provisional=True)

    def _launched(self, task_id: int) -> None:
        self._outstanding.add(task_id)
        self._newest_task = max(self._newest_task, task_id)

    def _collect(self) -> None:
        """Collect the results of tasks that have ended."""
        ended = self._controller.try_wait(self._outstanding)
        self._outstanding.difference_update(ended)
        self._ended += [number for number, end in ended.items() if end.status is not KVResponseStatus.SUCCESS]
        self._log.tasks_ended(ended.values())
        if self._prefetches:
            self._prefetches.difference_update(self._controller.try_wait(self._prefetches))

    def _release_preempted(self, output: "SchedulerOutput") -> None:
        """End the saves of preempted requests, which lose their pages in the next step.

        vLLM 0.23 does not list requests that were preempted by a reset of its prefix cache. Their ``num_preemptions``
        shows it.
        """
        preempted = set(output.preempted_req_ids or ())
        preempted.update(name for name, tracked in self._requests.items() if tracked.was_preempted())
        for req_id in preempted:
            self._loaded.discard(req_id)
            if (tracked := self._requests.get(req_id)) is not None:
                self._release(tracked)

    def _release(self, tracked: TrackedRequest) -> None:
        """End the saves of a request whose pages vLLM has taken."""
        self._drop_puts(tracked.saves)
        if saves := tracked.saves & self._outstanding:
            self._controller.cancel(saves)
            self._controller.wait(saves, timeout=_DRAIN_TIMEOUT_S, completely=True)
            self._outstanding -= saves
        tracked.saves.clear()
        tracked.forget_pages()

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the request's blocks must stay allocated for saves. The workers report the end of these saves."""
        tracked = self._requests.pop(request.request_id, None)
        self._running.discard(request.request_id)
        self._loaded.discard(request.request_id)
        self._log.request_ended(request.request_id, request.num_prompt_tokens)
        if tracked is None:
            return False, None
        if tracked.was_preempted():                         # by a reset, and no step was scheduled since
            self._release(tracked)
        if block_ids and self._worth_saving(request):
            tracked.set_pages(block_ids)
            self._save(tracked, request.num_computed_tokens)
        self._collect()
        pending = sorted(tracked.saves & self._outstanding)
        if pending:
            self._finishing[request.request_id] = pending
        return bool(pending), None

    def _worth_saving(self, request: "Request") -> bool:
        from vllm.v1.request import RequestStatus

        return request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)

    def reset_cache(self) -> bool:
        """Drop all cached KV, after a change of weights."""
        self._controller.reset(new_weights=True)
        self._drop_puts()
        for tracked in self._requests.values():
            tracked.num_offered = NEVER_SAVED               # computed with the old weights
        return True

    def stats(self) -> dict[str, int]:
        """Counts since the start, and the controller's current counts."""
        return {
            "requests": self._log.num_requests, "hit_tokens": self._log.num_hit_tokens,
            "layerwise_loads": self._num_layerwise, **self._controller.stats(),
        }

    def take_pending(self) -> tuple[list[LoadJob], dict[str, list[int]]]:
        """Return and forget the loads and finished requests that were not yet sent to the workers."""
        pending = self._loads, self._finishing
        self._loads, self._finishing = [], {}
        return pending

    def shutdown(self) -> None:
        """Stop the controller."""
        self._controller.shutdown()
