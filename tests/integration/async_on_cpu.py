"""Asynchronous scheduling of a real vLLM on the CPU, where vLLM turns it off."""

from contextlib import nullcontext
from typing import Any

import torch


class _Ordered:
    """A stream or an event of a device that computes when it is asked to: everything is in order already."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        """Nothing is behind."""

    def record(self, stream: Any = None) -> None:
        """Nothing is behind."""

    def synchronize(self) -> None:
        """Nothing is behind."""


def schedule_asynchronously() -> None:
    """vLLM schedules each step before it has processed the one before it, in this process, from here on.

    Its scheduler, its engine loop and its model runner take their own asynchronous paths. The runner computes a step
    when it is given it.
    """
    from vllm.platforms import current_platform

    check = current_platform.check_and_update_config

    def keep(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    current_platform.check_and_update_config = keep
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = _Ordered
    cuda.current_stream = lambda *args: _Ordered()
    cuda.stream = lambda stream: nullcontext()
