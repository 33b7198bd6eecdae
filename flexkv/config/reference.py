"""Generates the configuration reference from the settings: ``flexkv config``."""

import dataclasses
from collections.abc import Iterator, Mapping

from flexkv.config.environment import PREFIX
from flexkv.config.field import allowed, kinds
from flexkv.config.sources import GROUPS
from flexkv.config.upstream import MEANINGLESS, UNAVAILABLE

_HEAD = """\
# Configuration

<!-- Made by `flexkv config > docs/configuration.md`; a test compares. Edit flexkv/config/ instead. -->

A setting comes from, in this order: `kv_connector_extra_config` of vLLM (or keyword arguments), the file that
`FLEXKV_CONFIG_PATH` names (YAML or JSON, in UTF-8), the variable in the table, the default. An unknown name, a name
that is given twice, a wrong type or an impossible value stops the start, with an error that names the key, the value
and the allowed values. With vLLM `tokens_per_block` is always the block size of its scheduler.

`flexkv config --check [FILE]` validates the environment and a file in a fraction of a second: one line for each
problem, exit status 1 if there is one. Conflicts between settings are reported once each setting is valid by itself;
disks and directories are not examined. `flexkv config --show [FILE]` prints every setting that is in effect, and where
it was given.

**Values.** A number may be in quotes, and may have a unit where the table gives one:

| unit of the setting | units that can be written | examples |
|---|---|---|
| GiB, MiB, bytes, MiB/s | `kB` `MB` `GB` `TB` (powers of 1000), `KiB` `MiB` `GiB` `TiB` (of 1024) | `32GB`, `1.5 GiB` |
| s | `ms` `s` `min` (or `m`) `h` `d` | `20`, `500ms`, `5min` |
| tokens/s | `k` `M` `G` | `12k` |

`cpu_cache_gb: 32` and `32 GiB` are the same, `32GB` is 29.8 GiB. The `B` can be left out, and `/s` after a rate too.
A setting that counts whole units rounds down (`gpu_window_mb: 10MB` is 9 MiB). Names of choices, `true`, `false`, `on`,
`off` and units are the same in capitals. Where the table says "or none", `none` means no value, as text too. An empty
variable counts as not set.

**Paths.** `~` and `~user` at the start of a path mean the home directory. Environment variables (`$HOME`) are not
expanded: a path with one is an error. Directories are separated by `;`.

**Files.** YAML anchors and merge keys (`<<: *name`) work. A file may begin with a byte order mark.

**Kubernetes** adds variables for each Service to all pods of its namespace. Variables of a Service whose name begins
with `flexkv` (`FLEXKV_X_SERVICE_HOST`, `FLEXKV_X_PORT_80_TCP` and so on) are not settings. They are ignored, and the
log names them. A Service named `flexkv-py-metrics` or `flexkv-gpu-register` makes a variable with the name of a
setting, which stops the start: rename the Service, or set `enableServiceLinks: false` in the pod.

**Settings without effect** because of others are named in the log as warnings. A directory for an SSD tier without
`ssd_cache_gb` stops the start; with `ssd_cache_gb: 0` the tier is off.
"""

_TITLES = {
    "cache": "Cache",
    "transfer": "Transfers",
    "connector": "Engine adapter",
}


def _rows(owner: type) -> Iterator[str]:
    yield "| setting | variable | default | allowed | meaning |"
    yield "|---|---|---|---|---|"
    for field in dataclasses.fields(owner):
        kind, optional = kinds(owner)[field.name]
        default = "none" if field.default is None else f"`{field.default}`" if field.default != "" else "empty"
        words = allowed(field, kind) + (", or none" if optional else "")
        yield f"| `{field.name}` | `{PREFIX}{field.name.upper()}` | {default} | {words} | {field.metadata['help']} |"


def _rows_by_reason(effect: str, reasons: Mapping[str, str]) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(f"`{name}`")
    for reason, group in names.items():
        yield f"| {', '.join(group)} | {effect}: {reason} |"


def reference() -> str:
    """Reference page of all settings, in Markdown."""
    lines = [_HEAD]
    for group, owner in GROUPS.items():
        lines += [f"## {_TITLES[group]}", "", f"{owner.__doc__}", "", *_rows(owner), ""]
    lines += [
        "## Names of upstream FlexKV",
        "",
        "The settings above have the same meaning as settings of the [upstream project](glossary.md) with the same",
        f"name. Other settings of upstream are accepted, as keys of a file and as variables (`{PREFIX}NAME`,",
        "in capitals).",
        "",
        "| settings | here |",
        "|---|---|",
        *_rows_by_reason("refused when it is on", UNAVAILABLE),
        *_rows_by_reason("no effect", MEANINGLESS),
    ]
    return "\n".join(lines) + "\n"
