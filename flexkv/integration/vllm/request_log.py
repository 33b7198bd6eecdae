"""Log lines about requests: one for each request at DEBUG, one for every N requests at INFO."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flexkv.cache.plan import MatchResult
from flexkv.cache.reasons import MissReason
from flexkv.controller.response import KVResponse, KVResponseStatus

logger = logging.getLogger("flexkv.vllm")

_HAS_TIME = {MissReason.EVICTED, MissReason.FAILED, MissReason.EXPIRED, MissReason.OVER_QUOTA, MissReason.NOT_ADMITTED}
"""Reasons for which a match may contain a time."""


@dataclass(slots=True)
class _Blocks:
    """Block counts of one request: blocks wanted, blocks in vLLM's own cache (``computed``), blocks found (``match``),
    blocks being loaded, blocks loaded."""

    wanted: int
    computed: int
    match: MatchResult
    loading: int = 0
    loaded: int = 0
    failed: bool = False


class RequestLog:
    """Counts the requests of an engine, and writes lines about them.

    Parameters
    ----------
    every : int
        Number of requests between two lines at INFO; 0: no lines.
    block_size : int
        Tokens of a block.
    stats : callable
        Returns the counts for the line at INFO; called when the line is written.

    Attributes
    ----------
    num_requests, num_hit_tokens : int
        Number of requests that have ended, and of tokens whose load was started, since the start.
    """

    def __init__(self, every: int, block_size: int, stats: Callable[[], Mapping[str, int]]) -> None:
        self._every = every
        self._block_size = block_size
        self._stats = stats
        self.num_requests = self.num_hit_tokens = self._num_prompt_tokens = 0
        self._blocks: dict[str, _Blocks] = {}
        self._loads: dict[int, str] = {}

    def matched(self, request_id: str, wanted: int, computed: int, match: MatchResult) -> None:
        """Record the match of a request of ``wanted`` whole blocks, ``computed`` of which are in vLLM's own cache."""
        if logger.isEnabledFor(logging.DEBUG):
            self._blocks[request_id] = _Blocks(wanted, computed, match)

    def loading(self, request_id: str, task_id: int, num_tokens: int) -> None:
        """Record that a task loads ``num_tokens`` tokens of a request."""
        self.num_hit_tokens += num_tokens
        if (blocks := self._blocks.get(request_id)) is not None:
            blocks.loading = -(-num_tokens // self._block_size)
            self._loads[task_id] = request_id

    def tasks_ended(self, responses: Iterable[KVResponse]) -> None:
        """Record the results of tasks that have ended. Tasks other than loads are ignored."""
        for response in responses:
            blocks = self._blocks.get(self._loads.pop(response.task_id, ""))
            if blocks is not None and response.status is KVResponseStatus.SUCCESS:
                blocks.loaded, blocks.loading = blocks.loading, 0
            elif blocks is not None:
                blocks.failed = True

    def request_ended(self, request_id: str, num_prompt_tokens: int) -> None:
        """Record the end of a request, and write the lines that are due."""
        self.num_requests += 1
        self._num_prompt_tokens += num_prompt_tokens
        if (blocks := self._blocks.pop(request_id, None)) is not None:
            logger.debug("request %s: %s", request_id, _line(blocks))
        if self._every and self.num_requests % self._every == 0:
            logger.info(
                "%d requests, %d prompt tokens, %d loaded; %s", self.num_requests, self._num_prompt_tokens,
                self.num_hit_tokens, {name: count for name, count in self._stats().items() if count},
            )


def _line(blocks: _Blocks) -> str:
    match = blocks.match
    found = max(0, match.num_ready - blocks.computed)
    text = f"{blocks.wanted} blocks wanted, {blocks.computed} in vLLM's cache, {found} found"
    if match.num_to_fetch:
        text += f" ({match.num_to_fetch} on SSD)"
    text += f", {blocks.loaded} loaded"
    if blocks.failed:
        text += ", load failed"
    if match.reason is not MissReason.FULL_HIT:
        text += f"; block {match.num_ready}: {match.reason.name.lower()}"
        if match.reason in _HAS_TIME and not math.isnan(match.evicted_at):
            text += f" {time.monotonic() - match.evicted_at:.0f} s ago"
    return text
