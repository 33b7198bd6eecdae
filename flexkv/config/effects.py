"""Finds settings that were given but have no effect because of other settings."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flexkv.errors import ConfigError

logger = logging.getLogger("flexkv.config")

_NO_SSD = "there is no SSD tier: set ssd_cache_gb to its size"

_Needs = tuple[Callable[[Mapping[str, Any]], bool], str]

_NEEDS: dict[str, _Needs] = {
    **dict.fromkeys(
        ("ssd_admission", "ssd_write_mb_per_s", "ssd_queue_depth", "ssd_io", "ssd_deadline_s", "load_policy",
         "prefill_tokens_per_s"),
        (lambda values: values["ssd_cache_gb"] > 0, _NO_SSD),
    ),
    "cpu_cache_gb": (lambda values: values["num_cpu_blocks"] is None, "num_cpu_blocks sets the size of the host tier"),
    "hugepage_size_bytes": (lambda values: values["use_hugepage_cpu_buffer"], "use_hugepage_cpu_buffer is off"),
    "hit_reward_seconds": (lambda values: values["eviction_policy"] != "adaptive", "eviction_policy is adaptive"),
    "metrics_host": (lambda values: values["enable_metrics"], "enable_metrics is off"),
    "py_metrics_port": (lambda values: values["enable_metrics"], "enable_metrics is off"),
    "trace_max_mb": (lambda values: bool(values["trace_path"]), "trace_path is empty: nothing is recorded"),
    "audit_path": (lambda values: values["audit"], "audit is off"),
}
"""For a setting: the condition under which it has an effect, and the reason why it otherwise has none."""


def without_effect(values: Mapping[str, Any], defaults: Mapping[str, Any], given: Mapping[str, str]) -> Iterator[str]:
    """A line for each setting that was given, is not its default, and has no effect.

    Parameters
    ----------
    values : mapping
        All settings by name.
    defaults : mapping
        Default of each setting.
    given : mapping
        For each setting that was given: the place where it was given.
    """
    for name, place in given.items():
        if name not in _NEEDS or values[name] == defaults[name]:
            continue
        has_effect, reason = _NEEDS[name]
        turned_off = reason is _NO_SSD and "ssd_cache_gb" in given        # the user turned the tier off on purpose
        if not turned_off and not has_effect(values):
            yield f"{name} ({place}) has no effect: {reason}"


def lost_directory(values: Mapping[str, Any], given: Mapping[str, str]) -> ConfigError | None:
    """The error for a directory of an SSD tier whose size was not given."""
    if "ssd_cache_dir" not in given or "ssd_cache_gb" in given:
        return None
    return ConfigError(
        "ssd_cache_dir", values["ssd_cache_dir"], "has no effect without ssd_cache_gb: set ssd_cache_gb to the size of "
        "the SSD tier in GiB, or to 0 for no SSD tier"
    )


def warn_overruled(given: Mapping[str, str], name: str, value: object, winner: object, reason: str) -> None:
    """Log that ``winner`` is used instead of a setting's value, if the setting was given and differs."""
    if name in given and value != winner:
        logger.warning("%s = %r (%s) has no effect: %s is used, %s", name, value, given[name], winner, reason)
