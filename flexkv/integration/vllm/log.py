"""The log of this package inside vLLM, with the stream, format and level of vLLM's log."""

import copy
import logging

_PLACE = "%(fileinfo)s"
"""Field of vLLM's log format for the file. The names of this package's loggers are more useful there."""


def follow_vllm_log(log_level: str) -> None:
    """Write the log of this package to vLLM's log.

    vLLM adds handlers to its own logger only, so Python drops the INFO lines of all other packages. Handlers are not
    changed if the application has configured logging (the root logger or ``flexkv`` has handlers), or has turned vLLM's
    configuration off.

    Parameters
    ----------
    log_level : str
        Value of the setting ``log_level``. INFO, the default, means INFO or vLLM's level, whichever is stricter.
    """
    ours, theirs = logging.getLogger("flexkv"), logging.getLogger("vllm")
    level = logging.getLevelNamesMapping()[log_level]
    if level == logging.INFO:
        level = max(level, theirs.level)
    ours.setLevel(level)
    if ours.handlers or logging.getLogger().handlers or not theirs.handlers:
        return
    for theirs_handler in theirs.handlers:
        handler = copy.copy(theirs_handler)
        handler.setLevel(level)
        handler.setFormatter(_with_name(theirs_handler.formatter))
        ours.addHandler(handler)
    ours.propagate = False


def _with_name(formatter: logging.Formatter | None) -> logging.Formatter | None:
    """Copy vLLM's formatter, with the logger's name in place of the file. Other formatters are returned unchanged."""
    style = getattr(formatter, "_style", None)
    if formatter is None or style is None or _PLACE not in style._fmt:
        return formatter
    formatter = copy.copy(formatter)
    formatter._style = copy.copy(style)
    formatter._style._fmt = style._fmt.replace(_PLACE, "%(name)s")
    formatter._fmt = formatter._style._fmt
    return formatter
