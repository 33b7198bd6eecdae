"""The command ``flexkv config``: print the reference, check settings, show them."""

import argparse
import sys
from pathlib import Path
from typing import Any

from flexkv.config.reference import reference
from flexkv.config.sources import FIELDS, Findings, gather

_DESCRIPTION = """\
Without options: print the configuration reference, in Markdown. A FILE is YAML or JSON; without one, the file that
FLEXKV_CONFIG_PATH names is read. The settings of the environment are read in both cases."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if a setting is wrong."""
    parser = argparse.ArgumentParser(prog="flexkv config", description=_DESCRIPTION)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", nargs="?", type=Path, const=None, default=False, metavar="FILE",
                       help="validate the settings: one line for each problem, status 1 if there is one")
    modes.add_argument("--show", nargs="?", type=Path, const=None, default=False, metavar="FILE",
                       help="print every setting that is in effect, and where it was given")
    args = parser.parse_args(argv)
    if args.check is False and args.show is False:
        print(reference(), end="")
        return 0
    found = gather(args.show if args.check is False else args.check)
    for problem in found.problems:
        print(f"error: {_one_line(str(problem))}", file=sys.stderr)
    for line in found.warnings:
        print(f"warning: {_one_line(line)}", file=sys.stderr)
    if args.show is not False and not found.problems:
        _show(found)
    if args.check is not False and not found.problems:
        print(f"ok; settings given: {len(found.given)}, all others have their defaults")
    return 1 if found.problems else 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show(found: Findings) -> None:
    values = found.in_effect()
    width = max(map(len, values))
    for name, value in values.items():
        _, _, spec = FIELDS[name]
        text = "***" if spec.metadata["secret"] and value else _text(value)
        unit = f" {spec.metadata['unit']}" if spec.metadata["unit"] and value is not None else ""
        print(f"{name:<{width}}  {text + unit:<24}  {found.given.get(name, 'default')}")


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'
