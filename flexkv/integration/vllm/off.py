"""The two halves of an adapter whose caching is off: the engine runs as if it had no connector."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexkv.integration.vllm.metadata import FlexKVConnectorMetadata, LoadJob

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class OffScheduler:
    """Scheduler half that offers and saves no KV. Has the methods of ``SchedulerSide``."""

    def __init__(self) -> None:
        self._step = 0

    def on_new_request(self, request: "Request") -> None:
        """Does nothing."""

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        """Returns 0: no token can be loaded."""
        return 0, False

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Does nothing."""

    def build_connector_meta(self, output: "SchedulerOutput") -> FlexKVConnectorMetadata:
        """Returns a step without transfers."""
        self._step += 1
        return FlexKVConnectorMetadata(self._step, output.total_num_scheduled_tokens > 0)

    def step_reported(self, output: "KVConnectorOutput") -> None:
        """Does nothing."""

    def step_ended(self) -> None:
        """Does nothing."""

    def take_pending(self) -> tuple[list[LoadJob], dict[str, list[int]]]:
        """Returns no transfers."""
        return [], {}

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Returns False: vLLM may free the blocks at once."""
        return False, None

    def reset_cache(self) -> bool:
        """Returns True: no KV is cached."""
        return True

    def stats(self) -> dict[str, int]:
        """Returns no counts."""
        return {}

    def shutdown(self) -> None:
        """Does nothing."""


class OffWorker:
    """Worker half that registers no tensors. Has the methods of ``WorkerSide``."""

    between_steps = False

    def register_kv_caches(
        self, kv_caches: "Mapping[str, torch.Tensor]", num_blocks: int | None, connect_timeout_s: float
    ) -> None:
        """Does nothing."""

    def start_load(self, meta: FlexKVConnectorMetadata) -> None:
        """Does nothing."""

    def wait_for_layer(self, layer_name: str) -> None:
        """Does nothing."""

    def wait_for_save(self) -> None:
        """Does nothing."""

    def get_finished(self) -> tuple[set[str], set[str]]:
        """Returns no requests."""
        return set(), set()

    def take_failed_pages(self) -> set[int]:
        """Returns no pages."""
        return set()

    def take_pending(self) -> tuple[list[LoadJob], set[str], set[int]]:
        """Returns no transfers."""
        return [], set(), set()

    def audit_counts(self) -> dict[str, int]:
        """Returns no counts."""
        return {}

    def shutdown(self) -> None:
        """Does nothing."""
