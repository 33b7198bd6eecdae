"""Lines of the log about tasks."""

import logging

from flexkv.controller.tasks.task import KVTask
from flexkv.transfer.repeated_log import RepeatedLog

logger = logging.getLogger("flexkv.controller")


class TaskLog:
    """Writes about tasks that fail; lines whose cause may concern every request at most once in 10 s, with a count."""

    def __init__(self) -> None:
        self._failed = RepeatedLog(logger)

    def failed(self, task: KVTask, reason: str) -> None:
        """A task has ended as FAILED."""
        kind = "load" if task.loading else "save"
        self._failed.write(logging.WARNING, f"task {task.task_id} ({kind}) failed: {reason}")

    def layers_lost(self, task: KVTask) -> None:
        """A load whose layers are counted has not succeeded."""
        logger.critical(
            "task %d failed, and the engine can only be notified of layers that arrived: it waits for the others until "
            "its watchdog ends it", task.task_id,
        )
