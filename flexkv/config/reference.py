"""The configuration reference, made from the settings themselves: ``flexkv config``."""

import dataclasses
from collections.abc import Iterator

from flexkv.config.field import allowed, kind_of
from flexkv.config.sources import GROUPS, PREFIX
from flexkv.config.upstream import MEANINGLESS, UNAVAILABLE

_HEAD = """\
# Configuration

<!-- Made by `flexkv config > docs/configuration.md`; a test compares. Edit flexkv/config/ instead. -->

A setting comes from, in this order: `kv_connector_extra_config` of vLLM (or keyword arguments), the file that
`FLEXKV_CONFIG_PATH` names (YAML or JSON), the variable in the table, the default. An unknown name, a wrong type or an
impossible value stops the start, with an error that names the key, the value and what is allowed.
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
        kind, optional = kind_of(owner, field)
        default = "none" if field.default is None else f"`{field.default}`" if field.default != "" else "empty"
        words = allowed(field, kind) + (", or none" if optional else "")
        yield f"| `{field.name}` | `{PREFIX}{field.name.upper()}` | {default} | {words} | {field.metadata['help']} |"


def reference() -> str:
    """The page, in Markdown."""
    lines = [_HEAD]
    for group, owner in GROUPS.items():
        lines += [f"## {_TITLES[group]}", "", f"{owner.__doc__}", "", *_rows(owner), ""]
    lines += [
        "## Names of upstream FlexKV",
        "",
        "Names in the tables above that upstream has mean the same here. The others are accepted as follows, as keys",
        f"of a file and, with `{PREFIX}` before them and in capitals, as variables.",
        "",
        "| name | here |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | refused when it is on: {why} |" for name, why in UNAVAILABLE.items()]
    lines += [f"| `{name}` | has no effect: {why} |" for name, why in MEANINGLESS.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Print the page."""
    if argv:
        print("usage: flexkv config")
        return 2
    print(reference(), end="")
    return 0
