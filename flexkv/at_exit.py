"""Closes at the end of the interpreter what its owner has not closed, while threads and modules still work."""

import atexit
import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("flexkv")

_open: dict[int, tuple[int, "weakref.ref[Any]", Callable[[Any], None]]] = {}
"""By identity, in the order of registration: process, object, and the function that closes it."""


def close_at_exit(resource: object, close: Callable[[Any], None]) -> None:
    """Call ``close(resource)`` at the end of this process, if the object still exists. ``close`` may be called for an
    object that was closed before. A process that was forked leaves its parent's objects alone."""
    key = id(resource)
    _open[key] = os.getpid(), weakref.ref(resource, lambda _: _open.pop(key, None)), close


@atexit.register
def _close_all() -> None:
    for process, reference, close in list(_open.values()):
        resource = reference()
        if resource is not None and process == os.getpid():
            try:
                close(resource)
            except Exception:
                logger.exception("%s could not be closed at exit", type(resource).__name__)
