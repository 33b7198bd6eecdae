"""Check that vLLM, when it stops, leaves its engine enough time to write queued blocks to SSD."""

import logging
from typing import TYPE_CHECKING

from flexkv.config import CacheConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("flexkv.vllm")

_ENOUGH_S = 30
"""Maximum time that a stop needs, in seconds: the controller's limit for writing queued blocks."""


def warn_of_short_stop(vllm_config: "VllmConfig", cache: CacheConfig) -> None:
    """Log a warning if vLLM kills its engine before blocks that wait for SSD can be written.

    At SIGINT or SIGTERM vLLM gives the engine process ``--shutdown-timeout`` seconds, by default none, and then kills
    it. vLLM versions without that option are not checked.
    """
    timeout_s = getattr(vllm_config, "shutdown_timeout", None)
    if cache.ssd_bytes and timeout_s is not None and timeout_s < _ENOUGH_S:
        logger.warning(
            "blocks that still wait for SSD are lost when vLLM stops: it kills its engine after --shutdown-timeout "
            "%d (s); start it with --shutdown-timeout 60", timeout_s,
        )
