"""Log lines about tasks that fail."""

import logging

from flexkv.controller.tasks.task import KVTask
from flexkv.transfer.repeated_log import RepeatedLog

logger = logging.getLogger("flexkv.controller")


class TaskLog:
    """Logs failed tasks. A line whose cause may affect every request is written at most once in 10 s, with a count."""

    def __init__(self) -> None:
        self._failed = RepeatedLog(logger)

    def failed(self, task: KVTask, reason: str) -> None:
        """Log that a task has ended as FAILED, with the reason; limited to one line in 10 s."""
        kind = "load" if task.loading else "save"
        self._failed.write(logging.WARNING, f"task {task.task_id} ({kind}) failed: {reason}")

    def layers_lost(self, task: KVTask) -> None:
        """Log that a load with a ``counter`` has not succeeded; not limited, because the engine will hang."""
        logger.critical(
            "task %d failed, and the engine can only be notified of layers that arrived: it waits for the others until "
            "its watchdog ends it", task.task_id,
        )
