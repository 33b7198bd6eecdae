"""The log of this package inside vLLM: the same stream, format and level as vLLM's own."""

import copy
import logging

_PLACE = "%(fileinfo)s"
"""In vLLM's format: the file. Loggers of this package have names that say more."""


def follow_vllm_log(log_level: str) -> None:
    """Write the log of this package where vLLM writes its own.

    vLLM gives handlers to its own logger alone, so that Python drops the INFO lines of all other packages. If the
    application has configured logging (the root logger, or ``flexkv``, has handlers), or has turned vLLM's
    configuration off, handlers stay as they are.

    Parameters
    ----------
    log_level : str
        The setting of that name. INFO, the default, means INFO or vLLM's level, whichever is stricter.
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
    """A copy of vLLM's formatter that writes the logger's name in place of the file; other formats stay."""
    style = getattr(formatter, "_style", None)
    if formatter is None or style is None or _PLACE not in style._fmt:
        return formatter
    formatter = copy.copy(formatter)
    formatter._style = copy.copy(style)
    formatter._style._fmt = style._fmt.replace(_PLACE, "%(name)s")
    formatter._fmt = formatter._style._fmt
    return formatter
